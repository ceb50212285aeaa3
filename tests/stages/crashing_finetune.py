"""The fine-tuning stage with a trace of what it released, and a place where it is killed.

``DPLDM_TEST_CRASH`` holds ``place:step``; the worker of rank ``DPLDM_TEST_CRASH_RANK`` (0) sends
itself SIGKILL there. Run as a program, it takes the path of a config in JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dpldm_dist.config import Config, parse_config
from dpldm_dist.privacy.optimizer import NoisySum
from dpldm_dist.runtime import checkpoint
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages import finetune as stage
from dpldm_dist.stages.finetune.private_data import PrivateData

PLACES = (
    "after the charge",
    "before the bind",
    "after the bind",
    "after the release",
    "while saving",
)


def finetune(config: Config, worker: Worker) -> Any:
    place, _, step = os.environ.get("DPLDM_TEST_CRASH", "nowhere:0").partition(":")
    mine = worker.rank == int(os.environ.get("DPLDM_TEST_CRASH_RANK", "0"))
    trace = Path(config.run.dir) / "private" / "trace.jsonl"

    def crash(here: str, at: int) -> None:
        if mine and (here, at) == (place, int(step)):
            os.kill(os.getpid(), signal.SIGKILL)

    release, microbatches = NoisySum.release_, PrivateData.microbatches
    add_noise, digest = NoisySum._add_noise, NoisySum._digest

    def traced_release(self: NoisySum, total: Any, *, purpose: str, step: int) -> Any:
        noisy = release(self, total, purpose=purpose, step=step)
        if self._mechanism == "a step without records":
            return noisy
        if worker.rank == 0:
            entry = {
                "purpose": purpose,
                "step": step,
                "head": noisy[:4].tolist(),
            }
            with open(trace, "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        crash("after the release", step if purpose == "step" else -1)
        return noisy

    def traced_digest(self: NoisySum, total: Any, *, purpose: str, step: int) -> Any:
        if self._mechanism != "a step without records":
            crash("before the bind", step if purpose == "step" else -1)
        self._now = (purpose, step)
        return digest(self, total, purpose=purpose, step=step)

    def traced_noise(self: NoisySum, *arguments: Any) -> Any:
        if self._mechanism != "a step without records":
            crash("after the bind", self._now[1] if self._now[0] == "step" else -1)
        return add_noise(self, *arguments)

    def traced_microbatches(self: PrivateData, step: int) -> Any:
        crash("after the charge", step)
        return microbatches(self, step)

    write = checkpoint.Checkpoints._write

    def traced_write(self: Any, step: int, contents: Any) -> Any:
        crash("while saving", step)
        return write(self, step, contents)

    NoisySum.release_ = traced_release
    NoisySum._add_noise, NoisySum._digest = traced_noise, traced_digest
    PrivateData.microbatches = traced_microbatches
    checkpoint.Checkpoints._write = traced_write
    try:
        return stage.finetune(config, worker)
    finally:
        NoisySum.release_, PrivateData.microbatches = release, microbatches
        NoisySum._add_noise, NoisySum._digest = add_noise, digest
        checkpoint.Checkpoints._write = write


if __name__ == "__main__":
    from dpldm_dist.runtime.rundir import RunDir
    from tests.stages.crashing_finetune import finetune as importable

    config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
    with RunDir(config.run.dir).create().lock():
        launch([Job(importable, config)], run=config.run)
