"""``run.activation_checkpointing``: the same bits from less memory, and a refusal with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.cells import make_cell, own_copy
from benchmarks.clock import peak_bytes
from benchmarks.methods import METHODS
from dpldm_dist.config import Config, RunConfig
from dpldm_dist.errors import ConfigError
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.trainable import transformer_blocks
from dpldm_dist.runtime.strategy import checkpoint_activations
from tests.stages.tiny_run import TEST_KEY, released_weights, run_alone, settings


def private(root: Path, name: str, **run: object) -> Config:
    fixed = {"dir": str(root / name), "unsafe_test_key": TEST_KEY}
    chosen = {"trainable": "transformer", "draws": 2, "steps": 3}
    return settings(root, name, finetune=chosen, run=fixed | run)


def test_a_private_run_releases_the_same_bits(root):
    run_alone(private(root, "kept"))
    run_alone(private(root, "again", activation_checkpointing=True))
    kept, again = released_weights(root, "kept"), released_weights(root, "again")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_planted_second_computation_that_differs_is_caught():
    """As of dropout that is drawn anew: the engine's sum must show it."""
    wanted_P = clipped_sum(again=False)
    assert torch.equal(clipped_sum(again=True), wanted_P)
    assert not torch.equal(clipped_sum(again=True, drift=1e-3), wanted_P)


def clipped_sum(*, again: bool, drift: float = 0.0) -> torch.Tensor:
    """``drift`` is what a layer of one block reads more in every pass than in the one before."""
    cell = own_copy(make_cell("tiny", "transformer", draws=1, rows=4))
    checkpoint_activations(cell.denoiser, run=RunConfig(activation_checkpointing=again))
    passes: list[int] = []

    def moved(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        passes.append(1)
        return (inputs[0] + drift * len(passes), *inputs[1:])

    block = cell.denoiser.unet.get_submodule(transformer_blocks(cell.denoiser.unet)[-1])
    block.transformer_blocks[0].attn1.to_q.register_forward_pre_hook(moved)
    step = METHODS["ours"](cell, 1.0)
    step.run()
    assert len(passes) == (2 if again else 1)
    return step.result()


def most_bytes(*, again: bool) -> int:
    """Of a private step on the small network."""
    cell = own_copy(make_cell("small", "attention", draws=1, rows=32))
    checkpoint_activations(cell.denoiser, run=RunConfig(activation_checkpointing=again))
    step = METHODS["ours"](cell, 1.0)
    return peak_bytes(lambda: lambda: (step.forget(), step.run()), cell.device)


def test_a_private_step_takes_less_than_half_the_memory():
    assert most_bytes(again=True) < 0.5 * most_bytes(again=False)


def test_a_model_that_cannot_is_named():
    vq = build_autoencoder(
        kind="vq", channels=1, size=16, latent_channels=4, block_channels=(8, 8, 8),
        layers_per_block=1, norm_groups=4, mid_attention=False, vq_codes=8, seed=0,
    )  # fmt: skip
    checkpoint_activations(vq, run=RunConfig())
    with pytest.raises(ConfigError, match="no part of VQModel can compute its activations"):
        checkpoint_activations(vq, run=RunConfig(activation_checkpointing=True))
