"""Who runs a stage and where is noted at every start, for ``status``."""

from __future__ import annotations

import json
import os
import socket
import stat

import torch

from dpldm_dist.runtime.rundir import RunDir, private_files
from dpldm_dist.runtime.starts import driver_facts, last_start, note_start
from dpldm_dist.runtime.worker import Worker
from tests.processes import on_workers


def start(collective, root):
    worker = Worker(collective.rank, collective.world_size, 0, torch.device("cpu"), collective)
    socket.gethostname = lambda: f"node{collective.rank}"
    with private_files():
        note_start(RunDir(root), "finetune", {"slurm": None}, worker)
    collective.barrier()


def test_all_workers_and_their_machines_are_noted_by_rank(tmp_path):
    run = RunDir(tmp_path).create()
    assert last_start(run) is None
    assert on_workers(3, start, tmp_path) == [None] * 3
    note = last_start(run)
    assert [worker["host"] for worker in note["workers"]] == ["node0", "node1", "node2"]
    assert note["stage"] == "finetune" and note["slurm"] is None
    assert stat.S_IMODE((run.private / "start.json").stat().st_mode) == 0o600


def test_a_start_replaces_the_note_of_the_one_before(tmp_path):
    run = RunDir(tmp_path).create()
    for workers in (3, 2):
        on_workers(workers, start, tmp_path)
    assert len(last_start(run)["workers"]) == 2


def test_the_driver_knows_the_job_that_it_belongs_to():
    alone = driver_facts({})
    assert (alone["slurm"], alone["ray_job"]) == (None, None)
    assert alone["driver"] == {"host": socket.gethostname(), "process": os.getpid()}
    given = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}
    assert driver_facts(given)["slurm"] == {"job": 12, "restart": 2}
    facts = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    assert driver_facts({"RAY_JOB_CONFIG_JSON_ENV_VAR": facts})["ray_job"] == "raysubmit_1"
    assert driver_facts({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{"})["ray_job"] is None
