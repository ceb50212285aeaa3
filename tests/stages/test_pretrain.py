"""Public pre-training: resume, workers, what is saved, and models that are given instead."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpldm_dist.config import with_changes
from dpldm_dist.data.latents import all_latents
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.errors import ConfigError, DataError, RunError
from dpldm_dist.models.captions import CaptionEncoder
from dpldm_dist.models.conditioning import random_rows
from dpldm_dist.models.directory import load_model
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.public_training import PublicTraining
from dpldm_dist.runtime.rundir import RunDir, dataset_dir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.encode import encode
from dpldm_dist.stages.pretrain import describe, pretrain
from tests.models.sd_shaped import TOKENS, WIDTH, make_sd_shaped
from tests.stages.tiny_data import CLASSES, killed_after, tiny_config, write_images


def encoded_run(root, **sections):
    config = tiny_config(root, **sections)
    write_images(config, "public")
    encode(config, solo_worker())
    return config


def model_of(config):
    return load_model(RunDir(config.run.dir).public_model)


def weights_of(config) -> dict[str, torch.Tensor]:
    model = model_of(config)
    return {**model.unet.state_dict(), "rows": model.rows_NTD}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = encoded_run(tmp_path_factory.mktemp("run"))
    pretrain(config, solo_worker())
    return config


def test_the_public_model_has_the_public_classes_and_a_null_row(trained):
    model = model_of(trained)
    assert (model.classes, model.kind) == (CLASSES, "class")
    assert model.rows_NTD.shape == (4, 1, 8)
    before = random_rows(4, 1, 8, seed=0)
    assert all((model.rows_NTD[row] != before[row]).any() for row in range(4))  # null learns too


def test_the_manifest_names_files_and_parents(trained):
    run = RunDir(trained.run.dir)
    manifest = Manifest.read(run.public_model, "model")
    manifest.verify(run.public_model)
    assert manifest.parents == {
        "autoencoder": Manifest.read(run.autoencoder).digest,
        "latents": Manifest.read(dataset_dir(trained, "public", "latents")).digest,
    }
    assert not (run.public / "checkpoints/public-model").exists()


def test_a_finished_training_is_not_done_again(trained):
    folder = RunDir(trained.run.dir).public_model
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert pretrain(trained, solo_worker()) == Manifest.read(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_other_settings_in_the_same_place_are_refused(trained):
    with pytest.raises(RunError, match=r"pretrain\.steps = 6, this config says 7"):
        pretrain(with_changes(trained, pretrain={"steps": 7}), solo_worker())


def test_losses_are_shown_under_public_tags(trained):
    folder = RunDir(trained.run.dir).tensorboard / "public-model"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"public/public_model_loss", "optimizer/learning_rate"}


@torch.no_grad()
def loss_on_public_latents(config) -> float:
    found = all_latents(dataset_dir(config, "public", "latents"))
    z0 = torch.from_numpy(found.moments[:, 0, 0, :4])
    labels, t = torch.from_numpy(found.labels[:, 0]), torch.arange(len(z0)) * 40
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    model = model_of(config)
    return float(model.diffusion.loss_rows(model.denoiser(), z0, noise, t, labels).mean())


def test_training_lowers_the_loss(tmp_path):
    losses = []
    for steps in (1, 60):
        few = {"steps": steps, "batch": 16, "learning_rate": 5e-3}
        config = encoded_run(tmp_path / str(steps), pretrain=few)
        pretrain(config, solo_worker())
        losses.append(loss_on_public_latents(config))
    assert losses[1] < 0.95 * losses[0]


def test_a_killed_training_goes_on_as_the_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr("dpldm_dist.runtime.public_training.LEG_STEPS", 4)
    weights = []
    for name in ("unbroken", "killed"):
        config = encoded_run(tmp_path / name, pretrain={"steps": 10})
        if name == "killed":
            with killed_after(updates=6), pytest.raises(KeyboardInterrupt):
                pretrain(config, solo_worker())
            assert (tmp_path / "killed/public/checkpoints/public-model").is_dir()
        pretrain(config, solo_worker())
        weights.append(weights_of(config))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dpldm_dist.runtime.public_training.LEG_STEPS", 4)
    config = encoded_run(tmp_path)
    with killed_after(updates=5), pytest.raises(KeyboardInterrupt):
        pretrain(config, solo_worker())
    with pytest.raises(RunError, match=r"pretrain\.learning_rate"):
        pretrain(with_changes(config, pretrain={"learning_rate": 0.5}), solo_worker())


def encode_and_pretrain_and_tell(config, worker):
    """A stage for tests: leaves every worker's averaged parameters beside the run."""

    def finish_and_tell(self):
        finish(self)
        flat_P = torch.cat([p.detach().flatten() for p in self._parameters.values()])
        save_file({"flat": flat_P}, config.run.dir / f"{self.what}-{worker.rank}.safetensors")

    finish = PublicTraining.finish
    with patch.object(PublicTraining, "finish", finish_and_tell):
        encode(config, worker)
        pretrain(config, worker)


