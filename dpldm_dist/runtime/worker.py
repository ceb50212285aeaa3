"""What a stage knows of the process it runs in: which worker it is, its device, its collective."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dpldm_dist.config import RunConfig
from dpldm_dist.errors import ConfigError
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.runtime.collective import SoloCollective


@dataclass(frozen=True)
class Worker:
    """One training process.

    ``rank`` counts the workers of the run from 0, ``local_rank`` those on the same machine.
    ``preempted``: whether a machine of the run is about to be taken away, as this worker sees it.
    ``checkpointed``: to be called by every worker once a checkpoint of that many steps is whole.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    collective: Collective
    preempted: Callable[[], bool] = lambda: False
    checkpointed: Callable[[int], None] = lambda step: None

    def most(self, number: int) -> int:
        """The largest of all workers' numbers. Every worker calls it, at the same point."""
        largest = torch.tensor([number], dtype=torch.int64, device=self.device)
        self.collective.max_(largest)
        return int(largest.item())


def solo_worker(device: str | torch.device = "cpu") -> Worker:
    """The only worker of a run of one: no process group, the same code."""
    return Worker(0, 1, 0, torch.device(device), SoloCollective())


def worker_device(run: RunConfig, local_rank: int = 0) -> torch.device:
    """The device of a worker: its own GPU, or the CPU.

    Formal guarantees: two workers of one machine never get the same GPU.
    Raises: ConfigError if CUDA is asked for and missing, or there are fewer GPUs than workers.
    """
    if resolved_device(run) == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"Worker {local_rank} of this machine has no GPU of its own: found "
            f"{torch.cuda.device_count()}. Set run.workers to at most that, or run.device=cpu."
        )
    return torch.device("cuda", local_rank)


def resolved_device(run: RunConfig) -> str:
    """``"cpu"`` or ``"cuda"`` for ``run.device`` on this machine.

    ``auto`` takes the GPUs when every worker can have its own. Raises: ConfigError.
    """
    if run.device == "cpu":
        return "cpu"
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device = cuda, but torch finds no usable GPU here: install a CUDA build of torch "
            "and check the driver, or set run.device=cpu."
        )
    if run.device == "auto" and torch.cuda.device_count() < run.least_workers:
        return "cpu"
    return "cuda"


def set_threads(run: RunConfig, *, workers_here: int) -> int:
    """Give this process its share of the cores; the number of threads.

    ``run.threads`` if set, else OMP_NUM_THREADS if set, else cores // workers_here.
    """
    asked = run.threads or int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    threads = asked or max(1, cores() // workers_here)
    torch.set_num_threads(threads)
    return threads


def arithmetic(device: torch.device) -> str:
    """What the bits of a sum hang on besides its terms and the number of threads."""
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return f"torch {torch.__version__}, {device.type} {kind}"


def cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1
