"""Synthetic images -> how good they are, measured on held-out private images.

Evaluation only, not differentially private: every number here depends on private images without
noise. It is written below ``private/`` and must choose nothing that is released.

Shapes: N images, C channels, H height, W width, F features, S sets, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dpldm_dist.config import Config, EvaluateConfig
from dpldm_dist.data.files import make_folder, write_file
from dpldm_dist.data.manifest import Manifest, canonical_json, describe_files
from dpldm_dist.data.pages import class_grid_png, data_uri, render
from dpldm_dist.data.shards import ImageShards, read_images
from dpldm_dist.errors import ConfigError, DataError, RunError
from dpldm_dist.models.autoencoder import Autoencoder, decode, encode_moments
from dpldm_dist.models.classifier import SmallClassifier, predict, train_classifier
from dpldm_dist.models.directory import load_autoencoder
from dpldm_dist.models.extractors import load_efficientnet, load_inception
from dpldm_dist.models.pixels import to_uint8, to_unit_range
from dpldm_dist.runtime.rundir import RunDir, dataset_dir
from dpldm_dist.runtime.tracking import Progress
from dpldm_dist.runtime.worker import Worker, solo_worker
from dpldm_dist.stages.places import is_finished, place_of, shown_place

MARK = "evaluation only, not DP"
SYNTHETIC, REAL, ROUND_TRIP = "synthetic", "real", "real through the autoencoder"
KID_SUBSETS = 50
FORWARD_IMAGES = 250


def evaluate(config: Config, worker: Worker) -> Manifest:
    """Score the samples, and beside them real training images and their autoencoder round trip.

    The two ceilings appear where the run has private images and a model; they use as many images
    as there are samples. Writes ``private/evaluation.json`` and ``private/evaluation.html`` (0600);
    the manifest that describes them lies in ``private/evaluation/``.
    Raises: ConfigError, DataError, RunError.
    """
    run, samples = RunDir(config.run.dir), _samples_folder(config)
    folder = run.private / "evaluation"
    settings = {"evaluate": _settings(config)}
    heldout = ImageShards(place_of(config, "heldout", "images"))
    parents = {
        "samples": Manifest.read(samples, "samples").digest,
        "held-out images": heldout.manifest.digest,
    }
    for name, other in config.evaluate.compare.items():
        parents[name] = Manifest.read(other, "samples").digest
    finished = _finished(folder, settings, parents)
    if finished is not None:
        return finished
    sets = {SYNTHETIC: _matching_samples(config, samples)}
    sets |= {
        name: _matching_samples(config, other) for name, other in config.evaluate.compare.items()
    }
    sets |= _ceilings(config, samples, worker)
    scores = score_sets(config, sets, worker=worker)
    if worker.rank == 0:
        _write(config, run, folder, sets, scores, settings, parents)
    worker.collective.barrier()
    return Manifest.read(folder, "evaluation")


def describe(config: Config) -> list[str]:
    """What ``evaluate`` would do, for --dry-run. Reads no private data."""
    run, settings = RunDir(config.run.dir), config.evaluate
    return [
        f"reads   {_samples_folder(config)} (samples)",
        f"reads   {shown_place(config, 'heldout', 'images')} (held-out private images)",
        f"reads   {shown_place(config, 'private', 'images')} and the autoencoder of the model, for "
        "the ceilings, where they exist",
        f"writes  {run.private / 'evaluation.json'}, {run.private / 'evaluation.html'}",
        f"runs    a classifier of {settings.classifier_steps} steps per set; FID and KID with "
        f"{', '.join(settings.extractors)}",
        f"warns   {MARK}: the numbers do not belong in a release",
    ]


def score_sets(
    config: Config,
    sets: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    worker: Worker | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of named image sets, all under one protocol, against ``data.heldout``.

    ``sets``: name -> (images uint8 (N, C, H, W), labels int64 (N,)). At most ``evaluate.images`` of
    each are used, the same random choice for sets of equal size. Per set: ``images`` used,
    ``accuracy`` on all held-out images of a classifier trained on the set only (None where there is
    one class), and ``fid``, ``kid`` by label of the extractor. The sets are spread over the
    workers; every worker gets all scores.

    Raises: DataError if a set does not fit the held-out images; ConfigError for an extractor
    without weights.
    """
    worker = worker or solo_worker()
    heldout = _heldout(config)
    chosen = {name: _chosen(name, *pair, heldout, config.evaluate) for name, pair in sets.items()}
    judges = [_judge(kind, config.evaluate, heldout, worker) for kind in config.evaluate.extractors]
    progress = Progress(RunDir(config.run.dir).progress, worker=worker)
    progress.start("evaluation", len(chosen))
    table_SV = torch.zeros(len(chosen), 1 + 2 * len(judges), dtype=torch.float64)
    for row, labelled in enumerate(chosen.values()):
        if row % worker.world_size == worker.rank:
            scores = _scores(labelled, heldout, judges, config.evaluate, worker)
            table_SV[row] = torch.tensor(scores, dtype=torch.float64)
            progress.advance(row + 1)
    table_SV = table_SV.to(worker.device)
    worker.collective.sum_(table_SV)
    progress.done()
    return {
        name: _named(row.tolist(), len(labelled.labels), judges)
        for (name, labelled), row in zip(chosen.items(), table_SV.cpu(), strict=True)
    }


