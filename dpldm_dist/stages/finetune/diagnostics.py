"""Raw private values of every step, for ``run.unsafe_diagnostics`` only: never part of a release.

The run has no privacy claim, and everything that is written lies below ``private/``.

Shapes: B records of a microbatch, H bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpldm_dist.config import Config
from dpldm_dist.privacy.gradients import RawRecords
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.tracking import UnsafeTracker
from dpldm_dist.runtime.worker import Worker

QUANTILES = {"gradient_norm_10": 0.1, "gradient_norm_50": 0.5, "gradient_norm_90": 0.9}
_BINS, _PER_OCTAVE, _LOWEST = 512, 8, -32  # of gradient norms over clip_norm, by octaves


class Diagnostics:
    """Loss, batch size, clip fraction and gradient norms of each step, without noise.

    Off unless the config asks for it; then ``watch`` is None and ``show`` does nothing.
    """

    def __init__(
        self, config: Config, plan: PrivacyPlan, run: RunDir, worker: Worker, *, start_step: int
    ) -> None:
        self._tracker: UnsafeTracker | None = None
        if config.run.unsafe_diagnostics:
            self._tracker = UnsafeTracker(run.diagnostics, worker, start_step=start_step)
        self._clip_norm = plan.clip_norm
        self._worker = worker
        self._begin()

    @property
    def watch(self) -> Callable[[RawRecords], None] | None:
        """What the gradient engine shows its microbatches to."""
        return None if self._tracker is None else self._see

    def show(self, step: int) -> None:
        """Write the values of the step that ended, over all workers. All workers call it."""
        if self._tracker is None:
            return
        self._worker.collective.sum_(self._sums)
        self._worker.collective.sum_(self._norms_H)
        records, not_finite, loss, clipped = self._sums.tolist()
        values = {"records": records, "not_finite": not_finite}
        if records > not_finite:
            counted = records - not_finite
            values |= {"loss": loss / counted, "clip_fraction": clipped / counted}
            values |= {name: self._quantile(share) for name, share in QUANTILES.items()}
        for name, value in values.items():
            self._tracker.scalar(f"raw/{name}", value, step)
        self._begin()

    def _see(self, records: RawRecords) -> None:
        counted_B = records.factor_B > 0
        clipped_B = counted_B & (records.factor_B < 1)
        loss = records.loss_B[counted_B].sum()
        missed_B = records.mask_B & ~counted_B
        self._sums += torch.stack([records.mask_B.sum(), missed_B.sum(), loss, clipped_B.sum()])
        octave_B = torch.log2(records.norm_B[counted_B] / self._clip_norm) - _LOWEST
        bin_B = (octave_B * _PER_OCTAVE).clamp(0, _BINS - 1).long()
        self._norms_H += torch.bincount(bin_B, minlength=_BINS)

    def _quantile(self, share: float) -> float:
        """Middle of the bin that holds it: within 5 %."""
        total_H = self._norms_H.cumsum(0)
        found = int(torch.searchsorted(total_H, share * float(total_H[-1])))
        return self._clip_norm * 2.0 ** ((found + 0.5) / _PER_OCTAVE + _LOWEST)

    def _begin(self) -> None:
        device = self._worker.device
        self._sums: Tensor = torch.zeros(4, dtype=torch.float64, device=device)
        self._norms_H = torch.zeros(_BINS, dtype=torch.int64, device=device)
