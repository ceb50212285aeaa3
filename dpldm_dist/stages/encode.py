"""Image shards -> latent shards: moments of the autoencoder's posterior, for every image and view.

The autoencoder is part of this arrow: where the run has none, it is trained on the public images.
Shapes: i images of a record, V views (as it is, mirrored), B = i * V rows of a forward pass, C, h,
w of a latent, H, W of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from dpldm_dist.config import Config
from dpldm_dist.data.latents import (
    LatentRecord,
    finished_latent_shard,
    write_latent_shard,
    write_latents_manifest,
)
from dpldm_dist.data.manifest import (
    MANIFEST,
    Manifest,
    describe_files,
    finished_manifest,
    software,
)
from dpldm_dist.data.shards import ImageRecord, ImageShards, read_images, stream_images
from dpldm_dist.errors import ConfigError, DataError, RunError
from dpldm_dist.models.autoencoder import (
    Autoencoder,
    AutoencoderLoss,
    build_autoencoder,
    decode,
    encode_moments,
    fold_latent_scale,
    latent_shape,
)
from dpldm_dist.models.captions import CaptionEncoder
from dpldm_dist.models.directory import load_autoencoder
from dpldm_dist.models.pixels import to_unit_range
from dpldm_dist.runtime.public_training import (
    PublicTraining,
    remove_checkpoints,
    shuffled,
    step_generator,
)
from dpldm_dist.runtime.rundir import RunDir, closed_dataset_dir, dataset_dir
from dpldm_dist.runtime.stopping import StopRequest
from dpldm_dist.runtime.tracking import Progress
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.places import Which, is_address, is_finished, place_of, shown_place

WHAT = "autoencoder"
KEPT_FACTS = frozenset({"duplicates", "unit"})  # of the images, that private training must know
_ROWS = 256  # images and views in one forward pass
_MEMORY_BYTES = 1 << 30  # public images up to this size are kept in memory by every worker
_SCALE_IMAGES = 5000  # public images from which the latent scale is measured


def encode(config: Config, worker: Worker) -> Manifest:
    """Encode every prepared data set (public, private, held out); the last one's manifest.

    Where the run has no autoencoder yet, it is trained on the public images first. Shards are
    spread over the workers; a shard that is complete is not made again, so that the same command
    goes on after a crash. The latent scale is in the autoencoder and comes from public images
    alone. Progress over private shards shows per cent only.
    Raises: DataError, ConfigError, RunError.
    """
    pretrain_autoencoder(config, worker)
    run = RunDir(config.run.dir)
    found = _prepared(config)
    if not found:
        raise DataError(
            f"No prepared images in {run.root}: expected at least one finished data set. Run the "
            "prepare stage first."
        )
    encoder = _Encoder(config, run, worker)
    progress = Progress(run.progress, worker=worker)
    for which in found:
        manifest = _encode_one(which, config, encoder, progress, worker)
    return manifest


def pretrain_autoencoder(config: Config, worker: Worker) -> Manifest:
    """The run's autoencoder: trained on public images, or taken from ``autoencoder.init`` or
    ``model.init``, with the scale of its latents folded in.

    Interrupted, the same command goes on from the last checkpoint; finished, it does nothing.
    Raises: ConfigError, DataError, RunError.
    """
    run = RunDir(config.run.dir)
    images = _public_images(config)
    parents = {} if images is None else {"images": images.manifest.digest}
    settings = _autoencoder_settings(config)
    finished = finished_manifest(run.autoencoder, "autoencoder", settings=settings, parents=parents)
    worker.collective.barrier()  # all have looked before anybody writes
    if finished is not None:
        return finished
    if _autoencoder_init(config) is not None:
        autoencoder = _given_autoencoder(config)
    else:
        autoencoder = _train_autoencoder(config, _required(images), worker)
    if worker.rank == 0:
        _save_autoencoder(config, run, autoencoder, images, settings, parents, worker)
    worker.collective.barrier()
    return Manifest.read(run.autoencoder, "autoencoder")


def describe(config: Config) -> list[str]:
    """What ``encode`` would do, for --dry-run. Reads no image."""
    run = RunDir(config.run.dir)
    lines = [f"reads   {run.autoencoder} (autoencoder; trained first where it is missing)"]
    for which in _prepared(config):
        lines.append(f"reads   {shown_place(config, which, 'images')} ({which} images)")
        lines.append(f"writes  {dataset_dir(config, which, 'latents')} ({which} latents)")
    views = "as it is and mirrored" if config.data.flips else "as it is"
    return [*lines, f"encodes every image {views}, on {config.run.crew} worker(s)"]


def _prepared(config: Config) -> list[Which]:
    """Data sets with images to encode; latents that are an address are finished elsewhere."""
    names: tuple[Which, ...] = get_args(Which)
    return [
        name
        for name in names
        if is_finished(config, name, "images") and not is_address(config, name, "latents")
    ]


# --- latents -----------------------------------------------------------------------------------


class _Encoder:
    """The frozen networks, and one text that names all that a latent depends on but its image."""

    def __init__(self, config: Config, run: RunDir, worker: Worker):
        parent = Manifest.read(run.autoencoder, "autoencoder")
        parent.verify(run.autoencoder)
        self.digest = parent.digest
        self.flips = config.data.flips
        self._device = worker.device
        self._autoencoder: Autoencoder = load_autoencoder(run.autoencoder).to(worker.device)
        self._captions: CaptionEncoder | None = None
        self.text_encoder: str | None = None
        if config.model.conditioning == "caption":
            if config.model.init is None:
                raise ConfigError(
                    "model.conditioning = caption: expected model.init with a text encoder. Set "
                    "model.init to a local diffusers directory that has text_encoder/."
                )
            self._captions = CaptionEncoder(config.model.init).to(worker.device)
            self.text_encoder = _digest_of_weights(config.model.init / "text_encoder")

    def settings(self) -> dict[str, Any]:
        return {"flips": self.flips, "text_encoder": self.text_encoder}

    def parents(self, images: Manifest) -> dict[str, str]:
        return {"images": images.digest, "autoencoder": self.digest}

    def source(self, images: Manifest) -> str:
        return f"{images.digest} {self.digest} {self.flips} {self.text_encoder}"

    def require_fit(self, shards: ImageShards) -> None:
        """Raises: DataError if the autoencoder cannot take such images."""
        channels = self._autoencoder.config.in_channels
        halved = 2 ** (len(self._autoencoder.config.block_out_channels) - 1)
        if shards.channels != channels or shards.size % halved:
            raise DataError(
                f"The autoencoder takes images of {channels} channels and a size that is a "
                f"multiple of {halved}, {shards.folder} holds {shards.channels} channels of "
                f"{shards.size} pixels: prepare the images to fit, or choose another autoencoder."
            )
        if self._captions is not None and not shards.captions:
            raise DataError(
                f"{shards.folder} has no captions: model.conditioning = caption needs them. "
                "Prepare images with captions, or set it to class or none."
            )

    def records(self, images: list[ImageRecord]) -> Iterator[LatentRecord]:
        """Latent records of image records, in the same order."""
        views = 2 if self.flips else 1
        pixels_NHWC = np.concatenate([record.images for record in images])
        moments = self._moments(pixels_NHWC).reshape(len(pixels_NHWC), views, *self._shape)
        context = self._context(images)
        start = 0
        for record in images:
            stop = start + len(record.labels)
            own = None if context is None else context[start:stop]
            yield LatentRecord(record.key, moments[start:stop], record.labels, own)
            start = stop

    @torch.no_grad()
    def _moments(self, pixels_NHWC: np.ndarray) -> np.ndarray:
        parts = []
        step = max(1, _ROWS // (2 if self.flips else 1))
        for start in range(0, len(pixels_NHWC), step):
            pixels = torch.from_numpy(pixels_NHWC[start : start + step]).to(self._device)
            plain_BCHW = to_unit_range(pixels.permute(0, 3, 1, 2))
            views = [plain_BCHW, plain_BCHW.flip(3)] if self.flips else [plain_BCHW]
            rows_BCHW = torch.stack(views, dim=1).flatten(0, 1).contiguous()
            parts.append(encode_moments(self._autoencoder, rows_BCHW).cpu())
        moments = torch.cat(parts)
        self._shape = tuple(moments.shape[1:])
        return moments.numpy()

    def _context(self, images: list[ImageRecord]) -> np.ndarray | None:
        if self._captions is None:
            return None
        texts = [text for record in images for text in record.captions or ()]
        parts = [self._captions(texts[at : at + 64]).cpu() for at in range(0, len(texts), 64)]
        return torch.cat(parts).numpy()


def _encode_one(
    which: Which, config: Config, encoder: _Encoder, progress: Progress, worker: Worker
) -> Manifest:
    images = ImageShards(place_of(config, which, "images"))
    folder = closed_dataset_dir(config, which, "latents")
    finished = _finished(folder, encoder, images)
    worker.collective.barrier()  # all have looked before anybody writes
    if finished is not None:
        return finished
    encoder.require_fit(images)
    private, source = which != "public", encoder.source(images.manifest)
    names = [f"latents-{number:05d}.tar" for number in range(len(images.files))]
    progress.start(f"encoding {which} images", 100)  # per cent: the count of shards may be private
    stop = StopRequest(RunDir(config.run.dir), worker)
    for number in range(worker.rank, len(names), worker.world_size):
        if stop.asked():
            break
        if finished_latent_shard(folder, names[number], source=source) is None:
            write_latent_shard(
                folder,
                names[number],
                encoder.records(images.records(number)),
                images_per_record=images.images_per_record,
                source=source,
                private=private,
            )
        progress.advance(100 * (number + 1) // len(names))
    if stop.agreed():  # a barrier too
        raise stop.leave("finished shards")
    if worker.rank == 0:
        _write_manifest(folder, names, encoder, images, private=private)
    worker.collective.barrier()
    progress.done()
    return Manifest.read(folder, "latents")


def _write_manifest(
    folder: Path, names: list[str], encoder: _Encoder, images: ImageShards, *, private: bool
) -> None:
    source = encoder.source(images.manifest)
    entries = [finished_latent_shard(folder, name, source=source) for name in names]
    for name, entry in zip(names, entries, strict=True):
        if entry is None:
            raise RunError(
                f"{folder / name} is not there although a worker wrote it: expected run.dir on a "
                "disk that all workers share."
            )
    write_latents_manifest(
        folder,
        [entry for entry in entries if entry is not None],
        classes=images.classes,
        config=encoder.settings(),
        parents=encoder.parents(images.manifest),
        private=private,
        facts={name: value for name, value in images.manifest.facts.items() if name in KEPT_FACTS},
    )


def _finished(folder: Path, encoder: _Encoder, images: ImageShards) -> Manifest | None:
    """The manifest of these very latents if they are complete. Raises: RunError for others."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.read(folder, "latents")
    wanted = {**encoder.settings(), **encoder.parents(images.manifest)}
    found = {**manifest.config, **manifest.parents}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RunError(
                f"The latents in {folder} were made with other {name}: use a new run.dir, or "
                "remove that folder to encode again."
            )
    return manifest


