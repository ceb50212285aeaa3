"""Released weights -> synthetic images: PNG folders, WebDataset tars, NPZ, and a manifest.

Image i is a function of the model, the sampling settings, i and its label alone. Its noise comes
from numpy's Philox generator seeded by ``SeedSequence((seed, i))``: first the initial latent, then,
with eta > 0, one latent per DDIM step. Images are computed in fixed chunks of ``sample.batch``
successive indices, chunk c by worker c modulo the number of workers, so that even rounding is the
same for any number of workers with equally many threads.

Shapes: N images, B images of a chunk, C latent channels, h, w latent size, H, W image size.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpldm_dist.config import Config, SampleConfig
from dpldm_dist.data.files import make_folder, read_file, write_file
from dpldm_dist.data.manifest import Manifest, canonical_json, describe_files
from dpldm_dist.data.npy import npy_bytes
from dpldm_dist.data.pages import class_grid_png, png
from dpldm_dist.data.shards import ImageRecord, write_image_shard
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError
from dpldm_dist.models.autoencoder import decode
from dpldm_dist.models.captions import CaptionEncoder
from dpldm_dist.models.conditioning import ClassEmbedder
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.directory import LoadedModel, load_model
from dpldm_dist.models.latent_gaussian import LatentGaussian
from dpldm_dist.models.pixels import to_uint8
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.tracking import Progress, Tracker
from dpldm_dist.runtime.worker import Worker

GRID_COLUMNS = 10
SHARD_IMAGES = 1000
TENSORBOARD_IMAGES = 50


def sample(config: Config, worker: Worker) -> Manifest:
    """Draw ``sample.count`` images from a model directory by DDIM with guidance.

    Samples are post-processing of the weights: they cost no privacy. An interrupted stage goes on
    from its last finished chunk; a finished one given again does nothing.

    Formal guarantees: the images do not depend on the number of workers; the folder of the samples
    appears complete or not at all; samples of a model below ``private/`` are not written into
    ``release/``.
    Raises: ConfigError, DataError, PrivacyError, RunError.
    Source: Song et al. (2020), arXiv 2010.02502.
    """
    places = _places(config)
    settings, parents = _settings(config), {"model": model_digest(places.model)}
    finished = _finished(places.out, settings, parents)
    if finished is not None:
        return finished
    source = _source(config, load_model(places.model), worker.device)
    labels_N = class_labels(config.sample.count, source.shares(config.sample))
    if worker.rank == 0:
        _open_part(places, {"settings": settings, "parents": parents})
    worker.collective.barrier()

    progress = Progress(places.run.progress, worker=worker)
    chunks = [
        range(start, min(start + config.sample.batch, len(labels_N)))
        for start in range(0, len(labels_N), config.sample.batch)
    ]
    progress.start("sampling", len(chunks))
    for number in range(worker.rank, len(chunks), worker.world_size):
        if not _chunk_path(places.part, number).exists():
            images_NCHW = draw_images(source, config.sample, labels_N, chunks[number])
            _save_chunk(places, config, source, number, chunks[number], images_NCHW, labels_N)
        progress.advance(min(number + worker.world_size, len(chunks)))
    worker.collective.barrier()
    if worker.rank == 0:
        images_NCHW = _publish(places, config, source, labels_N, len(chunks), settings, parents)
        if places.released:
            with Tracker(places.run.tensorboard / "sample", worker, start_step=0) as tracker:
                shown = torch.from_numpy(images_NCHW[:TENSORBOARD_IMAGES]).float() / 255
                tracker.images("samples/released", shown, step=0)
    worker.collective.barrier()
    progress.done()
    return Manifest.read(places.out, "samples")


def describe(config: Config) -> list[str]:
    """What ``sample`` would do, for --dry-run. Reads nothing."""
    places, settings = _places(config), config.sample
    return [
        f"reads   {places.model} (model directory)",
        f"writes  {places.out} ({', '.join(settings.formats)}, samples.png, manifest.json)",
        f"runs    {settings.count} images in chunks of {settings.batch} on {config.run.crew} "
        f"worker(s), {settings.steps} DDIM steps, eta {settings.eta}, "
        f"guidance {settings.guidance_scale}",
        "costs   no privacy: samples are post-processing of the released weights",
    ]


def model_digest(folder: Path) -> str:
    """Hex SHA-256 over names, sizes and SHA-256 of all files of a model directory.

    Raises: DataError if there is no model.
    """
    if not (folder / "model_index.json").is_file():
        raise DataError(
            f"No model at {folder}: expected a diffusers directory with model_index.json. Run "
            "finetune first, or set sample.model."
        )
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return Manifest("model", {}, describe_files(folder, names)).digest


# --- what is drawn ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A model ready to sample from. ``contexts_LTD`` replaces labels where captions steer it;
    ``gaussian``, where there is one, draws the latents in place of the denoiser."""

    model: LoadedModel
    denoiser: Denoiser
    classes: tuple[str, ...]
    contexts_LTD: Tensor | None
    device: torch.device
    gaussian: LatentGaussian | None = None

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.model.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.model.unet.config.in_channels, height, width

    def shares(self, settings: SampleConfig) -> np.ndarray:
        """Share of each class, summing to 1. Raises: ConfigError."""
        weights = settings.class_weights
        if weights is None:
            return np.full(len(self.classes), 1.0 / len(self.classes))
        if len(weights) != len(self.classes) or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(
                f"sample.class_weights has {len(weights)} numbers: expected {len(self.classes)}, "
                "one per class of the model, none negative and not all zero."
            )
        return np.array(weights) / sum(weights)

    def condition(self, labels_B: Tensor) -> Tensor:
        """Labels (B,), or context tokens (B, T, D), for the denoiser."""
        return labels_B if self.contexts_LTD is None else self.contexts_LTD[labels_B]


