"""Promises that no single module makes: what private training never does, and what is released."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpldm_dist.config import load_config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.demo import FLOOR, GAUSSIAN, NO_NOISE, _jobs
from dpldm_dist.models.conditioning import ClassEmbedder
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.directory import load_model
from dpldm_dist.models.trainable import select_trainable
from dpldm_dist.models.warmup import balanced_grad_scale
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.evaluate import evaluate
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.finetune.preparation import declared_records
from tests.stages.tiny_run import latent_shards, public_model, settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dpldm_dist"


def words_of(path: Path) -> set[str]:
    """All names and texts of a module, but for its docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            found.add(str(node.value))
        found |= {str(getattr(node, field, "")) for field in ("id", "attr", "name", "arg")}
    return found


# --- what no module does ------------------------------------------------------------------------

PRIVATE_TRAINING = sorted(
    [*(PACKAGE / "stages" / "finetune").glob("*.py"), *(PACKAGE / "privacy").rglob("*.py")]
)
STREAMING = {"stream_latents", "stream_images", "stream_items", "shuffle", "DataLoader", "shuffled"}


@pytest.mark.parametrize("path", PRIVATE_TRAINING, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_training_never_streams_or_shuffles(path):
    assert not words_of(path) & STREAMING


def test_the_search_for_streams_finds_them_where_they_are():
    assert words_of(PACKAGE / "data" / "latents.py") & STREAMING
    assert words_of(PACKAGE / "stages" / "pretrain.py") & STREAMING


def test_nothing_but_the_page_of_scores_and_the_demo_reads_scores_on_private_data():
    """So no step, checkpoint, guidance or run can be chosen by them."""
    readers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any("evaluation.json" in word for word in words_of(path))
    }
    assert readers == {"stages/evaluate.py", "demo.py"}
    chosen = words_of(PACKAGE / "demo.py") & {"max", "min", "argmax", "best", "sorted"}
    assert not chosen, "the demo shows scores, and chooses nothing by them"


# --- what a run releases ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on 80 records, of which 100 are declared."""
    root = tmp_path_factory.mktemp("promises")
    public_model(root / "model")
    latent_shards(root / "latents")
    config = settings(
        root,
        privacy={"records": 100, "noise_multiplier": None},
        finetune={"steps": 4, "ema_decay": 0.9},
        run={"checkpoint_every": 1},
    )
    RunDir(config.run.dir).create()
    finetune(config, solo_worker())
    return config


def test_the_average_is_released_and_not_the_last_weights(run):
    place = RunDir(run.run.dir)
    saved = Checkpoints(place.checkpoints, keep=2).latest()
    released = load_file(place.released_model / "unet" / "diffusion_pytorch_model.safetensors")
    prefix = "unet."
    compared = 0
    for name, value in released.items():
        average = saved.tensors.get(f"ema/{prefix}{name}")
        if average is not None:
            assert torch.equal(value, average), name
            compared += not torch.equal(value, saved.tensors[f"parameter/{prefix}{name}"])
    assert compared > 5  # the average does differ from the last weights
    assert saved.step == 4


def test_of_the_number_of_records_only_what_was_declared_is_released(run):
    place = RunDir(run.run.dir)
    latents = LatentShards(run.data.private.latents)
    assert sum(latents.shard_records) == 80 and declared_records(run, latents) == 100
    undeclared = run.model_copy(
        update={"privacy": run.privacy.model_copy(update={"records": None})}
    )
    assert declared_records(undeclared, latents) == 80  # what such a run publishes
    assert read_ledger(place.ledger).plan["records"] == 100
    text = json.dumps(Manifest.read(place.release, "model").facts)
    assert "100" in text and '"records": 80' not in text


# --- how it is judged ---------------------------------------------------------------------------


def test_the_demo_sets_its_result_beside_the_gaussian_and_the_untuned_model(tmp_path):
    config = load_config(ROOT / "configs" / "demo.toml", [f"run.dir={tmp_path}"])
    (scored,) = [job.config for job in _jobs(config) if job.stage is evaluate]
    assert set(scored.evaluate.compare) == {FLOOR, GAUSSIAN, NO_NOISE}
    generators = {job.config.sample.generator for job in _jobs(config)}
    assert generators == {"diffusion", "gaussian"}


def test_the_automatic_scale_gives_the_embedder_half_of_the_squared_norm(tmp_path):
    public = load_model(public_model(tmp_path / "model"))
    embedder = ClassEmbedder(public.rows_NTD[[0, 1, 2, -1]].clone())
    denoiser = Denoiser(public.unet, embedder)
    learning = select_trainable(denoiser, trainable="attention")
    judged = {
        "latents_BCHW": torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        "labels_B": torch.arange(16) % 3,
        "times_B": torch.arange(16) * 60,
    }
    before = embedder_share(denoiser, learning, public.diffusion, **judged)
    assert not 0.4 < before < 0.6  # something to balance
    embedder.grad_scale = balanced_grad_scale(denoiser, public.diffusion, learning, **judged)
    assert embedder_share(denoiser, learning, public.diffusion, **judged) == pytest.approx(0.5)


def embedder_share(denoiser, learning, diffusion, *, latents_BCHW, labels_B, times_B) -> float:
    """Of the squared norms of the records' gradients, what is the embedder's, on equal noise."""
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(learning, 0.0)
    for row in range(len(latents_BCHW)):
        part = slice(row, row + 1)
        z0 = latents_BCHW[part]
        noise = torch.randn(z0.shape, generator=generator)
        loss = diffusion.loss_rows(denoiser, z0, noise, times_B[part], labels_B[part]).sum()
        for name, gradient in zip(
            learning, torch.autograd.grad(loss, list(learning.values())), strict=True
        ):
            squares[name] += float(gradient.double().square().sum())
    return sum(v for n, v in squares.items() if "embedder" in n) / sum(squares.values())