def read_samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) of a folder that ``sample`` wrote.

    Raises: DataError, naming the file, if something differs from the manifest.
    """
    manifest = Manifest.read(folder, "samples")
    if "samples.npz" in manifest.files:
        manifest.verify(folder, ["samples.npz"])
        with np.load(folder / "samples.npz", allow_pickle=False) as found:
            images, labels = found["images"], found["labels"]
        return (images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)), labels
    if "shards/manifest.json" in manifest.files:
        manifest.verify(folder, ["shards/manifest.json"])
        return read_images(folder / "shards")
    return _read_pngs(folder, manifest)


# --- one protocol for every set -----------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Images uint8 (N, C, H, W) and labels (N,), as tensors."""

    images: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> Labelled:
        return Labelled(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> Labelled:
        return Labelled(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class _Heldout:
    """All held-out images, and the stratified halves by which the small extractor is honest."""

    all: Labelled
    classes: tuple[str, ...]
    first_half: Tensor
    second_half: Tensor


@dataclass(frozen=True)
class Judge:
    """An extractor with the features (N, F) of the real images that sets are compared with."""

    label: str
    extract: Callable[[Tensor], Tensor]
    real_NF: Tensor


def fid(real_NF: Tensor, fake_NF: Tensor) -> float:
    """Frechet distance of two sets of features, by torchmetrics in float64.

    Both sets are whole here, so other workers are not asked (``sync_on_compute``).
    """
    metric = FrechetInceptionDistance(feature=_AsItIs(real_NF.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(real_NF.double(), real=True)
    metric.update(fake_NF.double(), real=False)
    return float(metric.compute())


def kid(real_NF: Tensor, fake_NF: Tensor) -> float:
    """Kernel distance of two sets of features, by torchmetrics: mean over random subsets."""
    size = max(2, min(1000, min(len(real_NF), len(fake_NF)) // 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps all features, which are here already
        metric = KernelInceptionDistance(
            feature=_AsItIs(real_NF.shape[1]),
            subsets=KID_SUBSETS,
            subset_size=size,
            sync_on_compute=False,
        )
    metric.update(real_NF, real=True)
    metric.update(fake_NF, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(metric.compute()[0])


class _AsItIs(nn.Module):
    """Stands where torchmetrics wants a network: its input is features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features_NF: Tensor) -> Tensor:
        return features_NF


def _heldout(config: Config) -> _Heldout:
    place = place_of(config, "heldout", "images")
    images, labels = read_images(place)
    if len(labels) < 8:
        raise DataError(
            f"{shown_place(config, 'heldout', 'images')} holds too few images to judge by: "
            "expected at least 8."
        )
    everything = Labelled(torch.from_numpy(images), torch.from_numpy(labels))
    order = np.lexsort((np.random.default_rng(0).permutation(len(labels)), labels))
    halves = torch.from_numpy(order[0::2].copy()), torch.from_numpy(order[1::2].copy())
    return _Heldout(everything, ImageShards(place).classes, *halves)


def _chosen(
    name: str, images: np.ndarray, labels: np.ndarray, heldout: _Heldout, settings: EvaluateConfig
) -> Labelled:
    """At most ``settings.images`` of a set, after a check that it can be compared."""
    expected = tuple(heldout.all.images.shape[1:])
    if images.dtype != np.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise DataError(
            f"The set {name!r} has images {images.dtype} {tuple(images.shape[1:])}: expected uint8 "
            f"{expected}, as the held-out images."
        )
    if len(images) != len(labels) or len(labels) < 2:
        raise DataError(
            f"The set {name!r} has {len(labels)} labels for {len(images)} images: expected one "
            "each, and at least two images."
        )
    if labels.min() < 0 or labels.max() >= len(heldout.classes):
        raise DataError(
            f"The set {name!r} has labels outside of the {len(heldout.classes)} classes of the "
            "held-out images: expected class numbers in the same order."
        )
    rows = np.random.default_rng(0).permutation(len(labels))[: settings.images]
    return Labelled(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows].astype(np.int64)))


def _scores(
    labelled: Labelled,
    heldout: _Heldout,
    judges: list[Judge],
    settings: EvaluateConfig,
    worker: Worker,
) -> list[float]:
    """Accuracy, then FID and KID of each judge."""
    values = [_accuracy(labelled.to(worker.device), heldout, settings)]
    for judge in judges:
        features_NF = judge.extract(labelled.images)
        values += [fid(judge.real_NF, features_NF), kid(judge.real_NF, features_NF)]
    return values


def _accuracy(labelled: Labelled, heldout: _Heldout, settings: EvaluateConfig) -> float:
    if len(heldout.classes) < 2:
        return float("nan")
    model = _classifier(labelled, heldout, settings)
    test = heldout.all.to(labelled.images.device)
    return (predict(model, test.images) == test.labels).double().mean().item()


def _classifier(labelled: Labelled, heldout: _Heldout, settings: EvaluateConfig) -> SmallClassifier:
    return train_classifier(
        labelled.images,
        labelled.labels,
        classes=len(heldout.classes),
        width=settings.classifier_width,
        steps=settings.classifier_steps,
    )


def _judge(kind: str, settings: EvaluateConfig, heldout: _Heldout, worker: Worker) -> Judge:
    if kind == "small":
        return _small_judge(settings, heldout, worker)
    network = (
        load_inception(settings.inception_weights) if kind == "inception" else load_efficientnet()
    )
    network = network.to(worker.device)

    def extract(images_NCHW: Tensor) -> Tensor:
        parts = images_NCHW.split(FORWARD_IMAGES)
        return torch.cat([network(part.to(worker.device)).cpu() for part in parts])

    return Judge(network.label, extract, extract(heldout.all.images))


def _small_judge(settings: EvaluateConfig, heldout: _Heldout, worker: Worker) -> Judge:
    """A classifier trained by worker 0 on one half of the held-out images, judge on the other."""
    if len(heldout.classes) < 2:
        raise ConfigError(
            "evaluate.extractors has small, which learns classes, and the held-out images have "
            "one: use inception or efficientnet."
        )
    payload = None
    if worker.rank == 0:
        half = heldout.all.at(heldout.first_half).to(worker.device)
        payload = safetensors.torch.save(
            {
                n: v.cpu().contiguous()
                for n, v in _classifier(half, heldout, settings).state_dict().items()
            }
        )
    network = SmallClassifier(
        channels=heldout.all.images.shape[1],
        classes=len(heldout.classes),
        width=settings.classifier_width,
    )
    network.load_state_dict(safetensors.torch.load(worker.collective.broadcast_bytes(payload)))
    network = network.to(worker.device).eval()

    @torch.no_grad()
    def extract(images_NCHW: Tensor) -> Tensor:
        parts = images_NCHW.split(FORWARD_IMAGES)
        return torch.cat(
            [network.features(to_unit_range(part.to(worker.device))).cpu() for part in parts]
        )

    label = f"small ({network.num_features} features)"
    return Judge(label, extract, extract(heldout.all.images[heldout.second_half]))


def _named(values: list[float], images: int, judges: list[Judge]) -> dict[str, Any]:
    accuracy, rest = values[0], values[1:]
    return {
        "images": images,
        "accuracy": None if accuracy != accuracy else accuracy,
        "fid": {judge.label: value for judge, value in zip(judges, rest[0::2], strict=True)},
        "kid": {judge.label: value for judge, value in zip(judges, rest[1::2], strict=True)},
    }


# --- what is scored -----------------------------------------------------------------------------


def _samples_folder(config: Config) -> Path:
    chosen = (
        config.evaluate.samples or config.sample.out or RunDir(config.run.dir).release / "samples"
    )
    return chosen.expanduser().absolute()


def _matching_samples(config: Config, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The samples, whose classes must be those of the held-out images. Raises: DataError."""
    expected = ImageShards(dataset_dir(config, "heldout", "images")).classes
    found = tuple(Manifest.read(folder, "samples").fact("classes", list))
    if found != expected:
        raise DataError(
            f"The samples at {folder} have {len(found)} classes {_some(found)}, the held-out "
            f"images {len(expected)} {_some(expected)}: expected the same names in the same order."
        )
    return read_samples(folder)


def _ceilings(
    config: Config, samples: Path, worker: Worker
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Real training images, as many as samples are scored, and the same through the autoencoder."""
    if not is_finished(config, "private", "images"):
        return {}
    count = min(Manifest.read(samples, "samples").fact("images", int), config.evaluate.images)
    images, labels = read_images(place_of(config, "private", "images"))
    rows = np.random.default_rng(1).permutation(len(labels))[:count]
    sets = {REAL: (images[rows], labels[rows])}
    model = (config.sample.model or RunDir(config.run.dir).released_model).expanduser().absolute()
    if (model / "vae").is_dir():
        autoencoder = load_autoencoder(model).to(worker.device)
        sets[ROUND_TRIP] = round_trip(autoencoder, images[rows], device=worker.device), labels[rows]
    return sets


@torch.no_grad()
def round_trip(
    autoencoder: Autoencoder, images_NCHW: np.ndarray, *, device: torch.device
) -> np.ndarray:
    """uint8 images (N, C, H, W) encoded to their mean latent and decoded again."""
    parts = []
    for part in torch.from_numpy(images_NCHW).split(FORWARD_IMAGES):
        mean, _ = encode_moments(autoencoder, to_unit_range(part.to(device))).chunk(2, dim=1)
        parts.append(to_uint8(decode(autoencoder, mean)).cpu())
    return torch.cat(parts).numpy()


def _read_pngs(folder: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    names = sorted((n for n in manifest.files if n.startswith("png/")), key=lambda n: Path(n).stem)
    if len(names) != manifest.fact("images", int):
        raise DataError(f"{folder} lists {len(names)} PNG files, not all its images: sample again.")
    manifest.verify(folder, names)
    folders = {name: label for label, name in enumerate(manifest.fact("classes", list))}
    folders |= {f"class-{label:05d}": label for label in range(len(folders))}
    images, labels = [], []
    for name in names:
        with Image.open(folder / name) as file:
            pixels = np.asarray(file)
        images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        labels.append(folders[Path(name).parent.name])
    return np.stack(images), np.array(labels, dtype=np.int64)


def _some(names: tuple[str, ...]) -> str:
    return f"({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


# --- what is kept, all of it private --------------------------------------------------------------


def _settings(config: Config) -> dict[str, Any]:
    settings = config.evaluate.model_dump(
        mode="json", exclude={"samples", "compare", "inception_weights"}
    )
    path = config.evaluate.inception_weights
    if path is not None and "inception" in config.evaluate.extractors:
        settings["inception_weights"] = describe_files(path.parent, [path.name])[path.name][
            "sha256"
        ]
    return settings


def _finished(folder: Path, settings: dict[str, Any], parents: dict[str, str]) -> Manifest | None:
    """The manifest of this very evaluation if it is complete. Raises: RunError if of another."""
    if not (folder / "manifest.json").is_file():
        return None
    manifest = Manifest.read(folder, "evaluation")
    for name, value in settings["evaluate"].items():
        old = manifest.config.get("evaluate", {}).get(name)
        if old != value:
            raise RunError(
                f"{folder} was made with evaluate.{name} = {old}, this config says {value}: delete "
                "that folder to evaluate again, or restore the config."
            )
    for name, digest in parents.items():
        if manifest.parents.get(name) != digest:
            raise RunError(f"{folder} scored other {name}: delete that folder to evaluate again.")
    manifest.verify(folder.parent)
    return manifest


def _write(
    config: Config,
    run: RunDir,
    folder: Path,
    sets: dict[str, tuple[np.ndarray, np.ndarray]],
    scores: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    parents: dict[str, str],
) -> None:
    protocol = {
        "mark": MARK,
        "test": "all held-out private images",
        "classifier": f"{config.evaluate.classifier_steps} steps, width "
        f"{config.evaluate.classifier_width}, trained on the set only, same seed for all",
        "small extractor": "trained on one half of the held-out images, compared with the other",
    }
    make_folder(folder, private=True)
    payload = canonical_json({"protocol": protocol, "sets": scores})
    write_file(run.private / "evaluation.json", payload + b"\n", private=True)
    page = render(
        "evaluation.html.j2",
        mark=MARK,
        protocol=protocol,
        scores=scores,
        extractors=list(scores[SYNTHETIC]["fid"]),
        grids=_grids(sets, ImageShards(dataset_dir(config, "heldout", "images")).classes),
    )
    write_file(run.private / "evaluation.html", page.encode(), private=True)
    files = describe_files(run.private, ["evaluation.json", "evaluation.html"])
    Manifest("evaluation", {"mark": MARK, "sets": scores}, files, settings, parents).write(
        folder, private=True
    )


def _grids(
    sets: dict[str, tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...]
) -> dict[str, str]:
    """Name of a set -> its grid as a data address, one row per class."""
    return {
        name: data_uri(class_grid_png(images, labels, classes=len(classes), columns=8))
        for name, (images, labels) in sets.items()
    }
