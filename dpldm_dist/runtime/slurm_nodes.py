"""The tasks of a Slurm job, one per node: the first one leads, the others follow.

The head waits for a word from every node, starts Ray, has the others join, runs the stages one
after another, and has all of it taken down. A follower does what it is told until it is told to
end, or the head is gone. A signal to any task (Slurm preempts by one, job.sh warns of the time
limit by another) asks the run to save and stop.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dpldm_dist.errors import (
    BringUpError,
    ConfigError,
    DpldmError,
    NodeLostError,
    SavedAndStopped,
)
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.slurm_channel import Line, greet, near_end
from dpldm_dist.runtime.slurm_job import Allocation, Order, Ports
from dpldm_dist.runtime.slurm_ray import (
    RayNode,
    folder_for_ray,
    head_options,
    member_options,
    ray_here,
    write_token,
)
from dpldm_dist.runtime.stopping import ask_to_stop

_TICK_S = 0.5
_TELL_EVERY_S = 15.0
_CANCEL_GRACE_S = 8.0  # scancel leaves 30 s (KillWait) for everything
_LAST_WORD_S = 10.0  # for a driver to end by itself, once a node is lost
_TEARDOWN_S = 20.0
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_SETTLED = (0, 2, 3, 4, SavedAndStopped.exit_code)  # exit codes that no lost node explains
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Post:
    """Where a task stands: its allocation, its order, its job's ports, folder and token."""

    allocation: Allocation
    order: Order
    ports: Ports
    folder: Path
    token: str

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.order.run))

    @property
    def logs(self) -> Path:
        return self.folder / self.allocation.node

    def say(self, text: str) -> None:
        """A line in the output of the job."""
        print(f"[job {self.allocation.job}, {self.allocation.node}] {text}", flush=True)


@dataclass(frozen=True)
class Member:
    """A node as it presented itself; ``address``: its own, for Ray."""

    node: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Placement:
    """How many workers, where, and with what: ``slots`` by node."""

    workers: int
    slots: dict[str, int]
    gpus: bool
    threads: int


class Stop:
    """Whether this start is asked to end early. Any signal asks; SIGUSR2 means: cancelled."""

    def __init__(self, post: Post):
        self._post = post
        self.asked = asyncio.Event()
        self.cancelled = False
        self._deadline = 0.0
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            loop.add_signal_handler(number, self.ask, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGUSR2, self.cancel)

    def ask(self, why: str) -> None:
        self._repeat()
        if not self.asked.is_set():
            self._post.say(f"{why}: asking the run to save and stop.")
            self._set_deadline(self._post.order.stop_grace_s)
            self.asked.set()

    def cancel(self) -> None:
        self.ask("cancelled")
        self.cancelled = True
        self._set_deadline(min(self._post.order.stop_grace_s, _CANCEL_GRACE_S))

    def remind(self) -> bool:
        """Repeat the request, which a driver that just starts forgets; whether it is overdue."""
        if not self.asked.is_set():
            return False
        self._repeat()
        return time.monotonic() > self._deadline

    def _set_deadline(self, grace_s: float) -> None:
        self._deadline = time.monotonic() + grace_s

    def _repeat(self) -> None:
        with suppress(OSError):  # a full disk must not keep us from stopping
            ask_to_stop(self._post.run)


async def lead(post: Post) -> int:
    """The task of the first node. How this start ended, as an exit code of ``errors``.

    0: all stages are done; 75: saved and stopped; 70, 71: Ray did not come up, or a node was lost;
    else the exit code of the stage that failed.
    """
    stop = Stop(post)
    post.say(f"{len(post.allocation.nodes)} nodes, start {post.allocation.restart + 1}.")
    try:
        async with AsyncExitStack() as stack:
            crew = await stack.enter_async_context(crew_of(post, stop))
            options = await _bring_up(post, crew, stack)
            return await _run_stages(post, options, crew, stop)
    except DpldmError as error:
        post.say(str(error))
        return error.exit_code


