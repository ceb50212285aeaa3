"""What a Slurm job does with its nodes, without a Slurm: real processes, real sockets, no Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dpldm_dist.errors import BringUpError, ConfigError, NodeLostError, RunError
from dpldm_dist.runtime import slurm, slurm_nodes, slurm_ray
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.slurm_channel import Line, greet
from dpldm_dist.runtime.slurm_job import Allocation, Order, Ports, expand_nodes
from dpldm_dist.runtime.slurm_nodes import Member, Post, lead, place
from dpldm_dist.runtime.stopping import ask_to_stop, stop_file

TOKEN = "ab" * 32
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
CONFIG = '[run]\ndir = "{folder}/run"\nworkers = 3\n'
DRIVER = """
import os, sys, time
from pathlib import Path
stop, how, note = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
note.write_text(" ".join(sys.argv[4:]))
note.chmod(0o666 & ~os.umask(0))
if how.isdigit():
    sys.exit(int(how))
while how == "deaf" or not stop.exists():
    time.sleep(0.02)
if how == "forgets":
    stop.unlink()
    while not stop.exists():
        time.sleep(0.02)
sys.exit(5 if how == "fails" else 75)
"""


# ---- what Slurm says ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,2],login", ["n08", "n09", "n10", "n2", "login"]),
        ("rack[1-2]-n[1,3].x", ["rack1-n1.x", "rack1-n3.x", "rack2-n1.x", "rack2-n3.x"]),
        ("a[1,2],b[3],c", ["a1", "a2", "b3", "c"]),
    ],
)
def test_a_list_of_nodes_is_written_out(text, names):
    assert expand_nodes(text) == tuple(names)


def test_an_allocation_is_read_from_the_environment_of_its_task():
    task = {"SLURM_PROCID": "1", "SLURMD_NODENAME": "n2", "SLURM_CPUS_PER_TASK": "6"}
    more = {"SLURM_RESTART_COUNT": "2", "SLURM_ARRAY_TASK_ID": "4", "CUDA_VISIBLE_DEVICES": "0,3"}
    found = Allocation.read(JOB | task | more)
    assert (found.job, found.restart, found.nodes, found.rank) == (7, 2, ("n1", "n2"), 1)
    assert (found.node, found.cpus, found.gpus, found.member) == ("n2", 6, 2, 4)
    assert Allocation.read(JOB | {"SLURM_CPUS_ON_NODE": "5"}).cpus == 5
    assert Allocation.read(JOB | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}).gpus == 0
    assert Allocation.read(JOB | {"SLURM_GPUS_ON_NODE": "4"}).gpus == 4
    with pytest.raises(ConfigError, match="no Slurm job"):
        Allocation.read({})


def test_jobs_that_may_share_a_node_share_no_port():
    blocks = [set(vars(Ports.of(job)).values()) for job in range(100_000, 101_500)]
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == 1500 * 7
    ports = sorted(set.union(*blocks))
    assert ports[0] >= 20000 and ports[-1] < 32768, "none of those that the system hands out"
    assert not set(vars(Ports.of(7)).values()) & set(vars(Ports.of(7, 2)).values())


# ---- workers over nodes ---------------------------------------------------------------------------


def nodes(*gpus: int, cpus: int = 8) -> list[Member]:
    return [Member(f"n{i}", f"192.0.2.{i}", cpus, count) for i, count in enumerate(gpus, 1)]


@pytest.mark.parametrize(
    ("gpus", "workers", "device", "slots", "threads"),
    [
        ((0, 0), None, "auto", [1, 1], 8),
        ((0, 0), 3, "auto", [2, 1], 4),
        ((2, 2), None, "auto", [2, 2], 4),
        ((2, 4), None, "cuda", [2, 4], 2),
        ((4, 4), 2, "cuda", [1, 1], 8),
        ((1, 4), 4, "cuda", [1, 3], 2),
        ((2, 2), None, "cpu", [1, 1], 8),
        ((1, 0), 2, "auto", [1, 1], 8),
    ],
)
def test_workers_are_spread_evenly_and_each_has_its_gpu(gpus, workers, device, slots, threads):
    found = place(nodes(*gpus), workers=workers, device=device, threads=None)
    assert list(found.slots.values()) == slots and found.workers == sum(slots)
    assert found.threads == threads
    assert found.gpus == (device != "cpu" and sum(gpus) >= sum(slots))


def test_missing_gpus_are_refused():
    with pytest.raises(ConfigError, match="the allocation has 2 GPUs"):
        place(nodes(1, 1), workers=3, device="cuda", threads=None)
    with pytest.raises(ConfigError, match="gpus-per-node"):
        place(nodes(0), workers=None, device="cuda", threads=None)


def test_threads_that_were_asked_for_are_kept():
    assert place(nodes(0), workers=4, device="cpu", threads=3).threads == 3


# ---- the line between two tasks -------------------------------------------------------------------


def talk(client, server, *, silence_s: float = 20.0):
    """Run both coroutines, each with its end of a connection; what each returned or raised."""

    async def both():
        results = asyncio.get_running_loop().create_future()

        async def serve(reader, writer):
            outcome = (await asyncio.gather(server(reader, writer), return_exceptions=True))[0]
            writer.close()
            results.set_result(outcome)

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ours = (await asyncio.gather(client(reader, writer), return_exceptions=True))[0]
        writer.close()
        found = ours, await results
        listener.close()
        return found

    return asyncio.run(both())


def greeting(role: str, token: str = TOKEN):
    return lambda reader, writer: greet(
        reader, writer, token=token.encode(), role=role, facts={"role": role}
    )


def test_two_ends_that_know_the_token_learn_each_others_facts():
    assert talk(greeting("member"), greeting("head")) == ({"role": "head"}, {"role": "member"})


def test_neither_end_believes_one_with_another_token():
    for pair in [("cd" * 32, TOKEN), (TOKEN, "cd" * 32)]:
        outcomes = talk(greeting("member", pair[0]), greeting("head", pair[1]))
        assert all(isinstance(outcome, BringUpError) for outcome in outcomes)


def test_an_end_is_not_taken_in_by_its_own_proof_sent_back():
    async def mirror(reader, writer):
        for _ in range(2):
            writer.write(await reader.readline())

    ours, _ = talk(greeting("member"), mirror)
    assert isinstance(ours, BringUpError) and "does not know the token" in str(ours)


@pytest.mark.parametrize("noise", [b"", b"{}\n", b"[1]\n", b"GET / HTTP/1.0\r\n\r\n", b"x" * 10**6])
def test_what_does_not_speak_as_a_task_is_refused(noise):
    async def stranger(reader, writer):
        writer.write(noise)
        writer.close()

    _, theirs = talk(stranger, greeting("head"))
    assert isinstance(theirs, BringUpError)


def test_the_token_does_not_pass_over_the_line():
    heard = []

    async def listen(reader, writer):
        writer.write(b'{"nonce": "00"}\n')
        heard.extend([await reader.readline(), await reader.readline()])

    talk(greeting("member"), listen)
    assert heard and TOKEN.encode() not in b"".join(heard)


def test_messages_pass_in_order_and_beats_are_not_heard(monkeypatch):
    monkeypatch.setattr("dpldm_dist.runtime.slurm_channel._BEAT_EVERY_S", 0.01)

    async def speak(reader, writer):
        line = Line(reader, writer, name="the other", silence_s=20)
        await line.tell("one", n=1)
        await asyncio.sleep(0.05)
        await line.tell("two")
        await line.close()

    async def listen(reader, writer):
        line = Line(reader, writer, name="the other", silence_s=20)
        return [await line.hear(), await line.hear()]

    _, heard = talk(speak, listen)
    assert heard == [{"is": "one", "n": 1}, {"is": "two"}]


def test_an_end_that_falls_silent_or_closes_is_lost(monkeypatch):
    async def listen(reader, writer):
        await Line(reader, writer, name="Node n2", silence_s=0.2).hear()

    async def silent(reader, writer):
        await reader.read()

    async def close(reader, writer):
        writer.close()

    outcome = talk(listen, silent)[0]
    assert isinstance(outcome, NodeLostError) and "Nothing was heard from Node n2" in str(outcome)
    outcome = talk(listen, close)[0]
    assert isinstance(outcome, NodeLostError) and "Node n2 is gone" in str(outcome)


# ---- begin: the request of a start ----------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def started(*arguments, stages="finetune", **environment) -> tuple[Path, Order]:
    folder = slurm.begin(stages.split(), [str(a) for a in arguments], JOB | environment)
    return folder, Order.read(folder / "order.json")


def test_a_start_gets_a_closed_folder_in_the_run_and_its_order(config, tmp_path):
    folder, order = started(config, "--set", "finetune.steps=3", "--set", "finetune.batch=4")
    assert folder == tmp_path / "run" / "private" / "slurm" / "7-0"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "order.json").stat().st_mode) == 0o600
    assert order.stages == ("finetune",) and order.config == str(config)
    assert order.settings == ("finetune.steps=3", "finetune.batch=4")
    assert order.ray, "several nodes need Ray"


def test_the_allocation_decides_how_many_workers_unless_the_command_line_does(config):
    assert started(config)[1].workers is None
    assert started(config, "--set", "run.workers=5")[1].workers == 5
    assert started(config, "--set", "run.workers=[1, 4]")[1].workers == 4


def test_one_node_needs_no_ray_unless_the_config_says_so(config):
    assert not started(config, SLURM_JOB_NODELIST="n1")[1].ray
    assert started(config, "--set", "run.launcher=ray", SLURM_JOB_NODELIST="n1")[1].ray


def test_a_wrong_request_is_one_line_with_its_exit_code(config, capsys, monkeypatch):
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert slurm.main(["begin", "finetune", str(config), "--set", "run.wrkers=2"]) == 2
    assert "Did you mean 'workers'" in capsys.readouterr().err
    monkeypatch.setenv("DPLDM_STOP_GRACE", "soon")
    assert slurm.main(["begin", "finetune", str(config)]) == 2
    assert "DPLDM_STOP_GRACE = soon" in capsys.readouterr().err


def test_a_new_start_is_not_stopped_by_an_old_request(config, tmp_path):
    run = RunDir(tmp_path / "run").create()
    ask_to_stop(run)
    started(config)
    assert not stop_file(run).exists()


def test_members_of_an_array_never_share_a_run_directory(config, tmp_path):
    member = {"SLURM_ARRAY_TASK_ID": "3"}
    assert started(config, **member)[1].run == str(tmp_path / "run-3")
    named = started(config, "--set", f"run.dir={tmp_path}/sweep/%a/x", **member)[1]
    assert named.run == str(tmp_path / "sweep" / "3" / "x")
    assert started(config, "--set", f"run.dir={tmp_path}/b", **member)[1].run.endswith("/b-3")


def test_a_member_takes_its_line_of_the_sweep(config, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"--set pretrain.steps=1\n\n--set pretrain.steps=2 --set run.dir={tmp_path}/o")
    first = started(config, "--sweep", sweep, SLURM_ARRAY_TASK_ID="1")[1]
    assert "pretrain.steps=1" in first.settings and first.run == str(tmp_path / "run-1")
    second = started(config, "--sweep", sweep, SLURM_ARRAY_TASK_ID="2")[1]
    assert "pretrain.steps=2" in second.settings and second.run == str(tmp_path / "o")
    with pytest.raises(ConfigError, match="array=1-2"):
        started(config, "--sweep", sweep, SLURM_ARRAY_TASK_ID="3")
    with pytest.raises(ConfigError, match="goes with an array"):
        started(config, "--sweep", sweep)


# ---- progress, and the end of patience ------------------------------------------------------------


def checkpoint(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"{step:08d}-step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_a_job_that_changes_nothing_is_refused_after_three_starts(config, tmp_path):
    for restart in range(3):
        started(config, SLURM_RESTART_COUNT=str(restart))
    with pytest.raises(RunError, match="3 starts of job 7 in a row have changed nothing"):
        started(config, SLURM_RESTART_COUNT="3")
    started(config, SLURM_JOB_ID="8")  # somebody submitted again
    checkpoint(RunDir(tmp_path / "run"), 1)
    started(config, SLURM_RESTART_COUNT="3")


def test_progress_is_what_a_start_saved_and_nothing_that_an_idle_one_writes(config, tmp_path):
    from dpldm_dist.config import load_config

    run, settings = RunDir(tmp_path / "run").create(), load_config(config)
    before = slurm.progress_mark(run, settings)
    (run.tensorboard / "finetune").mkdir(parents=True)
    for idle in ("private/ledger.jsonl", "private/crash-rank0.log", "private/progress.json"):
        (run.root / idle).write_text("text")
    (run.tensorboard / "finetune" / "events").write_text("text")
    (run.private / "slurm" / "7-0").mkdir(parents=True)
    (run.private / "slurm" / "7-0" / "log").write_text("text")
    assert slurm.progress_mark(run, settings) == before
    seen = {before}
    for name in ("private/latents", "private/images", "release/samples", "public/model"):
        (run.root / name).mkdir(parents=True)
        (run.root / name / "one").write_text("")
        seen.add(slurm.progress_mark(run, settings))
    checkpoint(run, 1)
    seen.add(slurm.progress_mark(run, settings))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("code", "verdict"),
    [(0, "final"), (1, "final"), (2, "final"), (3, "final"), (4, "final"), (5, "final"),
     (6, "final"), (70, "requeue"), (71, "requeue"), (75, "requeue"), (137, "final")],
)  # fmt: skip
def test_only_what_another_start_may_mend_is_requeued(config, code, verdict):
    _, order = started(config)
    assert slurm._verdict(order, Allocation.read(JOB), code) == verdict


def test_a_line_that_a_crash_has_torn_does_not_end_the_count(config, tmp_path):
    for restart in range(3):
        started(config, SLURM_RESTART_COUNT=str(restart))
    with open(tmp_path / "run/private/slurm/starts.jsonl", "a") as notes:
        notes.write('{"job": 7, "ma')
    with pytest.raises(RunError, match="have changed nothing"):
        started(config, SLURM_RESTART_COUNT="3")


def test_the_third_idle_start_is_the_last(config, tmp_path, capsys):
    for restart in range(3):
        _, order = started(config, SLURM_RESTART_COUNT=str(restart))
        verdict = slurm._verdict(order, Allocation.read(JOB), 75)
        assert verdict == ("final" if restart == 2 else "requeue")
    assert "have changed nothing" in capsys.readouterr().err
    checkpoint(RunDir(tmp_path / "run"), 1)
    assert slurm._verdict(order, Allocation.read(JOB), 75) == "requeue"


# ---- Ray's folder on a node -----------------------------------------------------------------------

LEAVE_A_FOLDER = """
import os, sys
from dpldm_dist.runtime.slurm_ray import folder_for_ray
with folder_for_ray(sys.argv[1], job=5) as folder:
    os._exit(0)
