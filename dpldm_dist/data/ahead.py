"""What the next steps need, made ready in the background while this one computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
_PATIENCE_S = 10.0  # for the thread to end; a daemon, it holds up nothing if it does not


@dataclass(frozen=True)
class _Found(Generic[Item]):
    """An item of a step; None: the step has no more. Or the error that ended the work."""

    step: int
    item: Item | None = None
    error: BaseException | None = None


class Ahead(Generic[Item]):
    """The items of step after step, made by one background thread, at most ``most`` of them ahead.

    ``make(step)`` gives the items of a step, in order; no step from ``last`` on is begun unless it
    is asked for. The thread starts when a step is first asked for, and anew when another step is
    asked for than the one that follows.

    Formal guarantees: ``of_step(step)`` yields what ``make(step)`` yields, in that order, and
    raises what it raises, the very exception, at the place where it was raised. ``make`` is called
    in one thread at a time, and never again after ``close``.
    """

    def __init__(self, make: Callable[[int], Iterator[Item]], *, most: int, last: int):
        self._make = make
        self._most = most
        self._last = last
        self._next: int | None = None
        self._thread: threading.Thread | None = None

    def of_step(self, step: int) -> Iterator[Item]:
        """All items of ``step``."""
        if self._next != step:
            self.close()
            self._start(step)
        self._next = None  # until the step has been taken to its end
        while True:
            found = self._found.get()
            self._room.release()
            if found.error is not None:
                self.close()
                raise found.error
            if found.item is None:
                break
            yield found.item
        self._next = step + 1 if step + 1 < self._last else None

    def close(self) -> None:
        """End the thread and drop what it made."""
        self._next = None
        if self._thread is not None:
            self._stopped.set()
            self._room.release()
            self._thread.join(_PATIENCE_S)
            self._thread = None

    def _start(self, step: int) -> None:
        self._found: queue.SimpleQueue[_Found[Item]] = queue.SimpleQueue()
        self._room = threading.Semaphore(self._most)
        self._stopped = threading.Event()
        parts = self._make, step, max(self._last, step + 1)
        ends = self._found, self._room, self._stopped
        self._thread = threading.Thread(target=_work, args=(*parts, *ends), daemon=True)
        self._thread.start()


def _work(
    make: Callable[[int], Iterator[Item]],
    first: int,
    last: int,
    found: queue.SimpleQueue[_Found[Item]],
    room: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    """Fill ``found``, a slot of ``room`` for each, until all is made or it is ``stopped``."""
    step = first
    try:
        for step in range(first, last):
            for item in make(step):
                room.acquire()
                if stopped.is_set():
                    return
                found.put(_Found(step, item))
            room.acquire()
            if stopped.is_set():
                return
            found.put(_Found(step))
    except BaseException as error:
        found.put(_Found(step, error=error))