def _digest_of_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the autoencoder --------------------------------------------------------------------------


def _train_autoencoder(config: Config, images: ImageShards, worker: Worker) -> Autoencoder:
    settings = config.autoencoder
    autoencoder = build_autoencoder(
        kind=settings.kind,
        channels=images.channels,
        size=images.size,
        latent_channels=settings.latent_channels,
        block_channels=settings.block_channels,
        layers_per_block=settings.layers_per_block,
        norm_groups=settings.norm_groups,
        mid_attention=settings.mid_attention,
        vq_codes=settings.vq_codes,
        seed=0,
    )
    objective = AutoencoderLoss(
        autoencoder, kl_weight=settings.kl_weight, l1_weight=settings.l1_weight
    )
    training = PublicTraining(
        objective,
        what=WHAT,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        weight_decay=0.01,
        ema_decay=0.99,
        settings=_autoencoder_settings(config),
        run=config.run,
        worker=worker,
    )
    shape = latent_shape(autoencoder, images.size)
    batches = _pixel_batches(images, training, worker)
    for leg, steps in training.legs():
        for pixels_BCHW in batches(leg, steps):
            images_BCHW = to_unit_range(torch.from_numpy(pixels_BCHW).to(worker.device))
            noise = torch.randn(settings.batch, *shape, generator=step_generator(1, training.step))
            own = noise[training.my_rows].to(worker.device)
            loss_B, squared_B = training.module(images_BCHW, own)
            training.update(loss_B, squared_B)
    training.finish()
    return autoencoder.eval()


