"""Private shards that other users could read are refused by every stage that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpldm_dist.config import parse_config, with_changes
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.errors import DataError, PrivacyError
from dpldm_dist.runtime.rundir import closed_dataset_dir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.encode import encode
from dpldm_dist.stages.evaluate import evaluate
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.prepare import prepare
from tests.stages.tiny_data import tiny_config, write_images
from tests.stages.tiny_run import latent_shards, public_model, settings


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    return latent_shards(tmp_path / "latents")


def config_of(folder: Path, which: str = "private", **data):
    return parse_config({"data": {which: {"latents": str(folder)}, **data}})


@pytest.mark.parametrize("which", ["private", "heldout"])
@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o601])
@pytest.mark.parametrize("name", ["latents-00003.tar", "latents-00000.index.npy", "manifest.json"])
def test_private_shards_that_others_could_use_are_refused_unless_allowed(
    latents, which, bits, name
):
    assert closed_dataset_dir(config_of(latents, which), which, "latents") == latents
    (latents / name).chmod(bits)
    with pytest.raises(PrivacyError, match=rf"{name} \(mode {bits:04o}\).*chmod -R go= {latents}"):
        closed_dataset_dir(config_of(latents, which), which, "latents")
    allowed = config_of(latents, which, allow_shared_files=True)
    assert closed_dataset_dir(allowed, which, "latents") == latents


def test_a_folder_of_private_shards_that_others_could_enter_is_refused(latents):
    latents.chmod(0o750)
    with pytest.raises(PrivacyError, match="mode 0750"):
        closed_dataset_dir(config_of(latents), "private", "latents")


def test_a_link_is_judged_by_what_it_leads_to(latents, tmp_path):
    shard = latents / "latents-00000.tar"
    shard.rename(tmp_path / "elsewhere.tar")
    shard.symlink_to(tmp_path / "elsewhere.tar")
    assert closed_dataset_dir(config_of(latents), "private", "latents") == latents
    (tmp_path / "elsewhere.tar").chmod(0o644)
    with pytest.raises(PrivacyError, match="mode 0644"):
        closed_dataset_dir(config_of(latents), "private", "latents")


def test_public_shards_may_be_open_to_everybody(latents):
    for path in (latents, *latents.iterdir()):
        path.chmod(0o777)
    folder = closed_dataset_dir(config_of(latents, "public"), "public", "latents")
    assert LatentShards(folder).files


def test_finetune_refuses_latents_that_others_could_read(latents, tmp_path):
    public_model(tmp_path / "model")
    (latents / "latents-00002.tar").chmod(0o644)
    with pytest.raises(PrivacyError, match=r"latents-00002\.tar .*allow_shared_files"):
        finetune(settings(tmp_path), solo_worker())


@pytest.mark.parametrize("which", ["private", "heldout"])
def test_encode_refuses_images_that_others_could_read(tmp_path, which):
    config = tiny_config(tmp_path)
    write_images(config, "public")
    folder = write_images(config, which)
    (folder / "images-00001.tar").chmod(0o644)
    with pytest.raises(PrivacyError, match=r"images-00001\.tar"):
        encode(with_changes(config, autoencoder={"steps": 1}), solo_worker())


def test_prepare_refuses_finished_images_that_others_could_read(tmp_path):
    config = tiny_config(tmp_path, data={"size": 16, "private": {"source": "photos"}})
    folder = write_images(config, "private")
    (folder / "images-00000.tar").chmod(0o604)
    with pytest.raises(PrivacyError, match=r"images-00000\.tar"):
        prepare(config, solo_worker())


def test_evaluate_refuses_images_that_others_could_read(tmp_path):
    config = tiny_config(tmp_path)
    folder = write_images(config, "heldout")
    with pytest.raises(DataError):  # nothing to score yet: closed images are taken
        evaluate(config, solo_worker())
    (folder / "images-00000.tar").chmod(0o644)
    with pytest.raises(PrivacyError, match=r"images-00000\.tar"):
        evaluate(config, solo_worker())
