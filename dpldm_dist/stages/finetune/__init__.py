"""Public model + private latents -> private model + the ledger that proves its (epsilon, delta).

This file is the main loop; beside it lie what it is made of: ``private_data`` (which records take
part, and their losses), ``preparation`` (model, released statistics, warm-up), ``state`` (what a
checkpoint holds) and ``publication`` (what is released).
"""

from __future__ import annotations

import math
from contextlib import closing, suppress

from dpldm_dist.config import Config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import Manifest, finished_manifest
from dpldm_dist.errors import BudgetReached
from dpldm_dist.models.directory import load_model
from dpldm_dist.privacy.ledger import SharedLedger
from dpldm_dist.privacy.optimizer import NoisyStep
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import StopRequest
from dpldm_dist.runtime.strategy import refuse_for_private_training
from dpldm_dist.runtime.tracking import Progress, Tracker
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune.diagnostics import Diagnostics
from dpldm_dist.stages.finetune.microbatch import with_settled_microbatch
from dpldm_dist.stages.finetune.preparation import (
    attempt_key,
    declared_records,
    genesis,
    has_claim,
    keep_threads,
    lineage,
    prepare_model,
    public_model_dir,
    refuse_different_workers,
    refuse_lost_ledger,
    refuse_unsafe_place,
    release_statistics,
    reservation,
    steps_left,
    trainable_model,
)
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.finetune.publication import close_books, publish
from dpldm_dist.stages.finetune.selfchecks import check_start
from dpldm_dist.stages.finetune.state import TrainingState, settings_of
from dpldm_dist.stages.mechanism import plan_of, refuse_other_unit, require_sections
from dpldm_dist.stages.places import place_of, shown_place


def finetune(config: Config, worker: Worker) -> Manifest:
    """Fine-tune the public model on private latents with (epsilon, delta)-DP.

    Formal guarantees: everything below ``release/`` is a function of public data and of noisy sums
    that the ledger charged before they were made. A start after a crash repeats the steps since the
    last checkpoint: one that ends in the same sum is the same release, bit for bit, and costs
    nothing; one that ends in another sum is accounted together with the earlier one; where key,
    data, layout or arithmetic are others, a new attempt begins with fresh coins and noise, and its
    steps are charged. A step that would pass the budget does not run.
    Raises: ConfigError, DataError, PrivacyError, RunError; SavedAndStopped if asked to stop.
    Source: Liu et al. (2023), arXiv 2305.15759, Algorithm 1.
    """
    require_sections(config)
    refuse_for_private_training(config.run)
    run = RunDir(config.run.dir)
    refuse_unsafe_place(config, run)
    done = finished_manifest(run.release, "model", settings=settings_of(config), parents={})
    if done is not None:
        close_books(config, run, worker)
        return done
    public = load_model(public_model_dir(config, run))
    latents = LatentShards(place_of(config, "private", "latents"))
    refuse_other_unit(config, latents.manifest)
    plan = plan_of(config, records=declared_records(config, latents))
    run_key = worker.collective.broadcast_bytes(
        run.run_key(config.run.unsafe_test_key) if worker.rank == 0 else None
    )
    refuse_different_workers(plan, latents, worker)
    plan = with_settled_microbatch(config, plan, run, latents, worker)
    denoiser, parameters = trainable_model(config, public, latents, worker)
    refuse_lost_ledger(run)
    worker.collective.barrier()  # all have looked before anybody writes
    ledger = SharedLedger.open(
        run.ledger,
        genesis(config, plan, parameters),
        collective=worker.collective,
        reserve=reservation(config, plan),
    )
    with closing(ledger):
        keep_threads(config, ledger)
        lines = lineage(plan, run_key, latents, worker)
        attempt = ledger.open_attempt(lines, workers=worker.world_size)
        key = attempt_key(config, run_key, attempt)
        progress, stop = Progress(run.progress, worker=worker), StopRequest(run, worker)

        state = TrainingState(config, plan, key, ledger, denoiser, parameters, worker)
        checkpoints = Checkpoints(run.checkpoints, keep=config.run.checkpoint_keep)
        data = PrivateData(config, plan, latents, key, attempt.number, public.diffusion, worker)
        check_start(config, plan, data, latents, denoiser, parameters, worker)  # before any release
        if not state.restore(checkpoints):
            gaussian = release_statistics(config, plan, key, latents, ledger, run, worker)
            prepare_model(config, denoiser, parameters, public, gaussian, progress, worker)
            state.begin()
            state.save(checkpoints)
        raw = Diagnostics(config, plan, run, worker, start_step=state.step)
        gradients = data.gradients(denoiser, parameters, watch=raw.watch)
        state.freeze()

        last = min(plan.steps, state.step + steps_left(plan, ledger, since=state.step))
        progress.start("private fine-tuning", last, step=state.step)
        with (
            Tracker(run.tensorboard / "finetune", worker, start_step=state.step) as tracker,
            suppress(BudgetReached),  # the model of the steps before is released
            data.ahead(last=last),
        ):
            if has_claim(config):
                tracker.hparams(
                    {n: value for n, value in plan.facts().items() if value is not None}
                )
            while state.step < last:
                ledger.charge(plan.step_event, what="step", step=state.step)  # durable first
                for part in data.microbatches(state.step):
                    # clip the gradient of each record, add it to the sum
                    gradients.add(data.losses(denoiser, part), part.mask_B)
                noisy = state.optimizer.step(gradients.take_sum(), state.step)  # noise once
                state.tick(noisy)
                progress.advance(state.step)
                _show(tracker, plan, ledger, state, noisy, last=state.step == last)
                raw.show(state.step)
                if state.step < last and stop.agreed():
                    state.save(checkpoints)
                    raise stop.leave(f"{state.step} of {plan.steps} noisy steps")
                if state.step % config.run.checkpoint_every == 0 or state.step == last:
                    state.save(checkpoints)
                del noisy  # the next sum takes its memory
        if state.step < plan.steps:
            progress.say(f"Budget reached after {state.step} of {plan.steps} steps.")
        hint = state.curves.hint()
        if hint is not None:
            progress.say(hint)
        progress.done()
        model = publish(config, plan, run, public, latents, state, ledger, lines["data"], worker)
    close_books(config, run, worker)
    return model


