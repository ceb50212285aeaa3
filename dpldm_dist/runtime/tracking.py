"""What a run shows while it works: TensorBoard and a progress bar, of public quantities only.

A quantity is shown if it is differentially private, or does not depend on private data at all.
The tables below are the whole list; a raw loss, gradient norm, batch size or time of a private
step is refused. What stands under ``private/`` is not raw: it was released with the step's noise,
which its error bars show. Only worker 0 writes.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import rich.console
import rich.progress
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summary

from dpldm_dist.errors import PrivacyError
from dpldm_dist.runtime.rundir import private_files
from dpldm_dist.runtime.worker import Worker

_EDGES = {
    "": "",
    "_low": ": two standard errors below",
    "_high": ": two standard errors above",
    "_mean": ": mean over the last steps",
    "_mean_low": ": that mean, two standard errors below",
    "_mean_high": ": that mean, two standard errors above",
}
TELEMETRY = {
    f"private/{name}{edge}": f"{what}, released in the step's noisy sum{words}"
    for name, what in (
        ("loss", "mean clipped loss of the records of a step"),
        ("records", "number of records of a step"),
        ("clip_fraction", "share of the records of a step whose gradient was clipped"),
    )
    for edge, words in _EDGES.items()
}
SIGNAL = {
    "signal/walk": "length of the sum of all noisy gradients so far",
    "signal/noise_alone": "length that noise alone is expected to give, from public numbers",
    "signal/noise_alone_low": "two standard errors below that",
    "signal/noise_alone_high": "two standard errors above that",
    "signal/walk_ratio": "walk over noise alone: 1 is pure noise",
    "signal/step_ratio": "length of one noisy gradient over that of its noise: 1 is pure noise",
    "signal/alignment": "agreement of steps with those before, in standard errors of pure noise",
}
SCALARS = {
    "privacy/epsilon": "spent so far, from the ledger",
    "privacy/epsilon_budget": "the budget",
    "privacy/epsilon_left": "budget minus spent",
    "privacy/delta": "constant of the plan",
    "privacy/sample_rate": "constant of the plan",
    "privacy/noise_multiplier": "constant of the plan",
    "privacy/clip_norm": "constant of the plan",
    "privacy/charges": "entries of the ledger: steps of all attempts",
    "privacy/attempt": "number of the attempt",
    "optimizer/learning_rate": "schedule",
    "optimizer/ema_decay": "schedule",
    "optimizer/noisy_gradient_norm": "norm of the released gradient, after the noise",
    "optimizer/update_norm": "norm of the change of the weights, after the noise",
    "speed/steps_per_s": "mean over a window of many steps",
    "speed/records_per_s": "from the expected batch q * N_declared, never the drawn one",
    "speed/images_per_s": "public or generated images",
    **TELEMETRY,
    **SIGNAL,
}
TEXTS = frozenset({"privacy/plan", "privacy/guarantee"})
PUBLIC = "public/"  # anything computed from public data: pre-training losses, warm-up losses
SAMPLES = "samples/"  # images drawn from released weights

FACTS = frozenset(
    {"epsilon", "epsilon_budget", "learning_rate", "public_loss", "records_per_s", "images_per_s"}
)
_WRITE_EVERY_S = 0.2
_POLL_EVERY_S = 0.2
_LINE_EVERY_S = 15.0

LAYOUT = {
    "Privacy": {
        "epsilon and budget": ["Multiline", ["privacy/epsilon$", "privacy/epsilon_budget"]],
        "charges": ["Multiline", ["privacy/charges"]],
    },
    "Training": {
        "learning rate": ["Multiline", ["optimizer/learning_rate"]],
        "noisy gradient": ["Multiline", ["optimizer/noisy_gradient_norm"]],
        "public losses": ["Multiline", ["public/.*loss.*"]],
    },
    "Private training, from noisy sums": {
        title: ["Margin", [f"private/{name}", f"private/{name}_low", f"private/{name}_high"]]
        for title, name in (
            ("loss, with two standard errors", "loss_mean"),
            ("loss of single steps", "loss"),
            ("records, with two standard errors", "records_mean"),
            ("share of clipped records", "clip_fraction_mean"),
        )
    },
    "Signal beside noise": {
        "noise alone, with two standard errors": [
            "Margin",
            ["signal/noise_alone", "signal/noise_alone_low", "signal/noise_alone_high"],
        ],
        "walk and noise alone": ["Multiline", ["signal/walk$", "signal/noise_alone$"]],
        "ratio (1 is pure noise)": ["Multiline", ["signal/walk_ratio", "signal/step_ratio"]],
        "agreement of steps (pure noise stays within 5)": ["Multiline", ["signal/alignment"]],
    },
    "Speed": {"per second": ["Multiline", ["speed/.*"]]},
}


class Tracker:
    """TensorBoard events of one stage in ``folder`` (a folder of its own for every stage).

    A tracker that starts at step s takes back what earlier ones showed of steps >= s.

    Formal guarantees: a tag outside the tables of this module raises PrivacyError on every
    worker before anything is written. Entries carry their step in place of the clock time, because
    the time that a private step takes tells how many records it drew.
    """

    def __init__(self, folder: Path, worker: Worker, *, start_step: int):
        self._writer: SummaryWriter | None = None
        if worker.rank == 0:
            self._writer = SummaryWriter(str(folder), purge_step=start_step, flush_secs=10)
            self._writer.add_custom_scalars(LAYOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalar(self, tag: str, value: float, step: int) -> None:
        if tag not in SCALARS and not tag.startswith(PUBLIC):
            raise _refusal("scalar", tag)
        if self._writer:
            self._writer.add_scalar(tag, float(value), step, walltime=_time_of(step))

    def images(self, tag: str, images_BCHW: Tensor, step: int) -> None:
        """A grid of images in [0, 1]: samples of released weights, or public images."""
        if not tag.startswith((SAMPLES, PUBLIC)):
            raise _refusal("image", tag)
        if self._writer:
            shown = images_BCHW.detach().float().cpu().clamp(0, 1)
            self._writer.add_images(tag, shown, step, walltime=_time_of(step))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        if tag not in TEXTS and not tag.startswith(PUBLIC):
            raise _refusal("text", tag)
        if self._writer:
            self._writer.add_text(tag, text, step, walltime=_time_of(step))

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Settings of the run, by dotted name. Never the key. Other than numbers: as text."""
        for name in values:
            if name.endswith("key"):
                raise _refusal("setting", name)
        if self._writer:
            plain = {
                name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in values.items()
            }
            for summary in hparams_summary(plain, {"privacy/epsilon": 0.0}):
                self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class UnsafeTracker:
    """TensorBoard events of raw private values, for runs without a privacy claim.

    Formal guarantees: writes only into a folder that no other user may enter.
    Raises: PrivacyError for any other folder.
    """

    def __init__(self, folder: Path, worker: Worker, *, start_step: int):
        self._writer: SummaryWriter | None = None
        if folder.parent.name != "private" or _is_open(folder.parent):
            raise PrivacyError(
                f"Raw private values in {folder}: expected a folder below private/ with mode 0700."
            )
        if worker.rank == 0:
            with private_files():
                self._writer = SummaryWriter(str(folder), purge_step=start_step, flush_secs=10)

    def scalar(self, tag: str, value: float, step: int) -> None:
        if self._writer:
            self._writer.add_scalar(tag, float(value), step)
            self._writer.flush()


