"""One loop for training on *public* data: optimizer, schedule, average, checkpoints, progress.

``finetune`` never uses this module: here gradients are averaged over workers and losses are shown.
Shapes: B rows of this worker.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_dist.config import RunConfig, refuse_other_settings
from dpldm_dist.errors import ConfigError, RunError
from dpldm_dist.models.ema import EMA
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import StopRequest
from dpldm_dist.runtime.strategy import public_model
from dpldm_dist.runtime.tracking import Progress, Tracker
from dpldm_dist.runtime.worker import Worker

LEG_STEPS = 200
"""Steps between checkpoints. Data that is streamed is ordered anew for each leg, so that a resumed
training sees what an unbroken one would have seen."""


class PublicTraining:
    """AdamW with warm-up and cosine decay, clipped gradients, an average of the weights.

    ``objective`` answers losses of rows. Every step's loss is divided by the rows of all workers,
    so that their number does not change the update beyond rounding. A new object goes on from the
    last checkpoint in ``public/checkpoints/<what>``.
    Raises: RunError if that checkpoint was made with other ``settings``.
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        what: str,
        steps: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        ema_decay: float,
        settings: dict[str, Any],
        run: RunConfig,
        worker: Worker,
    ):
        if batch < worker.world_size:
            raise ConfigError(
                f"The batch of the {what} is {batch}: expected at least one row for each of "
                f"{worker.world_size} workers."
            )
        self.what, self.steps, self.batch = what, steps, batch
        self._worker = worker
        self._settings = settings
        self._model = public_model(objective, weight_decay=weight_decay, run=run, worker=worker)
        self.module = self._model.module
        self._parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self._learning_rate = learning_rate
        self._ema = EMA(self._model.followed(), ema_decay)
        directory, folder = RunDir(run.dir), what.replace(" ", "-")
        self._stop = StopRequest(directory, worker)
        self._checkpoints = Checkpoints(checkpoint_folder(directory, what), keep=1)
        self.step = self._restore(checkpoint_folder(directory, what))
        self._progress = Progress(directory.progress, worker=worker)
        self._tracker = Tracker(directory.tensorboard / folder, worker, start_step=self.step)
        self._progress.start(f"training the {what}", steps, step=self.step)

    @property
    def my_rows(self) -> slice:
        """This worker's rows of a batch over all workers."""
        rank, world_size = self._worker.rank, self._worker.world_size
        return slice(self.batch * rank // world_size, self.batch * (rank + 1) // world_size)

    def legs(self) -> Iterator[tuple[int, int]]:
        """(number, steps) of the legs that are left; a checkpoint is written after each."""
        while self.step < self.steps:
            left_of_leg = LEG_STEPS - self.step % LEG_STEPS
            yield self.step // LEG_STEPS, min(left_of_leg, self.steps - self.step)
            self._save()

    def update(self, loss_B: Tensor, shown_B: Tensor) -> None:
        """One step from this worker's rows; the mean of ``shown_B`` is what is shown.

        Raises: RunError if the training diverged; SavedAndStopped if the run is asked to stop.
        """
        rate = self._learning_rate * rate_factor(self.step, self.steps)
        # Gradients are averaged over workers: this makes it the mean over the whole batch.
        self._model.step(loss_B.sum() * (self._worker.world_size / self.batch), rate)
        self._ema.update(self._model.followed())
        self.step += 1
        self._show(shown_B, rate)
        if self.step < self.steps and self._stop.agreed():
            self._save()
            raise self._stop.leave(f"{self.step} steps of the {self.what}")

    def finish(self) -> None:
        """Put the averaged weights into the model and close the books."""
        self._model.finish(self._model.whole(self._ema.averages))
        self._progress.done()
        self._tracker.close()

    def _show(self, shown_B: Tensor, rate: float) -> None:
        if self.step % 10 and self.step != self.steps:
            return self._progress.advance(self.step)
        loss = float(shown_B.detach().mean())
        if not math.isfinite(loss):
            raise RunError(
                f"The training of the {self.what} diverged at step {self.step}: lower its "
                "learning_rate and use a new run.dir."
            )
        self._progress.advance(self.step, public_loss=loss)
        self._tracker.scalar(f"public/{self.what} loss".replace(" ", "_"), loss, self.step)
        self._tracker.scalar("optimizer/learning_rate", rate, self.step)

    def _save(self) -> None:
        tensors = self._tensors()  # every worker: the model may be spread over them
        if self._worker.rank == 0:
            self._checkpoints.save(self.step, tensors, {"settings": self._settings})
        self._worker.collective.barrier()
        self._worker.checkpointed(self.step)

    def _tensors(self) -> dict[str, Tensor]:
        """The same for any strategy and number of workers."""
        model, averages = self._model, self._ema.state()
        updates = averages.pop("ema_updates")
        parts = {
            "parameter": model.whole(model.followed()),
            "ema": {**model.whole(averages), "ema_updates": updates},
            "optimizer": model.optimizer_state(),
        }
        return {
            f"{kind}/{name}": value.detach()
            for kind, tensors in parts.items()
            for name, value in tensors.items()
        }

    @torch.no_grad()
    def _restore(self, folder: Path) -> int:
        saved = self._checkpoints.latest()
        if saved is None:
            return 0
        refuse_other_settings(saved.facts["settings"], self._settings, folder)
        averages = _below("ema/", saved.tensors)
        updates = averages.pop("ema_updates")
        self._ema.load({**self._model.parts(averages), "ema_updates": updates})
        self._model.load(_below("parameter/", saved.tensors), _below("optimizer/", saved.tensors))
        return saved.step


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 50 steps (or a twentieth), then half a cosine to zero."""
    warm_up = max(1, min(50, steps // 20))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def checkpoint_folder(run: RunDir, what: str) -> Path:
    """Where the checkpoints of a public training lie."""
    return run.public / "checkpoints" / what.replace(" ", "-")


def remove_checkpoints(run: RunDir, what: str) -> None:
    """Remove what a finished training no longer needs."""
    shutil.rmtree(checkpoint_folder(run, what), ignore_errors=True)


def shuffled(total: int, start: int, count: int) -> np.ndarray:
    """Numbers int64 (count,) in [0, total): positions ``start`` and on of endless shuffled passes.

    A function of its arguments alone, so that neither a restart nor the number of workers changes
    the order of public data.
    """
    positions = np.arange(start, start + count)
    numbers = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // total):
        inside = positions // total == epoch
        numbers[inside] = _order(total, int(epoch))[positions[inside] % total]
    return numbers


@lru_cache(maxsize=2)
def _order(total: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((0, epoch)).permutation(total)


def step_generator(purpose: int, step: int) -> torch.Generator:
    """Public randomness of one step: a resumed training draws what an unbroken one draws."""
    return torch.Generator().manual_seed((purpose << 40) + step)
