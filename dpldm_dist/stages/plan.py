"""``dpldm plan``: what a config would cost, before any data is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import rich.box
import rich.console
import rich.markup
import rich.table

from dpldm_dist.config import Config
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.errors import ConfigError
from dpldm_dist.privacy.accounting import (
    GaussianEvent,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_curve,
    epsilon_prv,
    epsilon_rdp,
)
from dpldm_dist.privacy.dataset_ledger import (
    Answer,
    DatasetSummary,
    Share,
    read_dataset_ledger,
)
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.privacy.telemetry import LOSS_BOUND
from dpldm_dist.runtime.rundir import RunDir, dataset_budget_file
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.clusters import cluster_tables
from dpldm_dist.stages.mechanism import plan_of, request_of, require_sections, telemetry_query
from dpldm_dist.stages.shapes import shapes_of

POINTS = 5  # of the curve, besides the start and the reserve
# A trainable parameter beside the model itself: integer sum and its noise (8 bytes each), gradient,
# two moments of Adam, average, sum of all steps and of the last ones (4 bytes each).
_BYTES_PER_PARAMETER = 8 + 8 + 4 + 2 * 4 + 4 + 2 * 4

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cost:
    """Epsilon of a plan when all its steps are done, at its delta, by each accountant."""

    pld: float
    prv: float
    rdp: float
    replace_one: float

    @property
    def agree(self) -> bool:
        """Whether PRV confirms PLD (within 0.5 % and 0.005) and RDP lies above."""
        near = not math.isfinite(self.prv) or abs(self.prv - self.pld) <= 0.005 * self.pld + 0.005
        return near and self.rdp >= self.pld


def plan(config: Config, worker: Worker, *, cluster: bool = False) -> Manifest | None:
    """Print the mechanism that ``config`` describes and what it costs. Writes nothing: None.

    With ``cluster``: also what a step would take on clusters of GPUs, and a proposal where
    ``cluster.gpu_hours`` says what may be spent.

    Formal guarantees: touches no data; the number of records is the declared one. Where the data
    set has a budget for all its runs, that file is read.
    Raises: ConfigError if ``privacy.records`` is not set; PrivacyError if the budget cannot be met.
    """
    mechanism = mechanism_of(config)
    console = rich.console.Console()
    _show(console, "Mechanism", _mechanism_rows(config, mechanism))
    cost = cost_of(mechanism)
    _show(
        console,
        f"Epsilon at delta = {mechanism.delta:g} when all is done",
        _cost_rows(mechanism, cost),
    )
    _show(console, "Epsilon along the run", _curve_rows(mechanism))
    if mechanism.statistics_events:
        _show(console, "The release of latent statistics", _statistics_rows(mechanism))
    _show_dataset_budget(console, config, mechanism)
    _show(console, "Memory of the private step", _memory_rows(config))
    if cluster:
        for title, rows in cluster_tables(config, mechanism):
            _show(console, title, rows, wrap=True)
    if not cost.agree:
        console.print("The accountants disagree: report this config as a bug, and do not run it.")
    return None


def describe(config: Config, *, cluster: bool = False) -> list[str]:
    """What ``plan`` would do, for --dry-run."""
    lines = ["reads   the config only", "prints  noise, epsilon along the run and memory"]
    path = dataset_budget_file(config)
    lines += ["prints  predictions for clusters, not measured"] if cluster else []
    return [*lines, f"reads   {path} (the budget of the data set)"] if path.exists() else lines


def mechanism_of(config: Config) -> PrivacyPlan:
    """The plan of ``config`` for its declared records. Raises: ConfigError, PrivacyError."""
    require_sections(config)
    if config.privacy.records is None:
        raise ConfigError(
            "privacy.records is not set: plan reads no data, so set it to the number of private "
            "records that you declare to the public."
        )
    return plan_of(config, records=config.privacy.records)


def cost_of(mechanism: PrivacyPlan) -> Cost:
    """Epsilon of all steps of ``mechanism``, its reserve left unused, by each accountant."""
    events = [replace(mechanism.step_event, count=mechanism.steps), *mechanism.statistics_events]
    delta = mechanism.accounting_delta
    return Cost(
        pld=epsilon(events, delta),
        prv=epsilon_prv(events, delta),
        rdp=epsilon_rdp(events, delta),
        replace_one=epsilon(events, delta, relation="replace_one"),
    )


def trainable_parameters(config: Config) -> int | None:
    """Parameters that would learn, besides rows of classes; None if the model is not ours."""
    if config.model.init is not None or config.autoencoder.init is not None:
        return None
    _, parameters = shapes_of(config)
    return sum(p.numel() for name, p in parameters.items() if not name.startswith("embedder"))


def _mechanism_rows(config: Config, mechanism: PrivacyPlan) -> Rows:
    calibrated = "calibrated" if config.privacy.noise_multiplier is None else "given"
    reserve = f", and {mechanism.reserve_steps} in reserve" if mechanism.reserve_steps else ""
    return [
        ("records declared (unit)", f"{mechanism.records} ({mechanism.unit})"),
        ("budget", f"epsilon {mechanism.epsilon:g} at delta {mechanism.delta:g}"),
        ("steps", f"{mechanism.steps}{reserve}"),
        ("sample rate", f"{mechanism.sample_rate:.6g}"),
        ("expected records per step", f"{mechanism.divisor:.6g}"),
        ("most records in a step", f"{mechanism.batch_cap} (in {mechanism.lanes} lanes)"),
        ("delta kept for that bound", f"{mechanism.overflow_delta:.3g}"),
        ("noise multiplier", f"{mechanism.noise_multiplier:.4f} ({calibrated})"),
        ("clip norm", f"{mechanism.clip_norm:g}"),
        ("draws per record (free)", f"{mechanism.draws}"),
        ("training loss of a step is known to", _telemetry_error(config, mechanism)),
    ]


def _telemetry_error(config: Config, mechanism: PrivacyPlan) -> str:
    query = telemetry_query(config, mechanism, parameters=trainable_parameters(config) or 1)
    if query is None:
        return "not released"
    share = mechanism.telemetry_share
    noise = (1.0 - share) ** -0.5 - 1.0
    return f"± {2 * query.errors.loss:.2g} of 0 to {LOSS_BOUND:g} (for {noise:.1%} more noise)"


def _cost_rows(mechanism: PrivacyPlan, cost: Cost) -> Rows:
    return [
        ("add or remove one record, PLD (number of record)", f"{cost.pld:.4f}"),
        ("the same by PRV (cross-check, its error added)", _number(cost.prv)),
        ("the same by RDP (cross-check, looser)", _number(cost.rdp)),
        ("replace one record by another, PLD", f"{cost.replace_one:.4f}"),
    ]


def _curve_rows(mechanism: PrivacyPlan) -> Rows:
    last = mechanism.steps
    steps = sorted({0, *(round(last * part / POINTS) for part in range(1, POINTS + 1))})
    steps += [last + mechanism.reserve_steps] if mechanism.reserve_steps else []
    curve = epsilon_curve(
        mechanism.step_event,
        others=mechanism.statistics_events,
        delta=mechanism.accounting_delta,
        steps=steps,
    )
    rows = []
    for count, spent in zip(steps, curve, strict=True):
        label = f"after {count} steps" + (" (reserve used up)" if count > last else "")
        rows.append((label, f"{spent:.4f}  ({spent / mechanism.epsilon:.0%} of the budget)"))
    return rows


def _statistics_rows(mechanism: PrivacyPlan) -> Rows:
    alone = epsilon(mechanism.statistics_events, mechanism.accounting_delta)
    steps = mechanism.steps + mechanism.reserve_steps
    rows = [
        ("its noise multiplier", f"{mechanism.statistics_noise:g}"),
        ("its epsilon alone", f"{alone:.4f}"),
    ]
    event = GaussianEvent(mechanism.noise_multiplier, mechanism.sample_rate, steps)
    whole = epsilon([event, *mechanism.statistics_events], mechanism.accounting_delta)
    without = epsilon([event], mechanism.accounting_delta)
    rows.append(("its share of the whole epsilon", f"{(whole - without) / whole:.1%}"))
    least = calibrate_noise_multiplier(
        epsilon=whole,
        delta=mechanism.accounting_delta,
        sample_rate=mechanism.sample_rate,
        steps=steps,
    )
    rows.append(("noise of the steps without it", f"{least:.4f} for the same epsilon"))
    return rows


def _show_dataset_budget(
    console: rich.console.Console, config: Config, mechanism: PrivacyPlan
) -> None:
    """What is left of the budget that all runs share, and whether a new run of this config is let
    in. Nothing where there is none."""
    path, request = dataset_budget_file(config), request_of(mechanism)
    numbers = config.privacy.dataset_epsilon, config.privacy.dataset_delta
    if path.exists():
        whole = read_dataset_ledger(path)
    elif None not in numbers:
        whole = DatasetSummary.before_the_first_run(*numbers, request)
    else:
        return
    terms, given = whole.terms, whole.answer(request)
    refusal = given.refusal
    if numbers not in ((None, None), (terms.epsilon, terms.delta)):
        refusal = "the config names another budget than the file. Leave it out, or restore it"
    rows = [
        ("for all runs together", f"epsilon {terms.epsilon:g} at delta {terms.delta:g}"),
        ("runs so far", f"{len(whole.shares)}, {sum(s.settled for s in whole.shares)} finished"),
        ("left", f"{whole.left:.2%}"),
        ("a new run of this config", _answer_in_words(given, refused=bool(refusal))),
    ]
    if not given.alone and given.asked > 0:
        rows.append(("such runs that still fit", f"{int(given.left / given.asked)}"))
    own = _own_share(config, whole)
    if own is not None:
        rows.append(("the run in run.dir holds", f"{terms.cost(own.events):.2%}"))
    _show(console, "The budget that all runs on the private data share", rows)
    console.print(f"Its file: {path}", soft_wrap=True)
    if refusal:
        console.print(f"A new run would be refused: {refusal}.", soft_wrap=True)


def _answer_in_words(given: Answer, *, refused: bool) -> str:
    if refused:
        return f"asks for {given.asked:.2%}: refused"
    if given.alone:
        return "admitted, as the only one for ever"
    return f"asks for {given.asked:.2%}: admitted"


def _own_share(config: Config, whole: DatasetSummary) -> Share | None:
    """What the run in ``run.dir`` has reserved, if it has started."""
    path = RunDir(config.run.dir).ledger
    return whole.share_of(read_ledger(path).run_id) if path.exists() else None


def _memory_rows(config: Config) -> Rows:
    parameters = trainable_parameters(config)
    if parameters is None:
        return [("trainable parameters", "known when model.init is loaded")]
    needed = parameters * _BYTES_PER_PARAMETER / 2**20
    return [
        ("trainable parameters", f"{parameters:,} and the rows of the classes"),
        ("beside the model and its activations", f"{needed:,.1f} MiB per worker"),
    ]


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "outside its range"


def _show(console: rich.console.Console, title: str, rows: Rows, *, wrap: bool = False) -> None:
    table = rich.table.Table(
        box=rich.box.SIMPLE, show_header=False, title=title, title_justify="left"
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=not wrap)
    for name, value in rows:
        table.add_row(rich.markup.escape(name), rich.markup.escape(value))
    console.print(table)
