"""A stage as a job of a Ray cluster: sent through its dashboard, followed, and ended as it ended.

The job is one shell command, with every setting of the config written out: nothing is uploaded. Its
driver runs on the cluster's head, so this machine may be a laptop that sees neither the nodes nor
the run directory, and may leave.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpldm_dist.config import Config
from dpldm_dist.errors import BringUpError, ConfigError, DpldmError
from dpldm_dist.runtime.stopping import handled

_ADDRESS = "RAY_API_SERVER_ADDRESS"
_NOT_SENT = {"ray_api_address", "ray_folder", "submit_wait", "launcher", "ray_address"}
_TEARDOWN_S = 20  # that a job has after its grace, before Ray ends it
_LOOK_EVERY_S = 0.1  # whether somebody interrupts while a log is read
_ASK_EVERY_S = 1.0
_ENDED = "dpldm job: exit code"  # how the last line of a job's log begins
_TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Submission:
    """What a cluster is sent. ``environment`` is of the job; its workers get that of their node."""

    address: str
    command: str
    environment: dict[str, str]


def submission(config: Config, stage: str) -> Submission:
    """The job that runs ``stage`` on a cluster with ``config``.

    Raises: ConfigError if no address is given, or relative paths would have no meaning there.
    """
    folder = config.run.ray_folder or Path.cwd()
    if not folder.is_absolute():
        raise ConfigError(
            f"run.ray_folder = {folder}: expected an absolute path, which all nodes of the cluster "
            "share."
        )
    words = ["python", "-m", "dpldm_dist", stage]
    for setting in settings_of(config):
        words += ["--set", setting]
    # The shell outlives a SIGTERM, which Ray sends to it too: its last word is the exit code, of
    # which Ray keeps nothing when it stops a job.
    command = (
        f"trap : TERM; cd {shlex.quote(str(folder))} && {shlex.join(words)}; "
        f'code=$?; echo "{_ENDED} $code"; exit $code'
    )
    grace_s = math.ceil(config.run.stop_grace_s) + _TEARDOWN_S
    return Submission(_address(config), command, {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s)})


def settings_of(config: Config) -> list[str]:
    """``section.key=value`` of all that was set, as ``--set`` takes it, for a job on a cluster."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["run"] = {n: v for n, v in tree.get("run", {}).items() if n not in _NOT_SENT}
    tree["run"] |= {"launcher": "ray", "ray_address": "auto"}
    return [f"{name}={toml_value(value)}" for name, value in _settings(tree, [])]