"""


def test_what_dead_jobs_left_is_removed_and_what_living_ones_use_is_kept():
    base = "/tmp"
    with slurm_ray.folder_for_ray(base, job=6) as living:
        subprocess.run([sys.executable, "-c", LEAVE_A_FOLDER, base], check=True)
        left = [path for path in Path(base).glob("dpldm-slurm-5-*") if path != living]
        assert len(left) == 1
        with slurm_ray.folder_for_ray(base, job=7) as other:
            assert stat.S_IMODE(other.stat().st_mode) == 0o700
            assert living.is_dir() and not left[0].exists()
    assert not living.exists() and not other.exists()


def test_the_token_of_a_job_is_readable_by_its_user_alone(tmp_path, monkeypatch):
    for name in (*slurm_ray._ENVIRONMENT, *slurm_ray._DEFAULTS, "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "before")
    slurm_ray.write_token(tmp_path, TOKEN)
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert path.read_text() == TOKEN and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token" and TOKEN not in str(os.environ)


def test_a_folder_too_deep_for_sockets_is_refused():
    with (
        pytest.raises(ConfigError, match="too long a path"),
        slurm_ray.folder_for_ray("/scratch/of/a/user/who/likes/long/names", job=1),
    ):
        pass


def test_the_ends_of_log_files_are_kept(tmp_path):
    source, target = tmp_path / "logs", tmp_path / "kept"
    source.mkdir(), target.mkdir()
    (source / "raylet.out").write_bytes(b"a" * 10 + b"b" * (1 << 20))
    (source / "empty").write_text("")
    (source / "link").symlink_to("/etc/passwd")
    slurm_ray.collect_logs(source, target)
    assert [path.name for path in target.iterdir()] == ["raylet.out"]
    assert (target / "raylet.out").read_bytes() == b"b" * (1 << 20)


LEAVE_A_PROCESS = """
import os, subprocess, sys
from dpldm_dist.runtime.slurm_ray import _adopt_orphans, end_descendants
_adopt_orphans()
sleeper = "import subprocess; p = subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=-3, stderr=-3); print(p.pid)"
pid = int(subprocess.run([sys.executable, "-c", sleeper], capture_output=True, text=True).stdout)
os.kill(pid, 0)
end_descendants()
os.waitpid(pid, 0)
print("gone")
"""


def test_processes_that_left_their_session_and_lost_their_parent_are_ended():
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_A_PROCESS], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "gone\n", done.stderr


# ---- the head and its followers -------------------------------------------------------------------


@pytest.fixture
def post(tmp_path, monkeypatch) -> Post:
    """The head of a job of two nodes that needs no Ray; ``drive`` says what its stage does."""
    run = RunDir(tmp_path / "run").create()
    folder = run.private / "slurm" / "7-0"
    folder.mkdir(parents=True)
    order = Order(
        run=str(run.root), stages=("finetune",), config=None, settings=(), ray=False, workers=None,
        threads=None, device="cpu", start_timeout_s=30.0, stop_grace_s=30.0, node_timeout_s=20.0,
        dashboard=False, interface=None, head_address="127.0.0.1", folder_for_ray="/tmp",
    )  # fmt: skip
    return Post(Allocation.read(JOB), order, free_ports(), folder, TOKEN)


def free_ports() -> Ports:
    """A block whose first port nobody uses; jobs of other numbers would have others."""
    for job in range(os.getpid(), os.getpid() + 200):
        ports = Ports.of(job)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", ports.control))
            except OSError:
                continue
            return ports
    raise AssertionError("no free port")


def drive(monkeypatch, post: Post, how: str) -> Path:
    """The stage is a process that ends with code ``how``, or when asked to stop "saves", "fails",
    is "deaf", or "forgets" the first request. The file that it writes once it runs."""
    note = post.folder / "driver"
    arguments = [str(stop_file(post.run)), how, str(note)]
    monkeypatch.setattr(
        slurm_nodes,
        "stage_command",
        lambda stage, given: [sys.executable, "-c", DRIVER, *arguments, stage, *given],
    )
    return note


def follower(post: Post, token: str = TOKEN, rank: int = 1) -> subprocess.Popen:
    """The task of another node as a process of its own."""
    order = post.folder / f"order-{len(_followers)}.json"
    post.order.write(order)
    code = (
        "import sys, asyncio; from pathlib import Path\n"
        "from dpldm_dist.runtime.slurm_job import *; from dpldm_dist.runtime.slurm_nodes import *\n"
        "order, first, token = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "import os; post = Post(Allocation.read(os.environ), Order.read(order),\n"
        "    Ports(*range(first, first + 7)), order.parent, token)\n"
        "sys.exit(asyncio.run(follow(post)))\n"
    )
    task = {"SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, order, str(post.ports.control), token],
        env=os.environ | JOB | task, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _followers.append(process)
    return process


_followers: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_follower_is_left():
    yield
    while _followers:
        task = _followers.pop()
        try:
            task.wait(timeout=60)
        finally:
            task.kill()


async def when(path: Path, act) -> None:
    """``act`` once ``path`` is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    act()


