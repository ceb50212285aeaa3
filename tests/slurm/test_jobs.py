"""The scripts of slurm/ on a real Slurm of two nodes, with real private fine-tuning on Ray."""

from __future__ import annotations

import json
import math
import re

import pytest

from dpldm_dist.privacy.dataset_ledger import read_dataset_ledger
from dpldm_dist.runtime.rundir import RunDir
from tests.slurm.tiny_job import STEPS, assert_nothing_is_left
from tests.test_pipeline import CONFIG, draw_images

pytestmark = pytest.mark.slurm


def test_two_jobs_share_two_nodes_and_each_uses_both(slurm, tiny_job):
    runs = [tiny_job("a"), tiny_job("b")]
    jobs = [run.submit("--nodes=2", "--cpus-per-task=1") for run in runs]
    for run, job in zip(runs, jobs, strict=True):
        ended = slurm.wait(job, "COMPLETED", "FAILED")
        assert ended["ExitCode"] == "0:0", run.output()
        assert ended["NodeList"] == "node[1-2]", "both jobs held both nodes"
        assert "for 2 workers" in run.output()
        start = json.loads((run.run.private / "start.json").read_text())
        assert sorted(worker["host"] for worker in start["workers"]) == ["node1", "node2"]
        assert start["slurm"] == {"job": job, "restart": 0}
        assert (run.ledger().steps, run.ledger().attempts) == (STEPS, 1)
        assert run.released()["epsilon"] == pytest.approx(run.ledger().epsilon)
        logs = run.run.private / "slurm" / f"{job}-0"
        for node in ("node1", "node2"):
            assert "Ray runtime started" in (logs / node / "ray-start.log").read_text()
            assert list((logs / node).glob("raylet*"))
        for path in [logs, *logs.rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0, path
        assert (run.run.release / "manifest.json").stat().st_mode & 0o044, "the user's umask"
    assert_nothing_is_left(slurm)


def test_a_failing_worker_fails_the_job_with_its_exit_code_and_no_private_text(slurm, tiny_job):
    run = tiny_job("failing")
    run.fail_at(2)
    job = run.submit("--nodes=2")
    assert slurm.wait(job, "COMPLETED", "FAILED")["ExitCode"] == "1:0", run.output()
    assert "Worker 1 failed with ValueError" in run.output()
    assert "31337" in (run.run.private / "crash-rank1.log").read_text()
    assert "31337" not in run.output() and "31337" not in str(slurm.job(job))
    assert slurm.job(job)["Restarts"] == "0", "an error that would come back is final"
    assert_nothing_is_left(slurm)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("finetune.stepz=3", 2, "Did you mean 'steps'"),
        ("data.private.latents=/no/such/folder", 3, "/no/such/folder"),
    ],
)
def test_the_exit_code_of_a_stage_is_that_of_the_job(slurm, tiny_job, change, code, said):
    run = tiny_job("wrong")
    job = run.submit("--nodes=1", more=("--set", change))
    assert slurm.wait(job, "COMPLETED", "FAILED")["ExitCode"] == f"{code}:0", run.output()
    assert said in run.output() and slurm.job(job)["Restarts"] == "0"


def test_a_preempted_or_timed_out_job_saves_is_requeued_and_loses_no_step(slurm, tiny_job):
    run = tiny_job("stopped")
    run.hold_at(2)
    job = run.submit("--nodes=2", "--cpus-per-task=4", "--time=50")
    run.until_held(job)
    urgent = slurm.submit(
        *("--nodes=2", "--cpus-per-task=4", "--ntasks-per-node=1", "--partition=urgent"),
        *("--output=/dev/null", "--wrap=true"),
    )
    slurm.until(lambda: "Requeued" in run.output(), "saved and requeued", 600)
    run.hold_at(5)
    slurm.wait(urgent, "COMPLETED")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "requeued once", 600)
    assert "3 of 8 noisy steps saved" in run.output(), run.output()

    run.until_held(job)
    assert slurm.state(job) == "RUNNING"
    hours, minutes, seconds = map(int, slurm.job(job)["RunTime"].split(":"))
    ran_min = 60 * hours + minutes + seconds / 60
    limit = math.ceil(ran_min) + 1  # 1 to 2 minutes are left: B:USR1@120 is due
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "2", "requeued twice", 600)
    assert "6 of 8 noisy steps saved" in run.output(), run.output()

    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=50")
    run.let_go()
    ended = slurm.wait(job, "COMPLETED", "FAILED")
    assert ended["ExitCode"] == "0:0", run.output()
    ledger = run.ledger()
    assert (ledger.steps, ledger.attempts, ledger.starts) == (STEPS, 1, 3)
    assert run.released()["steps_done"] == STEPS
    assert_nothing_is_left(slurm)