def toml_value(value: Any) -> str:
    """``value`` as TOML writes it; None, which TOML has not, as ``none``."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml_value(k)} = {toml_value(v)}' for k, v in value.items())}}}"
    return json.dumps(value)


def submit(job: Submission, *, stage: str, wait: bool, patience_s: float) -> None:
    """Send ``job``; with ``wait``, print its log and end as it ends.

    Ctrl-C or SIGTERM asks the job to save and stop; once more leaves it to itself.
    ``patience_s``: how long the cluster may not answer, at the start and while the job runs.
    Raises: an error with the exit code of the job; ConfigError if the cluster refuses our token;
    BringUpError if it does not answer.
    """
    client = _client(job.address)
    number = _send(client, job, f"dpldm-{stage}-{secrets.token_hex(4)}", patience_s)
    _say(f"Job {number} at {job.address}. To stop it from elsewhere: ray job stop {number}")
    if not wait:
        return
    interrupts = _Interrupts()
    followed = _Followed(client, number, job.address, patience_s, interrupts)
    with interrupts.caught():
        try:
            followed.to_its_end()
        except KeyboardInterrupt:
            followed.stop()
            followed.to_its_end()
    followed.end()


class _Followed:
    """A job whose log is printed here."""

    def __init__(
        self, client: Any, number: str, address: str, patience_s: float, interrupts: _Interrupts
    ):
        self._client, self._number, self._address = client, number, address
        self._patience_s, self._interrupts = patience_s, interrupts
        self._shown = 0  # characters of the log
        self._tail = ""
        self._info: Any = None

    def stop(self) -> None:
        _say(f"Asking job {self._number} to save and stop; once more to leave it to itself.")
        self._client.stop_job(self._number)

    def to_its_end(self) -> None:
        """Print the log until the job has ended. Raises: BringUpError if the cluster is gone."""
        heard = time.monotonic()
        while True:
            with self._interrupts.kept(), suppress(Exception):  # no connection, or no log yet
                asyncio.run(self._print_log())
            try:
                self._info = self._client.get_job_info(self._number)
                heard = time.monotonic()
            except (OSError, RuntimeError) as error:
                if time.monotonic() - heard > self._patience_s:
                    raise BringUpError(
                        f"The cluster at {self._address} has not answered for "
                        f"{self._patience_s:.0f} s ({type(error).__name__}). The job may go on; to "
                        f"see it: ray job logs -f {self._number}"
                    ) from None
            else:
                if self._info.status.is_terminal():
                    self._show(self._client.get_job_logs(self._number)[self._shown :])
                    return
            time.sleep(_ASK_EVERY_S)

    def end(self) -> None:
        """Raises: an error with the exit code of the job, unless it is 0."""
        code = self._exit_code()
        if code is None:
            reason = (self._info.message or "no reason given").strip().splitlines()[0]
            raise BringUpError(f"Job {self._number} ended {self._info.status.value}: {reason}")
        if code:
            raise _error(code, self._number)

    def _exit_code(self) -> int | None:
        if self._info.driver_exit_code is not None:
            return int(self._info.driver_exit_code)
        said = re.findall(rf"^{_ENDED} (\d+)$", self._tail, re.MULTILINE)
        return int(said[-1]) if said else None

    async def _print_log(self) -> None:
        printing = asyncio.ensure_future(self._print_all())
        while not (printing.done() or self._interrupts.waiting):
            await asyncio.wait({printing}, timeout=_LOOK_EVERY_S)
        printing.cancel()
        await asyncio.gather(printing, return_exceptions=True)

    async def _print_all(self) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(self._number):
            seen += len(text)
            if seen > self._shown:  # a broken connection starts again with the first character
                self._show(text[len(text) - (seen - self._shown) :])

    def _show(self, text: str) -> None:
        self._shown += len(text)
        self._tail = (self._tail + text)[-_TAIL_CHARACTERS:]
        print(text, end="", flush=True)


def _address(config: Config) -> str:
    address = config.run.ray_api_address or os.environ.get(_ADDRESS)
    if not address:
        raise ConfigError(
            f"No cluster to submit to: set run.ray_api_address or {_ADDRESS} to the address of its "
            "dashboard, like http://head:8265."
        )
    if not re.match(r"https?://[^/\s]+", address):
        raise ConfigError(
            f"The cluster's address is {address!r}: expected that of its dashboard, like "
            "http://head:8265."
        )
    return address


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ConfigError(
            f"The cluster at {address} refuses our token, or we sent none: set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
        ) from None
    except (OSError, RuntimeError) as error:
        raise BringUpError(
            f"No Ray dashboard answers at {address} ({type(error).__name__}). See whether the "
            "cluster runs and can be reached from here (from outside, by an SSH tunnel: "
            "cluster/README.md)."
        ) from None


def _send(client: Any, job: Submission, number: str, patience_s: float) -> str:
    """Submit ``job`` under the name ``number``. A cluster that has just started may take a while.

    Raises: BringUpError.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return client.submit_job(
                entrypoint=job.command,
                submission_id=number,
                runtime_env={"env_vars": job.environment},
            )
        except (OSError, RuntimeError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise BringUpError(
                    f"The cluster at {job.address} does not take the job ({said[0][:200]}). See "
                    "whether it is whole (ray status) and of the same version of Ray."
                ) from None
        time.sleep(_ASK_EVERY_S)


def _settings(tree: dict[str, Any], path: list[str]) -> Iterator[tuple[str, Any]]:
    """(section.key, value) of a config's tree, two levels deep and deeper only in sections."""
    for name, value in tree.items():
        if isinstance(value, dict) and _is_section([*path, name]):
            yield from _settings(value, [*path, name])
        else:
            yield ".".join([*path, name]), value


def _is_section(path: list[str]) -> bool:
    section: Any = Config
    for name in path:
        kinds = section.model_fields[name].annotation
        kinds = (kinds, *getattr(kinds, "__args__", ()))
        section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        if section is None:
            return False
    return True


def _error(code: int, number: str) -> DpldmError:
    """An error that ends this process with the exit code of the job."""
    kinds = {kind.exit_code: kind for kind in reversed(DpldmError.__subclasses__())}
    error = kinds.get(code, DpldmError)(
        f"Job {number} ended with exit code {code}; why stands above, at the end of its log."
    )
    error.exit_code = code
    return error


class _Interrupts:
    """Ctrl-C and SIGTERM, of which none may be lost: what a connection does when its task is
    cancelled is not ours, so while a log is read they wait until it has been left."""

    def __init__(self) -> None:
        self.waiting = False
        self._keeping = False

    def caught(self) -> AbstractContextManager[None]:
        """Within, both raise KeyboardInterrupt."""
        return handled((signal.SIGINT, signal.SIGTERM), self._got)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within, they only set ``waiting``; what waits is raised at the end."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt

    def _got(self, number: int, frame: Any) -> None:
        if not self._keeping:
            raise KeyboardInterrupt
        self.waiting = True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