def led(post: Post, *beside) -> int:
    """The exit code of the head, with coroutines beside it."""

    async def both() -> int:
        others = [asyncio.ensure_future(work) for work in beside]
        try:
            return await lead(post)
        finally:
            for task in others:
                task.cancel()

    return asyncio.run(both())


@pytest.fixture
def usual_umask():
    previous = os.umask(0o022)
    yield
    os.umask(previous)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 42])
def test_the_exit_code_of_the_stage_is_that_of_the_start(
    post, monkeypatch, code, capfd, usual_umask
):
    note, task = drive(monkeypatch, post, str(code)), follower(post)
    assert led(post) == code
    assert task.wait(timeout=60) == 0, "followers end with the head, whatever the stage did"
    given = note.read_text()
    assert given.startswith("finetune ") and "run.workers=2" in given
    assert stat.S_IMODE(note.stat().st_mode) == 0o644, "the stage has the user's umask"
    assert "127.0.0.1" in capfd.readouterr().out


def test_stages_run_one_after_another_until_one_fails(post, monkeypatch, capfd):
    drive(monkeypatch, post, "0")
    allocation = replace(post.allocation, nodes=("n1",))
    assert (
        led(replace(post, allocation=allocation, order=replace(post.order, stages=("a", "b")))) == 0
    )
    shown = capfd.readouterr().out
    assert "dpldm a" in shown and "dpldm b" in shown
    drive(monkeypatch, post, "4")
    assert (
        led(replace(post, allocation=allocation, order=replace(post.order, stages=("a", "b")))) == 4
    )
    assert "dpldm b" not in capfd.readouterr().out


