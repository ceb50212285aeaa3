"""The model directory: what is written is read back, and stock diffusers samples alike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpldm_dist.errors import DataError
from dpldm_dist.models.autoencoder import build_autoencoder, decode, encode_moments
from dpldm_dist.models.conditioning import ClassEmbedder, random_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import load_autoencoder, load_model, save_model
from dpldm_dist.models.trainable import select_trainable
from dpldm_dist.models.unet import build_unet

CLASSES = ("zero", "one", "two")


def tiny_autoencoder(kind="kl"):
    return build_autoencoder(
        kind=kind,
        channels=1,
        size=16,
        latent_channels=4,
        block_channels=(8, 8, 16),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
        vq_codes=16,
        seed=0,
    )


def tiny_denoiser() -> Denoiser:
    unet = build_unet(
        latent_channels=4,
        latent_size=4,
        block_channels=(16, 32),
        layers_per_block=1,
        heads=2,
        context_dim=8,
        norm_groups=4,
        seed=0,
    )
    return Denoiser(unet, ClassEmbedder(random_rows(4, 1, 8, seed=0)))


def save(folder: Path, denoiser: Denoiser, *, kind="kl", diffusion=Diffusion()) -> list[str]:
    return save_model(
        folder,
        unet=denoiser.unet,
        autoencoder=tiny_autoencoder(kind),
        diffusion=diffusion,
        rows_NTD=denoiser.embedder.rows(),
        classes=CLASSES,
    )


def with_learned_adapters() -> Denoiser:
    denoiser = tiny_denoiser()
    for parameter in select_trainable(denoiser, trainable="lora", lora_rank=2).values():
        torch.nn.init.normal_(parameter.data, std=0.3)
    return denoiser


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_saved_model_is_read_back_as_it_was(tmp_path, kind):
    denoiser, diffusion = tiny_denoiser(), Diffusion(prediction="epsilon", schedule="linear")
    names = save(tmp_path / "model", denoiser, kind=kind, diffusion=diffusion)
    loaded = load_model(tmp_path / "model")
    assert loaded.diffusion == diffusion
    assert (loaded.classes, loaded.kind) == (CLASSES, "class")
    assert torch.equal(loaded.rows_NTD, denoiser.embedder.rows())
    z, t, labels = torch.randn(4, 4, 4, 4), torch.tensor([1, 10, 500, 999]), torch.arange(4)
    assert torch.equal(loaded.denoiser()(z, t, labels), denoiser(z, t, labels))
    image = torch.rand(2, 1, 16, 16)
    expected = encode_moments(tiny_autoencoder(kind), image)
    assert torch.equal(encode_moments(loaded.autoencoder, image), expected)
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert set(names) == {str(path.relative_to(tmp_path / "model")) for path in files}


def test_saving_replaces_an_older_model_and_leaves_nothing_beside_it(tmp_path):
    save(tmp_path / "model", tiny_denoiser())
    changed = with_learned_adapters()
    save(tmp_path / "model", changed)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_model(tmp_path / "model").rows_NTD, changed.embedder.rows())


def test_saving_clears_what_a_killed_save_left_beside_it(tmp_path):
    for name in ("model.part", "model.old"):
        (tmp_path / name / "unet").mkdir(parents=True)
    save(tmp_path / "model", tiny_denoiser())
    save(tmp_path / "model", tiny_denoiser())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_all_of_a_model_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync, rename = set(), os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file)))

    def renamed(source, target):
        everything = [Path(source), *Path(source).rglob("*")]
        assert {path.stat().st_ino for path in everything} <= synced
        synced.add("named")
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path / "model", tiny_denoiser())
    assert "named" in synced


def test_a_model_that_was_loaded_does_not_tell_where_it_lay(tmp_path):
    save(tmp_path / "first", tiny_denoiser())
    loaded = load_model(tmp_path / "first")
    save_model(
        tmp_path / "second",
        unet=loaded.unet,
        autoencoder=loaded.autoencoder,
        diffusion=loaded.diffusion,
        rows_NTD=loaded.rows_NTD,
        classes=loaded.classes,
    )
    for path in (tmp_path / "second").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("guidance_scale, steps", [(1.0, 7), (2.0, 10)])
def test_stock_diffusers_samples_alike_in_a_process_without_this_package(
    tmp_path, guidance_scale, steps
):
    denoiser = with_learned_adapters()
    save(tmp_path / "model", denoiser)
    noise, labels = torch.randn(3, 4, 4, 4), torch.tensor([2, 0, 1])
    save_file({"noise": noise, "labels": labels}, tmp_path / "given.safetensors")
    script = Path(__file__).with_name("stock_pipeline_for_tests.py")
    arguments = [tmp_path / "model", tmp_path / "given.safetensors", tmp_path / "found.safetensors"]
    subprocess.run(
        [sys.executable, "-W", "ignore", script, *arguments, str(guidance_scale), str(steps)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    stock_BCHW = load_file(tmp_path / "found.safetensors")["images"]
    loaded = load_model(tmp_path / "model")
    z0 = loaded.diffusion.ddim_sample(
        loaded.denoiser(), labels, noise, steps=steps, guidance_scale=guidance_scale
    )
    ours_BCHW = (decode(loaded.autoencoder, z0).detach() + 1) / 2
    assert stock_BCHW.shape == (3, 1, 16, 16)
    assert torch.allclose(stock_BCHW, ours_BCHW, atol=1e-4)
    assert stock_BCHW.std() > 0.01


def test_a_directory_of_stock_diffusers_without_a_table_is_read(tmp_path):
    save(tmp_path / "model", tiny_denoiser())
    shutil.rmtree(tmp_path / "model" / "conditioning")
    loaded = load_model(tmp_path / "model")
    assert (loaded.rows_NTD, loaded.classes, loaded.kind) == (None, (), "caption")
    with pytest.raises(DataError, match="rows.safetensors"):
        loaded.denoiser()


def test_an_autoencoder_is_found_in_a_pipeline_directory_and_its_scale_folded(tmp_path):
    save(tmp_path / "model", tiny_denoiser())
    config = tmp_path / "model/vae/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    image = torch.rand(2, 1, 16, 16)
    scaled = encode_moments(load_autoencoder(tmp_path / "model"), image)[:, :4]
    plain = encode_moments(tiny_autoencoder(), image)[:, :4]
    assert torch.allclose(scaled, 0.5 * plain, atol=1e-5)


WEIGHTS = "diffusion_pytorch_model"
DAMAGES = {
    "model_index.json or unet": lambda f: shutil.rmtree(f / "unet"),
    "scheduler_config.json": lambda f: (f / "scheduler/scheduler_config.json").unlink(),
    "rows.safetensors": lambda f: (f / "conditioning/rows.safetensors").write_bytes(b"damaged"),
    "expected JSON": lambda f: (f / "conditioning/classes.json").write_text("{"),
    "Cannot load UNet": lambda f: (f / f"unet/{WEIGHTS}.safetensors").write_bytes(b"x" * 99),
}


@pytest.mark.parametrize("match", DAMAGES)
def test_a_damaged_directory_is_refused_with_the_name_of_the_file(tmp_path, match):
    save(tmp_path / "model", tiny_denoiser())
    DAMAGES[match](tmp_path / "model")
    with pytest.raises(DataError, match=match.removeprefix("model_index.json or ")):
        load_model(tmp_path / "model")


def test_pickled_weights_are_not_read(tmp_path):
    save(tmp_path / "model", tiny_denoiser())
    (tmp_path / f"model/unet/{WEIGHTS}.safetensors").unlink()
    torch.save(tiny_denoiser().unet.state_dict(), tmp_path / f"model/unet/{WEIGHTS}.bin")
    with pytest.raises(DataError, match="unet"):
        load_model(tmp_path / "model")


def test_rows_that_do_not_fit_their_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected 3"):
        save_model(
            tmp_path / "model",
            unet=tiny_denoiser().unet,
            autoencoder=tiny_autoencoder(),
            diffusion=Diffusion(),
            rows_NTD=random_rows(4, 1, 8, seed=0),
            classes=("a", "b"),
        )
    assert not (tmp_path / "model").exists()
