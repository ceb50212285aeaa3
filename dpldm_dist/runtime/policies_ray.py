"""What Ray Train asks us as it runs: is a failure worth another start, with how many workers?

Ray's own rules try every failure again, also an error that is bound to come back, and wait without
end for machines that are gone. Both rules live in Ray's controller, beside the driver. What they
decide is noted in a file, from which the driver tells the user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.state import state as ray_state
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

from dpldm_dist.errors import (
    BringUpError,
    DpldmError,
    NodeLostError,
    SavedAndStopped,
    WorkerError,
)
from dpldm_dist.runtime.failures import Preempted, root_cause
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import stop_file

_LOOK_EVERY_S = 0.5
_FINAL = FailureDecision.RAISE
_HOOK = "_initialize_and_run_controller"


@dataclass(frozen=True)
class Rules:
    """``notes``: file for what was decided, one JSON object a line.
    ``wait_s``: how long the cluster may be too small for the least workers."""

    run: RunDir
    notes: Path
    wait_s: float

    def note(self, kind: str, text: str) -> None:
        with open(self.notes, "a") as file:
            file.write(json.dumps({"kind": kind, "text": text}) + "\n")


class RuledTrainer(TorchTrainer):
    """Ray's trainer under our rules.

    It hangs on a private part of Ray. A Ray without it is refused, and tests on a real Ray notice
    when it changes its meaning.
    Raises: BringUpError.
    """

    def __init__(self, *arguments: Any, rules: Rules, **settings: Any):
        if not hasattr(TorchTrainer, _HOOK):
            raise BringUpError(
                f"Ray {ray.__version__} is not known to this package: install a version that "
                "pyproject.toml names."
            )
        super().__init__(*arguments, **settings)
        self._rules = rules

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = FailurePolicy(self.run_config.failure_config, self._rules)
        parts["scaling_policy"] = ScalingPolicy(self.scaling_config, self._rules)
        return super()._initialize_and_run_controller(**parts)


class FailurePolicy(DefaultFailurePolicy):
    """Another start for a worker that died, hung or lost its machine; none for any other error.

    Formal guarantees: an error that a worker could explain is final (a user's, data, privacy or
    run error comes back however often it is tried). Deaths, preemptions and failed starts are each
    tried again a bounded number of times.
    """

    def __init__(self, config: ray.train.FailureConfig, rules: Rules):
        super().__init__(config)
        self._rules = rules

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        cause = explain_ray(training_failed_error, run=self._rules.run)
        if isinstance(cause, Preempted):
            self._preemption_failures += 1
            limit = self.failure_config.max_preemption_failures
            decision = _within(self._preemption_failures, limit)
        elif isinstance(training_failed_error, ray.train.WorkerGroupError):
            again = isinstance(cause, WorkerError)
            decision = super().make_decision(training_failed_error) if again else _FINAL
        elif isinstance(cause, WorkerError):  # it died while the others were being started
            self._worker_group_failures += 1
            decision = _within(self._worker_group_failures, self.failure_config.max_failures)
        else:
            decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RETRY:
            kind = "preempted" if isinstance(cause, Preempted) else "failed"
            self._rules.note(kind, f"{cause} Starting again from the last checkpoint.")
        return decision


def _within(count: int, limit: int) -> FailureDecision:
    return FailureDecision.RETRY if count <= limit else _FINAL


class ScalingPolicy(ElasticScalingPolicy):
    """As many workers as the cluster has room for, between the least and the most.

    Raises: NodeLostError if it has no room for the least for ``rules.wait_s`` seconds;
    SavedAndStopped if the run is asked to stop meanwhile.
    """

    def __init__(self, config: ray.train.ScalingConfig, rules: Rules):
        super().__init__(config)
        self._rules = rules
        self._short_since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self._short_since = None
            return decision
        refuse_stopped(self._rules.run)
        now = time.monotonic()
        self._short_since = self._short_since or now
        if now - self._short_since > self._rules.wait_s:
            raise NodeLostError(
                f"The Ray cluster has had no room for {self.scaling_config.min_workers} workers "
                f"for {self._rules.wait_s:.0f} s (run.nodes_wait_s). Add nodes, or lower "
                "run.workers, and give the same command again."
            )
        time.sleep(_LOOK_EVERY_S)  # Ray would ask again at once, and keep a core busy
        return decision

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        leaving = ray_state.get_draining_nodes()  # Ray counts them as long as they are there
        staying = {n: has for n, has in reserved_resources.items() if n not in leaving}
        return super()._count_possible_workers(staying)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if isinstance(decision, NoopDecision):
            return decision
        if decision.num_workers < worker_group_state.num_workers:
            return NoopDecision()  # a machine that goes is announced, or missed when it is gone
        self._rules.note(
            "resized",
            f"The cluster has room for {decision.num_workers} worker(s) now: going on with as many "
            "from the last checkpoint.",
        )
        return decision


def explain_ray(error: BaseException, *, run: RunDir) -> BaseException:
    """What ``TorchTrainer.fit`` raised, or its controller saw, as one error of our tree."""
    if isinstance(error, ray.train.WorkerGroupError):
        return root_cause(_explain_workers(error.worker_failures, run))
    if isinstance(error, ray.train.ControllerError):
        cause = error.controller_failure
        if isinstance(cause, DpldmError):
            return cause
        if isinstance(cause, ray.exceptions.ActorDiedError):  # seen before the worker's rank is
            return _death("A worker", cause)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return BringUpError(
                f"Ray found no place for {cause.num_workers} workers: others use the cluster, or "
                "a node was lost. See what runs there (ray status)."
            )
        return BringUpError(
            f"Ray could not start the workers ({first_line(cause)}). See whether all nodes are up "
            "and share the run directory: dpldm check."
        )
    if isinstance(error, _PREEMPTION):
        return Preempted("A machine of the run was taken away. To resume, give the same command.")
    if isinstance(error, ray.exceptions.RayError):
        return BringUpError(f"The connection to Ray was lost ({type(error).__name__}).")
    return error


def refuse_stopped(run: RunDir) -> None:
    """Raises: SavedAndStopped if ``run`` was asked to stop; to be called while no worker runs."""
    if stop_file(run).exists():
        raise SavedAndStopped(
            "Stopped on request while it waited for machines; nothing is lost. To go on, give the "
            "same command."
        )


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def stalled_report(run: RunDir, rank: int) -> Path:
    """Where the watchdog of a worker writes what the worker was doing when it was ended."""
    return run.private / f"stalled-rank{rank}.log"


_PREEMPTION = ray.train.v2.api.exceptions.PreemptionError


def _explain_workers(failures: Mapping[int, BaseException], run: RunDir) -> dict[int, DpldmError]:
    return {rank: _explain_worker(rank, error, run) for rank, error in failures.items()}


def _explain_worker(rank: int, error: BaseException, run: RunDir) -> DpldmError:
    cause = getattr(error, "cause", error)  # a RayTaskError carries ours
    if isinstance(cause, DpldmError):
        return cause
    report = stalled_report(run, rank)
    if report.is_file():
        return WorkerError(
            f"Worker {rank} did nothing for longer than run.timeout_s and was ended; where it "
            f"stood is in {report.with_suffix('')}*. To resume, give the same command again."
        )
    return _death(f"Worker {rank}", error)


def _death(who: str, error: BaseException) -> WorkerError:
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    return WorkerError(
        f"{who} died ({type(error).__name__}); often its machine was lost or ran out of memory. To "
        "resume, give the same command again."
    )