@pytest.fixture(scope="module")
def runs_of_workers(tmp_path_factory, trained):
    """Number of workers -> (a run that encodes with a given autoencoder, one that trains all)."""
    root, found = tmp_path_factory.mktemp("workers"), {}
    given = str(RunDir(trained.run.dir).autoencoder)
    for workers in (1, 2):
        run = {"workers": workers}
        encoding = tiny_config(root / f"encode-{workers}", run=run, autoencoder={"init": given})
        # An odd batch: the workers' shares differ, and still count by rows.
        few = {"steps": 3, "batch": 7}
        training = tiny_config(root / f"train-{workers}", run=run, autoencoder=few, pretrain=few)
        for config in (encoding, training):
            write_images(config, "public", records=10, shards=5)
        jobs = [Job(encode, encoding), Job(encode_and_pretrain_and_tell, training)]
        launch(jobs, run=training.run)
        found[workers] = encoding, training
    return found


def test_two_workers_encode_to_the_files_of_one(runs_of_workers):
    found = []
    for workers in (1, 2):
        folder = dataset_dir(runs_of_workers[workers][0], "public", "latents")
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(found[0]) == 11 and found[0] == found[1]


@pytest.mark.parametrize("what", ["autoencoder", "public model"])
def test_two_workers_hold_equal_parameters_and_agree_with_one(runs_of_workers, what):
    one, first, second = (
        load_file(runs_of_workers[workers][1].run.dir / f"{what}-{rank}.safetensors")["flat"]
        for workers, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert torch.equal(first, second)
    # Adam turns the rounding of a gradient near zero into a whole step of learning_rate.
    assert (one - first).abs().median() < 1e-6
    assert (one - first).abs().max() < 2e-2


def test_latents_of_another_autoencoder_are_refused(tmp_path):
    config = encoded_run(tmp_path)
    folder = RunDir(tmp_path).autoencoder
    manifest = Manifest.read(folder)
    facts = {**manifest.facts, "changed": True}
    Manifest("autoencoder", facts, manifest.files, manifest.config, manifest.parents).write(folder)
    with pytest.raises(DataError, match="another autoencoder"):
        pretrain(config, solo_worker())


def test_pretraining_before_encoding_says_what_is_missing(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(DataError, match="autoencoder"):
        pretrain(config, solo_worker())


def test_an_unconditional_model_has_one_constant_token(tmp_path):
    config = encoded_run(tmp_path, model={"conditioning": "none"})
    pretrain(config, solo_worker())
    model = model_of(config)
    assert (model.kind, model.classes, model.rows_NTD.shape) == ("none", (), (1, 1, 8))


def test_several_tokens_per_class_are_learned(tmp_path):
    config = encoded_run(tmp_path, model={"context_tokens": 3})
    pretrain(config, solo_worker())
    assert model_of(config).rows_NTD.shape == (4, 3, 8)


def test_a_model_of_another_run_is_taken_as_it_is(tmp_path, trained):
    given = RunDir(trained.run.dir).public_model
    config = encoded_run(tmp_path, model={"init": str(given)})
    manifest = pretrain(config, solo_worker())
    assert manifest.parents["init"] == Manifest.read(given).digest
    old, new = weights_of(trained), weights_of(config)
    assert all(torch.equal(old[name], value) for name, value in new.items())


def sd_config(tmp_path, **model):
    """A run that starts from a tiny text-to-image directory."""
    folder = make_sd_shaped(tmp_path / "sd")
    own = {"init": str(folder), "block_channels": [16, 32], "context_dim": WIDTH}
    return folder, tiny_config(tmp_path / "run", model={**own, **model})


def given_sd(tmp_path):
    folder, config = sd_config(tmp_path)
    write_images(config, "public")
    encode(config, solo_worker())
    return folder, config


def test_a_text_to_image_model_is_dressed_with_embeddings_of_the_class_names(tmp_path):
    folder, config = given_sd(tmp_path)
    pretrain(config, solo_worker())
    model = model_of(config)
    assert (model.classes, model.rows_NTD.shape) == (CLASSES, (4, TOKENS, WIDTH))
    assert torch.allclose(model.rows_NTD, CaptionEncoder(folder)([*CLASSES, ""]))
    assert model.diffusion == load_model(folder).diffusion
    assert not model.has_text_encoder


def test_a_text_to_image_model_keeps_its_text_encoder_for_captions(tmp_path):
    folder, config = sd_config(tmp_path, conditioning="caption")
    write_images(config, "public", captions=True)
    encode(config, solo_worker())
    pretrain(config, solo_worker())
    model = model_of(config)
    assert model.kind == "caption" and model.has_text_encoder
    assert torch.allclose(model.rows_NTD, CaptionEncoder(folder)([""]))


def test_an_option_that_the_given_model_contradicts_is_refused(tmp_path):
    _, config = given_sd(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.norm_groups = 8: .* has 4"):
        pretrain(with_changes(config, model={"norm_groups": 8}), solo_worker())


def test_captions_without_a_given_model_are_refused(tmp_path):
    config = encoded_run(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.init"):
        pretrain(with_changes(config, model={"conditioning": "caption"}), solo_worker())


def test_the_dry_run_touches_nothing(tmp_path):
    config = tiny_config(tmp_path / "run")
    before = sorted(path for path in tmp_path.rglob("*"))
    assert any("trains" in line for line in describe(config))
    assert before == sorted(path for path in tmp_path.rglob("*"))
