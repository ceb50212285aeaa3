"""Public training through DeepSpeed: it learns what the plain strategy learns, and goes on anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpldm_dist.errors import ConfigError
from dpldm_dist.models.directory import load_model
from dpldm_dist.models.unet import build_unet
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.runtime.collective import SoloCollective
from dpldm_dist.runtime.public_training import PublicTraining, step_generator
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import Worker, solo_worker
from dpldm_dist.stages.encode import encode
from dpldm_dist.stages.pretrain import pretrain
from tests.processes import on_workers
from tests.stages.tiny_data import tiny_config, write_images

STEPS = 6


class Denoising(torch.nn.Module):
    """Plain gradients of every parameter of a small UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet(
            latent_channels=4, latent_size=4, block_channels=(8, 16), layers_per_block=1, heads=2,
            context_dim=8, norm_groups=4, seed=0,
        )  # fmt: skip

    def forward(self, noisy_RChw: torch.Tensor, wanted_RChw: torch.Tensor) -> torch.Tensor:
        rows = len(noisy_RChw)
        found = self.unet(noisy_RChw, torch.zeros(rows), torch.ones(rows, 1, 8)).sample
        return (found.float() - wanted_RChw).square().flatten(1).mean(1)


def train(
    collective: Collective,
    folder: str,
    *,
    until: int = STEPS,
    again: bool = False,
    **deepspeed: Any,
) -> dict[str, torch.Tensor]:
    """Steps up to ``until``, from the checkpoint in ``folder`` on if there is one; ``again``:
    activations are computed again."""
    run: dict[str, Any] = {"dir": folder, "activation_checkpointing": again}
    if deepspeed:
        run |= {"strategy": "deepspeed", "deepspeed": deepspeed}
    config = tiny_config(Path(folder), run=run)
    worker = Worker(collective.rank, collective.world_size, 0, torch.device("cpu"), collective)
    objective = Denoising()
    training = PublicTraining(
        objective, what="public model", steps=STEPS, batch=6, learning_rate=1e-3,
        weight_decay=0.01, ema_decay=0.9, settings={}, run=config.run, worker=worker,
    )  # fmt: skip
    while training.step < until:
        both = torch.randn(2, 6, 4, 4, 4, generator=step_generator(7, training.step))
        loss_R = training.module(*both[:, training.my_rows])
        training.update(loss_R, loss_R.detach())
    if until < STEPS:
        training._save()
    training.finish()
    return {name: p.detach().clone() for name, p in objective.named_parameters()}


def agree(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, rough: bool = False
) -> None:
    """Adam turns the rounding of a gradient near zero into a whole step, so a few may be far."""
    assert one.keys() == other.keys()
    apart = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
    assert apart.median() < (1e-3 if rough else 1e-6) and apart.max() < 2e-2


WAYS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-2, optimizer off the device": {"zero_stage": 2, "offload_optimizer": True},
    "ZeRO-3, all off the device": {
        "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True,
    },
    "ZeRO-2, activations again": {"zero_stage": 2, "again": True},
    "ZeRO-3, activations again": {"zero_stage": 3, "again": True},
    "ZeRO-2 in bfloat16": {"zero_stage": 2, "bf16": True},
    "ZeRO-3 in bfloat16": {"zero_stage": 3, "bf16": True},
}  # fmt: skip
FEW = ("ZeRO-3, all off the device",)


def ways(collective: Collective, root: str, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: train(collective, f"{root}/{name}", **WAYS[name]) for name in names}
    train(collective, f"{root}/broken", until=3, zero_stage=2)
    train(collective, f"{root}/again", until=3, zero_stage=3)
    found["ZeRO-3 broken off"] = train(collective, f"{root}/again", zero_stage=3)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(SoloCollective(), str(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, what each of two workers learned)."""
    root = tmp_path_factory.mktemp("two")
    return root, on_workers(2, ways, str(root), FEW)


def test_two_workers_with_deepspeed_learn_what_one_process_learns(plain, two):
    for learned in two[1]:
        for name in (*FEW, "ZeRO-3 broken off"):
            agree(plain, learned[name])
            assert all(torch.equal(two[1][0][name][n], v) for n, v in learned[name].items())


@pytest.mark.parametrize("deepspeed", [{}, {"zero_stage": 1}, {"zero_stage": 3}], ids=str)
def test_what_two_workers_broke_off_goes_on_alone_with_or_without_deepspeed(
    plain, two, tmp_path, deepspeed
):
    shutil.copytree(two[0] / "broken", tmp_path / "run")
    agree(plain, train(SoloCollective(), str(tmp_path / "run"), **deepspeed))


def test_activations_that_are_computed_again_change_no_bit(plain, tmp_path):
    again = train(SoloCollective(), str(tmp_path), again=True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_bfloat16_computes_otherwise_and_keeps_float32_weights(plain, tmp_path):
    rough = train(SoloCollective(), str(tmp_path), zero_stage=1, bf16=True)
    assert all(value.dtype == torch.float32 for value in rough.values())
    agree(plain, rough, rough=True)
    assert any(not torch.equal(plain[name], rough[name]) for name in plain)


@pytest.mark.parametrize("more", [{}, {"again": True}], ids=str)
def test_another_model_of_the_process_computes_as_before(tmp_path, more):
    """ZeRO-3 puts a ``linear`` of its own in the place of torch's for the whole process."""
    before, seen = torch.nn.functional.linear, []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: (
            seen.append(torch.nn.functional.linear is before)
            if isinstance(module, torch.nn.Linear)
            else None
        )
    )
    try:
        train(SoloCollective(), str(tmp_path), until=1, zero_stage=3, **more)
    finally:
        hook.remove()
    assert seen and not any(seen), "its own model computes with it"
    assert torch.nn.functional.linear is before


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_way_learns_what_one_process_learns(plain, tmp_path, workers):
    for learned in on_workers(workers, ways, str(tmp_path), tuple(WAYS), limit_s=600):
        for name in WAYS:
            agree(plain, learned[name], rough="bfloat16" in name)


def test_autoencoder_and_denoiser_are_trained_by_the_stages(tmp_path):
    run = {
        "strategy": "deepspeed",
        "deepspeed": {"zero_stage": 3},
        "activation_checkpointing": True,
    }
    config = tiny_config(tmp_path, run=run)
    write_images(config, "public")
    encode(config, solo_worker())
    pretrain(config, solo_worker())
    assert load_model(RunDir(tmp_path).public_model).unet.dtype == torch.float32
    assert not (RunDir(tmp_path).public / "checkpoints/public-model").exists()


@pytest.mark.parametrize(
    ("deepspeed", "reason"),
    [
        ({"options": {"fp16": {"enabled": True}}}, "run.deepspeed.options.fp16.enabled"),
        ({"options": {"optimizer": {"type": "Adam"}}}, "the stage makes it"),
        ({"zero_stage": 2, "offload_parameters": True}, "only ZeRO-3"),
        ({"zero_stage": 0, "offload_optimizer": True}, "expected 1, 2 or 3"),
    ],
)
def test_options_that_the_stage_decides_are_refused(tmp_path, deepspeed, reason):
    with pytest.raises(ConfigError, match=reason):
        train(SoloCollective(), str(tmp_path), **deepspeed)
