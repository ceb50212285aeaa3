"""What a run would take on clusters of GPUs, and what to run there: predictions. Not a stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dpldm_dist.config import Config
from dpldm_dist.errors import ConfigError, PrivacyError
from dpldm_dist.privacy.accounting import GaussianEvent, epsilon
from dpldm_dist.privacy.plan import PrivacyPlan, make_plan
from dpldm_dist.runtime.cost import (
    Cluster,
    Rates,
    Work,
    bytes_sent,
    efficiency,
    least_bytes,
    step_time,
)
from dpldm_dist.stages.proposal import KAPPA, LEAST_STEPS, Proposal, propose
from dpldm_dist.stages.shapes import flops_per_row, shapes_of

PREDICTED = "predicted, not measured"
Rows = Sequence[tuple[str, str]]
_HOUR_S = 3600.0
_MICROBATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def cluster_tables(config: Config, mechanism: PrivacyPlan) -> Iterator[tuple[str, Rows]]:
    """(title, rows) of every table of ``dpldm plan --cluster``.

    Raises: ConfigError if the network is in ``model.init``, where its shapes are not known here.
    """
    if config.model.init is not None or config.autoencoder.init is not None:
        raise ConfigError(
            "plan --cluster counts the operations of a network that the config describes: expected "
            "no model.init and no autoencoder.init. Describe it in [model] and [autoencoder]."
        )
    work, rates = _work(config, mechanism), _rates(config)
    yield "Work of a step", _work_rows(config, work)
    for batch in sorted({work.batch, *config.cluster.batches}):
        if batch <= mechanism.records:
            title = f"Seconds per step with batch {batch:,} ({PREDICTED})"
            yield title, _step_rows(config, replace(work, batch=batch), rates)
    yield f"Privacy of {mechanism.steps} steps", _budget_rows(config, mechanism)
    if config.cluster.gpu_hours is not None:
        yield (
            f"Proposal for {config.cluster.gpu_hours:g} GPU-hours (times {PREDICTED})",
            _proposal_rows(config, mechanism, work, rates),
        )


def _work(config: Config, mechanism: PrivacyPlan) -> Work:
    _, parameters = shapes_of(config)
    return Work(
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        batch=round(mechanism.divisor),
        draws=mechanism.draws,
        microbatch=mechanism.microbatch,
        lanes=mechanism.lanes,
    )


def _rates(config: Config) -> tuple[Rates, Rates]:
    facts = config.cluster.model_dump(exclude={"gpus", "batches", "gpu_hours"})
    return Cluster(**facts).rates(flops_per_row(config))


def _on(work: Work, rates: Rates, workers: int) -> Work:
    """The work with a lane for each worker at least, and the microbatch that suits it best."""
    wide = replace(work, lanes=-(-max(work.lanes, workers) // workers) * workers)
    sizes = [size for size in _MICROBATCHES if size <= work.microbatch] or [work.microbatch]
    choices = [replace(wide, microbatch=size) for size in sizes]
    return min(choices, key=lambda choice: step_time(rates, choice, workers).total_s)


def _work_rows(config: Config, work: Work) -> Rows:
    most = max(config.cluster.gpus)
    sent, least = bytes_sent(work.parameters, most), least_bytes(work.parameters, most)
    return [
        ("operations per draw of a record", f"{flops_per_row(config):.3g}"),
        ("trainable parameters", f"{work.parameters:,}"),
        ("sent by each of many workers", f"{sent / 2**20:,.1f} MiB"),
        ("of which without privacy (fp32)", f"{least / 2**20:,.1f} MiB"),
    ]


def _step_rows(config: Config, work: Work, rates: tuple[Rates, Rates]) -> Rows:
    rows = []
    for workers in config.cluster.gpus:
        wide = _on(work, rates[0], workers)
        slow, fast = (step_time(case, wide, workers).total_s for case in rates)
        least, most = sorted(efficiency(case, wide, workers) for case in rates)
        told = (
            f"{_seconds(fast)} to {_seconds(slow)}, efficiency {least:.0%} to {most:.0%}, "
            f"microbatches of {wide.microbatch}"
        )
        rows.append((f"{workers:,} GPUs", told))
    return rows


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _budget_rows(config: Config, mechanism: PrivacyPlan) -> Rows:
    """Noise multiplier and noise of the mean for every batch, at the budget of the config."""
    rows = []
    for batch in sorted({round(mechanism.divisor), *config.cluster.batches}):
        if batch <= mechanism.records:
            found = _plan_with(config, mechanism, batch=batch, steps=mechanism.steps)
            rows.append((f"batch {batch:,}", _noise_in_words(found)))
    return rows


def _noise_in_words(found: PrivacyPlan | None) -> str:
    if found is None:
        return "the budget cannot be met"
    spent = epsilon(
        [GaussianEvent(found.noise_multiplier, found.sample_rate, found.steps)],
        found.accounting_delta,
    )
    return (
        f"noise multiplier {found.noise_multiplier:.4g}, in the mean "
        f"{found.noise_multiplier / found.divisor:.3g} C; epsilon {spent:.3f}"
    )


def _plan_with(
    config: Config, mechanism: PrivacyPlan, *, batch: int, steps: int
) -> PrivacyPlan | None:
    try:
        return make_plan(
            epsilon=mechanism.epsilon,
            delta=mechanism.delta,
            clip_norm=mechanism.clip_norm,
            records=mechanism.records,
            batch=batch,
            steps=steps,
            statistics_noise=mechanism.statistics_noise,
            telemetry_share=mechanism.telemetry_share,
        )
    except PrivacyError:
        return None


def _proposal_rows(
    config: Config, mechanism: PrivacyPlan, work: Work, rates: tuple[Rates, Rates]
) -> Rows:
    """The proposal at the middle of the rates, why, and what smaller batches would give."""
    slow, fast = (case.row_s for case in rates)
    row_s = (slow * fast) ** 0.5
    found = propose(
        epsilon=mechanism.epsilon,
        delta=mechanism.delta,
        records=mechanism.records,
        rows=config.cluster.gpu_hours * _HOUR_S / row_s,
    )
    if not found:
        return [("none", f"{LEAST_STEPS} steps of 64 records take more: raise cluster.gpu_hours")]
    best, *smaller = found
    plan = _plan_with(config, mechanism, batch=best.batch, steps=best.steps)
    hours = sorted(best.rows * case.row_s / _HOUR_S for case in rates)
    rows = [
        ("finetune.batch", f"{best.batch:,}"),
        ("finetune.steps", f"{best.steps:,}"),
        ("finetune.draws", f"{best.draws}"),
        ("noise multiplier", "cannot be met" if plan is None else f"{plan.noise_multiplier:.4f}"),
        ("GPU-hours of its gradients", f"{hours[0]:.3g} to {hours[1]:.3g}"),
        *_reasons(best, mechanism.records),
    ]
    return [*rows, *(_smaller_in_words(best, other) for other in smaller)]


def _reasons(best: Proposal, records: int) -> Rows:
    batch = f"reaches {best.share:.0%} of the signal that this budget can give at any batch"
    if 2 * best.batch > records:
        batch += "; twice as much is more than there are records"
    draws = "one: the hours are better spent on records"
    if best.draws > 1:
        draws = f"cost no privacy; what is left of the hours goes there (kappa = {KAPPA:g})"
    fewest = f"the fewest that can move far ({LEAST_STEPS})"
    many = "more, where a larger batch would not fit the hours or gain nothing"
    return [
        ("why this batch", batch),
        ("why these steps", fewest if best.steps == LEAST_STEPS else many),
        ("why these draws", draws),
    ]


def _smaller_in_words(best: Proposal, other: Proposal) -> tuple[str, str]:
    told = f"at best {other.signal / best.signal:.0%} of its signal: {other.steps:,} steps, "
    return f"batch {other.batch:,}", told + f"{other.draws} draws"
