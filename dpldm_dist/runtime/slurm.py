"""What a Slurm job does with its nodes. Called by slurm/job.sh, never by hand.

    python -m dpldm_dist.runtime.slurm begin "STAGES" [CONFIG] [--set ...]   once, on the first node
    python -m dpldm_dist.runtime.slurm node FOLDER TRY                       one task on every node

``begin`` checks the request and prints the folder of this start, ``private/slurm/JOB-RESTART`` in
the run directory. ``node`` brings up one Ray cluster for the job, runs the stages on it and takes
it down again (``slurm_nodes``); the task of the first node leads, and writes how it ended, and
whether another start would help, into FOLDER/verdict-TRY. Neither needs a Slurm command, so both
may run inside a container.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dpldm_dist.config import Config, load_config
from dpldm_dist.errors import (
    BringUpError,
    ConfigError,
    DpldmError,
    NodeLostError,
    RunError,
    SavedAndStopped,
)
from dpldm_dist.runtime.rundir import RunDir, dataset_dir, private_files
from dpldm_dist.runtime.slurm_job import Allocation, Order, Ports
from dpldm_dist.runtime.slurm_nodes import Post, follow, lead
from dpldm_dist.runtime.stopping import forget_stop

WORTH_ANOTHER_START = (
    BringUpError.exit_code,
    NodeLostError.exit_code,
    SavedAndStopped.exit_code,
)
_IDLE_STARTS = 3  # of one job in a row that change nothing: a fourth would not either
_STARTS_KEPT = 5  # folders of starts, with their logs
_TOKEN_DIGITS = 64


def begin(stages: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str]) -> Path:
    """Check the request, note this start, and write its order; the folder of this start.

    Raises: ConfigError; RunError if the starts before it changed nothing.
    """
    allocation = Allocation.read(environment)
    options = _options(arguments, allocation)
    config = load_config(options.config, options.set)
    run = RunDir(config.run.dir).create()
    forget_stop(run)
    with private_files():
        _note_start(run, allocation, progress_mark(run, config))
        folder = start_folder(run, allocation)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _remove_old_starts(folder.parent)
        _order(config, options, stages, allocation, environment).write(folder / "order.json")
    return folder


def node(folder: Path, attempt: int, environment: Mapping[str, str]) -> int:
    """One task of the job: lead or follow. The exit code of the task.

    The token of the job comes by standard input, which srun hands to every task: it stands in no
    environment, on no command line and on no shared disk.
    """
    allocation, order = Allocation.read(environment), Order.read(folder / "order.json")
    token = sys.stdin.readline().strip()
    if len(token) != _TOKEN_DIGITS:
        raise BringUpError("srun handed no token to this task: start it by slurm/job.sh.")
    post = Post(allocation, order, Ports.of(allocation.job, attempt), folder, token)
    if allocation.rank:
        return asyncio.run(follow(post))
    code = asyncio.run(lead(post))
    _write_verdict(folder, attempt, code, _verdict(order, allocation, code))
    return code


def start_folder(run: RunDir, allocation: Allocation) -> Path:
    """Where a start keeps its order, its verdicts and the logs of its nodes."""
    return run.private / "slurm" / f"{allocation.job}-{allocation.restart}"


def progress_mark(run: RunDir, config: Config) -> str:
    """A digest of what a start can bring about: other than the one before, and there was progress.

    Names and sizes of checkpoints, shards, models and samples. Neither the ledger nor logs, which
    also a start that gets nowhere writes.
    """
    places = {run.public, run.release, run.checkpoints}
    for which in ("public", "private", "heldout"):
        places |= {dataset_dir(config, which, what) for what in ("images", "latents")}
    found = sorted(entry for place in places for entry in _files(place))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def main(arguments: Sequence[str]) -> int:
    """The exit code: of the task, or of the error's kind."""
    try:
        match arguments:
            case ["begin", stages, *rest]:
                print(begin(stages.split(), rest, os.environ))
                return 0
            case ["node", folder, attempt]:
                return node(Path(folder), int(attempt), os.environ)
            case _:
                raise ConfigError("This is called by slurm/job.sh; see slurm/README.md.")
    except DpldmError as error:
        print(f"dpldm on Slurm: {error}", file=sys.stderr)
        return error.exit_code


