"""``run.microbatch = "auto"``: measured once on made-up records, agreed on, kept over restarts."""

import json
import shutil
from itertools import pairwise

import pytest
import torch

from dpldm_dist.errors import ConfigError, RunError
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime import memory
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune, microbatch
from dpldm_dist.stages.finetune.microbatch import candidates, foretold
from dpldm_dist.stages.mechanism import microbatch_of
from tests.stages.tiny_run import (
    TEST_KEY,
    released_weights,
    run_alone,
    settings,
)


@pytest.mark.parametrize(
    ("batch", "lanes", "largest"),
    [(512, 4, 128), (500, 4, 128), (516, 4, 256), (64, 64, 2), (3, 4, 2)],
)
def test_what_is_tried_are_powers_of_two_that_a_lane_can_fill(batch, lanes, largest):
    tried = candidates(batch=batch, lanes=lanes)
    assert tried[0] == 2 and tried[-1] == largest
    assert all(more == 2 * fewer for fewer, more in pairwise(tried))


def test_a_larger_pass_is_foretold_from_the_last_two():
    assert foretold([], 2) == foretold([(2, 100)], 4) == 0  # always tried
    assert foretold([(2, 100), (4, 140), (8, 240)], 16) == 440


def test_the_first_start_measures_and_records_and_a_restart_uses_it(root, monkeypatch):
    config = settings(root, "kept", run={"microbatch": "auto"})
    assert microbatch_of(config) == 64  # not settled
    run_alone(config)
    record = json.loads(RunDir(config.run.dir).microbatch.read_text())
    assert record["microbatch"] == microbatch_of(config) >= 2
    assert all(peak >= 0 for peak in record["bytes_by_records"].values())

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(microbatch, "_measure", never)
    again = settings(root, "again", run={"microbatch": "auto"})
    RunDir(again.run.dir).create().microbatch.write_text('{"microbatch": 4}')
    run_alone(again)
    assert "microbatches of 4" in RunDir(again.run.dir).ledger.read_text()


def test_what_was_measured_on_passes_that_keep_less_is_refused_for_others(root):
    spared = {"microbatch": "auto", "activation_checkpointing": True}
    run_alone(settings(root, "spared", run=spared))
    other = RunDir(settings(root, "not-spared").run.dir).create()
    shutil.copy(RunDir(root / "spared").microbatch, other.microbatch)
    with pytest.raises(ConfigError, match="measured with run.activation_checkpointing = true"):
        run_alone(settings(root, "not-spared", run={"microbatch": "auto"}))


def test_settling_equals_asking_for_that_number(root):
    auto = settings(root, "auto", run={"microbatch": "auto", "unsafe_test_key": TEST_KEY})
    run_alone(auto)
    settled = microbatch_of(auto)
    run_alone(settings(root, "asked", run={"microbatch": settled, "unsafe_test_key": TEST_KEY}))
    one, other = released_weights(root, "auto"), released_weights(root, "asked")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_workers_agree_on_one_number(root):
    config = settings(root, "two", run={"microbatch": "auto", "workers": 2})
    RunDir(config.run.dir).create()
    launch([Job(finetune, config)], run=config.run)
    assert microbatch_of(config) >= 2
    assert read_ledger(RunDir(config.run.dir).ledger)


def test_what_does_not_fit_is_not_chosen_and_not_even_tried(root, monkeypatch):
    peaks = iter([100, 200, 400, 800, 1600])
    monkeypatch.setattr(microbatch.MemoryWatch, "peak", lambda self: next(peaks))
    monkeypatch.setattr(microbatch, "free_bytes", lambda worker: 2 * 799)
    config = settings(
        root,
        "small",
        run={"microbatch": "auto"},
        finetune={"batch": 40},
        privacy={"lanes": 1, "noise_multiplier": 2.0},
    )
    run_alone(config)
    record = json.loads(RunDir(config.run.dir).microbatch.read_text())
    assert record["microbatch"] == 8
    assert list(record["bytes_by_records"]) == ["2", "4", "8"]  # 16 was foretold to take 800


def test_a_device_that_holds_no_two_records_is_refused_with_numbers(root, monkeypatch):
    monkeypatch.setattr(microbatch, "free_bytes", lambda worker: 1000)
    monkeypatch.setattr(microbatch.MemoryWatch, "peak", lambda self: 501)
    config = settings(root, "none", run={"microbatch": "auto"})
    with pytest.raises(ConfigError, match="takes 501 bytes; expected at most 500"):
        run_alone(config)
    assert not RunDir(config.run.dir).microbatch.exists()
    assert not RunDir(config.run.dir).ledger.exists()  # before anything is charged


@pytest.mark.parametrize("content", ["", "{}", '{"microbatch": "many"}', '{"microbatch": 1}', "[]"])
def test_a_damaged_record_is_named(root, content):
    config = settings(root, "damaged", run={"microbatch": "auto"})
    RunDir(config.run.dir).create().microbatch.write_text(content)
    with pytest.raises(RunError, match=r"microbatch\.json is damaged"):
        run_alone(config)


def test_free_memory_is_positive_and_divided_among_workers():
    worker = solo_worker()
    assert 0 < memory.free_bytes(worker) <= memory.free_memory() * 1.1


def test_a_watch_sees_the_most_memory_since_it_was_made():
    watch = memory.MemoryWatch(torch.device("cpu"))
    before = watch.peak()
    held = torch.ones(16 * 2**20)  # 64 MiB
    del held
    assert 60 * 2**20 < watch.peak() - before < 80 * 2**20