def test_a_node_that_never_speaks_is_named(post, monkeypatch, capfd):
    drive(monkeypatch, post, "0")
    assert led(replace(post, order=replace(post.order, start_timeout_s=0.5))) == 70
    assert "a word from n2" in capfd.readouterr().out


def test_a_stranger_on_the_port_is_refused_and_the_job_goes_on(post, monkeypatch, capfd):
    drive(monkeypatch, post, "0")
    stranger = follower(replace(post, order=replace(post.order, start_timeout_s=5.0)), "cd" * 32)
    tasks = []

    async def then_the_real_one():
        await asyncio.sleep(0.5)
        tasks.append(follower(post))

    assert led(post, then_the_real_one()) == 0
    assert stranger.wait(timeout=60) == 1, "it raised that it cannot reach the head"
    assert tasks[0].wait(timeout=60) == 0
    assert "A connection was refused" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_head_asks_the_run_to_stop_and_the_code_of_saving_is_kept(
    post, monkeypatch, number
):
    note, task = drive(monkeypatch, post, "saves"), follower(post)
    assert led(post, when(note, lambda: os.kill(os.getpid(), number))) == 75
    assert stop_file(post.run).exists() and task.wait(timeout=60) == 0


def test_a_signal_to_any_follower_asks_the_run_to_stop(post, monkeypatch, capfd):
    note, task = drive(monkeypatch, post, "saves"), follower(post)
    assert led(post, when(note, lambda: task.send_signal(signal.SIGTERM))) == 75
    assert "node n2 was signalled" in capfd.readouterr().out