def _pixel_batches(
    images: ImageShards, training: PublicTraining, worker: Worker
) -> Callable[[int, int], Iterator[np.ndarray]]:
    """What gives this worker's uint8 (B, C, H, W) for every step of a leg.

    Images that fit in memory come in an order that no number of workers changes; else they are
    streamed, and each worker shuffles its share of the shards.
    """
    rows = training.my_rows
    if sum(entry["bytes"] for entry in images.manifest.files.values()) > _MEMORY_BYTES:
        return lambda leg, steps: (
            pixels
            for pixels, _ in stream_images(
                images.place,
                batch=rows.stop - rows.start,
                steps=steps,
                seed=leg,
                rank=worker.rank,
                world_size=worker.world_size,
            )
        )
    pixels_NCHW, _ = read_images(images.place)

    def in_memory(leg: int, steps: int) -> Iterator[np.ndarray]:
        for _ in range(steps):
            chosen = shuffled(len(pixels_NCHW), training.step * training.batch, training.batch)
            yield pixels_NCHW[chosen[rows]]

    return in_memory


def _given_autoencoder(config: Config) -> Autoencoder:
    autoencoder = load_autoencoder(_autoencoder_init(config))
    if autoencoder.config.in_channels != config.data.channels:
        raise ConfigError(
            f"data.channels = {config.data.channels}: the autoencoder of "
            f"{_autoencoder_init(config)} takes {autoencoder.config.in_channels}. Set "
            "data.channels to that, and prepare the images again."
        )
    return autoencoder


