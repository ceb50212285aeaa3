"""Workers as Ray Train v2 actors. Ray starts the processes; the run directory is the only truth.

What goes through Ray is the order (names of stages and the public config) and, if a worker fails,
one of our one-line errors. Data, weights, keys and results never do.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray._raylet import AuthenticationTokenLoader
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context

from dpldm_dist.config import RunConfig
from dpldm_dist.errors import BringUpError, DpldmError, NodeLostError, RunError, SavedAndStopped
from dpldm_dist.runtime.collective import GroupCollective, SoloCollective
from dpldm_dist.runtime.failures import Preempted, explain
from dpldm_dist.runtime.jobs import do_jobs
from dpldm_dist.runtime.policies_ray import (
    RuledTrainer,
    Rules,
    explain_ray,
    first_line,
    refuse_stopped,
    stalled_report,
)
from dpldm_dist.runtime.rundir import RunDir, private_files
from dpldm_dist.runtime.stopping import SIGNALS, stop_file
from dpldm_dist.runtime.watchdog import patience_s, watched
from dpldm_dist.runtime.worker import Worker, cores, resolved_device, set_threads

_OBJECT_STORE_BYTES = 80 * 2**20  # only the order passes through it
_CONNECT_S = 10.0
_RELAY_EVERY_S = 0.5
_RESIZE_EVERY_S = 60.0  # how often a group of workers may grow
_MOST_PREEMPTIONS = 100
_PLACE_WITHIN_S = 30.0  # workers for which the cluster has room
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def launch_ray(order: dict[str, Any], *, run: RunConfig) -> None:
    """Run ``order`` (see jobs.job_order) on ``run.workers`` Ray workers.

    Workers that die, hang or lose their machine are replaced ``run.max_failures`` times, and with a
    range of workers their number follows the cluster; they go on from what lies in the run
    directory. A Ray that this process has joined already is used and left as it is.

    Raises: the root cause (see failures.root_cause); BringUpError if the cluster cannot be
    reached or has not enough CPUs or GPUs; NodeLostError if it lost them.
    """
    with ray_cluster(run), _folder_for_ray(run) as storage:
        gpus = _use_gpus(run)
        _wait_for_resources(run, gpus=gpus)
        rules = Rules(RunDir(run.dir), storage / "notes", wait_s=run.nodes_wait_s)
        order = order | {"threads": _threads(run), "gpus": gpus}
        order |= {"run_dir": str(rules.run.root), "seen": str(rules.notes)}
        trainer = RuledTrainer(
            _work,
            rules=rules,
            train_loop_config=order,
            torch_config=PinnedTorchConfig(
                backend="cpu:gloo,cuda:nccl" if gpus else "gloo",
                timeout_s=int(run.timeout_s) or 1,
            ),
            scaling_config=ScalingConfig(
                num_workers=(run.least_workers, run.most_workers),
                use_gpu=gpus,
                resources_per_worker=_needs(gpus),
                elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
            ),
            run_config=ray.train.RunConfig(
                name=f"launch-{secrets.token_hex(4)}",  # new each time: nothing of Ray's is resumed
                storage_path=str(storage),
                failure_config=FailureConfig(
                    max_failures=run.max_failures,
                    controller_failure_limit=max(1, run.max_failures),
                    max_preemption_failures=_MOST_PREEMPTIONS,
                ),
                checkpoint_config=CheckpointConfig(num_to_keep=1),  # see _tell_ray
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        fit = _Fit(trainer, rules.notes)
        error = fit.outcome()
        if error is None:
            return
        error = explain_ray(error, run=rules.run)
        if isinstance(error, NodeLostError) and fit.last_note == "preempted":
            raise SavedAndStopped(f"All is saved. {error}")
        raise error from None


@contextmanager
def ray_cluster(run: RunConfig) -> Iterator[None]:
    """This process joined to Ray: already so, or ``run.ray_address``, or a Ray of its own.

    Its own one ("local") has no dashboard, listens with a token of its own, keeps its files in a
    folder that only this user can read, and is gone afterwards.
    Raises: BringUpError.
    """
    settings = _settings(run)
    if ray.is_initialized():
        with _environment(settings):
            yield
        return
    own = run.ray_address == "local"
    with _environment(settings), _own_folder() if own else nullcontext():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with private_files():  # the umask of every process that Ray starts
                _join(run, own=own)
            unheard = handlers[signal.SIGTERM] is signal.SIG_DFL
            _restore(handlers | ({signal.SIGTERM: _leave} if unheard else {}))
            yield
        finally:
            ray.shutdown()
            _restore(handlers)


@dataclass
class PinnedTorchConfig(TorchConfig):
    """Process group over the interface that carries the node's IP; deaf workers.

    Where a host name resolves to loopback, gloo would otherwise offer 127.0.0.1 to other nodes.
    A GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME that the user gave is kept. SIGTERM and SIGUSR1 to a
    whole process tree ask the driver to stop the run: workers that died by them could not save.
    """

    @property
    def backend_cls(self) -> type:
        return _PinnedBackend


class _PinnedBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_pin_interface)
        # here and not in the stage: handlers can be set in the main thread only
        worker_group.execute(_ignore_signals)
        super().on_start(worker_group, backend_config)


def _pin_interface() -> None:
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interface_of(address: str) -> str | None:
    """Name of the network interface with the IPv4 ``address``, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _work(order: dict[str, Any]) -> None:
    """The life of a worker, inside a Ray actor."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    run, directory = RunConfig.model_validate(order["run"]), RunDir(Path(order["run_dir"]))
    try:
        _require_shared(Path(order["seen"]), rank)
        set_threads(run.model_copy(update={"threads": order["threads"]}), workers_here=1)
        device = ray.train.torch.get_device() if order["gpus"] else torch.device("cpu")
        worker = Worker(
            rank,
            workers,
            context.get_local_rank(),
            device,
            GroupCollective(device) if workers > 1 else SoloCollective(),
            preempted=_preempted,
            checkpointed=_tell_ray,
        )
        if rank == 0:
            _await_predecessor(directory.ledger, limit_s=run.nodes_wait_s)
        with watched(stalled_report(directory, rank), limit_s=patience_s(run.timeout_s)):
            do_jobs(order, worker)
    except BaseException as error:
        # Without its cause: Ray prints that, and its text may be private.
        explained = explain(error, rank=rank, run_dir=directory.root)
        raise _with_reason(explained, directory) from None


def _preempted() -> bool:
    """Whether Ray was told that a machine of this group will be taken away. Asks nobody."""
    return get_train_context().preemption_context.preemption_info is not None


def _with_reason(error: DpldmError, run: RunDir) -> DpldmError:
    """A stop that nobody asked for is a preemption: the others may go on."""
    asked = stop_file(run).exists()
    if type(error) is SavedAndStopped and _preempted() and not asked:
        return Preempted(str(error))
    return error


def _tell_ray(step: int) -> None:
    """Let Ray show the number of steps of the newest checkpoint. It gets a marker with that number
    and nothing else; what a restart reads is in the run directory."""
    marker = None
    if ray.train.get_context().get_world_rank() == 0:
        folder = Path(tempfile.mkdtemp(prefix="dpldm-marker-"))
        (folder / "steps.json").write_text(json.dumps({"steps": step}))
        marker = Checkpoint.from_directory(folder)
    ray.train.report({"steps": step}, checkpoint=marker, delete_local_checkpoint_after_upload=True)


def _require_shared(seen: Path, rank: int) -> None:
    """Raises: RunError if this machine does not see what the driver wrote in the run directory.

    Without that it would make a run directory, a key and a ledger of its own.
    """
    if not seen.is_file():
        raise RunError(
            f"Worker {rank} on {socket.gethostname()} does not see {seen}, which the driver wrote: "
            "set run.dir to storage that all machines share."
        )


def _await_predecessor(ledger: Path, *, limit_s: float) -> None:
    """Wait until nobody holds ``ledger``: a worker that was replaced may be about to die, or its
    file server may not know yet that it did. Whoever holds it longer is named when it is opened."""
    deadline = time.monotonic() + limit_s
    while ledger.is_file() and time.monotonic() < deadline:
        descriptor = os.open(ledger, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
        else:
            return
        finally:
            os.close(descriptor)


def _require_listener(address: str) -> None:
    """Raises: BringUpError if nothing answers at ``host:port``; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return  # "auto" and the like: Ray looks for itself
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise BringUpError(
            f"Nothing answers at run.ray_address = {address} ({error}). Start Ray there (ray start "
            "--head), or set run.ray_address=local."
        ) from None