def describe(config: Config) -> list[str]:
    """What ``finetune`` would do, for --dry-run. Reads no private data."""
    require_sections(config)
    refuse_for_private_training(config.run)
    run = RunDir(config.run.dir)
    lines = [
        f"reads   {public_model_dir(config, run)} (public model)",
        f"reads   {shown_place(config, 'private', 'latents')} (private latents)",
        f"writes  {run.ledger}, {run.checkpoints}",
        f"writes  {run.released_model}, {run.release / 'manifest.json'}",
        f"runs    {config.finetune.steps} noisy steps on {config.run.crew} worker(s), "
        f"trainable: {config.finetune.trainable}",
    ]
    if config.privacy.records is None:
        return [*lines, "costs   set privacy.records to see the noise that the budget needs"]
    plan = plan_of(config, records=config.privacy.records)
    return [
        *lines,
        f"costs   at most epsilon {plan.epsilon} at delta {plan.delta}: noise multiplier "
        f"{plan.noise_multiplier}, sample rate {plan.sample_rate:.6f}",
    ]


def _show(
    tracker: Tracker,
    plan: PrivacyPlan,
    ledger: SharedLedger,
    state: TrainingState,
    noisy: NoisyStep,
    *,
    last: bool,
) -> None:
    """Public numbers of a step. Epsilon comes from the ledger, about twenty times in a run."""
    tracker.scalar("optimizer/learning_rate", state.learning_rate, state.step)
    tracker.scalar("optimizer/noisy_gradient_norm", noisy.norm, state.step)
    state.curves.show(tracker)
    if last or state.step % max(1, plan.steps // 20) == 0:
        spent = ledger.spent()
        if math.isfinite(spent):  # a run without a claim has no epsilon
            tracker.scalar("privacy/epsilon", spent, state.step)