def class_labels(count: int, shares_K: np.ndarray) -> np.ndarray:
    """Label of each image, int64 (count,): counts by largest remainder, classes interleaved.

    With equal shares image i gets class i modulo K, so that a larger set starts with the smaller.
    """
    exact = shares_K * count
    counts = np.floor(exact + 1e-9).astype(np.int64)
    remainder_order = np.argsort(-(exact - counts), kind="stable")
    counts[remainder_order[: count - counts.sum()]] += 1
    labels = np.repeat(np.arange(len(shares_K)), counts)
    place = np.concatenate([np.arange(n) / max(1.0, m) for n, m in zip(counts, exact, strict=True)])
    return labels[np.lexsort((labels, place))]


@torch.inference_mode()
def draw_images(
    source: Source, settings: SampleConfig, labels_N: np.ndarray, indices: range
) -> np.ndarray:
    """The images of ``indices``, uint8 (B, channels, H, W)."""
    draws = [np.random.Generator(np.random.Philox(_seed(settings.seed, i))) for i in indices]

    def noise_BCHW() -> Tensor:
        parts = [draw.standard_normal(source.latent_shape, dtype=np.float32) for draw in draws]
        return torch.from_numpy(np.stack(parts)).to(source.device)

    labels_B = torch.from_numpy(labels_N[indices.start : indices.stop]).to(source.device)
    if source.gaussian is not None:
        z_BCHW = source.gaussian.place(labels_B.cpu(), noise_BCHW().cpu().flatten(1))
        return to_uint8(decode(source.model.autoencoder, z_BCHW.to(source.device))).cpu().numpy()
    z_BCHW = source.model.diffusion.ddim_sample(
        source.denoiser,
        source.condition(labels_B),
        noise_BCHW(),
        steps=settings.steps,
        eta=settings.eta,
        guidance_scale=settings.guidance_scale,
        eta_noise=(lambda step: noise_BCHW()) if settings.eta > 0 else None,
    )
    return to_uint8(decode(source.model.autoencoder, z_BCHW)).cpu().numpy()


def _seed(seed: int, index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, index))


def _source(config: Config, model: LoadedModel, device: torch.device) -> Source:
    classes, contexts = model.classes, None
    if model.kind == "caption":
        captions = _captions(config.sample.captions)
        encoder = CaptionEncoder(model.folder).to(device)
        contexts = encoder(captions)
        classes = tuple(f"caption-{number:05d}" for number in range(len(captions)))
        rows_NTD = encoder([""]).cpu() if model.rows_NTD is None else model.rows_NTD
        denoiser = Denoiser(model.unet, ClassEmbedder(rows_NTD, kind="caption"))
    else:
        denoiser = model.denoiser()
    model.autoencoder.to(device).eval()
    source = Source(model, denoiser.to(device).eval(), classes or ("all",), contexts, device)
    if config.sample.generator == "diffusion":
        return source
    path = RunDir(config.run.dir).gaussian
    return replace(source, gaussian=LatentGaussian.load(path, source.latent_shape))


