"""``dpldm submit`` against a real Ray cluster that asks for a token."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import finetune_for_tests as tiny
import pytest
import torch
import yaml

from dpldm_dist.config import Config, load_config, parse_config
from dpldm_dist.errors import BringUpError, ConfigError, DpldmError
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime import submit_ray
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import stop_file
from dpldm_dist.runtime.submit_ray import settings_of, submission, submit
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.submit import describe
from tests.stages.tiny_run import released_weights

STEPS = 8
REPOSITORY = Path(__file__).parents[2]
AT = {"ray_api_address": "http://head:8265", "ray_folder": "/shared"}


def config_of(tree: dict) -> Config:
    return parse_config({"run": AT} | tree)


# --- what is sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"run": AT | {"dir": "runs/with 'quotes' and \"more\" $HOME `id`", "workers": [1, 4]}},
        {"data": {"private": {"source": "a,b;c d é\\", "classes": ["x y", "[z]"]}}},
        {"evaluate": {"compare": {"a b": "x/y", "c.d": "z"}}, "data": {"flips": True}},
        {"privacy": {"epsilon": 1e-3, "delta": 1e-10, "clip_norm": 2, "noise_multiplier": None}},
    ],
)
def test_the_job_has_the_settings_of_the_config_bit_for_bit(tree):
    config = config_of(tree)
    command = submission(config, "finetune").command
    words = subprocess.run(  # as the shell of the cluster takes them
        ["sh", "-c", command.replace("cd /shared", ":").replace("python", "printf '%s\\0'")],
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    assert words[:3] == ["-m", "dpldm_dist", "finetune"]
    settings = [word for word, before in zip(words[1:], words, strict=False) if before == "--set"]
    assert settings == settings_of(config)
    arrived = load_config(None, settings)
    assert (arrived.run.launcher, arrived.run.ray_address) == ("ray", "auto")
    here = {"launcher": "ray", "ray_address": "auto", "ray_api_address": None, "ray_folder": None}
    wanted = config.model_dump() | {"run": config.run.model_dump() | here}
    assert arrived.model_dump() == wanted


def test_a_job_has_more_time_to_save_than_the_run_takes():
    job = submission(config_of({"run": AT | {"stop_grace_s": 250.5}}), "finetune")
    assert float(job.environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 250.5


def test_dry_run_says_what_would_be_sent_and_where():
    lines = describe(config_of({}), what="finetune")
    assert "http://head:8265" in lines[0] and "-m dpldm_dist finetune" in lines[1]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({}, "set run.ray_api_address or RAY_API_SERVER_ADDRESS"),
        ({"ray_api_address": "head:6379"}, "expected that of its dashboard"),
        (AT | {"ray_folder": "not/absolute"}, "expected an absolute path"),
    ],
)
def test_a_job_that_could_not_run_is_not_sent(monkeypatch, run, said):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=said):
        submission(parse_config({"run": run}), "finetune")


def test_a_cluster_that_does_not_answer_is_named():
    job = submission(config_of({"run": AT | {"ray_api_address": "http://127.0.0.1:9"}}), "report")
    with pytest.raises(BringUpError, match="No Ray dashboard answers at http://127.0.0.1:9"):
        submit(job, stage="report", wait=True, patience_s=1.0)


class _Young:
    """A cluster that takes a job only when asked the third time, or never."""

    def __init__(self, says: str):
        self.asked, self._says = 0, says

    def submit_job(self, *, submission_id: str, **_: object) -> str:
        self.asked += 1
        if self.asked < 3:
            raise RuntimeError(f"Request failed with status code 500: {self._says}")
        return submission_id


def test_a_cluster_that_has_just_started_is_asked_again_and_any_other_refusal_is_one_line():
    job = submission(config_of({}), "report")
    young = _Young("No available agent to submit job, please try again later.")
    assert submit_ray._send(young, job, "job-1", 60.0) == "job-1" and young.asked == 3
    with pytest.raises(BringUpError, match="does not take the job .*No available agent"):
        submit_ray._send(_Young("No available agent"), job, "job-2", -1.0)
    other = _Young("disk full\nTraceback")
    with pytest.raises(BringUpError, match=r"disk full\)"):
        submit_ray._send(other, job, "job-3", 60.0)
    assert other.asked == 1


class _Deaf:
    """A job whose log ends as if by itself when its reader is cancelled, and which ends when it is
    asked to. ``interrupts`` are sent to this process while the log is read."""

    def __init__(self, interrupts: list[int]):
        self._interrupts, self.stops = interrupts, 0

    def submit_job(self, *, submission_id: str, **_: object) -> str:
        return submission_id

    async def tail_job_logs(self, number: str):
        yield "a line\n"
        if self._interrupts:
            os.kill(os.getpid(), self._interrupts.pop(0))
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    def get_job_info(self, number: str):
        ended = self.stops > 0 and not self._interrupts
        status = SimpleNamespace(is_terminal=lambda: ended, value="STOPPED")
        return SimpleNamespace(status=status, driver_exit_code=75, message="")

    def get_job_logs(self, number: str) -> str:
        return "a line\n"

    def stop_job(self, number: str) -> None:
        self.stops += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_interrupt_is_lost_while_a_log_is_read(number, monkeypatch):
    deaf = _Deaf([number])
    monkeypatch.setattr(submit_ray, "_client", lambda address: deaf)
    before = signal.getsignal(number)
    with pytest.raises(DpldmError) as ended:
        submit(submission(config_of({}), "report"), stage="report", wait=True, patience_s=1.0)
    assert deaf.stops == 1 and ended.value.exit_code == 75
    assert signal.getsignal(number) is before


def test_a_second_interrupt_leaves_the_job_to_itself(monkeypatch):
    deaf = _Deaf([signal.SIGINT, signal.SIGINT])
    monkeypatch.setattr(submit_ray, "_client", lambda address: deaf)
    with pytest.raises(KeyboardInterrupt):
        submit(submission(config_of({}), "report"), stage="report", wait=True, patience_s=1.0)
    assert deaf.stops == 1


# --- a real cluster -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    address: str
    token: Path
    ports: dict[int, int]  # by their usual number
    gate: Path  # of tests/gate: holds its jobs at a step

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a machine that has the cluster's token, unless it is changed."""
        ours = {
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
        }
        return os.environ | ours | changes

    def submit(self, *arguments: str, **changes: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "dpldm_dist", "submit", *arguments],
            env=self.environment(**changes), cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """A Ray head with two CPUs, in a folder and on ports of its own."""
    folder = tmp_path_factory.mktemp("head")
    ray_folder = Path(f"/tmp/dpldm-test-{secrets.token_hex(3)}")  # its sockets need a short name
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    dashboard, *agents = _free_ports(4)
    ours = Head(f"http://127.0.0.1:{dashboard}", token, {8265: dashboard, 52365: agents[0]}, folder)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", "--port=0", "--include-dashboard=true", "--disable-usage-stats",
        f"--dashboard-port={dashboard}", f"--temp-dir={ray_folder}",
        f"--object-store-memory={80 * 2**20}",
        *(f"--{name}={port}" for name, port in zip(names, agents, strict=True)),
    ]  # fmt: skip
    environment = ours.environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # its jobs say "python"
        PYTHONPATH=f"{REPOSITORY / 'tests/gate'}:{REPOSITORY}",
        DPLDM_TEST_GATE=str(folder),
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
        RAY_memory_monitor_refresh_ms="0",  # this machine may be full of others
    )
    log = open(folder / "head.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_until(lambda: _answers(dashboard) or process.poll() is not None)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield ours
    finally:
        process.terminate()
        process.wait(timeout=120)
        log.close()
        subprocess.run(["rm", "-rf", str(ray_folder)], check=True)


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_who_has_not_the_token_is_refused(head, tmp_path, mode):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    asked = head.submit("report", RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN_PATH=str(wrong))
    _, errors = asked.communicate(timeout=300)
    assert asked.returncode == 2 and "refuses our token" in errors and "Traceback" not in errors


def test_the_probes_of_our_kubernetes_pods_answer_without_the_token(head):
    cluster = yaml.safe_load((REPOSITORY / "cluster/kubernetes/raycluster.yaml").read_text())[
        "spec"
    ]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [c for group in groups for c in group["template"]["spec"]["containers"]]
    probes = [
        c[kind]["httpGet"] for c in containers for kind in ("readinessProbe", "livenessProbe")
    ]
    assert len(probes) == 4
    for probe in probes:
        _wait_until(lambda port=head.ports[probe["port"]]: _answers(port))
        url = f"http://127.0.0.1:{head.ports[probe['port']]}{probe['path']}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):  # what is not a probe needs it
        urllib.request.urlopen(f"{head.address}/api/version", timeout=60)


def test_the_exit_code_and_the_log_of_a_job_come_back(head, tmp_path):
    arguments = ["--set", f"run.dir={tmp_path}/none", "--set", f"run.ray_folder={REPOSITORY}"]
    command = [sys.executable, "-m", "dpldm_dist", "report", *arguments]
    here = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    asked = head.submit("report", *arguments)
    log, errors = asked.communicate(timeout=300)
    assert asked.returncode == here.returncode > 1
    assert here.stderr.strip() in log and f"ended with exit code {here.returncode}" in errors


def test_a_job_is_stopped_saved_submitted_again_and_ends_as_an_unbroken_run(head, tmp_path):
    long = {"steps": STEPS}
    changes = {"workers": 2, "launcher": "ray", "ray_folder": str(REPOSITORY)}
    config = tiny.tiny_config(tmp_path, "submitted", finetune=long, **changes)
    run = RunDir(config.run.dir)
    settings = [word for s in settings_of(config) for word in ("--set", s)]
    settings += ["--set", f"run.ray_folder={REPOSITORY}"]
    hold = head.gate / "hold"
    hold.write_text("3")
    first = head.submit("finetune", *settings)
    _wait_until(lambda: len(list(head.gate.glob("waiting-*"))) == 2 or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    first.send_signal(signal.SIGINT)
    _wait_until(lambda: stop_file(run).exists() or first.poll() is not None)
    hold.unlink()
    log, errors = first.communicate(timeout=300)
    assert first.returncode == 75, (log, errors)
    assert "save and stop" in errors and f"4 of {STEPS} noisy steps saved" in log, (log, errors)
    assert read_ledger(run.ledger).steps == 4

    again = head.submit("finetune", *settings)
    log, errors = again.communicate(timeout=580)
    assert again.returncode == 0, (log, errors)
    ledger = read_ledger(run.ledger)
    assert (ledger.steps, ledger.attempts, ledger.starts) == (STEPS, 1, 2)

    unbroken = tiny.tiny_config(tmp_path, "unbroken", finetune=long)
    RunDir(unbroken.run.dir).create()
    finetune(unbroken, solo_worker())
    weights = released_weights(tmp_path, "submitted")
    for name, value in released_weights(tmp_path, "unbroken").items():
        assert torch.equal(weights[name], value), name


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 300 s"
        time.sleep(0.2)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