def _is_open(folder: Path) -> bool:
    return bool(stat.S_IMODE(folder.stat().st_mode) & 0o077)


def _time_of(step: int) -> float:
    """The "clock time" of an entry: seconds since 2000-01-01, one per step."""
    return 946684800.0 + step


class Progress:
    """Where a stage stands, for the driver's bar: worker 0 writes ``path``, at most 5 times/s.

    ``total_steps`` must be public: give per cent where the count of private records would show.
    """

    def __init__(self, path: Path, *, worker: Worker):
        self._path = path
        self._writes = worker.rank == 0
        self._state: dict[str, Any] = {}
        self._started = self._written = 0.0
        self._first_step = 0

    def start(self, what: str, total_steps: int, *, step: int = 0) -> None:
        """Begin ``what``; ``step`` steps were done before (a resumed stage)."""
        self._started = time.monotonic()
        self._first_step = step
        self._state = {"what": what, "total_steps": total_steps, "facts": {}}
        self._write(step, "running")

    def advance(self, step: int, **public_facts: float) -> None:
        """``step`` steps are done. Facts: names of FACTS only. Raises: PrivacyError."""
        for name in public_facts:
            if name not in FACTS:
                raise _refusal("progress fact", name)
        self._state["facts"].update(public_facts)
        self._state["step"] = step
        if time.monotonic() - self._written >= _WRITE_EVERY_S:
            self._write(step, "running")

    def say(self, line: str) -> None:
        """A line about public facts only, which the driver prints below the bar."""
        self._state.setdefault("lines", []).append(line)

    def done(self) -> None:
        self._write(self._state["total_steps"], "done")

    def _write(self, step: int, state: str) -> None:
        now = self._written = time.monotonic()
        passed, left = now - self._started, self._state["total_steps"] - step
        pace = passed / (step - self._first_step) if step > self._first_step else None
        self._state |= {
            "step": step,
            "state": state,
            "seconds": round(passed, 1),
            "seconds_left": None if pace is None else round(pace * left),
        }
        if self._writes:
            part = self._path.with_suffix(".part")
            with private_files():
                part.write_text(json.dumps(self._state))
            os.replace(part, self._path)