def _captions(path: Path | None) -> list[str]:
    if path is None:
        raise ConfigError(
            "The model is steered by captions: expected sample.captions, a text file with one "
            "caption per line."
        )
    try:
        captions = [line.strip() for line in read_file(path).decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: expected one caption per line.") from None
    if not captions:
        raise DataError(f"{path} is empty: expected one caption per line.")
    return captions


# --- where it goes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    """The folders of the stage. ``part`` holds what is done until all is."""

    run: RunDir
    model: Path
    out: Path

    @property
    def part(self) -> Path:
        return self.out.with_name(f"{self.out.name}.part")

    @property
    def private(self) -> bool:
        return _lies_in_private(self.out)

    @property
    def released(self) -> bool:
        """Whether these are samples of the run's released model, in its release."""
        return self.model == self.run.released_model.resolve() and self.out.is_relative_to(
            self.run.release.resolve()
        )


def _lies_in_private(path: Path) -> bool:
    """Whether a folder named private, of any run, is above ``path``, as given or links followed."""
    places = (path.expanduser().absolute(), path.expanduser().resolve())
    return any(above.name == "private" for place in places for above in place.parents)


def _places(config: Config) -> _Places:
    run = RunDir(config.run.dir)
    given = config.sample.model or run.released_model
    model, of_private = given.expanduser().resolve(), _lies_in_private(given)
    ours = of_private and not _lies_in_private(run.release)
    out = config.sample.out or (run.private if ours else run.release) / "samples"
    out = out.expanduser().resolve()
    if of_private and not _lies_in_private(out):
        raise PrivacyError(
            f"sample.model = {model} lies below a private folder, sample.out = {out} does not: "
            "expected samples of a private model to stay below private/."
        )
    return _Places(run, model, out)


def _settings(config: Config) -> dict[str, Any]:
    """The settings on which the samples depend; no path of this machine."""
    settings = config.sample.model_dump(mode="json", exclude={"model", "out", "captions"})
    path = config.sample.captions
    settings["captions"] = (
        None if path is None else describe_files(path.parent, [path.name])[path.name]
    )
    return {"sample": settings}


def _finished(out: Path, settings: dict[str, Any], parents: dict[str, str]) -> Manifest | None:
    """The manifest of these very samples if they are complete. Raises: RunError if others are."""
    if not (out / "manifest.json").is_file():
        return None
    manifest = Manifest.read(out, "samples")
    _refuse_others(
        {"settings": manifest.config, "parents": manifest.parents}, settings, parents, out
    )
    return manifest


def _refuse_others(
    found: dict[str, Any], settings: dict[str, Any], parents: dict[str, str], where: Path
) -> None:
    for name, value in settings["sample"].items():
        old = found["settings"].get("sample", {}).get(name)
        if old != value:
            raise RunError(
                f"{where} was made with sample.{name} = {old}, this config says {value}: set "
                "sample.out to a new folder, delete this one, or restore the config."
            )
    if found["parents"] != parents:
        raise RunError(
            f"{where} was made from another model: set sample.out to a new folder, or delete it."
        )


def _open_part(places: _Places, identity: dict[str, Any]) -> None:
    """Make the working folder, or go on with one of the same settings. Raises: RunError."""
    make_folder(places.part, private=places.private)
    note = places.part / "settings.json"
    if note.exists():
        found = json.loads(read_file(note))
        _refuse_others(found, identity["settings"], identity["parents"], places.part)
        return
    write_file(note, canonical_json(identity), private=places.private)


def _chunk_path(part: Path, number: int) -> Path:
    return part / f"chunk-{number:06d}.npy"


def _save_chunk(
    places: _Places,
    config: Config,
    source: Source,
    number: int,
    indices: range,
    images_BCHW: np.ndarray,
    labels_N: np.ndarray,
) -> None:
    """PNGs first, the chunk itself last: a chunk that exists is complete."""
    if "png" in config.sample.formats:
        for index, image in zip(indices, images_BCHW, strict=True):
            path = places.part / _png_name(source.classes, int(labels_N[index]), index)
            make_folder(path.parent, private=places.private)
            path.write_bytes(png(image.transpose(1, 2, 0)))
    write_file(_chunk_path(places.part, number), npy_bytes(images_BCHW), private=places.private)


def _png_name(classes: tuple[str, ...], label: int, index: int) -> str:
    return f"png/{_folder_name(classes, label)}/{index:07d}.png"


def _folder_name(classes: tuple[str, ...], label: int) -> str:
    """The name of the class, or its number where the name cannot name a folder."""
    name = classes[label]
    plain = name.replace("_", "").replace("-", "").replace(" ", "").isalnum()
    return name if plain and len(name.encode()) <= 200 else f"class-{label:05d}"


def _publish(
    places: _Places,
    config: Config,
    source: Source,
    labels_N: np.ndarray,
    chunks: int,
    settings: dict[str, Any],
    parents: dict[str, str],
) -> np.ndarray:
    """Join the chunks into the formats asked for, describe all files, and give the folder its name.
    Returns the images, uint8 (N, C, H, W)."""
    part, private = places.part, places.private
    images_NCHW = np.concatenate(
        [np.load(_chunk_path(part, n), allow_pickle=False) for n in range(chunks)]
    )
    if "npz" in config.sample.formats:
        write_file(part / "samples.npz", _npz(images_NCHW, labels_N), private=private)
    if "webdataset" in config.sample.formats:
        _write_shards(part / "shards", images_NCHW, labels_N, source.classes, private=private)
    grid = class_grid_png(images_NCHW, labels_N, classes=len(source.classes), columns=GRID_COLUMNS)
    write_file(part / "samples.png", grid, private=private)
    for path in [part / "settings.json", *part.glob("chunk-*.npy")]:
        path.unlink()
    names = [str(path.relative_to(part)) for path in part.rglob("*") if path.is_file()]
    facts = {
        "images": len(labels_N),
        "classes": list(source.classes),
        "images_per_class": np.bincount(labels_N, minlength=len(source.classes)).tolist(),
        "channels": images_NCHW.shape[1],
        "height": images_NCHW.shape[2],
        "width": images_NCHW.shape[3],
        "sampler": "DDIM",
        "noise": "numpy Philox, SeedSequence((seed, image))",
    }
    manifest = Manifest("samples", facts, describe_files(part, names), settings, parents)
    manifest.write(part, private=private)
    _take_name(part, places.out)
    write_file(places.out.with_name(f"{places.out.name}.png"), grid, private=private)
    return images_NCHW


def _npz(images_NCHW: np.ndarray, labels_N: np.ndarray) -> bytes:
    """``images``: uint8 (N, H, W), or (N, H, W, 3) in colour; ``labels``: int64 (N,)."""
    images = images_NCHW[:, 0] if images_NCHW.shape[1] == 1 else images_NCHW.transpose(0, 2, 3, 1)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.ascontiguousarray(images), labels=labels_N)
    return buffer.getvalue()


