"""Encoding: what is in a latent shard, resuming by shard, and where the latent scale comes from."""

from __future__ import annotations

import stat

import numpy as np
import pytest
import torch

from dpldm_dist.config import with_changes
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.data.shards import ImageShards, read_images
from dpldm_dist.errors import ConfigError, DataError, RunError
from dpldm_dist.models.autoencoder import decode, encode_moments
from dpldm_dist.models.captions import CaptionEncoder
from dpldm_dist.models.directory import load_autoencoder
from dpldm_dist.models.pixels import to_unit_range
from dpldm_dist.runtime.rundir import RunDir, dataset_dir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages import encode as stage
from dpldm_dist.stages.encode import describe, encode, pretrain_autoencoder
from tests.models.sd_shaped import TOKENS, WIDTH, make_sd_shaped
from tests.stages.tiny_data import CLASSES, killed_after, tiny_config, write_images


def latents_of(config, which: str) -> LatentShards:
    return LatentShards(dataset_dir(config, which, "latents"))


def expected_moments(config, pixels_NCHW: np.ndarray) -> np.ndarray:
    autoencoder = load_autoencoder(RunDir(config.run.dir).autoencoder)
    with torch.no_grad():
        return encode_moments(autoencoder, to_unit_range(torch.from_numpy(pixels_NCHW))).numpy()


def records_of(latents: LatentShards) -> np.ndarray:
    parts = [latents.records(s, np.arange(n)) for s, n in enumerate(latents.shard_records)]
    return np.concatenate([part.moments for part in parts])


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("run"), data={"flips": True})
    write_images(config, "public", seed=0)
    write_images(config, "private", seed=1, records=12, shards=2, most_images=3, duplicates=2)
    write_images(config, "heldout", seed=2, records=6, shards=1)
    encode(config, solo_worker())
    return config


def test_every_prepared_data_set_is_encoded_record_by_record(encoded):
    for which, shards in (("public", (8, 8, 8)), ("private", (6, 6)), ("heldout", (6,))):
        latents = latents_of(encoded, which)
        assert latents.shard_records == shards
        assert latents.classes == CLASSES
        assert (latents.latent_shape, latents.views) == ((4, 4, 4), 2)


def test_a_latent_holds_the_moments_of_the_image_and_of_its_mirror_image(encoded):
    pixels, labels = read_images(dataset_dir(encoded, "public", "images"))
    latents = latents_of(encoded, "public")
    moments = records_of(latents)[:, 0]
    half = {"rtol": 2**-10, "atol": 1e-3}  # float16
    plain, mirrored = (expected_moments(encoded, p) for p in (pixels, pixels[..., ::-1].copy()))
    assert np.allclose(moments[:, 0], plain, **half)
    assert np.allclose(moments[:, 1], mirrored, **half)
    assert not np.allclose(moments[:, 0], moments[:, 1], atol=0.05)
    found = np.concatenate([latents.records(s, np.arange(8)).labels[:, 0] for s in range(3)])
    assert np.array_equal(found, labels)


def test_all_images_of_a_record_stay_in_it_in_order(encoded):
    images = ImageShards(dataset_dir(encoded, "private", "images"))
    latents = latents_of(encoded, "private")
    for shard in range(2):
        found = latents.records(shard, np.arange(6))
        for place, record in enumerate(images.records(shard)):
            count = len(record.labels)
            assert found.images[place] == count
            assert tuple(found.labels[place, :count]) == record.labels
            expected = expected_moments(encoded, record.images.transpose(0, 3, 1, 2).copy())
            assert np.allclose(found.moments[place, :count, 0], expected, rtol=2**-10, atol=1e-3)


def test_the_latent_scale_comes_from_public_images_alone(tmp_path, encoded):
    config = tiny_config(tmp_path, data={"flips": True})
    write_images(config, "public", seed=0)
    write_images(config, "private", seed=99)
    encode(config, solo_worker())
    digests = [Manifest.read(RunDir(c.run.dir).autoencoder).digest for c in (config, encoded)]
    assert digests[0] == digests[1]


