"""What a worker holds of a frozen network that all workers divide, and what a pass then costs.

Each row is a group of real processes: all hold the network of configs/cifar10.toml whole, and once
more divided. A pass is forward, backward and the gradient of the attention projections.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.cells import Cell, make_cell
from benchmarks.clock import in_turns, middle, peak_bytes
from dpldm_dist.config import RunConfig
from dpldm_dist.models.unet import unet_layers
from dpldm_dist.runtime.collective import SoloCollective
from dpldm_dist.runtime.strategy_fsdp import shard_frozen
from dpldm_dist.runtime.worker import Worker

_WORKERS, _ROWS, _TURNS = (2, 4), 8, 5


def divided() -> list[dict[str, Any]]:
    """One row per number of workers: the worker that holds most, and the slowest."""
    return [_group(workers) for workers in _WORKERS]


def _group(workers: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(workers) as pool:
        orders = [(rank, workers, str(Path(folder) / "store")) for rank in range(workers)]
        found = pool.starmap(_worker, orders, chunksize=1)
    return {name: max(each[name] for each in found) for name in found[0]}


def _worker(rank: int, workers: int, store: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=workers,
        timeout=datetime.timedelta(seconds=300),
    )
    whole, parts = _cell(), _cell()
    worker = Worker(rank, workers, rank, torch.device("cpu"), SoloCollective())
    unet = parts.denoiser.unet
    run = RunConfig(strategy="fsdp")
    shard_frozen(unet, unet_layers(unet), parts.parameters.values(), run=run, worker=worker)
    times = in_turns(
        {"whole": lambda: _pass(whole), "divided": lambda: _pass(parts)},
        turns=_TURNS,
        device=torch.device("cpu"),
        between=lambda name: dist.barrier(),
    )
    found = {
        "workers": workers,
        "parameters": sum(p.numel() for p in whole.denoiser.parameters()),
        "learning": whole.count,
        "whole_s": middle(times["whole"]).wall,
        "divided_s": middle(times["divided"]).wall,
    }
    for name, cell in (("whole", whole), ("divided", parts)):
        found[f"{name}_held"] = _bytes_held(cell)
        above = peak_bytes(lambda cell=cell: lambda: _pass(cell), torch.device("cpu"))
        found[f"{name}_most"] = found[f"{name}_held"] + above
    dist.barrier()
    dist.destroy_process_group()
    return found


def _cell() -> Cell:
    return make_cell("cifar", "attention", draws=1, rows=_ROWS)


def _pass(cell: Cell) -> None:
    losses_R = cell.losses(cell.denoiser)
    torch.autograd.grad(losses_R.mean(), list(cell.parameters.values()))


def _bytes_held(cell: Cell) -> int:
    """Of parameters, between two passes."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in cell.denoiser.parameters())
    return sum(part.numel() * part.element_size() for part in parts)
