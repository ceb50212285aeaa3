"""Run the workers of one setting and boil down what they saw."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.scale.network import ADDRESS, INTERFACE, namespaces
from benchmarks.scale.tiny import settings
from dpldm_dist.runtime.rundir import RunDir

_SKIPPED = 2  # steps at the start, in which caches fill
_PORT = 29500
_LIMIT_S = 1200


@dataclass(frozen=True)
class Setting:
    """How a run is made: processes, expected records per step, 10^6 bits per second of each link
    (None: as fast as the machine is)."""

    workers: int
    batch: int
    mbit: float | None = None

    @property
    def name(self) -> str:
        return f"{self.workers}-of-{self.batch}" + (f"-at-{self.mbit:g}" if self.mbit else "")


@dataclass(frozen=True)
class Measured:
    """Medians over the steps of a run. ``wall_s``: seconds; ``cpu_s``: those of processors that all
    workers used together; ``step_s``: the one that counts; ``total``, ``most``: microbatches of
    all workers and of the one with most; ``sent``: bytes that a worker sent in a step, headers too;
    ``noise_s``: noise of all coordinates by one worker; ``message_s``: a reduction of 8 bytes;
    ``exchange_s``: the reduction and the gathering of a step, alone (0: not timed). ``by_worker``:
    of each worker, seconds of processors and microbatches.
    """

    setting: Setting
    parameters: int
    step_s: float
    wall_s: float
    cpu_s: float
    total: float
    most: float
    sent: float
    noise_s: float
    message_s: float
    exchange_s: float
    by_worker: tuple[tuple[float, float], ...]


def measure(
    root: Path, setting: Setting, *, number: int, cores: int, clock: str, alone: bool
) -> Measured:
    """One run of ``setting`` on this machine.

    ``clock``: "wall", or "cpu" for a machine that has other work: a step whose links are free then
    counts the seconds of processors that the workers used, spread over the cores that they have.
    ``alone``: time single parts by themselves, too.
    """
    name = f"run-{number}-{setting.name}"
    config = settings(root, name, batch=setting.batch)
    RunDir(Path(config["run"]["dir"])).create()
    with _places(setting) as prefixes:
        outs = [root / f"{name}-{rank}.json" for rank in range(setting.workers)]
        processes = [
            subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    "benchmarks.scale.worker",
                    _order(config, rank, setting, out, alone),
                ]
            )
            for rank, (prefix, out) in enumerate(zip(prefixes, outs, strict=True))
        ]
        try:
            codes = [process.wait(_LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise RuntimeError(f"{setting.name}: a worker ended with {max(codes)}")
    seen = [json.loads(out.read_text()) for out in outs]
    shared = min(setting.workers, cores) if clock == "cpu" and setting.mbit is None else None
    return _boiled_down(setting, seen, shared)


@contextmanager
def _places(setting: Setting) -> Iterator[list[list[str]]]:
    """What goes before the command of each worker."""
    if setting.workers == 1:
        yield [[]]
        return
    with namespaces(setting.workers, mbit=setting.mbit) as names:
        yield [["ip", "netns", "exec", name] for name in names]


def _order(config: dict[str, Any], rank: int, setting: Setting, out: Path, alone: bool) -> str:
    order = {"config": config, "rank": rank, "workers": setting.workers, "out": str(out)}
    order["alone"] = alone
    if setting.workers > 1:
        order |= {"store": f"tcp://{ADDRESS.format(1)}:{_PORT}", "interface": INTERFACE}
    return json.dumps(order)


def _boiled_down(setting: Setting, seen: list[dict[str, Any]], shared: int | None) -> Measured:
    ended = seen[0]["ended_s"]
    steps = range(_SKIPPED, len(ended))
    loads = [[worker["microbatches"][step] for worker in seen] for step in steps]
    sent = [worker["sent"][step] - worker["sent"][step - 1] for step in steps for worker in seen]
    wall_s = median(ended[step] - ended[step - 1] for step in steps)
    cpu_s = median(sum(w["cpu_s"][step] - w["cpu_s"][step - 1] for w in seen) for step in steps)
    return Measured(
        setting=setting,
        parameters=seen[0]["parameters"],
        step_s=wall_s if shared is None else cpu_s / shared,
        wall_s=wall_s,
        cpu_s=cpu_s,
        total=median(sum(load) for load in loads),
        most=median(max(load) for load in loads),
        sent=sum(sent) / len(sent),
        noise_s=_alone("noise", seen, 1 if shared else None),
        message_s=_alone("message", seen, shared),
        exchange_s=_alone("exchange", seen, shared),
        by_worker=tuple(
            (
                median(w["cpu_s"][step] - w["cpu_s"][step - 1] for step in steps),
                median(w["microbatches"][step] for step in steps),
            )
            for w in seen
        ),
    )


def _alone(part: str, seen: list[dict[str, Any]], shared: int | None) -> float:
    """Seconds of one part: of the slowest worker by the wall, or of processors. 0: not timed."""
    timed = [worker["alone"] for worker in seen if worker["alone"]]
    if shared is None:
        return max((facts[f"{part}_wall_s"] for facts in timed), default=0.0)
    workers = 1 if part == "noise" else len(timed)
    return sum(facts[f"{part}_cpu_s"] for facts in timed[:workers]) / shared


def as_json(found: Measured) -> dict[str, Any]:
    return asdict(found)


def from_json(tree: dict[str, Any]) -> Measured:
    workers = tuple((cpu_s, load) for cpu_s, load in tree["by_worker"])
    return Measured(**{**tree, "setting": Setting(**tree["setting"]), "by_worker": workers})