def test_a_request_that_a_starting_driver_forgot_is_repeated(post, monkeypatch):
    note = drive(monkeypatch, post, "forgets")
    follower(post)
    assert led(post, when(note, lambda: os.kill(os.getpid(), signal.SIGTERM))) == 75


def test_a_stop_before_the_stages_began_needs_no_driver(post, monkeypatch):
    note = drive(monkeypatch, post, "0")

    async def soon():
        await asyncio.sleep(0.3)
        os.kill(os.getpid(), signal.SIGUSR1)

    assert led(post, soon()) == 75 and not note.exists()


def test_a_driver_that_does_not_stop_is_ended_and_the_start_counts_as_lost(post, monkeypatch):
    note = drive(monkeypatch, post, "deaf")
    task = follower(post)
    quick = replace(post, order=replace(post.order, stop_grace_s=0.5))
    assert led(quick, when(note, lambda: os.kill(os.getpid(), signal.SIGTERM))) == 71
    assert task.wait(timeout=60) == 0


def test_scancel_shortens_the_time_to_stop(post, monkeypatch):
    monkeypatch.setattr(slurm_nodes, "_CANCEL_GRACE_S", 0.5)
    note = drive(monkeypatch, post, "deaf")
    follower(post)
    patient = replace(post, order=replace(post.order, stop_grace_s=150.0))
    started = time.monotonic()
    assert led(patient, when(note, lambda: os.kill(os.getpid(), signal.SIGUSR2))) == 71
    assert time.monotonic() - started < 100, "it waited for the grace of a stop"