@contextmanager
def show_progress(*paths: Path, titles: Mapping[Path, str] | None = None) -> Iterator[None]:
    """In the driver: draw the progress in ``paths`` on stderr while the body runs.

    A bar with the time left on a terminal, else a line when something begins or ends and every
    15 s. What ``paths`` say before the body begins is old and not shown. A path with one of
    ``titles`` goes under that name, without what it has to say.
    """
    console = rich.console.Console(file=sys.stderr)
    view = _Bars(console) if console.is_terminal else _Lines()
    stop = threading.Event()
    seen = {path: _stamp(path) for path in paths}
    thread = threading.Thread(target=_follow, args=(seen, titles or {}, view, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        view.close()


@dataclass(frozen=True)
class _Stamp:
    inode: int
    time_ns: int


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(found.st_ino, found.st_mtime_ns)


def _follow(
    seen: dict[Path, _Stamp | None],
    titles: Mapping[Path, str],
    view: _Bars | _Lines,
    stop: threading.Event,
) -> None:
    stopped = False
    while not stopped:
        stopped = stop.wait(_POLL_EVERY_S)  # and once more after the end
        for path, last in seen.items():
            stamp = _stamp(path)
            if stamp is None or stamp == last:
                continue
            seen[path] = stamp
            try:
                state = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if path in titles:
                state |= {"what": titles[path], "lines": []}
            view.show(state)


class _Bars:
    def __init__(self, console: rich.console.Console):
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<12}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._progress.start()
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._said: set[str] = set()

    def show(self, state: Mapping[str, Any]) -> None:
        what = state["what"]
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=state["total_steps"], note="")
        for line in _new_lines(state, self._said):
            self._progress.console.print(line, soft_wrap=True, markup=False)
        self._progress.update(
            self._tasks[what],
            total=state["total_steps"],
            completed=state["step"],
            note=_note(state),
        )

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self) -> None:
        self._shown: tuple[str, str] | None = None
        self._said: set[str] = set()
        self._time = 0.0

    def show(self, state: Mapping[str, Any]) -> None:
        for line in _new_lines(state, self._said):
            print(line, file=sys.stderr, flush=True)
        now, what = time.monotonic(), (state["what"], state["state"])
        if what == self._shown and now - self._time < _LINE_EVERY_S:
            return
        self._shown, self._time = what, now
        steps = f"{state['step']}/{state['total_steps']}"
        print(f"{state['what']} {steps} {_note(state)}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _new_lines(state: Mapping[str, Any], said: set[str]) -> list[str]:
    """What ``state`` says for the first time; it is added to ``said``."""
    lines = [line for line in state.get("lines", []) if line not in said]
    said.update(lines)
    return lines


def _note(state: Mapping[str, Any]) -> str:
    """``2:05 left, epsilon 3.21``: the time, then the facts."""
    facts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in state["facts"].items()]
    if state["state"] == "done":
        return ", ".join([f"done in {_clock(state['seconds'])}", *facts])
    left = state["seconds_left"]
    return ", ".join([*([] if left is None else [f"{_clock(left)} left"]), *facts])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _refusal(kind: str, name: str) -> PrivacyError:
    return PrivacyError(
        f"Refused to show the {kind} '{name}': it is not in the list of public quantities "
        "(runtime/tracking.py). Show it under 'public/' only if no private data went into it."
    )
