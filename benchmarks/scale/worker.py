"""One worker of a measured run: the real stage, with a clock at the end of each step.

``python -m benchmarks.scale.worker '{"config": ..., "rank": 0, "workers": 2, "out": "file.json",
"store": "tcp://10.77.0.1:29500", "interface": "eth0"}'``
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpldm_dist.config import parse_config
from dpldm_dist.privacy.blocks import block_slices
from dpldm_dist.privacy.randomness import integer_noise
from dpldm_dist.runtime.collective import GroupCollective, SoloCollective
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages import finetune as stage
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.finetune.state import TrainingState

_REPEATS = 5


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank, workers = order["rank"], order["workers"]
    collective: Any = SoloCollective()
    if workers > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = order["interface"]
        dist.init_process_group(
            "gloo",
            init_method=order["store"],
            rank=rank,
            world_size=workers,
            timeout=datetime.timedelta(seconds=300),
        )
        collective = GroupCollective(torch.device("cpu"))
    seen = _watch(order.get("interface"))
    worker = Worker(rank, workers, rank, torch.device("cpu"), collective)
    stage.finetune(parse_config(order["config"]), worker)
    seen["alone"] = _alone(seen["parameters"], collective) if order["alone"] else {}
    Path(order["out"]).write_text(json.dumps(seen))
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def _watch(interface: str | None) -> dict[str, Any]:
    """Note for every step: when it ended by the wall and by this process's use of processors, how
    many microbatches this worker had, and how many bytes its interface had sent."""
    seen: dict[str, Any] = {"ended_s": [], "cpu_s": [], "microbatches": [], "sent": []}
    microbatches, tick = PrivateData.microbatches, TrainingState.tick

    def counted(self: PrivateData, step: int) -> Iterator[Any]:
        seen["microbatches"].append(0)
        for part in microbatches(self, step):
            seen["microbatches"][-1] += 1
            yield part

    def timed(self: TrainingState, noisy: Any) -> None:
        tick(self, noisy)
        seen["parameters"] = len(noisy.mean_P)
        seen["ended_s"].append(time.perf_counter())
        seen["cpu_s"].append(time.process_time())
        seen["sent"].append(bytes_of(interface) if interface else 0)

    PrivateData.microbatches, TrainingState.tick = counted, timed
    stage._show = lambda *arguments, **rest: None  # epsilon by PLD is no part of a step
    return seen


def _alone(parameters: int, collective: Any) -> dict[str, float]:
    """Seconds of single parts outside of a run, by the wall and of processors: noise of all
    coordinates, a small reduction, and what a step exchanges."""
    token, sum_P = torch.zeros(1, dtype=torch.int64), torch.zeros(parameters, dtype=torch.int64)
    updated_P = torch.zeros(parameters)
    bounds = block_slices(parameters, collective.world_size)

    def exchange() -> None:
        collective.sum_slices_(sum_P, bounds)
        collective.gather_slices_(updated_P, bounds)

    parts = {
        "noise": lambda: integer_noise(bytes(32), 0, parameters, std=2.0**30),
        "message": lambda: collective.sum_(token),
        "exchange": exchange,
    }
    found = {}
    for name, part in parts.items():
        part()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(_REPEATS):
            part()
        found[f"{name}_wall_s"] = (time.perf_counter() - wall) / _REPEATS
        found[f"{name}_cpu_s"] = (time.process_time() - cpu) / _REPEATS
    return found


def bytes_of(interface: str) -> int:
    """Bytes that an interface of this network namespace has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise ValueError(f"no interface {interface}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