def test_a_node_that_dies_takes_the_start_with_it_as_lost(post, monkeypatch, capfd):
    monkeypatch.setattr(slurm_nodes, "_LAST_WORD_S", 0.2)
    note, task = drive(monkeypatch, post, "deaf"), follower(post)
    assert led(post, when(note, task.kill)) == 71
    assert "Node n2 is gone" in capfd.readouterr().out


def test_a_stage_that_a_dying_node_made_fail_is_not_blamed(post, monkeypatch):
    note, task = drive(monkeypatch, post, "fails"), follower(post)

    def fail_first():
        task.send_signal(signal.SIGSTOP)  # as when its network is gone: nothing closes
        ask_to_stop(post.run)  # the stage fails with code 5

    try:
        quick = replace(post, order=replace(post.order, node_timeout_s=3.0))
        assert led(quick, when(note, fail_first)) == 71
    finally:
        task.kill()
    task.wait(timeout=60)


def test_a_stage_that_fails_by_itself_keeps_its_code(post, monkeypatch):
    note, task = drive(monkeypatch, post, "fails"), follower(post)
    assert led(post, when(note, lambda: ask_to_stop(post.run))) == 5
    assert task.wait(timeout=60) == 0


def test_followers_end_when_the_head_dies(post):
    head = subprocess.Popen(
        [sys.executable, "-c", "import sys, socket, time\n"
         "s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); s.accept(); sys.exit()",
         str(post.ports.control)],
    )  # fmt: skip
    task = follower(replace(post, order=replace(post.order, start_timeout_s=2.0)))
    assert task.wait(timeout=60) != 0 and head.wait(timeout=60) == 0


