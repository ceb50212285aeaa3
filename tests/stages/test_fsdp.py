"""Frozen weights divided over workers: the same release, equally many passes, shards that stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpldm_dist.config import Config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.errors import ConfigError, PrivacyError
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.directory import load_model
from dpldm_dist.models.unet import unet_layers
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.selfcheck import FrozenState
from dpldm_dist.runtime import strategy_fsdp
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.strategy import public_model as hold_publicly
from dpldm_dist.runtime.worker import Worker, solo_worker
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.finetune.preparation import trainable_model
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.finetune.state import TrainingState
from dpldm_dist.stages.mechanism import plan_of
from tests.processes import on_workers
from tests.stages.tiny_run import (
    TEST_KEY,
    released_weights,
    run_alone,
    settings,
)

STEPS = 12
SETS = ("attention", "lora", "output-blocks")


def private(
    root: Path, name: str, *, strategy: str = "fsdp", again: bool = False, **finetune: Any
) -> Config:
    """Twelve noisy steps of a fixed key in two lanes; most steps draw about three records;
    ``again``: activations are computed again."""
    chosen = {"steps": STEPS, "batch": 3, "optimizer": "adam", "trainable": "attention"}
    return settings(
        root,
        name,
        finetune=chosen | finetune,
        privacy={"noise_multiplier": 2.0, "lanes": 2},
        run={
            "dir": str(root / name),
            "strategy": strategy,
            "unsafe_test_key": TEST_KEY,
            "microbatch": 2,
            "activation_checkpointing": again,
        },
    )


def worker_of(collective: Collective) -> Worker:
    rank, world_size = collective.rank, collective.world_size
    return Worker(rank, world_size, rank, torch.device("cpu"), collective)


def run_all(collective: Collective, *configs: Config) -> None:
    for config in configs:
        if collective.rank == 0:
            RunDir(config.run.dir).create()
        collective.barrier()
        finetune(config, worker_of(collective))


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """Ends a run once it made ``steps`` steps and saved."""
    save = TrainingState.save

    def stopping(self: TrainingState, checkpoints: Any) -> None:
        save(self, checkpoints)
        if self.step == steps:
            raise InterruptedError

    with mock.patch.object(TrainingState, "save", stopping):
        yield


def same_bits(root: Path, one: str, other: str) -> bool:
    first, second = released_weights(root, one), released_weights(root, other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- the same release -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(root):
    """What one process with whole weights releases."""
    for trainable in SETS:
        run_alone(private(root, f"alone-{trainable}", strategy="ddp", trainable=trainable))


@pytest.mark.parametrize(("workers", "sets"), [(2, SETS), (3, ("attention",))])
def test_workers_with_divided_weights_release_the_bits_of_one_with_whole_weights(
    root, alone, workers, sets
):
    """With three workers, the third has no lane: its passes are all empty."""
    runs = [private(root, f"{name}-{workers}", trainable=name) for name in sets]
    again = [private(root, "again", again=True)] if workers == 2 else []
    assert on_workers(workers, run_all, *runs, *again) == [None] * workers
    assert not again or same_bits(root, "alone-attention", "again")
    for name in sets:
        assert same_bits(root, f"alone-{name}", f"{name}-{workers}"), name


def one_way_then_the_other(collective: Collective, begun: Config, whole: Config) -> None:
    """Begin with divided weights; then go on with divided weights where whole ones began."""
    with stopped_after(6), suppress(InterruptedError):
        run_all(collective, begun)
    run_all(collective, whole)


def test_a_run_goes_on_with_divided_weights_after_whole_ones_and_the_other_way(root, alone):
    with stopped_after(6), pytest.raises(InterruptedError):
        run_alone(private(root, "whole-first", strategy="ddp"))
    divided_first = private(root, "divided-first")
    whole_first = private(root, "whole-first")
    assert on_workers(2, one_way_then_the_other, divided_first, whole_first) == [None] * 2
    run_alone(private(root, "divided-first", strategy="ddp"))
    for name in ("whole-first", "divided-first"):
        assert same_bits(root, "alone-attention", name), name


# --- equally many passes --------------------------------------------------------------------------


def passes_of(collective: Collective, config: Config) -> list[tuple[int, int]]:
    """Of each step: parts that this worker was given, and those of them that hold records."""
    latents = LatentShards(config.data.private.latents)
    plan = plan_of(config, records=80)
    diffusion = load_model(config.model.init).diffusion
    data = PrivateData(config, plan, latents, b"k" * 32, 1, diffusion, worker_of(collective))
    found = []
    for step in range(STEPS):
        masks = [part.mask_B for part in data.microbatches(step)]
        found.append((len(masks), sum(int(mask_B.any()) for mask_B in masks)))
        assert all(len(mask_B) == plan.microbatch for mask_B in masks)
    return found


def passes_with_and_without_padding(
    collective: Collective, config: Config
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    padded = passes_of(collective, config)
    with mock.patch.object(PrivateData, "_passes", lambda self, parts: parts):  # planted bug
        return padded, passes_of(collective, config)


def test_all_workers_make_as_many_passes_as_the_one_with_most_records(root):
    found = on_workers(3, passes_with_and_without_padding, private(root, "passes"))
    padded, bare = zip(*found, strict=True)
    for each in zip(*padded, strict=True):
        most = max(full for _, full in each)
        assert [made for made, _ in each] == [most] * 3
    assert any(made > full for made, full in padded[0])  # also a worker with lanes had to wait
    assert padded[2] == [(made, 0) for made, _ in padded[0]]
    # without the agreement, workers would make unequally many and wait for each other for ever
    assert any(len({made for made, _ in each}) > 1 for each in zip(*bare, strict=True))


# --- what each worker holds -----------------------------------------------------------------------


class MostGathered(TorchDispatchMode):
    """The most frozen numbers that are whole at once, looked at in every operation."""

    def __init__(self, model: nn.Module, trainable: set[nn.Parameter]):
        super().__init__()
        self._owners = [
            (module, name)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter not in trainable
        ]
        self.most = 0

    def now(self) -> int:
        found = (getattr(module, name) for module, name in self._owners)
        return sum(p.numel() for p in found if not isinstance(p, DTensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.most = max(self.most, self.now())
        return func(*args, **(kwargs or {}))


def made(config: Config, worker: Worker) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    latents = LatentShards(config.data.private.latents)
    return trainable_model(config, load_model(config.model.init), latents, worker)


def a_pass(
    denoiser: Denoiser, parameters: dict[str, nn.Parameter], *, rows: int = 4
) -> list[torch.Tensor]:
    z_RCHW = torch.randn(rows, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    answer = denoiser(z_RCHW, torch.arange(rows), torch.arange(rows) % 3)
    return list(torch.autograd.grad(answer.square().sum(), list(parameters.values())))


def held(collective: Collective, config: Config) -> dict[str, Any]:
    denoiser, parameters = made(config, worker_of(collective))
    learning = set(parameters.values())
    frozen = [p for p in denoiser.unet.parameters() if p not in learning]
    largest = sorted(
        sum(p.numel() for p in layer.parameters() if p not in learning)
        for layer in unet_layers(denoiser.unet)
    )
    of_no_layer = sum(p.numel() for p in frozen) - sum(largest)
    gathered = MostGathered(denoiser.unet, learning)
    with gathered:
        gradients = a_pass(denoiser, parameters)
    return {
        "frozen": sum(p.numel() for p in frozen),
        "held": sum(p.to_local().numel() for p in frozen),
        "allowed": of_no_layer + sum(largest[-2:]),
        "most": gathered.most,
        "after": gathered.now(),
        "gradients": gradients,
        "whole": all(type(p) is nn.Parameter for p in learning),
    }


def test_each_worker_holds_its_share_and_gathers_two_layers_at_a_time(root):
    """Attention projections learn everywhere, so the way back passes all layers but the first."""
    config = private(root, "held", trainable="attention")
    found = on_workers(2, held, config)
    denoiser, parameters = made(config, solo_worker())  # one worker: nothing is divided
    assert not any(isinstance(p, DTensor) for p in denoiser.parameters())
    expected = a_pass(denoiser, parameters)
    assert sum(each["held"] for each in found) == found[0]["frozen"]
    for each in found:
        assert each["held"] < 0.55 * each["frozen"]
        assert 0 < each["most"] <= each["allowed"] < each["frozen"]
        assert each["after"] == 0
        assert each["whole"]
        pairs = zip(each["gradients"], expected, strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_layers_are_those_of_a_pass_in_its_order(root):
    denoiser, parameters = made(private(root, "order"), solo_worker())
    layers, ran = unet_layers(denoiser.unet), []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: ran.append(module))
    a_pass(denoiser, parameters)
    assert ran == layers
    inside = {p for layer in layers for p in layer.parameters()}
    outside = [name for name, p in denoiser.unet.named_parameters() if p not in inside]
    assert {name.split(".")[0] for name in outside} == {
        "conv_in",
        "time_embedding",
        "conv_norm_out",
        "conv_out",
    }


def change_a_shard(collective: Collective, config: Config) -> str:
    denoiser, parameters = made(config, worker_of(collective))
    frozen = FrozenState(denoiser, parameters.keys())
    a_pass(denoiser, parameters)
    frozen.verify()
    if collective.rank == 1:
        shard = next(
            p for p in denoiser.unet.parameters() if isinstance(p, DTensor) and p.to_local().numel()
        )
        shard.to_local().view(-1)[0] += 1e-6
    try:
        frozen.verify()
    except PrivacyError as error:
        return str(error)
    return ""


def test_the_worker_that_holds_a_frozen_weight_notices_its_change(root):
    first, second = on_workers(2, change_a_shard, private(root, "changed"))
    assert first == ""
    assert "which is not trainable" in second


# --- planted bugs ---------------------------------------------------------------------------------


def _trainables_divided_too() -> Any:
    fully_shard = strategy_fsdp.fully_shard

    def all_of_it(module: nn.Module, **options: Any) -> Any:
        return fully_shard(module, **{**options, "ignored_params": None})

    return mock.patch.object(strategy_fsdp, "fully_shard", all_of_it)


@contextmanager
def _nodes_before_the_inputs() -> Iterator[None]:
    plain = mock.Mock(side_effect=lambda module, args, kwargs: (args, kwargs))
    with (
        mock.patch.object(strategy_fsdp, "_hide", plain),
        mock.patch.object(strategy_fsdp, "_show", plain),
    ):
        yield


@contextmanager
def _weights_where_the_file_has_them() -> Iterator[None]:
    to = torch.Tensor.to

    def without_a_copy(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, *args, **{**kwargs, "copy": False})

    with mock.patch.object(torch.Tensor, "to", without_a_copy):
        yield


PLANTED = {
    "none": (nullcontext, "same bits"),
    "trainables are divided too": (_trainables_divided_too, "DTensor"),
    "nodes of FSDP before the inputs": (_nodes_before_the_inputs, "other bits"),
    "weights where the file has them": (_weights_where_the_file_has_them, "other bits"),
}


def trials(collective: Collective, config: Config) -> list[str]:
    """Of each bug: whether gradients have the bits of whole weights, or what was refused."""
    expected = {rows: a_pass(*made(config, solo_worker()), rows=rows) for rows in (1, 4)}
    said = []
    for planted, _ in PLANTED.values():
        try:
            with planted():
                denoiser, parameters = made(config, worker_of(collective))
                found = [
                    torch.equal(ours, theirs)
                    for rows, wanted in expected.items()
                    for ours, theirs in zip(
                        a_pass(denoiser, parameters, rows=rows), wanted, strict=True
                    )
                ]
            said.append("same bits" if all(found) else "other bits")
        except (PrivacyError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_planted_bugs_change_bits_or_stop_the_run(root):
    for said in on_workers(2, trials, private(root, "bug")):
        for text, (bug, (_, seen)) in zip(said, PLANTED.items(), strict=True):
            assert seen in text, (bug, text)


# --- refusal ---------------------------------------------------------------------------------------


def test_public_training_is_refused_and_says_what_to_take(root):
    with pytest.raises(ConfigError, match="zero_stage=3"):
        hold_publicly(
            nn.Linear(1, 1), weight_decay=0.0, run=private(root, "x").run, worker=solo_worker()
        )
