"""Workers as Ray Train v2 actors. Ray starts the processes; the run directory is the only truth.

What goes through Ray is the order (names of stages and the public config) and, if a worker fails,
one of our one-line errors. Data, weights, keys and results never do.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray._raylet import AuthenticationTokenLoader
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend

from dpldm_dist.config import RunConfig
from dpldm_dist.errors import BringUpError, DpldmError, WorkerError
from dpldm_dist.runtime.collective import GroupCollective, SoloCollective
from dpldm_dist.runtime.failures import explain, root_cause
from dpldm_dist.runtime.jobs import do_jobs
from dpldm_dist.runtime.rundir import RunDir, private_files
from dpldm_dist.runtime.worker import Worker, cores, resolved_device, set_threads

_OBJECT_STORE_BYTES = 80 * 2**20  # only the order passes through it
_WAIT_FOR_RESOURCES_S = 60.0
_CONNECT_S = 10.0
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often a dead worker is looked for
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def launch_ray(order: dict[str, Any], *, run: RunConfig) -> None:
    """Run ``order`` (see jobs.job_order) on ``run.workers`` Ray workers.

    A Ray that this process has joined already is used and left as it is.

    Raises: the root cause (see failures.root_cause); BringUpError if the cluster cannot be
    reached or has not enough CPUs or GPUs.
    """
    with ray_cluster(run), _folder_for_ray(run) as storage:
        gpus = _use_gpus(run)
        _wait_for_resources(run, gpus=gpus)
        order = order | {"threads": _threads(run), "gpus": gpus}
        trainer = TorchTrainer(
            _work,
            train_loop_config=order,
            torch_config=PinnedTorchConfig(
                backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=int(run.timeout_s) or 1
            ),
            scaling_config=ScalingConfig(
                num_workers=run.workers, use_gpu=gpus, resources_per_worker=_needs(gpus)
            ),
            run_config=ray.train.RunConfig(
                name=f"launch-{secrets.token_hex(4)}",  # new each time: nothing of Ray's is resumed
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        error = _in_thread(trainer.fit)
        if error is not None:
            raise explain_ray(error) from None


@contextmanager
def ray_cluster(run: RunConfig) -> Iterator[None]:
    """This process joined to Ray: already so, or ``run.ray_address``, or a Ray of its own.

    Its own one ("local") has no dashboard, listens with a token of its own, keeps its files in a
    folder that only this user can read, and is gone afterwards.
    Raises: BringUpError.
    """
    if ray.is_initialized():
        with _environment(_ENVIRONMENT):
            yield
        return
    own = run.ray_address == "local"
    with _own_folder() if own else _environment(_ENVIRONMENT):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with private_files():  # the umask of every process that Ray starts
                _join(run, own=own)
            _restore(handlers | {signal.SIGTERM: _leave})
            yield
        finally:
            ray.shutdown()
            _restore(handlers)


def explain_ray(error: BaseException) -> BaseException:
    """What ``TorchTrainer.fit`` raised, as one error of our tree."""
    if isinstance(error, ray.train.WorkerGroupError):
        return root_cause(
            {rank: _explain_worker(rank, e) for rank, e in error.worker_failures.items()}
        )
    if isinstance(error, ray.train.ControllerError):
        cause = error.controller_failure
        if isinstance(cause, ray.exceptions.ActorDiedError):  # seen before the worker's rank is
            return _death("A worker", cause)
        return BringUpError(
            f"Ray could not start the workers ({_first_line(cause)}). See whether all nodes are "
            "up and share the run directory: dpldm check."
        )
    if isinstance(error, ray.exceptions.RayError):
        return BringUpError(f"The connection to Ray was lost ({type(error).__name__}).")
    return error


@dataclass
class PinnedTorchConfig(TorchConfig):
    """Process group over the interface that carries the node's IP.

    Where a host name resolves to loopback, gloo would otherwise offer 127.0.0.1 to other nodes.
    A GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME that the user gave is kept.
    """

    @property
    def backend_cls(self) -> type:
        return _PinnedBackend


class _PinnedBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_pin_interface)
        super().on_start(worker_group, backend_config)


def _pin_interface() -> None:
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


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
    run = RunConfig.model_validate(order["run"])
    try:
        set_threads(run.model_copy(update={"threads": order["threads"]}), workers_here=1)
        device = ray.train.torch.get_device() if order["gpus"] else torch.device("cpu")
        collective = GroupCollective(device) if workers > 1 else SoloCollective()
        do_jobs(order, Worker(rank, workers, context.get_local_rank(), device, collective))
    except BaseException as error:
        # Without its cause: Ray prints that, and its text may be private.
        raise explain(error, rank=rank, run_dir=run.dir) from None


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
            "num_cpus": run.workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**settings, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise BringUpError(
            f"Cannot join Ray at '{run.ray_address}' ({_first_line(error)}). See whether it runs "
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
        with _environment(_ENVIRONMENT | own | mode):
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
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_thread(call: Callable[[], object]) -> BaseException | None:
    """Run ``call`` beside the main thread; what it raised.

    In the main thread Ray Train would take over Ctrl-C; so it stays a KeyboardInterrupt here, and
    leaving ``ray_cluster`` ends the workers.
    """
    outcome: list[BaseException | None] = []

    def body() -> None:
        try:
            call()
        except BaseException as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=body, name="ray-train", daemon=True)
    thread.start()
    thread.join()
    return outcome[0]


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
        return ray.cluster_resources().get("GPU", 0) >= run.workers
    if run.ray_address == "local":
        return resolved_device(run) == "cuda"  # refuses cuda where there is none
    return run.device == "cuda"


def _needs(gpus: bool) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}


def _wait_for_resources(run: RunConfig, *, gpus: bool) -> None:
    """Raises: BringUpError if the cluster stays too small for the workers."""
    deadline = time.monotonic() + (0 if run.ray_address == "local" else _WAIT_FOR_RESOURCES_S)
    while True:
        have = ray.cluster_resources()
        short = [
            f"{have.get(kind, 0):g} {kind}s where {each * run.workers:g} are needed"
            for kind, each in _needs(gpus).items()
            if have.get(kind, 0) < each * run.workers
        ]
        if not short:
            return
        if time.monotonic() >= deadline:
            raise BringUpError(
                f"The Ray cluster is too small for run.workers = {run.workers}: it has "
                f"{' and '.join(short)}. Add nodes or lower run.workers."
            )
        time.sleep(1)


def _threads(run: RunConfig) -> int:
    """Threads per worker: a share of this machine in a Ray of our own, else Ray's one CPU each."""
    if run.threads is not None or run.ray_address != "local":
        return run.threads or 1
    asked = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    return asked or max(1, cores() // run.workers)


def _explain_worker(rank: int, error: BaseException) -> DpldmError:
    cause = getattr(error, "cause", error)  # a RayTaskError carries ours
    if isinstance(cause, DpldmError):
        return cause
    return _death(f"Worker {rank}", error)


def _death(who: str, error: BaseException) -> WorkerError:
    return WorkerError(
        f"{who} died ({type(error).__name__}); often its machine ran out of memory. To resume, "
        "give the same command again."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