def test_a_busy_port_is_worth_another_try(post, monkeypatch, capfd):
    drive(monkeypatch, post, "0")
    with socket.create_server(("0.0.0.0", post.ports.control)):
        assert led(post) == 70
    assert f"Port {post.ports.control} of this node is taken" in capfd.readouterr().out


def test_a_task_writes_its_verdict_where_the_batch_script_looks(config, monkeypatch, capfd):
    folder, _ = started(config, stages="status", SLURM_JOB_NODELIST="n1")
    done = subprocess.run(
        [sys.executable, "-m", "dpldm_dist.runtime.slurm", "node", folder, "2"],
        input=TOKEN + "\n", env=os.environ | JOB | {"SLURM_JOB_NODELIST": "n1"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "verdict-2").read_text() == "0 final\n"
    assert "dpldm status" in done.stdout and TOKEN not in done.stdout + done.stderr


def test_a_task_without_a_token_is_refused(config):
    folder, _ = started(config)
    done = subprocess.run(
        [sys.executable, "-m", "dpldm_dist.runtime.slurm", "node", folder, "1"],
        input="", env=os.environ | JOB, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 70 and "no token" in done.stderr


def test_the_tasks_of_a_job_load_neither_torch_nor_ray():
    code = "import sys, dpldm_dist.runtime.slurm as s\n"
    code += "print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_no_line_of_an_order_is_private(config):
    folder, _ = started(config)
    known = {"run", "stages", "config", "settings", "ray", "workers", "threads", "device"}
    known |= {"start_timeout_s", "stop_grace_s", "node_timeout_s", "dashboard", "interface"}
    assert set(json.loads((folder / "order.json").read_text())) - known == {
        "head_address", "folder_for_ray",
    }  # fmt: skip
