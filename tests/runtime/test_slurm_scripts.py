"""The scripts of slurm/: what they ask of Slurm, seen by stand-ins for its commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dpldm_dist.cli import COMMANDS
from dpldm_dist.runtime.slurm_job import Ports

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
BATCH = sorted(SCRIPTS.glob("*.sbatch"))
PYTHON = """
[ "$4" = "$STAGES" ] || exit 99
echo "begin ${*:5}" >>"$CALLS"; echo "$FOLDER"; exit "$BEGIN_CODE"
"""
SRUN = """
IFS= read -r token; echo "$token" >>"$TOKENS"; env >>"$ENVIRONMENT"
echo "srun $*" >>"$CALLS"; try=${!#}
trap 'echo USR1 >>"$CALLS"; stop=1' USR1
trap 'echo USR2 >>"$CALLS"; stop=1' USR2
if [ -n "$WAITS" ]; then while [ -z "$stop" ]; do sleep 0.02; done; fi
set -- $VERDICTS; eval "verdict=\\${$try:-}"
if [ -n "$verdict" ]; then echo "${verdict/-/ }" >"$FOLDER/verdict-$try"; fi
exit 1
"""
SCONTROL = 'echo "scontrol $*" >>"$CALLS"\n'
SQUEUE = 'echo "$STATE"\n'


class Batch:
    """A batch script among stand-ins. ``verdicts``: what each try ends with, "" for none."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls_file = folder / "calls"
        programs = {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
        for name, text in programs.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("#!/usr/bin/env bash\n" + text)
            path.chmod(0o755)

    def start(
        self, verdicts: str, *, script: str = "finetune", waits: bool = False, **more: str
    ) -> subprocess.Popen:
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_SUBMIT_HOST": "login", "FOLDER": str(self.folder), "VERDICTS": verdicts,
            "CALLS": str(self.calls_file), "TOKENS": str(self.folder / "tokens"),
            "ENVIRONMENT": str(self.folder / "environment"), "STAGES": script, "BEGIN_CODE": "0",
            "WAITS": "1" if waits else "", "STATE": "RUNNING",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", SCRIPTS / f"{script}.sbatch", "my.toml", "--set", "run.dir=a b"],
            env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, verdicts: str, **more) -> tuple[int, str]:
        """Its exit code and what it printed."""
        process = self.start(verdicts, **more)
        shown, _ = process.communicate(timeout=60)
        return process.returncode, shown

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def requeued(self) -> bool:
        return "scontrol requeue 7" in self.calls

    def until_called(self, what: str) -> None:
        deadline = time.monotonic() + 60
        while not any(call.startswith(what) for call in self.calls):
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.01)


@pytest.fixture
def batch(tmp_path) -> Batch:
    return Batch(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 3, 5, 42])
def test_the_exit_code_is_kept_and_a_final_one_is_not_requeued(batch, code):
    assert batch.run(f"{code}-final")[0] == code and not batch.requeued


@pytest.mark.parametrize("code", [71, 75])
def test_what_another_start_may_mend_is_requeued(batch, code):
    returned, shown = batch.run(f"{code}-requeue")
    assert returned == code and batch.requeued and "Requeued" in shown
    assert sum(call.startswith("srun") for call in batch.calls) == 1


def test_what_python_calls_final_is_not_requeued(batch):
    assert batch.run("75-final")[0] == 75 and not batch.requeued


def test_a_job_is_requeued_a_bounded_number_of_times(batch):
    bound = {"DPLDM_MAX_REQUEUES": "4"}
    code, shown = batch.run("75-requeue", SLURM_RESTART_COUNT="4", **bound)
    assert code == 75 and not batch.requeued and "DPLDM_MAX_REQUEUES=4 is reached" in shown
    assert batch.run("75-requeue", SLURM_RESTART_COUNT="3", **bound)[0] == 75 and batch.requeued


def test_bring_up_is_tried_three_times_within_a_start(batch):
    code, shown = batch.run("70-requeue 70-requeue 70-requeue")
    tries = [call.rpartition(" ")[2] for call in batch.calls if call.startswith("srun")]
    assert (code, tries) == (70, ["1", "2", "3"]) and batch.requeued
    assert "try 3 of 3" in shown


def test_a_bring_up_that_succeeds_at_last_counts(batch):
    assert batch.run("70-requeue 0-final")[0] == 0 and not batch.requeued


def test_no_verdict_means_that_the_first_node_was_lost(batch):
    assert batch.run("")[0] == 71 and batch.requeued


def test_a_refused_request_starts_nothing(batch):
    assert batch.run("0-final", BEGIN_CODE="2")[0] == 2
    assert [call.split()[0] for call in batch.calls] == ["begin"]


