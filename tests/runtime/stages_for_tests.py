"""Stages that real worker processes run in the tests of the launchers."""

import json
import os
import signal
import time
from pathlib import Path

import torch

from dpldm_dist import errors
from dpldm_dist.config import Config
from dpldm_dist.runtime.strategy import bare, replicate
from dpldm_dist.runtime.worker import Worker


def add_up(config: Config, worker: Worker) -> None:
    total = torch.tensor([worker.rank + 1], dtype=torch.int64, device=worker.device)
    worker.collective.sum_(total)
    facts = {
        "rank": worker.rank,
        "world_size": worker.world_size,
        "total": int(total),
        "process": os.getpid(),
        "threads": torch.get_num_threads(),
        "folder": os.getcwd(),
    }
    _note(config, f"worker-{worker.rank}.json", facts)


def add_up_again(config: Config, worker: Worker) -> None:
    """Reads what every worker wrote in the job before."""
    found = [
        json.loads((Path(config.run.dir) / "release" / f"worker-{rank}.json").read_text())
        for rank in range(worker.world_size)
    ]
    _note(config, f"again-{worker.rank}.json", {"processes": [item["process"] for item in found]})


def fail_on_last(config: Config, worker: Worker) -> None:
    """The last worker raises the class named in sample.seed's place; the others wait for it."""
    if worker.rank == worker.world_size - 1:
        kind = sorted(_classes())[config.sample.seed]
        raise _classes()[kind](f"{kind}: found this, expected that, do so.")
    worker.collective.barrier()


def crash_on_last(config: Config, worker: Worker) -> None:
    if worker.rank == worker.world_size - 1:
        raise ValueError("the private value is 31337")
    worker.collective.barrier()


def die_on_last(config: Config, worker: Worker) -> None:
    if worker.rank == worker.world_size - 1:
        _note(config, "death.json", time.monotonic())  # one clock for all processes
        os.kill(os.getpid(), signal.SIGKILL)
    worker.collective.barrier()


def leave_on_last(config: Config, worker: Worker) -> None:
    if worker.rank == worker.world_size - 1:
        _note(config, "death.json", time.monotonic())
        os._exit(9)
    worker.collective.barrier()


def hang_on_last(config: Config, worker: Worker) -> None:
    if worker.rank == worker.world_size - 1:
        signal.pause()
    worker.collective.barrier()


def wait_forever(config: Config, worker: Worker) -> None:
    _note(config, f"process-{worker.rank}.json", os.getpid())
    signal.pause()


def average_gradients(config: Config, worker: Worker) -> None:
    """Each worker has one row of [[1, 0], [0, 3], ...]; the loss is the sum of the outputs."""
    torch.manual_seed(worker.rank)  # replicas start apart: wrapping must make them equal
    model = replicate(torch.nn.Linear(2, 1, bias=False), worker, run=config.run)
    row = torch.zeros(1, 2)
    row[0, worker.rank % 2] = 1.0 + 2.0 * worker.rank
    model(row).sum().backward()
    facts = {
        "gradient": bare(model).weight.grad.tolist(),
        "weight": bare(model).weight.tolist(),
        "wrapped": model is not bare(model),
    }
    _note(config, f"gradient-{worker.rank}.json", facts)


def _note(config: Config, name: str, value: object) -> None:
    path = Path(config.run.dir) / "release" / name
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


def _classes() -> dict[str, type[errors.DpldmError]]:
    tree = [errors.DpldmError, *errors.DpldmError.__subclasses__()]
    return {kind.__name__: kind for kind in tree if kind.__module__ == errors.__name__}
