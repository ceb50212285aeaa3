"""The mechanism that a config describes: what plan prints and finetune runs. Not a stage."""

from __future__ import annotations

from dpldm_dist.config import Config
from dpldm_dist.errors import ConfigError
from dpldm_dist.privacy.plan import PrivacyPlan, make_plan


def require_sections(config: Config) -> None:
    """Raises: ConfigError if the config lacks the numbers of private training."""
    for section in ("privacy", "finetune"):
        if getattr(config, section) is None:
            raise ConfigError(
                f"[{section}] is missing from the config: expected the numbers of private training "
                "in [privacy] and [finetune]."
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
        unit=config.privacy.unit,
        lanes=config.privacy.lanes,
        microbatch=config.run.microbatch,
    )