def _options(arguments: Sequence[str], allocation: Allocation) -> argparse.Namespace:
    """CONFIG or --config, --set, --sweep; ``%a`` stands for the number of an array's member."""
    parser = argparse.ArgumentParser(prog="sbatch slurm/STAGE.sbatch", add_help=False)
    parser.add_argument("given", nargs="?", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--sweep", type=Path)
    options = parser.parse_args(arguments)
    options.config = options.config or options.given
    of_line = []
    if options.sweep is not None:
        of_line = parser.parse_args(_line_of_sweep(options.sweep, allocation)).set
    if allocation.member is not None:
        own = any(text.partition("=")[0].strip() == "run.dir" for text in of_line)
        folder = str(load_config(options.config, options.set + of_line).run.dir)
        if not own and "%a" not in folder:  # members never share a run directory
            folder += "-%a"
        of_line += [f"run.dir={folder}"]
        options.set = [text.replace("%a", str(allocation.member)) for text in options.set + of_line]
    return options


def _line_of_sweep(path: Path, allocation: Allocation) -> list[str]:
    """The options of this member: line ``member`` of the file, counted from 1."""
    if allocation.member is None:
        raise ConfigError("--sweep goes with an array: sbatch --array=1-N for a file of N lines.")
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"Cannot read the sweep {path}: {error.strerror}.") from None
    if not 1 <= allocation.member <= len(lines):
        raise ConfigError(
            f"Member {allocation.member} has no line in {path}: it has {len(lines)}, so give "
            f"sbatch --array=1-{len(lines)}."
        )
    return shlex.split(lines[allocation.member - 1])


def _order(
    config: Config,
    options: argparse.Namespace,
    stages: Sequence[str],
    allocation: Allocation,
    environment: Mapping[str, str],
) -> Order:
    names = {text.partition("=")[0].strip() for text in options.set}
    return Order(
        run=str(RunDir(config.run.dir).root),
        stages=tuple(stages),
        config=None if options.config is None else str(options.config),
        settings=tuple(options.set),
        ray=len(allocation.nodes) > 1 or config.run.launcher == "ray",
        workers=config.run.most_workers if "run.workers" in names else None,
        threads=config.run.threads,
        device=config.run.device,
        start_timeout_s=_seconds(environment, "DPLDM_START_TIMEOUT", 180.0),
        stop_grace_s=_seconds(environment, "DPLDM_STOP_GRACE", 90.0),
        node_timeout_s=_seconds(environment, "DPLDM_NODE_TIMEOUT", 30.0),
        interface=environment.get("DPLDM_INTERFACE") or None,
        head_address=environment.get("DPLDM_HEAD_ADDRESS") or None,
        dashboard=environment.get("DPLDM_DASHBOARD") == "true",
        folder_for_ray=environment.get("DPLDM_FOLDER_FOR_RAY") or "/tmp",
    )


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ConfigError(f"{name} = {text}: expected a number of seconds.")
    return value


def _note_start(run: RunDir, allocation: Allocation, mark: str) -> None:
    """Write this start down. Raises: RunError if the last starts of this job changed nothing."""
    path = run.private / "slurm" / "starts.jsonl"
    idle = _idle_starts(path, allocation.job, mark)
    if idle >= _IDLE_STARTS:
        raise _no_progress(allocation, run, idle)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"job": allocation.job, "restart": allocation.restart, "mark": mark}
    with open(path, "a") as file:
        file.write(json.dumps(note | {"time": round(time.time())}) + "\n")


def _idle_starts(path: Path, job: int, mark: str) -> int:
    """How many starts of ``job``, back from the last one, began where ``mark`` still is."""
    count = 0
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        with suppress(ValueError, KeyError):  # torn by a crash
            note = json.loads(line)
            if (note["job"], note["mark"]) != (job, mark):
                break
            count += 1
    return count


def _no_progress(allocation: Allocation, run: RunDir, starts: int) -> RunError:
    return RunError(
        f"{starts} starts of job {allocation.job} in a row have changed nothing in {run.root}: no "
        f"further one. See the output of the job and {run.private / 'slurm'}; allow more time "
        "(sbatch --time) or save more often (run.checkpoint_every), and submit again."
    )


def _verdict(order: Order, allocation: Allocation, code: int) -> str:
    """``requeue`` if another start may help, else ``final``."""
    if code not in WORTH_ANOTHER_START:
        return "final"
    run = RunDir(Path(order.run))
    path = run.private / "slurm" / "starts.jsonl"
    idle = _idle_starts(path, allocation.job, progress_mark(run, order.load()))
    if idle >= _IDLE_STARTS:
        print(f"dpldm on Slurm: {_no_progress(allocation, run, idle)}", file=sys.stderr)
        return "final"
    return "requeue"


def _write_verdict(folder: Path, attempt: int, code: int, verdict: str) -> None:
    path = folder / f"verdict-{attempt}"
    part = path.with_suffix(".part")
    with private_files():
        part.write_text(f"{code} {verdict}\n")
    part.rename(path)


def _remove_old_starts(folder: Path) -> None:
    starts = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in starts[:-_STARTS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _files(place: Path) -> Iterator[tuple[str, int]]:
    for top, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name != "tensorboard"]
        for name in names:
            path = os.path.join(top, name)
            try:
                yield path, os.stat(path, follow_symlinks=False).st_size
            except OSError:
                continue  # removed meanwhile


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
