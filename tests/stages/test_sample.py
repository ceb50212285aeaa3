"""Samples are a function of model, settings and index, not of workers or interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.data.shards import read_images
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.conditioning import random_rows
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import save_model
from dpldm_dist.models.unet import build_unet
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages import sample as stage
from dpldm_dist.stages.sample import class_labels, describe, sample

CLASSES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An untrained model with three classes, latents 2 x 4 x 4, grey images of 8 x 8."""
    folder = tmp_path_factory.mktemp("model") / "model"
    autoencoder = build_autoencoder(
        kind="kl",
        channels=1,
        size=8,
        latent_channels=2,
        block_channels=(8, 8),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
        vq_codes=8,
        seed=0,
    )
    unet = build_unet(
        latent_channels=2,
        latent_size=4,
        block_channels=(8, 16),
        layers_per_block=1,
        heads=2,
        context_dim=8,
        norm_groups=4,
        seed=0,
    )
    save_model(
        folder,
        unet=unet,
        autoencoder=autoencoder,
        diffusion=Diffusion(),
        rows_NTD=4 * random_rows(4, 1, 8, seed=0),
        classes=CLASSES,
    )
    return folder


def config_of(run: Path, model: Path, *, workers: int = 1, **settings) -> Config:
    fields = {"count": 20, "steps": 3, "batch": 6, "model": str(model), **settings}
    tree = {
        "sample": fields,
        "run": {"dir": str(run), "workers": workers, "device": "cpu", "threads": 1},
    }
    config = parse_config(tree)
    RunDir(config.run.dir).create()
    return config


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def npz_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz", allow_pickle=False) as found:
        return found["images"], found["labels"]


def test_every_byte_is_the_same_for_one_and_two_workers(tmp_path, model):
    folders = []
    for workers in (1, 2):
        config = config_of(
            tmp_path / str(workers),
            model,
            workers=workers,
            eta=0.5,
            formats=("png", "webdataset", "npz"),
        )
        launch([Job(sample, config)], run=config.run)
        folders.append(files_of(config.run.dir / "release" / "samples"))
    assert folders[0].keys() == folders[1].keys()
    assert all(folders[0][name] == folders[1][name] for name in folders[0])
    assert (
        len({hash(payload) for name, payload in folders[0].items() if name.startswith("png/")})
        == 20
    )


def test_npz_png_and_tar_hold_the_same_images(tmp_path, model):
    config = config_of(tmp_path, model, formats=("png", "webdataset", "npz"))
    sample(config, solo_worker())
    out = tmp_path / "release" / "samples"
    images, labels = npz_of(out)
    assert images.shape == (20, 8, 8) and images.dtype == np.uint8
    assert labels.tolist() == [i % 3 for i in range(20)]
    from_tar, tar_labels = read_images(out / "shards")
    np.testing.assert_array_equal(from_tar[:, 0], images)
    np.testing.assert_array_equal(tar_labels, labels)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        with Image.open(out / "png" / CLASSES[label] / f"{index:07d}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), image)


def test_an_image_depends_on_its_index_and_not_on_the_rest_of_its_chunk(tmp_path, model):
    found = []
    for batch in (20, 3):
        config = config_of(tmp_path / str(batch), model, batch=batch, eta=1.0)
        sample(config, solo_worker())
        found.append(npz_of(tmp_path / str(batch) / "release" / "samples")[0].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1  # one grey level: kernels round by batch
    other = config_of(tmp_path / "other", model, seed=1)
    sample(other, solo_worker())
    seeds_apart = npz_of(tmp_path / "other" / "release" / "samples")[0]
    assert (seeds_apart != found[0]).mean() > 0.5


def test_class_weights_set_the_counts_and_equal_weights_give_prefixes():
    labels = class_labels(10, np.array([0.5, 0.0, 0.25, 0.25]))
    assert np.bincount(labels, minlength=4).tolist() == [5, 0, 3, 2]
    assert (
        np.bincount(class_labels(100_003, np.full(10, 0.1))).tolist() == [10001] * 3 + [10000] * 7
    )
    np.testing.assert_array_equal(
        class_labels(30, np.full(3, 1 / 3))[:10], class_labels(10, np.full(3, 1 / 3))
    )


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0, 0.0), (1.0, -1.0, 1.0)])
def test_class_weights_that_do_not_fit_are_refused(tmp_path, model, weights):
    config = config_of(tmp_path, model, class_weights=weights)
    with pytest.raises(ConfigError, match="expected 3, one per class"):
        sample(config, solo_worker())


