"""A cluster that shrinks and grows under a run: real raylets that come, are drained, and go."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import finetune_for_tests as tiny
import pytest
import stages_for_tests as stages
import torch
from ray._raylet import Config as RayConfig
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from dpldm_dist.config import Config, parse_config
from dpldm_dist.errors import NodeLostError, SavedAndStopped
from dpldm_dist.runtime import launch_ray
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with room for one worker, and a second such node."""
    with launch_ray._own_folder(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        RayConfig.initialize("")  # it read the mode when it was imported
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        made = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        made.add_second = lambda: setattr(made, "second", made.add_node(**node))
        made.add_second()
        try:
            yield made
        finally:
            made.shutdown()
    RayConfig.initialize("")


def drain(cluster: Cluster, node: object, *, within_s: float) -> None:
    """Tell Ray what a cloud tells it: this machine will be taken away."""
    client = GcsClient(address=cluster.address)
    accepted, why = client.drain_node(
        node_id=node.node_id,
        reason=autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        reason_message="spot",
        deadline_timestamp_ms=int((time.time() + within_s) * 1000),
    )
    assert accepted, why


class Launch:
    """A launch beside the main thread, which alone can add nodes."""

    def __init__(self, stage: Callable[..., object], config: Config):
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._body, args=[stage, config], daemon=True)
        self._thread.start()

    def _body(self, stage: Callable[..., object], config: Config) -> None:
        try:
            launch([Job(stage, config)], run=config.run)
        except BaseException as error:
            self.error = error

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self._thread.is_alive(), f"the run ended with {self.error!r}"
            assert time.monotonic() < deadline, "it did not happen within 300 s"
            time.sleep(0.1)

    def end(self) -> None:
        self._thread.join()
        if self.error is not None:
            raise self.error


def test_workers_follow_a_cluster_that_shrinks_and_grows_and_release_the_same_bits(
    cluster, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(launch_ray, "_RESIZE_EVERY_S", 1.0)
    elastic = {"launcher": "ray", "ray_address": cluster.address, "workers": [1, 2]}
    config = tiny.tiny_config(tmp_path, "elastic", **elastic)
    folder, private = config.run.dir, RunDir(config.run.dir).create().private
    first = stages.give_order(folder, "wait", step=4)
    second = stages.give_order(folder, "wait", step=7)
    launched = Launch(tiny.finetune, config)
    launched.wait_until((private / "waiting").exists)  # two workers, at step 4
    drain(cluster, cluster.second, within_s=60)
    launched.wait_until(lambda: len(stages.starts(folder)) == 2)
    (private / "waiting").unlink()
    first.unlink()
    launched.wait_until((private / "waiting").exists)  # one worker, at step 7
    cluster.add_second()
    launched.wait_until(lambda: len(stages.starts(folder)) == 3)
    second.unlink()
    launched.end()
    assert [start["workers"] for start in stages.starts(folder)] == [2, 1, 2]
    weights, ledger = tiny.weights_and_ledger(config)
    unbroken = tiny.unbroken_weights(tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in unbroken.items())
    assert (ledger.steps, ledger.attempts, ledger.starts) == (tiny.STEPS, 1, 3)
    told = capfd.readouterr().err
    assert "5 of 10 noisy steps saved" in told, "saved when the machine was announced to go"
    assert "room for 2 worker(s) now" in told


@pytest.mark.soak
def test_a_machine_that_is_taken_away_and_not_replaced_leaves_a_saved_run_and_code_75(
    cluster, tmp_path
):
    config, private = fixed_config(tmp_path, cluster), RunDir(tmp_path).create().private
    held = stages.give_order(tmp_path, "wait", step=7)
    launched = Launch(stages.count, config)
    launched.wait_until((private / "waiting").exists)
    drain(cluster, cluster.second, within_s=60)
    with pytest.raises(SavedAndStopped, match="All is saved. .* no room for 2 workers for 5 s"):
        launched.end()
    assert Checkpoints(RunDir(tmp_path).checkpoints, keep=2).latest().step == 8
    held.unlink()
    cluster.remove_node(cluster.second)
    cluster.add_second()
    Launch(stages.count, config).end()  # the same command again
    assert [start["from"] for start in stages.starts(tmp_path)] == [0, 8]


@pytest.mark.soak
def test_a_machine_that_dies_and_is_not_replaced_ends_the_run_with_code_71(cluster, tmp_path):
    config, private = fixed_config(tmp_path, cluster), RunDir(tmp_path).create().private
    stages.give_order(tmp_path, "wait", step=7)
    launched = Launch(stages.count, config)
    launched.wait_until((private / "waiting").exists)
    cluster.remove_node(cluster.second, allow_graceful=False)
    with pytest.raises(NodeLostError, match="no room for 2 workers for 5 s") as caught:
        launched.end()
    assert caught.value.exit_code == 71


def fixed_config(folder: Path, cluster: Cluster) -> Config:
    run = {"dir": str(folder), "launcher": "ray", "device": "cpu", "timeout_s": 60.0}
    run |= {"ray_address": cluster.address, "workers": 2, "nodes_wait_s": 5.0}
    return parse_config({"run": run, "sample": {"seed": 12}})