def _join(run: RunConfig, *, own: bool) -> None:
    _require_listener(run.ray_address)
    settings: dict[str, Any] = {"address": run.ray_address}
    if own:
        settings |= {
            "num_cpus": run.most_workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**settings, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise BringUpError(
            f"Cannot join Ray at '{run.ray_address}' ({first_line(error)}). See whether it runs "
            "there and, if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
        ) from None


@contextmanager
def _own_folder() -> Iterator[None]:
    """A short 0700 folder for Ray's files and token (sockets allow about 100 characters)."""
    folder = Path(tempfile.mkdtemp(prefix="dpldm-", dir="/tmp"))
    token = folder / "token"
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    own = {"RAY_TMPDIR": str(folder), "RAY_AUTH_TOKEN_PATH": str(token)}
    mode = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE")}  # None: ray.init turns tokens on
    try:
        with _environment(own | mode):
            AuthenticationTokenLoader.instance().reset_cache()  # it may know an earlier token
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables within (None: unset); Ray sets more. Afterwards all are as before."""
    previous = dict(os.environ)
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment({name: previous.get(name) for name in {*os.environ, *previous}})


def _settings(run: RunConfig) -> dict[str, str]:
    """Ray's settings: how soon a dead worker is noticed, and how long a silent one may be."""
    return {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": f"{run.timeout_s}",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{min(run.nodes_wait_s, _PLACE_WITHIN_S)}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{patience_s(run.timeout_s)}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value


@contextmanager
def _folder_for_ray(run: RunConfig) -> Iterator[Path]:
    """Where Ray Train puts its own notes; on the shared storage, as it demands. We read none."""
    directory = RunDir(run.dir).create()
    for stale in directory.private.glob("ray-*"):  # of a driver that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with private_files():
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir=directory.private))
        (folder / "notes").touch()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Fit:
    """A training that runs beside the main thread, which tells the user what Ray decides.

    In the main thread Ray Train would take over Ctrl-C; so it stays a KeyboardInterrupt here, and
    leaving ``ray_cluster`` ends the workers.
    """

    def __init__(self, trainer: RuledTrainer, notes: Path):
        self.last_note: str | None = None
        self._notes, self._told = notes, 0
        self._trainer = trainer
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._body, name="ray-train", daemon=True)

    def outcome(self) -> BaseException | None:
        """Wait for the end; what it raised."""
        self._thread.start()
        while self._thread.is_alive():
            self._thread.join(_RELAY_EVERY_S)
            self._relay()
        return self._error

    def _body(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = error

    def _relay(self) -> None:
        lines = self._notes.read_text().splitlines(keepends=True)
        for line in lines[self._told :]:
            if not line.endswith("\n"):
                return
            note = json.loads(line)
            self._told, self.last_note = self._told + 1, note["kind"]
            print(note["text"], file=sys.stderr, flush=True)


def _leave(number: int, _frame: object) -> None:
    """On SIGTERM: unwind, so that our Ray ends with us (Ray's own handler aborts the process)."""
    raise SystemExit(128 + number)


def _restore(handlers: Mapping[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _use_gpus(run: RunConfig) -> bool:
    """Whether each worker gets a GPU: as asked, or if the cluster has one for each ("auto")."""
    if run.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= run.least_workers
    if run.ray_address == "local":
        return resolved_device(run) == "cuda"  # refuses cuda where there is none
    return run.device == "cuda"


def _needs(gpus: bool) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}


def _wait_for_resources(run: RunConfig, *, gpus: bool) -> None:
    """Raises: BringUpError if the cluster stays too small for the least workers; SavedAndStopped if
    the run is asked to stop meanwhile."""
    least = run.least_workers
    deadline = time.monotonic() + (0 if run.ray_address == "local" else run.nodes_wait_s)
    while True:
        have = ray.cluster_resources()
        short = [
            f"{have.get(kind, 0):g} {kind}s where {each * least:g} are needed"
            for kind, each in _needs(gpus).items()
            if have.get(kind, 0) < each * least
        ]
        if not short:
            return
        refuse_stopped(RunDir(run.dir))
        if time.monotonic() >= deadline:
            raise BringUpError(
                f"The Ray cluster is too small for run.workers = {run.crew}: it has "
                f"{' and '.join(short)}. Add nodes or lower run.workers."
            )
        time.sleep(1)


def _threads(run: RunConfig) -> int:
    """Threads per worker: a share of this machine in a Ray of our own, else Ray's one CPU each."""
    if run.threads is not None or run.ray_address != "local":
        return run.threads or 1
    asked = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    return asked or max(1, cores() // run.most_workers)
