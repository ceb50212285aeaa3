"""Public pre-training: replicas that stay equal because their gradients are averaged."""

import json

import pytest
import stages_for_tests as stages

from dpldm_dist.config import parse_config
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir


@pytest.mark.parametrize(("workers", "expected"), [(1, [[1.0, 0.0]]), (2, [[0.5, 1.5]])])
def test_gradients_are_the_mean_over_workers(tmp_path, workers, expected):
    config = parse_config({"run": {"dir": str(tmp_path), "workers": workers, "device": "cpu"}})
    RunDir(tmp_path).create()
    launch([Job(stages.average_gradients, config)], run=config.run)
    found = [
        json.loads((tmp_path / "release" / f"gradient-{rank}.json").read_text())
        for rank in range(workers)
    ]
    assert all(fact["gradient"] == expected for fact in found)
    assert all(fact["weight"] == found[0]["weight"] for fact in found)
    assert all(fact["wrapped"] == (workers > 1) for fact in found)