def test_the_warning_of_the_time_limit_reaches_every_task_and_requeues(batch):
    process = batch.start("75-requeue", waits=True)
    batch.until_called("srun")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert "USR1" in batch.calls and process.returncode == 75 and batch.requeued


def test_a_cancelled_job_is_told_so_and_never_requeued(batch):
    process = batch.start("75-requeue", waits=True, STATE="COMPLETING")
    batch.until_called("srun")
    process.terminate()
    process.communicate(timeout=60)
    assert "USR2" in batch.calls and process.returncode == 75 and not batch.requeued


def test_a_job_that_is_asked_to_end_but_lives_on_is_requeued(batch):
    process = batch.start("75-requeue", waits=True)  # a preemption that signals the script too
    batch.until_called("srun")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75 and batch.requeued


def test_every_try_has_a_token_of_its_own_that_only_its_input_holds(batch):
    batch.run("70-requeue 70-requeue 0-final")
    tokens = (batch.folder / "tokens").read_text().split()
    assert len(set(tokens)) == 3 and all(re.fullmatch("[0-9a-f]{64}", t) for t in tokens)
    elsewhere = (batch.folder / "environment").read_text() + "\n".join(batch.calls)
    assert not any(token in elsewhere for token in tokens)


def test_one_task_a_node_gets_the_arguments_as_they_are(batch):
    batch.run("0-final", SLURM_CPUS_PER_TASK="6")
    begin, srun = batch.calls
    assert begin == "begin my.toml --set run.dir=a b"
    for option in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"):
        assert option in srun
    assert srun.endswith(f"python -m dpldm_dist.runtime.slurm node {batch.folder} 1")


def test_a_hook_says_how_python_is_called_and_what_srun_is_given(batch):
    here = batch.folder / "slurm"
    shutil.copytree(SCRIPTS, here, ignore=shutil.ignore_patterns("hook.sh"))
    (here / "hook.sh").write_text(
        'DPLDM_PYTHON=(env THERE=1 python)\nDPLDM_MAX_REQUEUES=0\nexport LOADED="$UNSET_BEFORE"\n'
    )
    code, _ = batch.run("75-requeue", DPLDM_SLURM=str(here))
    assert code == 75 and not batch.requeued
    assert "env THERE=1 python -m dpldm_dist.runtime.slurm" in batch.calls[-1]


def test_all_scripts_are_clean_for_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found: apt-get install shellcheck")
    files = [*SCRIPTS.glob("*.sh"), *BATCH]
    done = subprocess.run(
        ["shellcheck", "-S", "warning", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_nothing_is_fixed_that_an_option_of_sbatch_says(path):
    fixed = re.findall(r"^#SBATCH --([\w-]+)", path.read_text(), re.MULTILINE)
    assert set(fixed) <= {
        "job-name", "output", "open-mode", "ntasks-per-node", "ntasks", "requeue", "no-requeue",
        "signal",
    }  # fmt: skip
    assert {"job-name", "output"} <= set(fixed)


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_every_script_names_stages_that_exist(path):
    if path.stem == "tensorboard":
        return
    line = re.search(r"^stages=(.*)$", path.read_text(), re.MULTILINE)[1]
    stages = line.removeprefix("${DPLDM_STAGES:-").removesuffix("}").split()
    assert stages and set(stages) <= set(COMMANDS)
    if path.stem == "pipeline":
        order = ["prepare", "encode", "pretrain", "finetune", "sample", "evaluate", "report"]
        assert stages == order


@pytest.mark.parametrize("stage", ["encode", "pretrain", "finetune", "sample", "pipeline"])
def test_scripts_of_long_stages_are_warned_before_the_time_limit_and_requeued(stage):
    text = (SCRIPTS / f"{stage}.sbatch").read_text()
    for line in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text


def test_tensorboard_names_the_line_of_the_tunnel_and_listens_on_its_node_alone(batch):
    (batch.folder / "bin" / "python").write_text('#!/usr/bin/env bash\necho "python $*"\n')
    run = batch.folder / "runs" / "a"
    (run / "release").mkdir(parents=True)
    done = subprocess.run(
        ["bash", SCRIPTS / "tensorboard.sbatch", run],
        env={"PATH": f"{batch.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_SUBMIT_HOST": "login"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    port = Ports.of(7).tensorboard
    assert f"ssh -N -L 6006:127.0.0.1:{port} -J login " in done.stdout
    assert f"--host 127.0.0.1 --port {port}" in done.stdout
    assert f"--logdir_spec a:{run}/release/tensorboard" in done.stdout
    assert "private" not in done.stdout.replace(str(batch.folder), "")
