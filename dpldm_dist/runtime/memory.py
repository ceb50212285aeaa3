"""How much memory a computation takes, and how much there is for it."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from dpldm_dist.runtime.worker import Worker


class MemoryWatch:
    """Most bytes that the device's allocator, or on a CPU this process, held since it was made,
    above what was held then. Memory that a process freed and kept counts as held: what fits into
    it needs no more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):  # Linux: forget the peak of what was before
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _most_resident()

    def peak(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _most_resident() - self._before


def _most_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * unit
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(worker: Worker) -> int:
    """What this worker may still take of its device; of a machine's memory, its part. All workers
    take part."""
    most_here = worker.most(worker.local_rank) + 1
    if worker.device.type == "cuda":
        kept = torch.cuda.memory_reserved(worker.device) - torch.cuda.memory_allocated(
            worker.device
        )
        return torch.cuda.mem_get_info(worker.device)[0] + kept
    return free_memory() // most_here


def free_memory() -> int:
    """Bytes that this machine could give to this program (Linux: the page cache included), and that
    its limit still grants (cgroup v2)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    found = found or [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min([*found, *_granted()])


def _granted() -> list[int]:
    left = []
    with suppress(OSError, ValueError):
        inside = Path("/proc/self/cgroup").read_text().split("0::", 1)[-1].strip()
        folder = Path("/sys/fs/cgroup") / inside.lstrip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # "max", or no limit there
                most = int((place / "memory.max").read_text())
                left.append(max(0, most - int((place / "memory.current").read_text())))
    return left
