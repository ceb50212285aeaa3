"""``dpldm audit``: attack the mechanism of a config, on made-up data, before it sees private data.

The real trainer runs with the config's own network, trainable set, launcher and workers at an
operating point where faults can be seen (``point``). From the weights that it leaves (``observe``)
statistical instruments (``privacy/audit``) judge noise, sampling, contributions and the ledger, and
guesses on canaries prove a lower bound on epsilon (``verdict``).
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpldm_dist.audit.legs import jobs, write_data
from dpldm_dist.audit.observe import Observations, observe
from dpldm_dist.audit.picture import picture
from dpldm_dist.audit.point import (
    DELTA,
    RATE,
    Point,
    expected_seconds,
    leg_configs,
    prepare_point,
    sizes_of,
)
from dpldm_dist.audit.screen import clock, show
from dpldm_dist.audit.verdict import Verdict, failed, judge
from dpldm_dist.config import Config
from dpldm_dist.errors import PrivacyError
from dpldm_dist.runtime.launch import launch
from dpldm_dist.runtime.rundir import RunDir, private_files
from dpldm_dist.runtime.stopping import stop_on_signals
from dpldm_dist.runtime.tracking import show_progress
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune.preparation import public_model_dir
from dpldm_dist.stages.mechanism import require_sections

REPORT, PICTURE = "audit.json", "audit.png"
_NOT_AUDITED = (
    "omits   the release of latent statistics, the path of captions, warm-up and averaging of "
    "weights (post-processing), the accountant (dpldm plan compares three), private data itself"
)


def audit(config: Config, worker: Worker) -> Verdict:
    """Run the audit of ``config`` and print its verdict. Reads no private data.

    Leaves ``private/audit/audit.json`` and ``audit.png``; runs and made-up data are removed.
    Raises: PrivacyError if an instrument contradicts the claim, naming it; whatever the trainer
    raises, if it refuses itself.
    """
    require_sections(config)
    run = RunDir(config.run.dir)
    folder = run.create().private / "audit"
    started = time.monotonic()
    with private_files(), RunDir(folder).lock():
        _clear(folder)
        point = prepare_point(config, folder / "model")
        included_M = np.array([secrets.randbits(1) for _ in range(point.canaries)], dtype=bool)
        write_data(config, folder / "data", point, included_M)
        legs = leg_configs(config, folder, point)
        _run(config, legs)
        seen = observe(legs, point, included_M)
        verdict = judge(seen)
        _keep(folder, config, point, seen, verdict)
        _clear(folder)
    show(
        [*_substitutions(config, point), _NOT_AUDITED],
        verdict,
        crew=config.run.crew,
        seconds=time.monotonic() - started,
        files=[folder / REPORT, folder / PICTURE],
    )
    if not verdict.passed:
        worst = failed(verdict.readings)
        raise PrivacyError(
            f"The audit failed: {worst[0].name} = {worst[0].found:.4g}, expected "
            f"{worst[0].expected} ({len(worst)} of {len(verdict.readings)} readings failed). Do "
            f"not train on private data with this installation; see {folder / REPORT}."
        )
    return verdict


def describe(config: Config) -> list[str]:
    """What ``audit`` would do, for --dry-run. Builds the network to say about how long."""
    require_sections(config)
    sizes = sizes_of(config)
    folder = RunDir(config.run.dir).private / "audit"
    steps, settings = config.audit.steps, config.audit
    return [
        *_substitutions(config),
        f"trains  on {sizes.canaries} made-up canaries, each included by a coin, not on your data",
        f"runs    1 + {steps} + {steps // 3} + {steps // 3} + {settings.selection_steps} steps in "
        f"5 runs on {config.run.crew} worker(s)",
        f"claims  epsilon {settings.epsilon} at delta {DELTA:g}, sample rate {RATE}",
        f"writes  {folder / REPORT}, {folder / PICTURE}",
        f"takes   about {clock(expected_seconds(config))} if this machine is idle, and the start "
        "of the workers",
    ]


def _run(config: Config, legs: Mapping[str, Config]) -> None:
    """All runs of the audit, in one start of the workers."""
    runs = {name: RunDir(leg.run.dir).create() for name, leg in legs.items()}
    titles = {run.progress: f"audit: {name}" for name, run in runs.items()}
    with (
        stop_on_signals(list(runs.values()), grace_s=config.run.stop_grace_s),
        show_progress(*titles, titles=titles),
    ):
        launch(jobs(legs), run=config.run)


def _clear(folder: Path) -> None:
    """Remove what an audit leaves while it runs."""
    for name in ("model", "data", "runs"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _keep(folder: Path, config: Config, point: Point, seen: Observations, verdict: Verdict) -> None:
    facts = {
        **verdict.facts(),
        "operating_point": _numbers(point, seen),
        "substitutions": _substitutions(config, point),
        "not_audited": _NOT_AUDITED,
        "workers": config.run.crew,
        "launcher": config.run.launcher,
    }
    (folder / REPORT).write_text(json.dumps(_plain(facts), indent=2) + "\n")
    (folder / PICTURE).write_bytes(picture(seen, verdict))


def _numbers(point: Point, seen: Observations) -> dict[str, Any]:
    return {
        "canaries": point.canaries,
        "canaries_included": int(seen.included_M.sum()),
        "steps": point.steps,
        "sample_rate": seen.plan.sample_rate,
        "noise_multiplier": seen.plan.noise_multiplier,
        "clip_norm": point.clip_norm,
        "draws": seen.plan.draws,
        "parameters": sum(point.sizes.values()),
        "embedder_grad_scale": point.grad_scale,
        "weights_per_clip_norm": point.step,
    }


def _substitutions(config: Config, point: Point | None = None) -> list[str]:
    """In words: where the audit does not run what the config says."""
    found = [
        "audits  SGD at a constant rate without averaging of weights or label dropout, on made-up "
        "latents at one diffusion time"
    ]
    if config.model.conditioning != "class":
        found.append(
            f"audits  rows of classes in place of conditioning {config.model.conditioning!r}: the "
            "canaries need coordinates of their own"
        )
    if not (public_model_dir(config, RunDir(config.run.dir)) / "model_index.json").is_file():
        found.append("audits  an untrained network of the configured shape: no public model yet")
    if point is not None and point.clip_norm < config.privacy.clip_norm:
        found.append(
            f"audits  clip_norm {point.clip_norm:.3g} in place of {config.privacy.clip_norm:g}, "
            "which no gradient of a canary reaches"
        )
    return found


def _plain(value: Any) -> Any:
    """JSON has no infinity and numpy's numbers are not Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if isinstance(value, (np.floating, float)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
