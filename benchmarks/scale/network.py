"""A network of our own: one namespace per worker, joined by a bridge, each link slowed as wanted.

Needs root, ``ip`` and ``tc``. Every byte between workers passes an interface that counts it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = "10.77.0.{}"
INTERFACE = "eth0"


@contextmanager
def namespaces(workers: int, *, mbit: float | None) -> Iterator[list[str]]:
    """Names of the namespaces, in which the workers have ``ADDRESS`` 1, 2, ...; ``mbit``: 10^6 bits
    per second that each may send, None: as fast as the machine is. Gone afterwards."""
    mark = f"dpldm{os.getpid()}"
    hub, names = f"{mark}h", [f"{mark}w{number}" for number in range(workers)]
    try:
        _run("ip", "netns", "add", hub)
        _in(hub, "ip", "link", "add", "br0", "type", "bridge")
        _in(hub, "ip", "link", "set", "br0", "up")
        for number, name in enumerate(names):
            _run("ip", "netns", "add", name)
            _join(hub, name, number, mbit)
        yield names
    finally:
        for name in (*names, hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _join(hub: str, name: str, number: int, mbit: float | None) -> None:
    port = f"p{number}"
    _in(hub, "ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _in(hub, "ip", "link", "set", port, "master", "br0", "up")
    _in(name, "ip", "addr", "add", f"{ADDRESS.format(number + 1)}/24", "dev", INTERFACE)
    for device in ("lo", INTERFACE):
        _in(name, "ip", "link", "set", device, "up")
    if mbit is not None:
        limit = ("rate", f"{mbit}mbit", "burst", "128kb", "limit", "64mb")  # nothing is dropped
        _in(name, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)


def _in(name: str, *command: str) -> None:
    _run("ip", "netns", "exec", name, *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