def test_an_interrupted_stage_goes_on_from_its_finished_chunks(tmp_path, model, monkeypatch):
    whole = config_of(tmp_path / "whole", model)
    sample(whole, solo_worker())
    config = config_of(tmp_path / "cut", model)
    drawn: list[int] = []
    draw = stage.draw_images

    def draw_until_cut(source, settings, labels, indices):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(indices.start)
        return draw(source, settings, labels, indices)

    monkeypatch.setattr(stage, "draw_images", draw_until_cut)
    with pytest.raises(KeyboardInterrupt):
        sample(config, solo_worker())
    release = tmp_path / "cut" / "release"
    assert not (release / "samples").exists()
    drawn.clear()
    monkeypatch.setattr(stage, "draw_images", lambda *a: drawn.append(a[3].start) or draw(*a))
    sample(config, solo_worker())
    assert drawn == [12, 18]
    assert files_of(release / "samples") == files_of(tmp_path / "whole" / "release" / "samples")
    assert not (release / "samples.part").exists()


def test_a_finished_stage_given_again_does_nothing_and_refuses_other_settings(tmp_path, model):
    config = config_of(tmp_path, model)
    first = sample(config, solo_worker())
    stamp = (tmp_path / "release/samples/manifest.json").stat().st_mtime_ns
    assert sample(config, solo_worker()).digest == first.digest
    assert (tmp_path / "release/samples/manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(RunError, match=r"sample\.steps = 3, this config says 4"):
        sample(config_of(tmp_path, model, steps=4), solo_worker())


def test_the_manifest_names_the_model_and_every_file_but_no_path(tmp_path, model):
    manifest = sample(config_of(tmp_path, model), solo_worker())
    out = tmp_path / "release" / "samples"
    manifest.verify(out)
    assert manifest.files.keys() == files_of(out).keys() - {"manifest.json"}
    assert manifest.parents == {"model": stage.model_digest(model)}
    assert manifest.facts["images_per_class"] == [7, 7, 6]
    assert str(tmp_path) not in json.dumps(Manifest.read(out, "samples").config)
    assert (tmp_path / "release" / "samples.png").read_bytes() == (out / "samples.png").read_bytes()


def test_samples_of_a_private_model_stay_private(tmp_path, model):
    private = tmp_path / "private" / "model"
    config_of(tmp_path, private)
    private.symlink_to(model)
    sample(config_of(tmp_path, private), solo_worker())
    assert (tmp_path / "private" / "samples" / "manifest.json").is_file()
    assert not list((tmp_path / "release").glob("samples*"))
    with pytest.raises(PrivacyError, match="stay below private"):
        sample(config_of(tmp_path, private, out=str(tmp_path / "release" / "x")), solo_worker())


def test_a_missing_model_is_one_clear_line_and_a_dry_run_touches_nothing(tmp_path, model):
    config = config_of(tmp_path, tmp_path / "none")
    with pytest.raises(DataError, match=r"No model at .* Run finetune first"):
        sample(config, solo_worker())
    before = files_of(tmp_path)
    assert any("20 images" in line for line in describe(config))
    assert files_of(tmp_path) == before


def test_samples_do_not_depend_on_the_global_random_state(tmp_path, model):
    found = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        sample(config_of(tmp_path / str(seed), model, eta=1.0), solo_worker())
        found.append(files_of(tmp_path / str(seed) / "release" / "samples"))
    assert found[0] == found[1]
