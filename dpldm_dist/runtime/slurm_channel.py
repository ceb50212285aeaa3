"""The line between the tasks of a Slurm job: JSON objects, one per line, between proved ends.

Both ends must know the job's token, and each proves it by an HMAC over what the other one drew, so
that neither obeys a stranger. Beats every few seconds show each end that the other one lives. No
secret passes over the line.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from contextlib import suppress
from typing import Any

from dpldm_dist.errors import BringUpError, NodeLostError

_BEAT_EVERY_S = 2.0
_HANDSHAKE_S = 10.0
_MOST_BYTES = 1 << 16  # of a message
_BEAT = "beat"


class Line:
    """One end of a line to ``name``. Silence of ``silence_s`` seconds counts as its loss.

    ``heard_at``: when the other end was last heard, by the monotonic clock.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        name: str,
        silence_s: float,
    ):
        self.name = name
        self._reader, self._writer = reader, writer
        self._silence_s = silence_s
        self.heard_at = time.monotonic()
        self._beats = asyncio.create_task(self._beat())

    async def tell(self, what: str, **facts: Any) -> None:
        """Send a message. A line that is broken swallows it: :meth:`hear` says so."""
        with suppress(OSError):
            _write(self._writer, {"is": what, **facts})
            await self._writer.drain()

    async def hear(self) -> dict[str, Any]:
        """The next message but beats. Raises: NodeLostError if the other end is gone or silent."""
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    message = await _read(self._reader)
            except TimeoutError:
                raise NodeLostError(
                    f"Nothing was heard from {self.name} for {self._silence_s:.0f} s: it, or its "
                    "network, is down."
                ) from None
            except (OSError, ValueError, EOFError):
                raise NodeLostError(f"{self.name} is gone: its connection was closed.") from None
            self.heard_at = time.monotonic()
            if message.get("is") != _BEAT:
                return message

    async def close(self) -> None:
        self._beats.cancel()
        self._writer.close()
        with suppress(OSError, asyncio.CancelledError):
            await self._writer.wait_closed()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_EVERY_S)
            await self.tell(_BEAT)


async def greet(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    token: bytes,
    role: str,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Prove ``token`` to the other end and have it proved; the facts that the other end gives.

    role: "head" or "member"; the other end must have the other one.
    Raises: BringUpError if it does not know the token, or does not answer as it should.
    """
    other = {"head": "member", "member": "head"}[role]
    mine = secrets.token_hex(16)
    try:
        async with asyncio.timeout(_HANDSHAKE_S):
            _write(writer, {"nonce": mine})
            theirs = str((await _read(reader))["nonce"])
            _write(writer, {"proof": _proof(token, role, mine, theirs), "facts": facts})
            answer = await _read(reader)
    except (TimeoutError, OSError, EOFError, ValueError, KeyError):
        raise BringUpError("The other end of a connection does not speak as a task does.") from None
    if not hmac.compare_digest(
        str(answer.get("proof")).encode(), _proof(token, other, theirs, mine).encode()
    ):
        raise BringUpError("The other end of a connection does not know the token of this job.")
    facts_of_other = answer.get("facts")
    return facts_of_other if isinstance(facts_of_other, dict) else {}


def near_end(writer: asyncio.StreamWriter) -> str:
    """The address of our end of a connection."""
    return str(writer.get_extra_info("sockname")[0])


def _proof(token: bytes, role: str, own_nonce: str, other_nonce: str) -> str:
    text = "\0".join(("dpldm", role, own_nonce, other_nonce))
    return hmac.new(token, text.encode(), hashlib.sha256).hexdigest()


def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


async def _read(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Raises: EOFError, OSError, ValueError."""
    text = await reader.readline()  # bounded by the reader's limit
    if not text.endswith(b"\n"):
        raise EOFError
    if len(text) > _MOST_BYTES:
        raise ValueError("too long")
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message
