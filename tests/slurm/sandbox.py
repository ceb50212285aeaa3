"""A throw-away Slurm cluster of several nodes on one Linux machine, for tests.

One set of namespaces (network, host name, IPC, mounts, processes) for the login node, which runs
munged and slurmctld, and one for each compute node, which runs slurmd; a bridge joins them. So every node
has its own name, address, process table, /tmp and /dev/shm, as real ones have, and shares the rest
of the file system, as real ones share /home. Nothing outside changes: no address, no /etc/slurm, no
system munge. When this process dies, however it dies, everything goes.

    with SlurmSandbox(shares=[folder]) as slurm:
        job = slurm.submit("--nodes=2", "--wrap", "srun hostname")
        slurm.wait(job, "COMPLETED")

Needs root and the programs of PROGRAMS. By hand: python -m tests.slurm.sandbox
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare", "setpriv", "ps")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux procps"
_NETWORK = "198.51.100"  # RFC 5737: for documentation, so nobody's
_LOCK = (
    "/run/dpldm-slurm-sandbox.lock"  # cgroups carry the names of the nodes: one sandbox at a time
)
_BIND, _REC = 4096, 16384
_CONF = """
ClusterName=sandbox
SlurmctldHost=login({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/ctld
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n/slurmd.pid
SlurmdSpoolDir={root}/%n/spool
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=15
MessageTimeout=30
BatchStartTimeout=60
KillWait=30
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str | None:
    """Why no sandbox can run here, or None."""
    if not sys.platform.startswith("linux") or os.getuid() != 0:
        return "a Slurm sandbox needs Linux and root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install {PACKAGES}"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False)
    return None if probe.returncode == 0 else "this machine does not let root make namespaces"


@dataclass
class SlurmSandbox:
    """``nodes`` compute nodes of ``cpus`` (claimed, not real) CPUs each.

    ``shares``: folders in /tmp that all nodes see, as /tmp is each node's own otherwise.
    """

    nodes: int = 2
    cpus: int = 4
    shares: Sequence[Path] = ()
    root: Path = Path()
    _machines: dict[str, subprocess.Popen] = field(default_factory=dict)
    _lock: int = -1

    def __enter__(self) -> SlurmSandbox:
        self._lock = os.open(_LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another Slurm sandbox on this machine to end.", file=sys.stderr)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.root = Path(tempfile.mkdtemp(prefix="dpldm-slurm-", dir="/run"))
        self.root.chmod(0o755)
        try:
            self._write_configuration()
            self._boot("login")
            for number in range(1, self.nodes + 1):
                self.boot(f"node{number}")
            self.until(self._all_idle, "all nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in reversed(list(self._machines.values())):
            _kill(machine)
        for folder in Path("/sys/fs/cgroup").glob("*/slurm_node*"):
            _remove_cgroup(folder)
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)

    # ---- what a user does ------------------------------------------------------------------------

    def run(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """What ``command`` prints on the login node. Raises: CalledProcessError."""
        done = self.on("login", *command, cwd=cwd, **environment)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
        return done.stdout

    def on(
        self, machine: str, *command: str | Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """``command`` on one machine of the cluster, outside of any job."""
        inside = ["nsenter", "-t", str(self._first_process(machine)), "-n", "-u", "-i", "-m", "-p"]
        folder = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd or "/")]
        return subprocess.run(
            [*inside, "--", *folder, *map(str, command)],
            env=self._environment() | environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def submit(self, *options: str | Path, cwd: Path | None = None, **environment: str) -> int:
        """Number of the job that ``sbatch options`` makes."""
        return int(self.run("sbatch", "--parsable", *options, cwd=cwd, **environment))

    def job(self, number: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        text = self.run("scontrol", "show", "job", str(number), "--oneliner")
        return dict(item.partition("=")[::2] for item in text.split() if "=" in item)

    def state(self, number: int | str) -> str:
        return self.job(number)["JobState"]

    def wait(self, number: int | str, *states: str, timeout_s: float = 900) -> dict[str, str]:
        """Until the job is in one of ``states``, and Slurm is done with its nodes."""
        self.until(lambda: self.state(number) in states, f"job {number} {states}", timeout_s)
        return self.job(number)

    def clear(self) -> None:
        """End all jobs."""
        if self.run("squeue", "-h"):
            self.run("scancel", "--user=root")
            self.until(lambda: not self.run("squeue", "-h"), "all jobs have ended")

    def until(
        self, done: Callable[[], bool], what: str, timeout_s: float = 120, every_s: float = 0.3
    ) -> None:
        """Look until ``done``. Raises: AssertionError with the end of the logs."""
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n{self.logs()}"
            time.sleep(every_s)

    def logs(self, lines: int = 15) -> str:
        found = []
        for path in sorted((self.root / "log").glob("*")):
            found += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(found)

    def processes(self, machine: str) -> list[str]:
        """Command lines of all that runs on a machine, but this look and Slurm's own."""
        shown = self.on(machine, "ps", "-eo", "args", "--no-headers").stdout.splitlines()
        own = ("slurmd", "ps -eo", "sh -c", sys.executable + " " + __file__, "slurmstepd")
        return [line for line in shown if line.strip() and not line.strip().startswith(own)]

    # ---- what happens to nodes -------------------------------------------------------------------

    def kill(self, node: str) -> None:
        """All processes of the node end at once, as when its power fails."""
        _kill(self._machines.pop(node))

    def unplug(self, node: str) -> None:
        """The node runs on, but nothing reaches it and nothing leaves it."""
        self._ip("link", "set", f"to-{node}", "down")

    def plug(self, node: str) -> None:
        self._ip("link", "set", f"to-{node}", "up")

    def boot(self, node: str) -> None:
        """Start a node and give it its end of a wire to the bridge."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "del", f"to-{node}")  # of an earlier life
        self._boot(node)
        peer = str(self._first_process(node))
        self._ip("link", "add", f"to-{node}", "type", "veth", "peer", "eth0", "netns", peer)
        self._ip("link", "set", f"to-{node}", "master", "bridge", "up")

    def _boot(self, machine: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--ipc"]
        command += ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
        shares = [str(path) for path in self._shares()]
        is_up = self.root / machine / "up"
        is_up.unlink(missing_ok=True)  # of an earlier life
        with open(self.root / "log" / f"{machine}.out", "w") as log:
            self._machines[machine] = subprocess.Popen(
                [*command, __file__, machine, self.root, *shares],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(),
            )  # fmt: skip
        self.until(is_up.exists, f"{machine} up", 30, 0.02)

    def _first_process(self, machine: str) -> int:
        """Number of the machine's process 1, as this process counts them."""
        parent = self._machines[machine].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def _ip(self, *arguments: str) -> None:
        inside = ["nsenter", "-t", str(self._first_process("login")), "-n"]
        subprocess.run([*inside, "ip", *arguments], check=True, capture_output=True)

    def _all_idle(self) -> bool:
        shown = self.on("login", "sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").stdout
        return shown.strip() == str(self.nodes)

    def _shares(self) -> Iterator[Path]:
        """Folders below /tmp that every node needs; a covering one stands for those below it."""
        wanted = [sys.prefix, sys.base_prefix, Path(__file__).parents[2], *self.shares]
        found = sorted({Path(path).resolve() for path in wanted})
        for path in found:
            if path.is_relative_to("/tmp") and not any(
                path != other and path.is_relative_to(other) for other in found
            ):
                yield path

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LANG", "HOME") if name in os.environ}
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return kept | {"PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}

    def _write_configuration(self) -> None:
        for name in ("log", "munge", "ctld"):
            (self.root / name).mkdir()
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"login": 1} | {f"node{n}": 10 + n for n in range(1, self.nodes + 1)}
        lines = [f"{_NETWORK}.{last} {name}" for name, last in names.items()]
        (self.root / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        # cgroups end also processes that left their session, as on most clusters; else /proc is searched
        cgroups = os.access("/sys/fs/cgroup/freezer/release_agent", os.W_OK)
        text = _CONF.format(
            network=_NETWORK, root=self.root, nodes=self.nodes, cpus=self.cpus,
            proctrack="cgroup" if cgroups else "linuxproc",
        )  # fmt: skip
        (self.root / "slurm.conf").write_text(text)
        (self.root / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n"
            "ConstrainCores=no\nConstrainRAMSpace=no\n"
        )


def _kill(machine: subprocess.Popen) -> None:
    machine.kill()  # the kernel ends its child, and with that all processes of the namespace
    machine.wait(timeout=30)


def _remove_cgroup(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), key=lambda p: -len(p.parts)):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


# ---- inside of the namespaces: process 1 of a machine ------------------------------------------


def _life_of_a_machine(name: str, root: Path, shares: list[Path]) -> None:
    """Process 1: set the machine up, start its daemons, adopt and bury orphans until they end."""
    socket.sethostname(name)
    _sh("ip", "link", "set", "lo", "up")
    _mount(root / "hosts", "/etc/hosts", flags=_BIND)
    (root / name).mkdir(exist_ok=True)
    daemon = _start_login(root) if name == "login" else _start_node(name, root, shares)
    (root / name / "up").touch()
    while True:
        pid, _ = os.wait()
        if pid == daemon:
            return


def _start_login(root: Path) -> int:
    _sh("ip", "link", "add", "bridge", "type", "bridge")
    _sh("ip", "addr", "add", f"{_NETWORK}.1/24", "dev", "bridge")
    _sh("ip", "link", "set", "bridge", "up")
    munge = root / "munge"
    _spawn(
        *("munged", "--foreground", f"--key-file={munge}/key", f"--socket={munge}/socket"),
        *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
        f"--log-file={root}/log/munged.log",
    )
    _await(lambda: (munge / "socket").exists())
    return _spawn("slurmctld", "-D")


def _start_node(name: str, root: Path, shares: list[Path]) -> int:
    (root / name / "spool").mkdir(parents=True, exist_ok=True)
    (root / name / "up").touch()  # the wire is laid once we are there
    _await(lambda: Path("/sys/class/net").is_dir() and _has_wire())
    number = int(name.removeprefix("node"))
    _sh("ip", "addr", "add", f"{_NETWORK}.{10 + number}/24", "dev", "eth0")
    _sh("ip", "link", "set", "eth0", "up")
    _own_folders(root / name, shares)
    return _spawn("slurmd", "-D", "-N", name)


def _own_folders(root: Path, shares: list[Path]) -> None:
    """An empty /tmp and /dev/shm; the shared folders are put back into their places."""
    kept = [(path, os.open(path, os.O_PATH | os.O_DIRECTORY)) for path in shares]
    _mount("tmpfs", "/dev/shm", kind="tmpfs", data="mode=1777")
    own = root / "tmp"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    own.chmod(0o1777)
    _mount(own, "/tmp", flags=_BIND)
    for path, descriptor in kept:
        path.mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", path, flags=_BIND | _REC)
        os.close(descriptor)


def _has_wire() -> bool:
    return any(name == "eth0" for _, name in socket.if_nameindex())


def _mount(
    source: object, target: object, *, kind: str = "", flags: int = 0, data: str = ""
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [str(text).encode() for text in (source, target, kind)]
    if libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None):
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def _await(done: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def _spawn(*command: str) -> int:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).pid


def _sh(*command: str) -> None:
    subprocess.run(command, check=True)


def _by_hand() -> None:
    with SlurmSandbox(shares=[Path.cwd()]) as slurm:
        print(f"SLURM_CONF={slurm.root}/slurm.conf; a shell on the login node:")
        inside = ["nsenter", "-t", str(slurm._first_process("login")), "-n", "-u", "-i", "-m", "-p"]
        subprocess.run([*inside, "bash"], env=slurm._environment(), check=False)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        _by_hand()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _life_of_a_machine(sys.argv[1], Path(sys.argv[2]), [Path(p) for p in sys.argv[3:]])