async def follow(post: Post) -> int:
    """The task of any other node: starts Ray when told, and ends when told or left alone."""
    stop = Stop(post)
    line, address = await _reach_head(post)
    try:
        async with AsyncExitStack() as stack:
            await _obey(post, line, stop, address, stack)
    except DpldmError as error:
        post.say(str(error))
        await line.tell("failed", why=str(error))
    finally:
        await line.tell("ended")
        await line.close()
    return 0


class Crew:
    """The nodes of the job as the head sees them.

    ``broken``: fails, with a DpldmError, as soon as one of them is lost or in trouble. ``is_up``:
    whether Ray has come up on all; before, its end is worth another try within the job.
    """

    def __init__(self, post: Post, stop: Stop):
        self.is_up = False
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.members: dict[str, Member] = {}
        self.reached_at = ""  # the address at which the others reached this node
        self._post, self._stop = post, stop
        self._others = set(post.allocation.nodes) - {post.allocation.node}
        self._lines: dict[str, Line] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from somewhere: prove it, and listen to it until it ends."""
        post, token = self._post, self._post.token.encode()
        try:
            facts = await greet(reader, writer, token=token, role="head", facts={})
            member = Member(**facts)
        except (BringUpError, TypeError) as error:
            writer.close()
            return post.say(f"A connection was refused: {error}")
        name, silence_s = f"Node {member.node}", post.order.node_timeout_s
        self.reached_at = self.reached_at or near_end(writer)
        self._lines[member.node] = Line(reader, writer, name=name, silence_s=silence_s)
        self._ended[member.node] = asyncio.Event()
        self.members[member.node] = member
        self._tasks.append(asyncio.create_task(self._listen(member.node)))

    async def complete(self) -> None:
        """Until every node has spoken. Raises: BringUpError naming those that have not."""
        post, others = self._post, self._others
        await self.until(
            lambda: others <= self.members.keys(),
            lambda: f"a word from {_names(others - self.members.keys())}",
            hint="See what srun says in the output of the job: is Python there, and the folder of "
            "this package?",
        )
        if others:
            post.say(f"All {len(others) + 1} nodes are here; they reach {self.reached_at}.")

    async def until(self, done: Callable[[], bool], what: Callable[[], str], *, hint: str) -> None:
        """Wait for ``done``, saying what is missing. Raises: BringUpError after start_timeout_s."""
        limit_s = self._post.order.start_timeout_s
        begun = told = time.monotonic()
        while True:
            await self.unless_broken(asyncio.sleep(_TICK_S / 5))
            if done():
                return
            now = time.monotonic()
            if now - begun > limit_s:
                raise BringUpError(
                    f"Still waiting for {what()} after {limit_s:.0f} s (DPLDM_START_TIMEOUT). "
                    f"{hint}"
                )
            if now - told > _TELL_EVERY_S:
                self._post.say(f"Waiting for {what()}.")
                told = now

    async def unless_broken(self, work: Awaitable[_Result]) -> _Result:
        """``work``'s result. Raises: the error of the crew; SavedAndStopped if asked to stop."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.asked.wait())
        try:
            await asyncio.wait({task, stopped, self.broken}, return_when=asyncio.FIRST_COMPLETED)
            if self.broken.done():
                self.broken.result()
            if stopped.done():
                raise SavedAndStopped("Stopped on request before the stages began.")
            return task.result()
        finally:
            for waiting in (task, stopped):
                waiting.cancel()

    async def tell_all(self, what: str, **facts: Any) -> None:
        for line in self._lines.values():
            await line.tell(what, **facts)

    async def tell(self, node: str, what: str, **facts: Any) -> None:
        await self._lines[node].tell(what, **facts)

    def watch(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` beside, as long as there is a crew."""
        self._tasks.append(asyncio.create_task(work))

    def fails(self, why: str) -> None:
        """Ray, or what starts it, failed on a node."""
        self.breaks(NodeLostError(why) if self.is_up else BringUpError(why))

    def breaks(self, error: DpldmError) -> None:
        if not self.broken.done():
            self.broken.set_exception(error)
            self.broken.exception()  # seen: nobody need wait for it

    async def dismiss(self) -> None:
        """Have all nodes take down what they started, and wait for them, within reason."""
        await self.tell_all("end")
        with suppress(TimeoutError):
            async with asyncio.timeout(_TEARDOWN_S):
                for event in self._ended.values():
                    await event.wait()
        for task in self._tasks:
            task.cancel()
        for line in self._lines.values():
            await line.close()

    async def all_heard(self, *, since: float) -> None:
        """Until every node has been heard after ``since``, or the crew is broken."""
        while not self.broken.done() and any(
            line.heard_at <= since for line in self._lines.values()
        ):
            await asyncio.sleep(_TICK_S)

    async def _listen(self, node: str) -> None:
        try:
            while True:
                message = await self._lines[node].hear()
                if message["is"] == "stop":
                    self._stop.ask(f"node {node} was signalled")
                elif message["is"] == "failed":
                    self.fails(f"Node {node}: {message['why']}")
                elif message["is"] == "ended":
                    return
        except NodeLostError as error:
            self.breaks(error)
        finally:
            self._ended[node].set()


@asynccontextmanager
async def crew_of(post: Post, stop: Stop) -> AsyncIterator[Crew]:
    """The other nodes, connected; afterwards they have ended what they started."""
    crew = Crew(post, stop)
    async with AsyncExitStack() as stack:
        if len(post.allocation.nodes) > 1:
            await stack.enter_async_context(await _listener(post, crew))
        stack.push_async_callback(crew.dismiss)
        await crew.complete()
        yield crew


async def _listener(post: Post, crew: Crew) -> asyncio.Server:
    port = post.ports.control
    try:
        return await asyncio.start_server(crew.welcome, port=port, family=socket.AF_INET)
    except OSError as error:
        raise BringUpError(f"Port {port} of this node is taken ({error.strerror}).") from None


def place(
    members: Sequence[Member], *, workers: int | None, device: str, threads: int | None
) -> Placement:
    """Workers over nodes, as evenly as they fit: a GPU each where there are enough, else CPUs.

    workers: None for one on every GPU, or one on every node without GPUs.
    Raises: ConfigError if the allocation has not the GPUs that are asked for.
    """
    room = {member.node: member.gpus for member in members}
    total = sum(room.values())
    with_gpus = device != "cpu" and total > 0 and (device == "cuda" or (workers or 1) <= total)
    if device == "cuda" and (workers or 1) > total:
        raise ConfigError(
            f"run.device = cuda and run.workers = {workers or 1}, but the allocation has {total} "
            "GPUs: give sbatch --gpus-per-node, or lower run.workers."
        )
    wanted = workers or (total if with_gpus else len(members))
    if not with_gpus:
        room = dict.fromkeys(room, wanted)
    slots = dict.fromkeys(room, 0)
    while sum(slots.values()) < wanted:
        free = [node for node in room if slots[node] < room[node]]
        slots[min(free, key=slots.__getitem__)] += 1
    shares = [member.cpus // slots[member.node] for member in members if slots[member.node]]
    return Placement(wanted, slots, with_gpus, threads or max(1, min(shares)))


async def _bring_up(post: Post, crew: Crew, stack: AsyncExitStack) -> list[str]:
    """Ray on all nodes, if the order needs it; the settings by which a stage finds its workers."""
    order, here = post.order, post.allocation
    address = order.head_address or _interface_address(post) or crew.reached_at or _address(here)
    placement = place(
        [Member(here.node, address, here.cpus, here.gpus), *crew.members.values()],
        workers=order.workers,
        device=order.device,
        threads=order.threads,
    )
    settings = [f"run.threads={placement.threads}"]
    if order.workers is None:
        settings.append(f"run.workers={placement.workers}")
    if not order.ray:
        return [*settings, "run.launcher=local"]
    gcs = f"{address}:{post.ports.gcs}"
    options = head_options(address, post.ports, dashboard=order.dashboard)
    ray = await _start_ray(post, options, placement.slots[here.node], placement.gpus, stack)
    crew.watch(_report_end(post, ray, crew))
    await _until_answers(crew, address, post.ports.gcs)
    for node in crew.members:
        await crew.tell(node, "join", head=gcs, slots=placement.slots[node], gpus=placement.gpus)
    stack.push_async_callback(crew.tell_all, "end")  # all nodes take Ray down at once
    await _until_joined(crew, gcs, {address: here.node} | _by_address(crew))
    crew.is_up = True
    post.say(f"Ray is up on {len(here.nodes)} nodes for {placement.workers} workers.")
    return [*settings, "run.launcher=ray", f"run.ray_address={gcs}"]


async def _obey(post: Post, line: Line, stop: Stop, address: str, stack: AsyncExitStack) -> None:
    """A follower's life: join Ray when told; pass on signals; until told to end.

    Raises: NodeLostError when the head is gone; BringUpError when Ray ends.
    """
    passing = asyncio.create_task(_pass_on(stop, line))
    stack.callback(passing.cancel)
    ray_ends: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    ray: RayNode | None = None
    while True:
        hearing = asyncio.create_task(line.hear())
        await asyncio.wait({hearing, ray_ends}, return_when=asyncio.FIRST_COMPLETED)
        if ray is not None and ray_ends.done():
            hearing.cancel()
            raise BringUpError(_obituary(ray, ray_ends.result()))
        message = await hearing
        if message["is"] == "end":
            ray_ends.cancel()
            return
        if message["is"] == "join":
            options = member_options(address, head=message["head"])
            ray = await _start_ray(post, options, message["slots"], message["gpus"], stack)
            ray_ends = asyncio.ensure_future(ray.process.wait())


async def _start_ray(
    post: Post, options: Sequence[str], slots: int, gpus: bool, stack: AsyncExitStack
) -> RayNode:
    base, job = post.order.folder_for_ray, post.allocation.job
    folder = stack.enter_context(folder_for_ray(base, job=job))
    write_token(folder, post.token)
    return await stack.enter_async_context(
        ray_here(options, slots=slots, gpus=gpus, ports=post.ports, folder=folder, logs=post.logs)
    )


async def _run_stages(post: Post, options: Sequence[str], crew: Crew, stop: Stop) -> int:
    order = post.order
    common = [] if order.config is None else ["--config", order.config]
    for setting in (*order.settings, *options):
        common += ["--set", setting]
    for stage in order.stages:
        if stop.asked.is_set():
            raise SavedAndStopped(f"Stopped on request before {stage}.")
        post.say(f"dpldm {stage}")
        code = await _run_stage(post, stage, common, crew, stop)
        if code:
            post.say(f"dpldm {stage} ended with exit code {code}.")
            return code
    return 0


def stage_command(stage: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-u", "-m", "dpldm_dist", stage, *arguments]


async def _run_stage(
    post: Post, stage: str, arguments: Sequence[str], crew: Crew, stop: Stop
) -> int:
    """The exit code of ``dpldm STAGE``. Raises: NodeLostError, also if it did not stop in time."""
    process = await asyncio.create_subprocess_exec(
        *stage_command(stage, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # it stops by the request, not by a signal of Slurm
    )
    ended = asyncio.ensure_future(process.wait())
    try:
        while not ended.done():
            await asyncio.wait(
                {ended, crew.broken}, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED
            )
            overdue = stop.remind()
            if crew.broken.done():
                await asyncio.wait({ended}, timeout=_LAST_WORD_S)
                break
            if overdue and not ended.done():
                raise NodeLostError(
                    f"dpldm {stage} has not stopped in time (DPLDM_STOP_GRACE) and is ended; what "
                    "it saved last counts."
                )
        return await _code_of(process, crew, stop, post)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await ended


async def _code_of(process: asyncio.subprocess.Process, crew: Crew, stop: Stop, post: Post) -> int:
    """A stage that a lost node took with it did not fail by itself. Raises: NodeLostError."""
    code = process.returncode
    if code in _SETTLED:
        return code
    if code is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(post.order.node_timeout_s):
                await crew.all_heard(since=time.monotonic())
    if crew.broken.done():
        crew.broken.result()
    if code is None or stop.asked.is_set():
        raise NodeLostError("The stage did not stop as asked; what it saved last counts.")
    return code if code > 0 else 128 - code


async def _report_end(post: Post, ray: RayNode, crew: Crew) -> None:
    code = await ray.process.wait()
    crew.fails(f"Node {post.allocation.node}: {_obituary(ray, code)}")


def _obituary(ray: RayNode, code: int) -> str:
    return f"Ray ended with exit code {code}: {ray.last_word()} See {ray.log}."


async def _until_answers(crew: Crew, address: str, port: int) -> None:
    answered = False

    async def knock() -> None:
        nonlocal answered
        while not answered:
            try:
                _, writer = await asyncio.open_connection(address, port)
            except OSError:
                await asyncio.sleep(_TICK_S / 2)
            else:
                writer.close()
                answered = True

    crew.watch(knock())
    await crew.until(
        lambda: answered, lambda: "Ray on this node", hint="See its ray-start.log beside this."
    )


async def _until_joined(crew: Crew, gcs: str, nodes: dict[str, str]) -> None:
    """Until Ray counts all of ``nodes`` (names by address) among its own."""
    joined: set[str] = set()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dpldm_dist.runtime.slurm_ray", gcs),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def read() -> None:
        assert process.stdout is not None
        async for text in process.stdout:
            joined.clear()
            joined.update(json.loads(text))

    crew.watch(read())
    try:
        await crew.until(
            lambda: nodes.keys() <= joined,
            lambda: f"Ray on {_names({nodes[a] for a in nodes.keys() - joined})}",
            hint="See the ray-start.log of each in private/slurm of the run.",
        )
    finally:
        process.kill()
        await process.wait()


async def _reach_head(post: Post) -> tuple[Line, str]:
    """A proved line to the head, by whichever of its addresses answers, and our own address for
    Ray. Raises: BringUpError."""
    deadline = time.monotonic() + post.order.start_timeout_s
    here, token, problem = post.allocation, post.token.encode(), "none of its addresses is known"
    while time.monotonic() < deadline:
        for there in _addresses_of_head(post):
            try:
                reader, writer = await asyncio.open_connection(
                    there, post.ports.control, family=socket.AF_INET
                )
                own = _interface_address(post) or near_end(writer)
                facts = asdict(Member(here.node, own, here.cpus, here.gpus))
                await greet(reader, writer, token=token, role="member", facts=facts)
            except (OSError, BringUpError) as error:
                problem = f"{there}: {error}"
                continue
            return Line(reader, writer, name="The head", silence_s=post.order.node_timeout_s), own
        await asyncio.sleep(_TICK_S / 2)
    raise BringUpError(
        f"Node {here.node} cannot reach {here.nodes[0]} ({problem}). Set DPLDM_HEAD_ADDRESS to an "
        "address of it that the nodes can reach."
    )


def _addresses_of_head(post: Post) -> list[str]:
    if post.order.head_address:
        return [post.order.head_address]
    found = []
    with suppress(OSError):
        found.append(socket.gethostbyname(post.allocation.nodes[0]))
    if post.allocation.launcher:
        found.append(post.allocation.launcher)
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]


def _interface_address(post: Post) -> str | None:
    """The IPv4 address of DPLDM_INTERFACE here, None if it is not set. Raises: ConfigError."""
    name = post.order.interface
    if name is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", name.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        except OSError as error:
            raise ConfigError(
                f"DPLDM_INTERFACE = {name} has no address on {post.allocation.node} "
                f"({error.strerror}): see `ip -4 addr` there."
            ) from None


def _address(here: Allocation) -> str:
    """The address of a node that is alone: that of its name, or from which it would talk to others
    (nothing is sent)."""
    with suppress(OSError):
        named = socket.gethostbyname(here.node)
        if not named.startswith("127."):
            return named
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


async def _pass_on(stop: Stop, line: Line) -> None:
    await stop.asked.wait()
    await line.tell("stop")


def _by_address(crew: Crew) -> dict[str, str]:
    return {member.address: member.node for member in crew.members.values()}


def _names(nodes: set[str]) -> str:
    return ", ".join(sorted(nodes))
