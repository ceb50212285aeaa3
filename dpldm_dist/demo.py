"""The whole pipeline on real digits, with everything that a result must be compared with.

Private: real handwritten digits. Public: letters drawn from stroke fonts. The digits are public in
truth, so the demo may show next to its release what a real run keeps in ``private/``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from dpldm_dist.config import Config, with_changes
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.errors import ConfigError
from dpldm_dist.models.conditioning import private_rows
from dpldm_dist.models.directory import load_model, save_model
from dpldm_dist.runtime.jobs import run_dirs, stage_seconds
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir, dataset_dir
from dpldm_dist.runtime.stopping import stop_on_signals
from dpldm_dist.runtime.tracking import show_progress
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.encode import encode
from dpldm_dist.stages.evaluate import REAL, ROUND_TRIP, SYNTHETIC, evaluate
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.prepare import prepare
from dpldm_dist.stages.pretrain import pretrain
from dpldm_dist.stages.report import report
from dpldm_dist.stages.sample import sample

FLOOR, GAUSSIAN, NO_NOISE = "no fine-tuning", "latent Gaussian (DP)", "without noise (not private)"
UNTUNED = "untuned-model"
NOTE = (
    "The demo's private data is public MNIST, so these scores may stand beside the release. Scores "
    "on private data are not differentially private: a real run keeps them in private/."
)


def demo(config: Config, worker: Worker) -> None:
    """Run every stage, score the result and what it must beat, and print a table.

    Give the same command again to go on after an interruption.
    Raises: ConfigError if the config has no private training, and whatever the stages raise.
    """
    if config.privacy is None or config.finetune is None:
        raise ConfigError(
            "The demo needs a config with [privacy] and [finetune]: --config configs/demo.toml."
        )
    for which in (config.data.private, config.data.heldout):
        if not (which.source or "").startswith("builtin:digits") or which.images or which.latents:
            raise ConfigError(
                "The demo prints scores on its private data, so data.private and data.heldout must "
                "be builtin:digits and builtin:digits-heldout. For your own data run the stages."
            )
    run, started = RunDir(config.run.dir), time.monotonic()
    jobs = _jobs(config)
    runs = run_dirs(jobs)
    with (
        run.create().lock(),
        stop_on_signals(runs, grace_s=config.run.stop_grace_s),
        show_progress(*(directory.progress for directory in runs)),
    ):
        for directory in runs:
            directory.create()
        launch(
            [Job(prepare, config, timed=True)],
            run=with_changes(config, run={"launcher": "local", "workers": 1}).run,
        )
        launch(jobs, run=config.run)
    metrics = _metrics(config, run, seconds_total=time.monotonic() - started)
    (run.root / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _show(run, metrics)


def describe(config: Config) -> list[str]:
    """The stages of the demo, for --dry-run."""
    places = [f"{job.stage.__name__:<9} in {job.config.run.dir}" for job in _jobs(config)]
    return [f"prepare   in {config.run.dir}", *places, f"writes  {config.run.dir / 'metrics.json'}"]


def _jobs(config: Config) -> list[Job]:
    """One start of the workers does everything; comparisons lie in ``private/compare``."""
    run = RunDir(config.run.dir)
    compare = run.private / "compare"
    without_noise = _without_noise(config, run)
    folders = {
        FLOOR: compare / "no-fine-tuning",
        GAUSSIAN: compare / "latent-gaussian",
        NO_NOISE: RunDir(without_noise.run.dir).release / "samples",
    }
    floor = {"model": compare / UNTUNED, "out": folders[FLOOR]}
    gaussian = {"generator": "gaussian", "out": folders[GAUSSIAN]}
    scored = with_changes(config, evaluate={"compare": folders})
    stages = [
        (encode, config),
        (pretrain, config),
        (finetune, config),
        (sample, config),
        (untuned_model, config),
        (sample, with_changes(config, sample=floor)),
        (sample, with_changes(config, sample=gaussian)),
        (finetune, without_noise),
        (sample, without_noise),
        (evaluate, scored),
        (report, config),
    ]
    return [Job(stage, changed, timed=True) for stage, changed in stages]


def _without_noise(config: Config, run: RunDir) -> Config:
    """The same private training without noise: kept in ``private/``, no claim."""
    return with_changes(
        config,
        run={"dir": run.private / "without-noise", "unsafe_no_noise": True},
        model={"init": run.public_model},
        data={
            "public": {"images": run.public / "images", "latents": run.public / "latents"},
            "private": {"images": run.private / "images", "latents": run.private / "latents"},
        },
    )


def untuned_model(config: Config, worker: Worker) -> None:
    """The public model with the table of private classes that fine-tuning starts from."""
    run = RunDir(config.run.dir)
    folder = run.private / "compare" / UNTUNED
    if worker.rank == 0 and not folder.exists():
        public = load_model(run.public_model)
        classes = LatentShards(dataset_dir(config, "private", "latents")).classes
        save_model(
            folder,
            unet=public.unet,
            autoencoder=public.autoencoder,
            diffusion=public.diffusion,
            rows_NTD=private_rows(public.rows_NTD, classes=len(classes), kind=public.kind),
            classes=classes,
            kind=public.kind,
        )
    worker.collective.barrier()


def _metrics(config: Config, run: RunDir, *, seconds_total: float) -> dict[str, Any]:
    """What ``metrics.json`` holds."""
    facts = Manifest.read(run.release, "model").facts
    scores = json.loads((run.private / "evaluation.json").read_text())["sets"]
    return {
        "epsilon": facts["epsilon"],
        "delta": facts["delta"],
        "accuracy": scores[SYNTHETIC]["accuracy"],
        "accuracy_floor": scores[FLOOR]["accuracy"],
        "accuracy_gaussian_baseline": scores[GAUSSIAN]["accuracy"],
        "accuracy_without_noise": scores[NO_NOISE]["accuracy"],
        "accuracy_ceiling": scores[REAL]["accuracy"],
        "accuracy_autoencoder": scores[ROUND_TRIP]["accuracy"],
        "scores": scores,
        "plan": {
            k: facts[k]
            for k in ("records", "sample_rate", "steps", "noise_multiplier", "clip_norm")
        },
        "seconds_total": round(seconds_total, 1),
        "seconds_by_stage": stage_seconds(run),
        "note": NOTE,
    }


def _show(run: RunDir, metrics: dict[str, Any]) -> None:
    console = rich.console.Console()
    table = rich.table.Table(
        title=f"epsilon = {metrics['epsilon']:.3f}, delta = {metrics['delta']:g}"
    )
    table.add_column("trained on")
    table.add_column("accuracy on held-out digits", justify="right")
    extractors = list(metrics["scores"][SYNTHETIC]["fid"])
    for name in extractors:
        table.add_column(f"FID ({name})", justify="right")
    for name in (SYNTHETIC, GAUSSIAN, FLOOR, NO_NOISE, ROUND_TRIP, REAL):
        score = metrics["scores"][name]
        fids = [f"{score['fid'][extractor]:.1f}" for extractor in extractors]
        table.add_row(
            name, f"{score['accuracy']:.3f}", *fids, style="bold" if name == SYNTHETIC else ""
        )
    console.print(table)
    console.print(
        _line("seconds", [f"{k} {v:.0f}" for k, v in metrics["seconds_by_stage"].items()])
    )
    places: dict[str, Path] = {
        "samples": run.release / "samples.png",
        "report": run.release / "report.html",
        "model": run.released_model,
        "TensorBoard": run.tensorboard,
        "metrics": run.root / "metrics.json",
    }
    for name, path in places.items():
        console.print(f"{name:<12}{path}", soft_wrap=True)
    console.print(NOTE)


def _line(name: str, parts: Sequence[str]) -> str:
    return f"{name}: " + ", ".join(parts)