def _save_autoencoder(
    config: Config,
    run: RunDir,
    autoencoder: Autoencoder,
    images: ImageShards | None,
    settings: dict[str, Any],
    parents: dict[str, str],
    worker: Worker,
) -> None:
    facts: dict[str, Any] = {"latent_shape": list(latent_shape(autoencoder, config.data.size))}
    if images is not None:
        # The scale of a given denoiser's latents is the one it was trained with.
        facts |= _measure(autoencoder, images, fold=config.model.init is None, device=worker.device)
    facts |= {
        "class": type(autoencoder).__name__,
        "parameters": sum(p.numel() for p in autoencoder.parameters()),
        "software": software(),
    }
    autoencoder.cpu().save_pretrained(run.autoencoder, safe_serialization=True)
    files = describe_files(run.autoencoder, ["config.json", "diffusion_pytorch_model.safetensors"])
    Manifest("autoencoder", facts, files, settings, parents).write(run.autoencoder)
    remove_checkpoints(run, WHAT)


@torch.no_grad()
def _measure(
    autoencoder: Autoencoder, images: ImageShards, *, fold: bool, device: torch.device
) -> dict[str, Any]:
    """Squared error of public images in [0, 1]; with ``fold`` the latent scale is folded in."""
    autoencoder.to(device).eval()
    pixels_NCHW, _ = read_images(images.place, limit=_SCALE_IMAGES)
    error, means, variances = 0.0, [], []
    for start in range(0, len(pixels_NCHW), 250):
        part_BCHW = to_unit_range(torch.from_numpy(pixels_NCHW[start : start + 250]).to(device))
        mean, log_variance = encode_moments(autoencoder, part_BCHW).chunk(2, dim=1)
        error += float((decode(autoencoder, mean) - part_BCHW).square().mean((1, 2, 3)).sum() / 4)
        means.append(mean.cpu())
        variances.append(log_variance.exp().cpu())
    mean_BChw = torch.cat(means).double()
    mean_C = mean_BChw.mean((0, 2, 3))
    square_C = (mean_BChw - mean_C.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    std_C = (square_C + torch.cat(variances).double().mean((0, 2, 3))).sqrt()
    if fold:
        fold_latent_scale(autoencoder, mean_C.float(), std_C.float())
    return {
        "public_squared_error": error / len(pixels_NCHW),
        "latent_mean": mean_C.tolist(),
        "latent_std": std_C.tolist(),
        "scale_folded": fold,
    }


def _public_images(config: Config) -> ImageShards | None:
    if not is_finished(config, "public", "images"):
        return None
    return ImageShards(place_of(config, "public", "images"))


def _required(images: ImageShards | None) -> ImageShards:
    if images is None:
        raise DataError(
            "No prepared public images: expected them to train the autoencoder. Set "
            "data.public.source and run the prepare stage, or set autoencoder.init or model.init."
        )
    return images


def _autoencoder_init(config: Config) -> Path | None:
    return config.autoencoder.init or config.model.init


def _autoencoder_settings(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    data = {name: tree["data"][name] for name in ("size", "channels")}
    model = {"init": tree["model"]["init"]}
    return {"autoencoder": tree["autoencoder"], "data": data, "model": model}
