"""The model directory: a diffusers StableDiffusionPipeline directory with the table of class rows.

```
model_index.json   unet/   vae/   scheduler/   [text_encoder/   tokenizer/]
conditioning/rows.safetensors      "rows": (classes + 1, tokens, width), the null row last
conditioning/classes.json          kind of conditioning, names of the classes in row order
```
No code and nothing pickled is in it. Stock diffusers samples from it with class rows as
``prompt_embeds`` and the null row as ``negative_prompt_embeds``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpldm_dist.errors import DataError
from dpldm_dist.models.autoencoder import Autoencoder, fold_scaling_factor
from dpldm_dist.models.conditioning import ClassEmbedder, Kind
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.trainable import fold_adapters

UNSUPPORTED_UNET = (
    "class_embed_type",
    "addition_embed_type",
    "time_cond_proj_dim",
    "encoder_hid_dim",
)


@dataclass(frozen=True)
class LoadedModel:
    """What a model directory holds. ``rows_NTD`` is None where it has no table of its own (a
    downloaded text-to-image model); then ``classes`` is empty."""

    folder: Path
    unet: UNet2DConditionModel
    autoencoder: Autoencoder
    diffusion: Diffusion
    rows_NTD: Tensor | None
    classes: tuple[str, ...]
    kind: Kind

    @property
    def has_text_encoder(self) -> bool:
        return (self.folder / "text_encoder").is_dir()

    def denoiser(self, *, grad_scale: float = 1.0) -> Denoiser:
        """UNet and table together. Raises: DataError if the directory has no table."""
        if self.rows_NTD is None:
            raise DataError(f"The model at {self.folder} has no conditioning/rows.safetensors.")
        embedder = ClassEmbedder(self.rows_NTD, grad_scale=grad_scale, kind=self.kind)
        return Denoiser(self.unet, embedder)


def save_model(
    folder: Path,
    *,
    unet: torch.nn.Module,
    autoencoder: Autoencoder,
    diffusion: Diffusion,
    rows_NTD: Tensor,
    classes: Sequence[str],
    kind: Kind = "class",
    text_encoder_from: Path | None = None,
) -> list[str]:
    """Write a model directory and return the names of its files, relative to ``folder``.

    Adapters in the UNet are folded into its weights. ``text_encoder_from`` is a directory whose
    text_encoder/ and tokenizer/ are copied along. The folder appears complete or not at all; one
    that exists is replaced, and what a killed save left beside it goes. One writer at a time.
    """
    folder = Path(folder)
    part = folder.with_name(f"{folder.name}.part")  # one name: what a kill leaves, the next clears
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fold_adapters(unet).save_pretrained(part / "unet", safe_serialization=True)
        autoencoder.save_pretrained(part / "vae", safe_serialization=True)
        diffusion.scheduler().save_pretrained(part / "scheduler")
        _save_conditioning(part / "conditioning", rows_NTD, classes, kind)
        if text_encoder_from is not None:
            for name in ("text_encoder", "tokenizer"):
                shutil.copytree(Path(text_encoder_from, name), part / name)
        _write_json(part / "model_index.json", _model_index(part, autoencoder))
        for config in part.glob("*/config.json"):
            _forget_origin(config)
        _put_on_disk(part)
        _replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def load_model(folder: Path) -> LoadedModel:
    """Read a model directory, ours or one of stock diffusers (UNet, VAE, scheduler).

    The autoencoder's scaling factor is folded into its weights. Only safetensors are read.
    Raises: DataError saying what is missing, damaged or not supported.
    """
    folder = Path(folder)
    unet = load_unet(folder / "unet")
    autoencoder = load_autoencoder(folder / "vae")
    diffusion = Diffusion.from_scheduler(_read_json(folder / "scheduler/scheduler_config.json"))
    rows, classes, kind = _load_conditioning(folder / "conditioning", unet)
    if unet.config.in_channels != autoencoder.post_quant_conv.in_channels:
        raise DataError(
            f"The UNet of {folder} takes {unet.config.in_channels} latent channels, its "
            f"autoencoder makes {autoencoder.post_quant_conv.in_channels}: they do not belong "
            "together."
        )
    return LoadedModel(folder, unet, autoencoder, diffusion, rows, classes, kind)


def load_unet(folder: Path) -> UNet2DConditionModel:
    """A UNet2DConditionModel from its diffusers folder. Raises: DataError."""
    unet = _from_pretrained(UNet2DConditionModel, folder)
    for name in UNSUPPORTED_UNET:
        if unet.config.get(name) is not None:
            raise DataError(
                f"The UNet at {folder} has {name} = {unet.config[name]!r}: expected conditioning "
                "through cross-attention alone, as in Stable Diffusion 1 and 2."
            )
    return unet


def load_autoencoder(folder: Path, *, fold: bool = True) -> Autoencoder:
    """An AutoencoderKL or VQModel from its diffusers folder, with scaling factor 1 if ``fold``.

    A pipeline directory is accepted too: its ``vae`` or ``vqvae`` is read. Raises: DataError.
    """
    folder = Path(folder)
    for inner in ("vae", "vqvae"):
        if (folder / inner / "config.json").is_file():
            folder = folder / inner
    name = _read_json(folder / "config.json").get("_class_name")
    classes = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    if name not in classes:
        raise DataError(f"{folder} holds {name}: expected one of {', '.join(classes)}.")
    autoencoder = _from_pretrained(classes[name], folder)
    if autoencoder.post_quant_conv is None or autoencoder.quant_conv is None:
        raise DataError(
            f"The autoencoder at {folder} has no quant_conv and post_quant_conv: expected both, "
            "as in Stable Diffusion 1 and 2."
        )
    if fold:
        fold_scaling_factor(autoencoder)
    return autoencoder


def _from_pretrained(kind: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise DataError(f"No {kind.__name__} at {folder}: expected config.json and safetensors.")
    try:
        model = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"Cannot load {kind.__name__} from {folder}: {reason}") from None
    return model.float().eval().requires_grad_(False)


def _save_conditioning(folder: Path, rows_NTD: Tensor, classes: Sequence[str], kind: Kind) -> None:
    expected = len(classes) + 1 if kind == "class" else 1
    if len(rows_NTD) != expected:
        raise DataError(f"Found {len(rows_NTD)} conditioning rows, expected {expected}.")
    folder.mkdir()
    rows = rows_NTD.detach().float().cpu().contiguous()
    save_file({"rows": rows}, folder / "rows.safetensors")
    names = list(classes) if kind == "class" else []
    _write_json(folder / "classes.json", {"classes": names, "kind": kind})


def _load_conditioning(
    folder: Path, unet: UNet2DConditionModel
) -> tuple[Tensor | None, tuple[str, ...], Kind]:
    if not folder.is_dir():
        return None, (), "caption"
    facts = _read_json(folder / "classes.json")
    kind, classes = facts.get("kind"), tuple(facts.get("classes", ()))
    try:
        rows = load_file(folder / "rows.safetensors")["rows"]
    except (OSError, KeyError, SafetensorError):
        raise DataError(f"{folder / 'rows.safetensors'} is missing or damaged.") from None
    width = unet.config.cross_attention_dim
    expected = len(classes) + 1
    if kind not in get_args(Kind) or rows.dim() != 3 or rows.shape[::2] != (expected, width):
        raise DataError(
            f"The rows at {folder} have shape {tuple(rows.shape)}: expected ({expected}, tokens, "
            f"{width}) for its {len(classes)} classes and its UNet."
        )
    return rows, classes, kind


def _model_index(folder: Path, autoencoder: Autoencoder) -> dict[str, Any]:
    absent = [None, None]
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": absent,
        "image_encoder": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": absent,
        "tokenizer": absent,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(autoencoder).__name__],
    }
    if (folder / "text_encoder").is_dir():
        name = _read_json(folder / "text_encoder/config.json")["architectures"][0]
        index["text_encoder"] = ["transformers", name]
        index["tokenizer"] = ["transformers", _tokenizer_class(folder / "tokenizer")]
    return index


def _tokenizer_class(folder: Path) -> str:
    return _read_json(folder / "tokenizer_config.json").get("tokenizer_class", "CLIPTokenizer")


def _forget_origin(path: Path) -> None:
    """Take the path that a model was loaded from out of its config: it is nobody's business."""
    config = _read_json(path)
    if config.pop("_name_or_path", None) is not None:
        _write_json(path, config)


def _put_on_disk(folder: Path) -> None:
    """A name that is on disk must not, after a power cut, stand for files that are not."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(part: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError:
        raise DataError(f"{path} is missing: expected a diffusers model directory.") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged: expected JSON.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: expected a JSON object.")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
