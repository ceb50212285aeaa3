"""The mechanism that a config describes: what plan prints and finetune runs. Not a stage."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from dpldm_dist.config import Config
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.data.records import IMAGE
from dpldm_dist.errors import ConfigError, PrivacyError, RunError
from dpldm_dist.privacy.dataset_ledger import Request, Reservation, reservation_for
from dpldm_dist.privacy.gradients import accumulation_error
from dpldm_dist.privacy.plan import ContributionBound, PrivacyPlan, contribution_bound, make_plan
from dpldm_dist.privacy.telemetry import TelemetryQuery
from dpldm_dist.runtime.rundir import RunDir, dataset_budget_file

_UNSETTLED = 64  # records of a microbatch


def require_sections(config: Config) -> None:
    """Raises: ConfigError if the config lacks the numbers of private training, or asks for workers
    that would have no records."""
    for section in ("privacy", "finetune"):
        if getattr(config, section) is None:
            raise ConfigError(
                f"[{section}] is missing from the config: expected the numbers of private training "
                "in [privacy] and [finetune]."
            )
    if config.run.most_workers > config.privacy.lanes:
        raise ConfigError(
            f"run.workers = {config.run.crew} is more than privacy.lanes = {config.privacy.lanes}: "
            "the others would have no records. Lower run.workers, or raise privacy.lanes before "
            "the first step (a run keeps its value)."
        )


def refuse_other_unit(config: Config, latents: Manifest) -> None:
    """The records of ``latents`` must be of the unit for which the config promises privacy.

    Raises: PrivacyError.
    """
    found = latents.facts.get("unit", IMAGE)
    if found != config.data.unit:
        raise PrivacyError(
            f"The private latents hold one record per {found}, data.unit = {config.data.unit!r}: "
            "expected the same. Prepare and encode them again with that unit, or restore the "
            "option."
        )


def plan_of(config: Config, *, records: int) -> PrivacyPlan:
    """The plan of ``config`` for ``records`` declared. Raises: ConfigError, PrivacyError."""
    require_sections(config)
    return make_plan(
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        clip_norm=config.privacy.clip_norm,
        records=records,
        batch=config.finetune.batch,
        steps=config.finetune.steps,
        draws=config.finetune.draws,
        reserve_steps=config.privacy.reserve_steps,
        noise_multiplier=config.privacy.noise_multiplier,
        statistics_noise=config.finetune.statistics_noise,
        telemetry_share=config.privacy.telemetry_share,
        unit=config.data.unit,
        lanes=config.privacy.lanes,
        microbatch=microbatch_of(config),
    )


def microbatch_of(config: Config) -> int:
    """Records of a microbatch. "auto" that no start has settled yet is taken for 64."""
    if config.run.microbatch != "auto":
        return config.run.microbatch
    record = microbatch_record(RunDir(config.run.dir))
    return _UNSETTLED if record is None else record["microbatch"]


def microbatch_record(run: RunDir) -> dict[str, Any] | None:
    """What the first start settled, as ``microbatch``, and how it measured that.

    Raises: RunError if its file is damaged.
    """
    try:
        record = json.loads(run.microbatch.read_text())
        found = record["microbatch"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if type(found) is not int or found < 2:
        raise RunError(
            f"{run.microbatch} is damaged: expected a number of records. Set run.microbatch to "
            "that number, or remove the file to have it measured again (another number opens a "
            "new attempt, whose steps are charged)."
        )
    return record


def request_of(plan: PrivacyPlan) -> Request:
    """What a run of ``plan`` asks of that budget: all steps that its own budget pays for."""
    steps = replace(plan.step_event, count=plan.steps + plan.reserve_steps)
    return Request(
        events=(steps, *plan.statistics_events),
        overflow_delta=plan.overflow_delta,
        unit=plan.unit,
        relation=plan.relation,
    )


def reservation_of(config: Config, plan: PrivacyPlan) -> Reservation | None:
    """How a run keeps to that budget; None if nobody gave the images one. Changes no file."""
    return reservation_for(
        dataset_budget_file(config),
        request_of(plan),
        dataset_epsilon=config.privacy.dataset_epsilon,
        dataset_delta=config.privacy.dataset_delta,
    )


def record_bound(plan: PrivacyPlan, *, parameters: int) -> ContributionBound:
    """The norms to which a record is clipped, with every rounding of the engine paid for."""
    error = accumulation_error(records=plan.microbatch, clip_norm=plan.clip_norm)
    return contribution_bound(plan, parameters=parameters, accumulation_error=error)


def telemetry_query(config: Config, plan: PrivacyPlan, *, parameters: int) -> TelemetryQuery | None:
    """How loss, count and clip flag of a record ride in the noisy sum; None if they do not."""
    return TelemetryQuery.of(
        plan,
        record_bound(plan, parameters=parameters),
        unsafe_no_noise=config.run.unsafe_no_noise,
    )
