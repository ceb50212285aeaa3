"""The command line: ``dpldm STAGE [--config FILE.toml] [--set section.key=value ...] [--dry-run]``.

Heavy imports happen after the command line is parsed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpldm_dist import __version__
from dpldm_dist.errors import DpldmError


@dataclass(frozen=True)
class Word:
    """A positional argument of a sub-command. An optional one that is missing is None."""

    name: str
    help: str
    choices: tuple[str, ...] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Switch:
    """An option of a sub-command without a value; it reaches the function as true or false."""

    name: str
    help: str


@dataclass(frozen=True)
class Command:
    """One sub-command: ``module:function``, what the help says, and where it runs.

    "here": in this process, which looks after the run directory itself if it needs one; "alone":
    on one worker that holds the run directory; "workers": on all workers of the run; "reader": in
    this process, and needs no worker: it reads what others wrote.
    ``words``: what may be said beside the options of all; they reach the function by their names.
    """

    function: str
    summary: str
    where: Literal["here", "alone", "workers", "reader"]
    words: tuple[Word | Switch, ...] = ()


SUBMITTED = ("demo", "prepare", "encode", "pretrain", "finetune", "sample", "evaluate", "report")
SUBMITTED += ("audit", "check")

COMMANDS = {
    name: Command(f"dpldm_dist.{function}", summary, where, tuple(words))
    for name, function, summary, where, *words in (
        ("demo", "demo:demo", "the whole pipeline on real digits, in minutes", "here"),
        ("prepare", "stages.prepare:prepare", "images -> image shards", "alone"),
        ("encode", "stages.encode:encode", "image shards -> latent shards", "workers"),
        ("pretrain", "stages.pretrain:pretrain", "public latents -> public model", "workers"),
        ("finetune", "stages.finetune:finetune", "private latents -> private model", "workers"),
        ("sample", "stages.sample:sample", "private model -> synthetic images", "workers"),
        ("evaluate", "stages.evaluate:evaluate", "scores against private images", "workers"),
        ("report", "stages.report:report", "the report that goes with a release", "alone"),
        (
            *("plan", "stages.plan:plan", "what a config would cost; touches no data", "here"),
            Switch("cluster", "predict it for clusters of GPUs, and propose batch and steps"),
        ),
        ("audit", "audit:audit", "attack the mechanism of a config on made-up data", "here"),
        ("check", "stages.check:check", "test the machine, the disk and the workers", "here"),
        (
            *("submit", "stages.submit:submit", "run a stage on a Ray cluster", "here"),
            Word("what", "the stage to run there", choices=SUBMITTED),
        ),
        (
            *("ledger", "stages.ledger:ledger", "what a ledger proves, from the file", "reader"),
            Word("action", "show it, or only verify it", choices=("show", "verify")),
            Word("file", "a ledger; without it: those of the config", optional=True),
        ),
        (
            *("status", "stages.status:status", "where a run stands", "reader"),
            Word("run", "run directory; without it: that of the config", optional=True),
        ),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, or that of the error's kind."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except DpldmError as error:
        print(f"dpldm {options.stage}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            f"dpldm {options.stage}: interrupted. Give the same command to go on.", file=sys.stderr
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpldm",
        description="Private images -> a diffusion model and synthetic images with an"
        " (epsilon, delta) differential-privacy guarantee.",
        epilog="To resume, give the same command again.",
    )
    parser.add_argument("--version", action="version", version=f"dpldm_dist {__version__}")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, command in COMMANDS.items():
        stage = stages.add_parser(name, help=command.summary, description=command.summary)
        for word in command.words:
            if isinstance(word, Switch):
                stage.add_argument(f"--{word.name}", action="store_true", help=word.help)
                continue
            stage.add_argument(
                word.name,
                help=word.help,
                choices=word.choices,
                nargs="?" if word.optional else None,
            )
        stage.add_argument("--config", type=Path, metavar="FILE.toml", help="settings of the run")
        stage.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="section.key=value",
            help="change one setting",
        )
        stage.add_argument(
            "--dry-run", action="store_true", help="say what would be done; touch nothing"
        )
    return parser


def _run(options: argparse.Namespace) -> None:
    from dpldm_dist.config import load_config

    command = COMMANDS[options.stage]
    config = load_config(options.config, options.set)
    module = importlib.import_module(command.function.partition(":")[0])
    words = {word.name: getattr(options, word.name) for word in command.words}
    if options.dry_run:
        print("\n".join(module.describe(config, **words)))
        return
    stage = getattr(module, command.function.partition(":")[2])
    _perform(stage, config, words, where=command.where)


def _perform(stage: Callable[..., Any], config: Any, words: dict[str, Any], *, where: str) -> None:
    """Hold the run directory, show progress, heed signals, and run the stage where it belongs."""
    if where == "reader":
        stage(config, **words)
        return
    from dpldm_dist.runtime.launch import Job, launch
    from dpldm_dist.runtime.rundir import RunDir
    from dpldm_dist.runtime.stopping import stop_on_signals
    from dpldm_dist.runtime.tracking import show_progress
    from dpldm_dist.runtime.worker import solo_worker

    if where == "here":
        stage(config, solo_worker(), **words)
        return
    run = RunDir(config.run.dir)
    alone = config.run.model_copy(update={"workers": 1, "launcher": "local"})
    with (
        run.create().lock(),
        stop_on_signals([run], grace_s=config.run.stop_grace_s),
        show_progress(run.progress),
    ):
        launch([Job(stage, config, noted=True)], run=config.run if where == "workers" else alone)
