"""What the tasks of a Slurm job know: what Slurm allocated, which ports are theirs, what to run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dpldm_dist.config import Config, load_config
from dpldm_dist.errors import ConfigError

_FIRST_PORT, _PORT_BLOCKS = 20000, 1500  # below the ports that the system hands out
_NAME_AND_BRACKETS = re.compile(r"([^\[\],]*)(?:\[([^\]]*)\])?")


@dataclass(frozen=True)
class Allocation:
    """What Slurm says about a job and this task of it.

    ``nodes``: names, the first one leads. ``rank``: of this task, one per node. ``cpus``,
    ``gpus``: of this task. ``launcher``: address of the machine that srun was called on, or None.
    ``member``: number within an array, or None.
    """

    job: int
    restart: int
    nodes: tuple[str, ...]
    rank: int
    node: str
    cpus: int
    gpus: int
    launcher: str | None
    member: int | None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Allocation:
        """Raises: ConfigError outside of a Slurm job."""
        try:
            nodes = expand_nodes(environment["SLURM_JOB_NODELIST"])
            job = int(environment["SLURM_JOB_ID"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"This is no Slurm job ({error} is missing): start it by sbatch, see "
                "slurm/README.md."
            ) from None
        rank = int(environment.get("SLURM_PROCID") or 0)
        member = environment.get("SLURM_ARRAY_TASK_ID")
        cpus = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE")
        return cls(
            job=job,
            restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
            nodes=nodes,
            rank=rank,
            node=environment.get("SLURMD_NODENAME") or nodes[min(rank, len(nodes) - 1)],
            cpus=max(1, int(cpus or 1)),
            gpus=_gpus(environment),
            launcher=environment.get("SLURM_LAUNCH_NODE_IPADDR"),
            member=None if member is None else int(member),
        )


@dataclass(frozen=True)
class Ports:
    """The fixed ports of one job; two jobs may share a node, so each has a block of its own.

    A further try takes another block, should one port of this one be taken.
    """

    control: int
    gcs: int
    client: int
    dashboard: int
    agent: int
    metrics: int
    tensorboard: int

    @classmethod
    def of(cls, job: int, attempt: int = 1) -> Ports:
        block = (job + 389 * (attempt - 1)) % _PORT_BLOCKS
        first = _FIRST_PORT + 8 * block
        return cls(*range(first, first + 7))


@dataclass(frozen=True)
class Order:
    """What all tasks of a start must know, as ``begin`` found it. Nothing private.

    ``config``, ``settings``: --config and --set of every stage. ``ray``: whether a Ray cluster is
    needed; one node alone can do without. ``workers``: that ``--set run.workers`` asked for; None:
    as many as the allocation has room for. ``threads``: of a worker, None: its share of the CPUs.
    The rest: see slurm/job.sh.
    """

    run: str
    stages: tuple[str, ...]
    config: str | None
    settings: tuple[str, ...]
    ray: bool
    workers: int | None
    threads: int | None
    device: str
    start_timeout_s: float
    stop_grace_s: float
    node_timeout_s: float
    dashboard: bool
    interface: str | None
    head_address: str | None
    folder_for_ray: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Order:
        tree = json.loads(path.read_text())
        return cls(**tree | {name: tuple(tree[name]) for name in ("stages", "settings")})

    def load(self) -> Config:
        return load_config(None if self.config is None else Path(self.config), self.settings)


def expand_nodes(text: str) -> tuple[str, ...]:
    """``a[1-2,07]b,c`` -> a1b, a2b, a07b, c. Raises: ValueError."""
    names: list[str] = []
    for part in _split_outside_brackets(text):
        found = [""]
        for prefix, ranges in _NAME_AND_BRACKETS.findall(part):
            found = [name + prefix + number for name in found for number in _numbers(ranges)]
        names += found
    if not all(names):
        raise ValueError(f"{text!r} is no list of nodes")
    return tuple(names)


def _gpus(environment: Mapping[str, str]) -> int:
    """GPUs that Slurm gave to this task."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        listed = [item for item in environment.get(name, "").split(",") if item.strip()]
        if listed and listed != ["NoDevFiles"]:
            return len(listed)
    return int(environment.get("SLURM_GPUS_ON_NODE") or 0)


def _split_outside_brackets(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]


def _numbers(ranges: str) -> list[str]:
    """``1-3,07`` -> 1, 2, 3, 07, with leading zeros kept; no brackets: one empty text."""
    if not ranges:
        return [""]
    found = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        stop = int(last if dash else first)
        found += [f"{number:0{len(first)}d}" for number in range(int(first), stop + 1)]
    return found
