"""Runs that are not steered by classes: captions through a frozen text encoder, or nothing."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dpldm_dist.config import parse_config
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.stages.encode import encode
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.prepare import prepare
from dpldm_dist.stages.pretrain import pretrain
from dpldm_dist.stages.report import report
from dpldm_dist.stages.sample import sample
from tests.models.sd_shaped import make_sd_shaped

PRIVATE = {
    "privacy": {"epsilon": 50.0, "delta": 1e-3, "clip_norm": 0.5, "lanes": 2, "records": 30},
    "finetune": {"steps": 2, "batch": 8},
    "sample": {"count": 4, "steps": 2, "formats": ["npz"]},
}


def captioned_people(folder):
    """A table of 24 images of 12 persons, two each, with captions."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with open(folder / "people.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "caption", "unit"])
        for number in range(24):
            pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            table.writerow([f"{number}.png", "all", f"face {number % 3}", f"person {number // 2}"])
    return folder / "people.csv"


def run_all(tree, *stages):
    config = parse_config(tree)
    RunDir(config.run.dir).create()
    launch([Job(stage, config) for stage in stages], run=config.run)
    return RunDir(config.run.dir)


def test_a_captioned_model_learns_from_persons_and_draws_from_captions(tmp_path):
    model = make_sd_shaped(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("face 0\nface 2\n")
    tree = {
        **PRIVATE,
        "data": {
            "size": 16,
            "shard_records": 4,
            "unit": "person",
            "max_images_per_unit": 2,
            "flips": True,
            "private": {"source": str(captioned_people(tmp_path / "people"))},
        },
        "model": {"init": str(model), "conditioning": "caption"},
        "finetune": {**PRIVATE["finetune"], "trainable": "lora", "lora_rank": 2},
        "sample": {**PRIVATE["sample"], "captions": str(tmp_path / "prompts.txt")},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "microbatch": 4},
    }
    run = run_all(tree, prepare, encode, pretrain, finetune, sample, report)
    latents = Manifest.read(run.private / "latents", "latents")
    assert latents.facts["records"] == 12 and latents.facts["images_per_record"] == 2
    facts = Manifest.read(run.release, "model").facts
    assert facts["unit"] == "person" and 0 < facts["epsilon"] <= 50.0
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(run.released_model / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    assert changed and all(".attn1." in name or ".attn2." in name for name in changed)
    with np.load(run.release / "samples" / "samples.npz", allow_pickle=False) as found:
        assert found["images"].shape == (4, 16, 16)
    assert "person" in (run.release / "report.html").read_text()


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_model_without_classes_runs_through(tmp_path, kind):
    generator = np.random.default_rng(1)
    for name in ("public", "private"):
        (tmp_path / name / "all").mkdir(parents=True)
        for number in range(16):
            pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / "all" / f"{number}.png")
    tree = {
        **PRIVATE,
        "data": {
            "size": 16,
            "shard_records": 8,
            "public": {"source": str(tmp_path / "public")},
            "private": {"source": str(tmp_path / "private")},
        },
        "autoencoder": {
            "kind": kind, "block_channels": [8, 8, 8], "norm_groups": 4, "steps": 3, "batch": 4,
        },
        "model": {
            "conditioning": "none", "block_channels": [16, 16], "heads": 2, "context_dim": 8,
            "norm_groups": 4,
        },
        "pretrain": {"steps": 3, "batch": 4},
        "finetune": {**PRIVATE["finetune"], "statistics_noise": 20.0, "warmup_steps": 2},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "microbatch": 4},
    }  # fmt: skip
    run = run_all(tree, prepare, encode, pretrain, finetune, sample)
    assert Manifest.read(run.release, "model").facts["claim"] is True
    assert Manifest.read(run.release / "samples", "samples").facts["images"] == 4
