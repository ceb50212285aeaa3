"""Stages that real worker processes run in the tests of the launchers."""

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import torch

from dpldm_dist import errors
from dpldm_dist.config import Config
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import StopRequest
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
    _note_start(config, worker)
    if worker.rank == worker.world_size - 1:
        kind = sorted(_classes())[config.sample.seed]
        raise _classes()[kind](f"{kind}: found this, expected that, do so.")
    worker.collective.barrier()


def crash_on_last(config: Config, worker: Worker) -> None:
    if worker.rank == worker.world_size - 1:
        raise ValueError("the private value is 31337")
    worker.collective.barrier()


def die_on_last(config: Config, worker: Worker) -> None:
    _note_start(config, worker)
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
    model = replicate(torch.nn.Linear(2, 1, bias=False), worker)
    row = torch.zeros(1, 2)
    row[0, worker.rank % 2] = 1.0 + 2.0 * worker.rank
    model(row).sum().backward()
    facts = {
        "gradient": bare(model).weight.grad.tolist(),
        "weight": bare(model).weight.tolist(),
        "wrapped": model is not bare(model),
    }
    _note(config, f"gradient-{worker.rank}.json", facts)


def _note_start(config: Config, worker: Worker) -> None:
    (RunDir(config.run.dir).private / f"started-{worker.rank}-{os.getpid()}").touch()


def _note(config: Config, name: str, value: object) -> None:
    path = Path(config.run.dir) / "release" / name
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


def _classes() -> dict[str, type[errors.DpldmError]]:
    tree = [errors.DpldmError, *errors.DpldmError.__subclasses__()]
    return {kind.__name__: kind for kind in tree if kind.__module__ == errors.__name__}


LANES, SAVE_EVERY = 4, 5


def unbroken_total(steps: int) -> int:
    """What ``count`` gets to, on any number of workers and with any breaks."""
    return sum(_part(step, lane) for step in range(steps) for lane in range(LANES))


def count(config: Config, worker: Worker) -> None:
    """``sample.seed`` steps, as private training does them: lanes, integer sums, checkpoints, stops.

    ``give_order`` tells a worker to die or to hang, or all of them to wait at a step.
    """
    run = RunDir(config.run.dir)
    checkpoints, stop = Checkpoints(run.checkpoints, keep=2), StopRequest(run, worker)
    saved = checkpoints.latest()
    step, total = (saved.step, int(saved.tensors["total"])) if saved else (0, 0)
    worker.collective.barrier()  # all have read before anybody writes
    note_start(run, worker, step=step)
    while step < config.sample.seed:
        obey(run, worker, step)
        parts = sum(_part(step, lane) for lane in range(worker.rank, LANES, worker.world_size))
        sum_over_workers = torch.tensor([parts])
        worker.collective.sum_(sum_over_workers)
        total, step = total + int(sum_over_workers), step + 1
        stopping = stop.agreed()
        if stopping or step % SAVE_EVERY == 0:
            if worker.rank == 0:
                checkpoints.save(step, {"total": torch.tensor(total)}, {})
            worker.collective.barrier()
            worker.checkpointed(step)
        if stopping:
            raise stop.leave(f"{step} steps")
    _note(config, f"total-{worker.rank}.json", total)


def note_start(run: RunDir, worker: Worker, *, step: int) -> None:
    if worker.rank == 0:
        line = json.dumps({"from": step, "workers": worker.world_size})
        with open(run.private / "starts.jsonl", "a") as file:
            file.write(line + "\n")


def starts(folder: Path) -> list[dict[str, int]]:
    """Each start of ``count``: from which step, with how many workers."""
    path = RunDir(folder).private / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def give_order(folder: Path, what: str, *, step: int, rank: int = 0) -> Path:
    """``die`` and ``hang`` reach one worker once; ``wait`` holds all until the file is removed."""
    path = RunDir(folder).private / f"order-{what}-{step}-{rank}"
    path.touch()
    return path


def obey(run: RunDir, worker: Worker, step: int) -> None:
    """Die, hang or wait, if that was ordered for this step."""
    for what, act in (("die", _die), ("hang", threading.Event().wait)):
        order = run.private / f"order-{what}-{step}-{worker.rank}"
        if order.exists():
            order.unlink()
            act()
    held = run.private / f"order-wait-{step}-0"
    if held.exists() and worker.rank == 0:
        (run.private / "waiting").touch()
    while held.exists() and not worker.preempted():
        time.sleep(0.05)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _part(step: int, lane: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{step}/{lane}".encode()).digest()[:4], "big")
