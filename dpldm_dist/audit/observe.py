"""What the runs of an audit let an attacker see: their checkpoints, ledgers and released tables.

Nothing is taken from inside of the trainer. Shapes: M canaries, T steps of the noisy run, S steps
after a restart, P trainable parameters in the order of the sum, N quiet coordinates looked at one
by one, K slices of all quiet ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load_file

from dpldm_dist.audit.point import Point
from dpldm_dist.config import Config
from dpldm_dist.errors import RunError
from dpldm_dist.privacy.ledger import LedgerSummary, read_ledger
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.stages.mechanism import plan_of, record_bound

TABLE = "embedder.delta.weight"
LEAST_CONTRIBUTION = 0.9  # of what clipping leaves in a canary's own rows
_LOOKED_AT = 1 << 15  # coordinates of a step that are kept
_SLICES = 64


@dataclass(frozen=True, eq=False)
class Reference:
    """One step without noise in which every canary took part once, in clip norms: what each added
    to its own rows, and the norm of what they added elsewhere together."""

    own_MD: np.ndarray
    outside: float


@dataclass(frozen=True, eq=False)
class NoisyRun:
    """A run with noise. Changes are in coordinates that no record has for its own, and in units of
    the claimed noise.

    ``blank_TN``: rows of classes without records. ``squares_TK``: sums of squares over slices of
    all quiet coordinates, of ``lengths_K``. ``first_P``: the whole first step, 0 where records are.
    ``moved_MD``: how far the released rows of the canaries moved, in clip norms.
    """

    blank_TN: np.ndarray
    squares_TK: np.ndarray
    lengths_K: np.ndarray
    first_P: np.ndarray
    moved_MD: np.ndarray
    ledger: LedgerSummary


@dataclass(frozen=True, eq=False)
class Selection:
    """Small batches without noise: who took part, and what each draw added, in clip norms."""

    drawn_TN: np.ndarray
    norms: np.ndarray


@dataclass(frozen=True, eq=False)
class Observations:
    """Everything that the verdict is made of: one field per leg, and public numbers.

    ``selection_rate``, ``places``: of the leg in which sampling is watched, see ``Point``.
    ``least``, ``most``: what a canary must and may add to the gradient's coordinates, in clip
    norms. ``included_M``: the coins of the auditor.
    """

    plan: PrivacyPlan
    selection_rate: float
    places: int
    restart: int
    least: float
    most: float
    included_M: np.ndarray
    reference: Reference
    noisy: NoisyRun
    other_weights: NoisyRun
    other_data: NoisyRun
    selection: Selection

    @property
    def scores_M(self) -> np.ndarray:
        """Projection of each released row's move on the canary's own direction, in draws of it."""
        own_MD = self.reference.own_MD
        square_M = np.square(own_MD).sum(1)
        return (self.noisy.moved_MD * own_MD).sum(1) / np.where(square_M > 0, square_M, 1.0)


def observe(legs: Mapping[str, Config], point: Point, included_M: np.ndarray) -> Observations:
    """Read the finished runs ``legs``. Raises: RunError if one of them is not complete."""
    plan = plan_of(legs["noisy"], records=point.canaries)
    bound = record_bound(plan, parameters=sum(point.sizes.values()))
    read = {name: read_leg(name, leg, point, included_M) for name, leg in legs.items()}
    return Observations(
        plan=plan,
        selection_rate=point.selection_rate,
        places=point.places,
        restart=point.restart,
        least=LEAST_CONTRIBUTION * point.own_share * bound.gradient / plan.clip_norm,
        most=bound.gradient / plan.clip_norm,
        included_M=included_M,
        **{name.replace("-", "_"): found for name, found in read.items()},
    )


def read_leg(
    name: str, config: Config, point: Point, included_M: np.ndarray
) -> Reference | NoisyRun | Selection:
    """What one leg left. Raises: RunError if it is not complete."""
    if name == "reference":
        return _reference(config, point)
    if name == "selection":
        return _selection(config, point)
    steps = point.steps if name == "noisy" else point.steps - point.restart
    return _noisy_run(config, point, included_M, steps=steps)


def _weights(config: Config, point: Point) -> Iterator[dict[str, np.ndarray]]:
    """Trainable parameters after each step, from the first kept one on, in the order of the sum."""
    kept: dict[int, dict[str, np.ndarray]] = {}
    run = RunDir(config.run.dir)
    for saved in Checkpoints(run.checkpoints, keep=1).history():
        at = {name: saved.tensors[f"parameter/{name}"].numpy() for name in point.parameters}
        for step in [step for step in kept if step < saved.step]:
            yield kept.pop(step)  # a later one of the same step would have replaced it
        kept[saved.step] = at
    yield from kept.values()


def _changes(
    config: Config, point: Point, *, steps: int, unit: float
) -> Iterator[dict[str, np.ndarray]]:
    """Minus the weight change of each of ``steps`` steps, over ``unit``. Raises: RunError."""
    before, count = None, 0
    for after in _weights(config, point):
        if before is not None:
            yield {n: (before[n].astype(np.float64) - after[n]) / unit for n in point.parameters}
            count += 1
        before = after
    if count != steps:
        raise RunError(
            f"The run in {config.run.dir} left {count} steps: expected {steps}. Give the same "
            "command again."
        )


def _flat(change: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([part.reshape(-1) for part in change.values()])


def _reference(config: Config, point: Point) -> Reference:
    (change,) = _changes(config, point, steps=1, unit=1.0)
    table = change.pop(TABLE)
    null_row = np.square(table[point.canaries :]).sum()
    elsewhere = sum(float(np.square(part).sum()) for part in change.values())
    return Reference(table[: point.canaries], float(np.sqrt(elsewhere + null_row)))


def _selection(config: Config, point: Point) -> Selection:
    norms_TN = np.array(
        [
            np.linalg.norm(change[TABLE][: point.selection_records], axis=1)
            for change in _changes(config, point, steps=point.selection_steps, unit=point.step)
        ]
    )
    drawn_TN = norms_TN > 0
    return Selection(drawn_TN, norms_TN[drawn_TN])


def _quiet(point: Point, included_M: np.ndarray) -> np.ndarray:
    """Which coordinates no included canary has for its own, bool (P,)."""
    width = point.rows_NTD[0].numel()
    loud_rows = np.append(included_M, False).repeat(width)
    sizes = {TABLE: ~loud_rows}
    return np.concatenate(
        [sizes.get(name, np.ones(size, bool)) for name, size in point.sizes.items()]
    )


def _noisy_run(config: Config, point: Point, included_M: np.ndarray, *, steps: int) -> NoisyRun:
    sigma = plan_of(config, records=point.canaries).noise_multiplier
    run = RunDir(config.run.dir)
    return noisy_run(
        _changes(config, point, steps=steps, unit=point.step * sigma),
        point,
        included_M,
        moved_MD=_moved(run, point),
        ledger=read_ledger(run.ledger),
    )


def noisy_run(
    changes: Iterable[Mapping[str, np.ndarray]],
    point: Point,
    included_M: np.ndarray,
    *,
    moved_MD: np.ndarray,
    ledger: LedgerSummary,
) -> NoisyRun:
    """What is kept of ``changes``, the weight changes of each step by name, over the noise."""
    blank_rows, quiet_P = np.flatnonzero(~included_M), _quiet(point, included_M)
    places = np.flatnonzero(quiet_P)
    bounds = np.linspace(0, len(places), min(_SLICES, len(places)) + 1).astype(int)
    blank, squares, first = [], [], None
    for change in changes:
        rows = change[TABLE][blank_rows].reshape(-1)
        blank.append(rows[:: max(1, len(rows) // _LOOKED_AT)])
        whole = np.where(quiet_P, _flat(change), 0.0)
        squares.append(np.add.reduceat(np.square(whole[places]), bounds[:-1]))
        first = whole if first is None else first
    return NoisyRun(np.array(blank), np.array(squares), np.diff(bounds), first, moved_MD, ledger)


def _moved(run: RunDir, point: Point) -> np.ndarray:
    table = load_file(run.released_model / "conditioning" / "rows.safetensors")["rows"]
    moved = (point.rows_NTD.numpy().astype(np.float64) - table)[: point.canaries]
    return moved.reshape(point.canaries, -1) / (point.grad_scale * point.step)