def test_a_lost_node_requeues_the_job_which_goes_on_when_the_node_is_back(slurm, tiny_job):
    """First a follower, which falls silent; then the node that leads, which dies."""
    run = tiny_job("lost")
    run.hold_at(4)
    job = run.submit("--nodes=2", "--export=ALL,DPLDM_NODE_TIMEOUT=10")
    run.until_held(job)
    run.forget_waiting()
    run.hold_at(6)
    slurm.unplug("node2")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "requeued once", 600)
    assert "node2" in run.output() and "Nothing was heard" in run.output(), run.output()
    slurm.plug("node2")
    run.until_held(job)

    run.forget_waiting()
    run.hold_at(STEPS)
    slurm.kill("node1")  # where the job script and the driver run
    slurm.until(lambda: slurm.job(job)["Restarts"] == "2", "requeued twice", 600)
    slurm.boot("node1")
    ended = slurm.wait(job, "COMPLETED", "FAILED")
    assert ended["ExitCode"] == "0:0", run.output()
    ledger = run.ledger()
    assert (ledger.steps, ledger.attempts, ledger.starts) == (STEPS, 1, 3)
    assert_nothing_is_left(slurm)


def test_scancel_saves_and_leaves_nothing_behind(slurm, tiny_job):
    run = tiny_job("cancelled")
    run.hold_at(4)
    job = run.submit("--nodes=2")
    run.until_held(job)
    slurm.run("scancel", str(job))
    slurm.wait(job, "CANCELLED")
    slurm.until(lambda: "COMPLETING" not in slurm.run("squeue", "-h", "-o", "%T"), "it is over")
    assert "5 of 8 noisy steps saved" in run.output(), run.output()
    assert slurm.job(job)["Restarts"] == "0" and slurm.run("squeue", "-h") == ""
    assert_nothing_is_left(slurm)


def test_members_of_an_array_run_side_by_side_within_the_budget_of_the_data_set(slurm, tiny_job):
    """A member reserves 0.38 of the budget: by the price of runs that may be chosen one by one."""
    run = tiny_job("sweep")
    budget, sweep = run.folder / "budget.jsonl", run.folder / "sweep.txt"
    rates = (0.001, 0.002, 0.003)
    sweep.write_text("".join(f"--set finetune.learning_rate={rate}\n" for rate in rates))
    terms = ("dataset_epsilon=80.0", "dataset_delta=4e-3", f"dataset_ledger={budget}")
    more = [text for term in terms for text in ("--set", f"privacy.{term}")]
    job = run.submit(
        *("--array=1-3", "--nodes=1", "--cpus-per-task=1"), more=("--sweep", str(sweep), *more)
    )
    ended = {}
    for member, rate in enumerate(rates, start=1):
        directory = RunDir(run.folder / f"run-{member}")
        code = slurm.wait(f"{job}_{member}", "COMPLETED", "FAILED")["ExitCode"]
        ended[member] = code
        if code == "0:0":
            manifest = json.loads((directory.release / "manifest.json").read_text())
            assert manifest["config"]["finetune"]["learning_rate"] == rate
        else:
            assert not (directory.release / "manifest.json").exists()
    assert sorted(ended.values()) == ["0:0", "0:0", "4:0"], run.output()
    assert len(read_dataset_ledger(budget).shares) == 2
    assert not run.run.root.exists(), "every member has a run directory of its own"


def test_the_pipeline_runs_stage_after_stage_in_one_job(slurm, tiny_job):
    run = tiny_job("pipeline")
    for seed, which in enumerate(("public", "private", "heldout")):
        draw_images(run.folder / which, ["a", "b"], 12, seed=seed)
    run.config.write_text(CONFIG.format(root=run.folder))
    stages = "prepare encode pretrain finetune sample"
    export = f"--export=ALL,DPLDM_STAGES={stages}"
    job = run.submit("--nodes=1", "--cpus-per-task=2", export, script="pipeline")
    assert slurm.wait(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", run.output()
    for name in ("release/manifest.json", "release/samples.png"):
        assert (run.run.root / name).is_file(), name
    assert re.findall(r"dpldm (\w+)$", run.output(), re.MULTILINE) == stages.split()


def test_check_tells_from_inside_of_an_allocation_what_the_nodes_are(slurm, tiny_job):
    run = tiny_job("checked")
    job = run.submit("--nodes=2", "--cpus-per-task=2", script="check")
    assert slurm.wait(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", run.output()
    shown = " ".join(run.output().split())
    for fact in (
        "node1 (198.51.100.11", "node2 (198.51.100.12", "locks hold between them", "clocks",
        "all-reduce 32 MB", "mode 0600", f"{job}: workers on node1, node2; 2 CPUs", "the same on",
    ):  # fmt: skip
        assert fact in shown, fact
    assert "wrong" not in shown
    assert_nothing_is_left(slurm)
