"""Time of several methods in one process, in turns; and the most memory that one method holds."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Times:
    """Medians over the turns, in seconds. ``cpu`` is the process's time on all of its threads."""

    cpu: float
    wall: float

    def taken(self, device: torch.device) -> float:
        """What counts: CPU time on a CPU, because others share it; wall time on a device."""
        return self.cpu if device.type == "cpu" else self.wall


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    device: torch.device,
    between: Callable[[str], object] = lambda name: None,
) -> dict[str, list[Times]]:
    """One untimed pass of each, then ``turns`` rounds A B C A B C ...: what disturbs the machine
    for a while disturbs all of them. ``between`` is called after each pass, untimed."""
    _keep_pages()
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for turn in range(-1, turns):
        for name, run in runs.items():
            times = once(run, device)
            between(name)
            if turn >= 0:
                found[name].append(times)
    return found


def once(run: Callable[[], object], device: torch.device) -> Times:
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    return Times(time.process_time() - cpu, time.perf_counter() - wall)


def _keep_pages() -> None:
    """Freed memory stays with the process: else each method pays for pages that the one before it
    gave back to the system, most of all the one that follows the largest."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # the C library of Linux has it
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def middle(times: list[Times]) -> Times:
    return Times(median(t.cpu for t in times), median(t.wall for t in times))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Most bytes of tensors that are alive at once while ``make()`` prepares and its result runs
    twice, above what was alive before. To be called in a fresh process.

    On a CPU this is the running sum of PyTorch's own allocations and releases, which the profiler
    reports one by one, so it is the same in every run: pages that the allocator keeps, or that the
    system has not given back, do not count. Nor does the work space inside a library's kernel.
    """
    if device.type == "cuda":
        return _peak_cuda(make, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run = make()
        run()
        run()
    events = watched.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        most = max(most, alive)
    return most


def _peak_cuda(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run = make()
    run()
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
