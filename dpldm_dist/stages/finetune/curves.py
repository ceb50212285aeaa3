"""What the noisy sums tell along the run: training loss with error bars, and signal beside noise.

Released numbers only: all of it is post-processing of noisy sums that the ledger charged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpldm_dist.config import Config
from dpldm_dist.data.files import write_file
from dpldm_dist.privacy.optimizer import NoisyStep
from dpldm_dist.privacy.plan import TELEMETRY_NUMBERS, PrivacyPlan
from dpldm_dist.privacy.signal import MOST_OF_NOISE, RandomWalk, Signal
from dpldm_dist.privacy.telemetry import LOSS_BOUND, WINDOW, Telemetry, TelemetryHistory
from dpldm_dist.runtime.strategy import own_slice, shares_update
from dpldm_dist.runtime.tracking import Tracker
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.mechanism import telemetry_query

ROWS = 500  # of the released file, at most
QUANTITIES = ("loss", "records", "clip_fraction")


class Curves:
    """Telemetry and random walk of a run; part of the training state.

    A run without noise has no walk, and one with ``privacy.telemetry_share = 0`` no telemetry.
    ``worker``: of a run whose workers may share the update; then each keeps its part of the walk.
    """

    def __init__(
        self,
        config: Config,
        plan: PrivacyPlan,
        parameters: Mapping[str, nn.Parameter],
        worker: Worker | None = None,
    ) -> None:
        count = sum(parameter.numel() for parameter in parameters.values())
        query = telemetry_query(config, plan, parameters=count)
        self._share = plan.telemetry_share
        self._steps = 0
        self._history = None if query is None else TelemetryHistory(query)
        self._walk = None
        if not config.run.unsafe_no_noise:
            part: dict[str, Any] = {}
            if worker is not None and shares_update(count, run=config.run, worker=worker):
                mine = own_slice(count, extra=self.extra, worker=worker)
                part = {"mine": slice(mine.start, mine.stop), "sum_": worker.collective.sum_}
            self._walk = RandomWalk(count, step_std=plan.noise_multiplier / plan.divisor, **part)

    @property
    def extra(self) -> int:
        """Coordinates of a sum behind its gradient."""
        return 0 if self._history is None else TELEMETRY_NUMBERS

    def add(self, noisy: NoisyStep) -> None:
        """What one more step released."""
        self._steps += 1
        if self._history is not None:
            self._history.add(noisy.extra)
        if self._walk is not None:
            self._walk.add(noisy.mean_P)

    def show(self, tracker: Tracker) -> None:
        """The last step on TensorBoard, beside the mean over the last steps."""
        if self._history is not None:
            for name, window in (("", 1), ("_mean", WINDOW)):
                for tag, value in _numbers(self._history.over(window), name).items():
                    tracker.scalar(f"private/{tag}", value, self._steps)
        if self._walk is not None:
            for tag, value in _signal_numbers(self._walk.signal()).items():
                tracker.scalar(f"signal/{tag}", value, self._steps)

    def hint(self) -> str | None:
        """A line for the user of a run that learned nothing but noise; else None.

        That is one whose steps agree no more than noise lets them, and whose loss did not fall.
        """
        if self._walk is None or self._steps < 2 or not self._walk.signal().is_pure_noise:
            return None
        if self._fall_of_loss() > MOST_OF_NOISE:
            return None
        return (
            f"{self.in_words()} Raise finetune.batch, finetune.steps or privacy.epsilon, or train "
            "fewer parameters."
        )

    def in_words(self) -> str | None:
        """What training did, for the report. None without noise, or before the second step."""
        if self._walk is None or self._steps < 2:
            return None
        words = self._walk.signal().in_words()
        if self._fall_of_loss() > MOST_OF_NOISE:
            words += f" The training loss fell by {self._fall_of_loss():.0f} standard errors."
        return words

    def write(self, path: Path) -> None:
        """The curves as a JSON file of at most 500 rows, for the report and for plots."""
        stride = -(-self._steps // ROWS) or 1
        steps = sorted({*range(stride, self._steps + 1, stride), self._steps} - {0})
        rows = [self._row(step) for step in steps]
        text = json.dumps(self._facts() | {"rows": rows}, indent=1, allow_nan=False)
        write_file(path, text.encode() + b"\n", private=False)

    def state(self) -> dict[str, Tensor]:
        """Everything that ``load`` needs."""
        tensors = {} if self._history is None else {"telemetry": self._history.state()}
        if self._walk is not None:
            tensors |= {f"walk/{name}": tensor for name, tensor in self._walk.state().items()}
        return tensors

    def load(self, state: Mapping[str, Tensor], *, steps: int) -> None:
        """Go on from the ``state()`` after ``steps`` steps."""
        self._steps = steps
        if self._history is not None:
            self._history.load(state["telemetry"])
        if self._walk is not None:
            names = self._walk.state()
            self._walk.load({name: state[f"walk/{name}"] for name in names})

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"telemetry_share": self._share}
        if self._history is not None:
            errors = asdict(self._history.query.errors)
            facts |= {"loss_bound": LOSS_BOUND, "window": WINDOW, "standard_errors": errors}
        return facts | {"signal": self.in_words()}

    def _fall_of_loss(self) -> float:
        """From the first steps to the last, in standard errors; 0 where it was not released."""
        return 0.0 if self._history is None else self._history.fall_of_loss()

    def _row(self, steps: int) -> dict[str, float]:
        row: dict[str, float] = {"step": steps}
        if self._history is not None:
            row |= _numbers(self._history.over(WINDOW, steps=steps), "")
        if self._walk is not None:
            row |= _signal_numbers(self._walk.signal(steps))
        return row


def _numbers(telemetry: Telemetry, suffix: str) -> dict[str, float]:
    """``loss``, ``loss_low``, ``loss_high``, ...: values and two standard errors to both sides."""
    numbers = {}
    for quantity in QUANTITIES:
        estimate = getattr(telemetry, quantity)
        name = quantity + suffix
        numbers |= {
            name: estimate.value,
            f"{name}_low": estimate.low,
            f"{name}_high": estimate.high,
        }
    return numbers


def _signal_numbers(signal: Signal) -> dict[str, float]:
    return {
        "walk": signal.walk,
        "noise_alone": signal.noise_alone,
        "noise_alone_low": signal.noise_alone * (1.0 - 2.0 * signal.error),
        "noise_alone_high": signal.noise_alone * (1.0 + 2.0 * signal.error),
        "walk_ratio": signal.ratio,
        "step_ratio": signal.step_ratio,
        "alignment": signal.alignment,
    }