def _write_shards(
    folder: Path,
    images_NCHW: np.ndarray,
    labels_N: np.ndarray,
    classes: tuple[str, ...],
    *,
    private: bool,
) -> None:
    """An image data set of its own, which ``encode`` and ``read_images`` take as it is."""
    make_folder(folder, private=private)
    shards = []
    for start in range(0, len(labels_N), SHARD_IMAGES):
        indices = range(start, min(start + SHARD_IMAGES, len(labels_N)))
        name = f"samples-{len(shards):05d}.tar"
        records = (
            ImageRecord(
                f"{i:07d}", images_NCHW[i : i + 1].transpose(0, 2, 3, 1), (int(labels_N[i]),)
            )
            for i in indices
        )
        shards.append(
            {"file": name, "records": write_image_shard(folder / name, records, private=private)}
        )
    facts = {
        "records": len(labels_N),
        "images": len(labels_N),
        "classes": list(classes),
        "size": images_NCHW.shape[2],
        "channels": images_NCHW.shape[1],
        "images_per_record": 1,
        "shards": shards,
        "duplicates": 0,
        "skipped": 0,
        "captions": False,
    }
    files = describe_files(folder, [shard["file"] for shard in shards])
    Manifest("images", facts, files).write(folder, private=private)


def _take_name(part: Path, out: Path) -> None:
    """Rename the finished folder. One without a manifest in its way was never finished."""
    if out.exists() and not (out / "manifest.json").exists() and any(out.iterdir()):
        raise RunError(f"{out} holds something else: set sample.out to a new or empty folder.")
    try:
        shutil.rmtree(out, ignore_errors=True)
        os.replace(part, out)
    except OSError as error:
        raise RunError(f"Cannot rename {part} to {out}: {error.strerror}.") from None
