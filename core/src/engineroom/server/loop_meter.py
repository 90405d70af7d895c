"""How long the event loop stands still: measured, kept as a metric, and told to the log.

A loop that is busy with one request answers nobody else. A beat is due every few milliseconds; how
late it comes is the lag. Where it is very late, a thread looks at what the loop is doing, so that
the log names the place in the code and the request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final, Protocol

from engineroom.border import get_logger
from engineroom.stacks import Call, StackReader

__all__ = ["BEAT_S", "WARN_S", "LoopMeter", "Work"]

logger = get_logger("engineroom.server.loop")

BEAT_S: Final = 0.02
"""Seconds between two beats. What stands still for a time may be seen as so much less."""
WARN_S: Final = 0.25
"""Seconds of lag that the log is told of."""
QUIET_S: Final = 10.0
"""Seconds between two such lines."""
LOOK_S: Final = 0.2
"""Seconds of lag after which the thread looks: less than ``WARN_S``, so that it has an answer."""
RECENT_S: Final = 60.0
_PATIENCE_S: Final = 0.05
"""Seconds that a loop which stood still gives the thread to say what it saw."""
_MOST_FRAMES: Final = 12
_MOST_THREADS: Final = 6
_MOST_WORK: Final = 5
_LOOPS_OWN: Final = (
    "asyncio.base_events",
    "asyncio.runners",
    "selectors",
    "asyncio.selector_events",
)
_WAITING: Final = ("threading", "queue", "selectors", "concurrent.futures.thread")


class Work(Protocol):
    """What a task of the loop does."""

    @property
    def described(self) -> str:
        """One line for the log."""


@dataclass(slots=True)
class _Look:
    """What the thread saw; whole when ``done`` is set.

    :param due: when the beat was due that did not come.
    """

    due: float
    place: str = ""
    work: Sequence[Work] = ()
    done: threading.Event = field(default_factory=threading.Event)


class LoopMeter:
    """Measures the lag of the loop that it runs on.

    :param beat_s: seconds between two beats.
    :param warn_s: seconds of lag that the log is told of.
    :param clock: seconds, never going back.
    """

    def __init__(
        self,
        beat_s: float = BEAT_S,
        warn_s: float = WARN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.observers: list[Callable[[float], object]] = []
        """Called on the loop with each lag in seconds."""
        self.at_work: dict[Work, asyncio.Task[Any]] = {}
        """What the loop works on, and the task that does it. On the loop only."""
        self._beat_s = beat_s
        self._warn_s = warn_s
        self._clock = clock
        self._due: float | None = None
        self._largest = 0.0
        self._recent = (0.0, 0.0)
        self._recent_until = 0.0
        self._look: _Look | None = None
        self._untold = 0
        self._told_at = -QUIET_S
        self._loop_thread = 0
        self._reader: StackReader | None = None
        self._ended = threading.Event()

    # ── what it has measured; from any thread ────────────────────────────────────────────────

    def largest_since_reset(self) -> float:
        """The largest lag in seconds since :meth:`reset`, that of now included."""
        return max(self._largest, self._lag_now())

    def reset(self) -> None:
        """Forget the largest lag."""
        self._largest = 0.0

    def largest_of_late(self) -> float:
        """The largest lag in seconds of the last minute, or of up to two."""
        return max(*self._recent, self._lag_now())

    def _lag_now(self) -> float:
        due = self._due
        return 0.0 if due is None else max(0.0, self._clock() - due)

    # ── the beat ─────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the loop that this is called on, inside the ``with``."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def beat() -> None:
            nonlocal timer
            now = self._clock()
            assert self._due is not None
            self._measured(self._due, now)
            self._due = now + self._beat_s
            timer = loop.call_later(self._beat_s, beat)

        self._loop_thread = threading.get_ident()
        self._reader = StackReader()
        self._ended.clear()
        self._due = self._clock() + self._beat_s
        timer = loop.call_later(self._beat_s, beat)
        watcher = threading.Thread(target=self._watch, name="engineroom-loop-meter", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            timer.cancel()
            self._due = None
            self._ended.set()
            watcher.join()
            self._reader.close()
            self._reader = None

    def _measured(self, due: float, now: float) -> None:
        lag = max(0.0, now - due)
        self._largest = max(self._largest, lag)
        if now > self._recent_until:
            self._recent = (0.0, self._recent[0])
            self._recent_until = now + RECENT_S
        if lag > self._recent[0]:
            self._recent = (lag, self._recent[1])
        for observe in self.observers:
            observe(lag)
        if lag >= self._warn_s:
            look = self._look
            self._tell(lag, now, look if look is not None and look.due == due else None)
        self._look = None

    def _threads_now(self) -> str:
        """What other threads do: who kept the interpreter may still be there."""
        if self._reader is None:
            return ""
        self._reader.look()
        return _others(self._reader.read(), self._loop_thread)

    def _tell(self, lag: float, now: float, look: _Look | None) -> None:
        if now - self._told_at < QUIET_S:
            self._untold += 1
            return
        if look is not None and not look.done.wait(_PATIENCE_S):
            look = None
        work = [*(() if look is None else look.work)] or [*self.at_work][-_MOST_WORK:]
        place = self._threads_now() if look is None else look.place
        logger.log(
            logging.WARNING if place or work else logging.INFO,
            "the event loop stood still for %.2f s: %s; %s%s",
            lag,
            place or "nothing of this process ran",
            "at work: " + ", ".join(item.described for item in work) if work else "no request ran",
            f" ({self._untold} times more since the last such line)" if self._untold else "",
        )
        self._told_at, self._untold = now, 0

    # ── the thread that looks ────────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        with StackReader() as reader:
            while True:
                due = self._due
                if due is None:
                    return
                lag = self._clock() - due
                if lag >= LOOK_S and (self._look is None or self._look.due != due):
                    self._look = look = _Look(due)
                    reader.look()  # at once: who kept the interpreter until now is still there
                    look.work = self._work_that_runs()
                    look.place = self._place(reader.read())
                    look.done.set()
                if self._ended.wait(LOOK_S - lag if lag < LOOK_S else LOOK_S):
                    return

    def _place(self, threads: dict[int, list[Call]]) -> str:
        own = threads.get(self._loop_thread, [])[:_MOST_FRAMES]
        lines = [str(call) for call in takewhile(lambda call: call.module not in _LOOPS_OWN, own)]
        return " < ".join(lines) or _others(threads, self._loop_thread)

    def _work_that_runs(self) -> list[Work]:
        tasks = list(self.at_work.items())
        return [item for item, task in tasks if getattr(task.get_coro(), "cr_running", False)]


def _others(threads: dict[int, list[Call]], loop_thread: int) -> str:
    """Where others are that do not wait: one may not have let go of the interpreter."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    ours = (loop_thread, threading.get_ident())
    places = [
        f"{names.get(ident, '?')} at {calls[0]}"
        for ident, calls in threads.items()
        if calls and ident not in ours and calls[0].module not in _WAITING
    ]
    if not places:
        return ""
    return f"nothing ran on the loop itself; other threads: {', '.join(places[:_MOST_THREADS])}"