def test_public_latents_have_unit_variance_per_channel(encoded):
    mean, log_variance = np.split(records_of(latents_of(encoded, "public"))[:, 0, 0], 2, axis=1)
    variance = mean.var((0, 2, 3)) + np.exp(log_variance).mean((0, 2, 3))
    assert np.allclose(mean.mean((0, 2, 3)), 0, atol=2e-3)
    assert np.allclose(variance, 1, atol=5e-3)


def test_private_latents_are_closed_to_other_users(encoded):
    for which in ("private", "heldout"):
        folder = dataset_dir(encoded, which, "latents")
        for path in (folder, *folder.iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_the_manifest_names_parents_and_keeps_the_note_on_duplicates(encoded):
    manifest = latents_of(encoded, "private").manifest
    images = Manifest.read(dataset_dir(encoded, "private", "images"))
    autoencoder = Manifest.read(RunDir(encoded.run.dir).autoencoder)
    assert manifest.parents == {"images": images.digest, "autoencoder": autoencoder.digest}
    assert manifest.facts["duplicates"] == 2


def test_progress_over_private_shards_is_per_cent(encoded):
    text = RunDir(encoded.run.dir).progress.read_text()
    assert '"total_steps": 100' in text


def test_a_finished_encoding_is_not_done_again(encoded):
    folder = dataset_dir(encoded, "private", "latents")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    encode(encoded, solo_worker())
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_other_settings_in_the_same_place_are_refused(encoded):
    with pytest.raises(RunError, match="other flips"):
        encode(with_changes(encoded, data={"flips": False}), solo_worker())
    with pytest.raises(RunError, match=r"autoencoder\.steps = 6, this config says 7"):
        encode(with_changes(encoded, autoencoder={"steps": 7}), solo_worker())


def test_an_interrupted_encoding_goes_on_at_the_first_missing_shard(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    write_images(config, "public")
    pretrain_autoencoder(config, solo_worker())
    folder = dataset_dir(config, "public", "latents")
    write = stage.write_latent_shard

    def killed_at_second(place, name, *arguments, **options):
        if name == "latents-00001.tar":
            raise KeyboardInterrupt
        return write(place, name, *arguments, **options)

    monkeypatch.setattr(stage, "write_latent_shard", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        encode(config, solo_worker())
    first = (folder / "latents-00000.tar").stat()
    monkeypatch.setattr(stage, "write_latent_shard", write)
    encode(config, solo_worker())
    assert (folder / "latents-00000.tar").stat().st_mtime_ns == first.st_mtime_ns
    latents_of(config, "public").manifest.verify(folder)


def test_a_shard_made_by_another_autoencoder_is_made_again(tmp_path):
    config = tiny_config(tmp_path)
    write_images(config, "public")
    encode(config, solo_worker())
    folder = dataset_dir(config, "public", "latents")
    before = (folder / "latents-00000.tar").read_bytes()
    (folder / "manifest.json").unlink()
    (RunDir(tmp_path).autoencoder / "manifest.json").unlink()
    changed = with_changes(config, autoencoder={"steps": 7})
    encode(changed, solo_worker())
    assert (folder / "latents-00000.tar").read_bytes() != before


def test_captions_are_embedded_by_the_text_encoder_of_the_model(tmp_path):
    folder = make_sd_shaped(tmp_path / "sd")
    config = tiny_config(tmp_path / "run", model={"init": str(folder), "conditioning": "caption"})
    write_images(config, "private", records=6, shards=1, most_images=2, captions=True)
    encode(config, solo_worker())
    latents = latents_of(config, "private")
    assert latents.context_shape == (TOKENS, WIDTH)
    found = latents.records(0, np.arange(6))
    record = ImageShards(dataset_dir(config, "private", "images")).records(0)[2]
    expected = CaptionEncoder(folder)(record.captions).numpy()
    assert np.allclose(found.context[2, : len(expected)], expected, atol=5e-3)


def test_captions_that_are_missing_are_asked_for(tmp_path):
    folder = make_sd_shaped(tmp_path / "sd")
    config = tiny_config(tmp_path / "run", model={"init": str(folder), "conditioning": "caption"})
    write_images(config, "private", records=6, shards=1)
    with pytest.raises(DataError, match="no captions"):
        encode(config, solo_worker())


def test_a_given_autoencoder_keeps_its_own_scale_when_the_denoiser_is_given_too(tmp_path):
    folder = make_sd_shaped(tmp_path / "sd")
    config = tiny_config(tmp_path / "run", model={"init": str(folder)})
    write_images(config, "public")
    encode(config, solo_worker())
    pixels, _ = read_images(dataset_dir(config, "public", "images"))
    with torch.no_grad():
        expected = encode_moments(load_autoencoder(folder), to_unit_range(torch.from_numpy(pixels)))
    assert np.allclose(records_of(latents_of(config, "public"))[:, 0, 0], expected, atol=5e-3)


def test_a_given_autoencoder_for_other_images_is_refused(tmp_path):
    folder = make_sd_shaped(tmp_path / "sd", channels=3)
    config = tiny_config(tmp_path / "run", autoencoder={"init": str(folder)})
    write_images(config, "public")
    with pytest.raises(ConfigError, match=r"data\.channels = 1"):
        encode(config, solo_worker())


def test_without_public_images_and_without_a_given_autoencoder_there_is_no_encoding(tmp_path):
    config = tiny_config(tmp_path)
    write_images(config, "private")
    with pytest.raises(DataError, match="public images"):
        encode(config, solo_worker())


def test_a_vq_autoencoder_is_trained_and_encodes_without_variance(tmp_path):
    config = tiny_config(tmp_path, autoencoder={"kind": "vq", "vq_codes": 16})
    write_images(config, "public")
    encode(config, solo_worker())
    moments = records_of(latents_of(config, "public"))[:, 0, 0]
    assert (moments[:, 4:] == -30).all()
    autoencoder = load_autoencoder(RunDir(tmp_path).autoencoder)
    assert decode(autoencoder, torch.from_numpy(moments[:2, :4])).shape == (2, 1, 16, 16)


def test_training_the_autoencoder_lowers_its_error(tmp_path):
    errors = []
    for steps in (1, 60):
        config = tiny_config(tmp_path / str(steps), autoencoder={"steps": steps})
        write_images(config, "public")
        manifest = pretrain_autoencoder(config, solo_worker())
        errors.append(manifest.facts["public_squared_error"])
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30], ids=["streamed", "in memory"])
def test_a_killed_training_goes_on_as_the_unbroken_one(tmp_path, monkeypatch, memory_bytes):
    monkeypatch.setattr(stage, "_MEMORY_BYTES", memory_bytes)
    monkeypatch.setattr("dpldm_dist.runtime.public_training.LEG_STEPS", 4)
    weights = []
    for name in ("unbroken", "killed"):
        config = tiny_config(tmp_path / name, autoencoder={"steps": 10})
        write_images(config, "public")
        if name == "killed":
            with killed_after(updates=6), pytest.raises(KeyboardInterrupt):
                pretrain_autoencoder(config, solo_worker())
        pretrain_autoencoder(config, solo_worker())
        weights.append(load_autoencoder(RunDir(tmp_path / name).autoencoder).state_dict())
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert not (tmp_path / "killed/public/checkpoints/autoencoder").exists()


def test_the_dry_run_names_what_would_be_read_and_written(encoded, tmp_path):
    text = "\n".join(describe(encoded))
    assert "private images" in text and "mirrored" in text
    assert describe(tiny_config(tmp_path))
    assert not (tmp_path / "public/autoencoder").exists()
