"""A tiny fine-tuning as a Slurm job, and what a test can see and do of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpldm_dist.privacy.ledger import LedgerSummary, read_ledger
from dpldm_dist.runtime.rundir import RunDir
from tests.slurm.sandbox import SlurmSandbox

ROOT = Path(__file__).parents[2]
STEPS = 8
CONFIG = """
[data.private]
latents = "{data}/latents"
[model]
init = "{data}/model"
[privacy]
epsilon = 20.0
delta = 1e-3
clip_norm = 0.5
lanes = 2
records = 80
[finetune]
steps = {steps}
batch = 20
learning_rate = 1e-3
[run]
dir = "{folder}/run"
device = "cpu"
microbatch = 4
checkpoint_every = 3
timeout_s = 120.0
"""


class TinyJob:
    """Jobs on one run directory, ``folder``/run, over the made-up data in ``data``."""

    def __init__(self, slurm: SlurmSandbox, folder: Path, data: Path):
        self.slurm, self.folder = slurm, folder
        self.run = RunDir(folder / "run")
        folder.mkdir()
        self.config = folder / "tiny.toml"
        self.config.write_text(CONFIG.format(data=data, folder=folder, steps=STEPS))

    def submit(self, *options: str, script: str = "finetune", more: tuple[str, ...] = ()) -> int:
        """``sbatch options slurm/SCRIPT.sbatch CONFIG more``; the number of the job."""
        return self.slurm.submit(
            *("--output", self.folder / "%x-%j.out", *options, f"slurm/{script}.sbatch"),
            *(self.config, *more),
            cwd=ROOT,
            PYTHONPATH=f"{ROOT / 'tests/gate'}:{ROOT}",
            DPLDM_TEST_GATE=str(self.folder),
            OMP_NUM_THREADS="1",
        )

    def hold_at(self, step: int) -> None:
        part = self.folder / "hold.part"
        part.write_text(str(step))
        part.rename(self.folder / "hold")

    def let_go(self) -> None:
        (self.folder / "hold").unlink()

    def fail_at(self, step: int) -> None:
        (self.folder / "fail").write_text(str(step))

    def until_held(self, job: int, workers: int = 2) -> None:
        """Until all workers wait at the step of ``hold_at``, in this life of ``job``."""

        def held() -> bool:
            ended = self.slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not ended, self.output()
            return len(list(self.folder.glob("waiting-*"))) == workers

        self.slurm.until(held, f"all workers wait before a step: {self.output()}", 900)

    def forget_waiting(self) -> None:
        """What dead workers left."""
        for path in self.folder.glob("waiting-*"):
            path.unlink()

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def ledger(self) -> LedgerSummary:
        return read_ledger(self.run.ledger)

    def released(self) -> dict[str, Any]:
        return json.loads((self.run.release / "manifest.json").read_text())["facts"]


def assert_nothing_is_left(slurm: SlurmSandbox) -> None:
    """No process, socket folder, token or shared memory of a job on any node."""
    for node in ("node1", "node2"):
        assert slurm.processes(node) == []
        left = slurm.on(node, "sh", "-c", "ls -d /tmp/dpldm-* /tmp/ray* /dev/shm/*").stdout
        assert left.split() == [], node
