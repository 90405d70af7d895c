"""An event loop in a thread of its own, watched from outside.

A handler may block the loop, hang, or swallow its cancellation. The thread that waits for it
here is another one, so each of these is found, named by the place where it stands, and the run
goes on or ends by itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Final, TypeVar

from engineroom.border import is_interrupt, words
from engineroom.stacks import Call, stacks
from engineroom.testing.conformance.clock import Clock
from engineroom.testing.conformance.outcomes import HungError, LoopLostError

__all__ = ["LoopThread", "contained", "where"]

_T = TypeVar("_T")

BEAT_S: Final = 0.01
LOOK_S: Final = 0.05
"""How often the waiting thread looks at the loop."""
_PATIENCE_S: Final = 1.0
NOTICE_S: Final = 0.1
"""A silence from which on its place is noted."""


_abandoned: Final[list[object]] = []


class LoopThread:
    """Runs coroutines, and knows the loop's longest silence and where it stood then.

    :param silence_s: seconds without a turn after which the loop counts as lost.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._loop = asyncio.new_event_loop()
        self._beats = 0
        self._between = Clock(BEAT_S)
        self._longest = 0.0
        self._place = ""
        self._noticed = 0.0
        self._lost = False
        self._thread = threading.Thread(
            target=self._turn, name="engineroom-conformance", daemon=True
        )
        self._thread.start()

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._beat)
        self._loop.run_forever()
        # What could not be stopped was named by a check; to collect it would only make noise.
        if left := asyncio.all_tasks(self._loop):
            _abandoned.append((self._loop, left))
        else:
            self._loop.close()

    def _beat(self) -> None:
        # What holds the interpreter as well is not seen by the other thread, but computes.
        self._longest = max(self._longest, self._between.passed() - 2 * BEAT_S)
        self._beats += 1
        self._loop.call_later(BEAT_S, self._beat)

    def forget_stalls(self) -> None:
        """Measure the longest silence anew."""
        self._longest, self._noticed, self._place = 0.0, 0.0, ""

    def stall(self) -> tuple[float, str]:
        """The longest silence in seconds, and where the loop stood, as far as that was seen."""
        return self._longest, self._place

    def run(self, work: Coroutine[Any, Any, _T], limit_s: float) -> _T:
        """Run ``work`` to its end, from another thread.

        :raises LoopLostError: the loop does not turn any more.
        :raises HungError: it did not end in ``limit_s`` seconds; it was cancelled.
        """
        done = threading.Event()
        tasks: list[asyncio.Task[_T]] = []

        def start() -> None:
            task = self._loop.create_task(contained(work))
            tasks.append(task)
            task.add_done_callback(lambda _: done.set())

        self._loop.call_soon_threadsafe(start)
        clock = Clock(LOOK_S)
        waited = silent = 0.0
        beats = self._beats
        while not done.wait(LOOK_S):
            passed = clock.passed()
            waited += passed
            silent = silent + passed if self._beats == beats else 0.0
            beats = self._beats
            self._look(silent)
            if waited > limit_s:
                place = where(tasks[0]) if tasks else "nowhere yet"
                if tasks:
                    self._loop.call_soon_threadsafe(tasks[0].cancel)
                raise HungError(
                    did="the whole check",
                    expected=f"its end within {limit_s:g} s",
                    saw=f"it still waits {place}",
                )
        return tasks[0].result()

    def _look(self, silent: float) -> None:
        """Note where a silent loop stands; give up on one that is silent for too long."""
        self._longest = max(self._longest, silent)
        if silent < NOTICE_S:
            return
        calls = stacks().get(self._thread.ident or 0)
        place = _place(calls) if calls else "(its thread has ended)"
        if silent > self._noticed:
            self._noticed, self._place = silent, place
        if silent > self._silence_s:
            self._lost = True
            raise LoopLostError(
                did="ran the handler on an event loop",
                expected=f"that the loop turns again within {self._silence_s:g} s: a handler "
                "hands long work to a thread or a process",
                saw=f"the loop has been blocked for {silent:.1f} s {place}",
            )

    def close(self) -> None:
        """End what is left and the thread; a loop that is lost is left behind."""
        if not self._lost:
            with suppress(HungError, LoopLostError):  # named when they were found
                self.run(_wind_up(), 2 * _PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_PATIENCE_S)


async def contained(work: Awaitable[_T]) -> _T:
    """The same, where ``SystemExit`` and its like do not end the loop of all checks."""
    try:
        return await work
    except BaseException as error:
        if isinstance(error, Exception | asyncio.CancelledError) or is_interrupt(error):
            raise
        raise RuntimeError(f"it raised {words(error)}, which is no Exception") from error


async def _wind_up() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_PATIENCE_S)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _place(calls: Sequence[Call]) -> str:
    """Where a thread stands: the innermost call that is not of asyncio, else the innermost."""
    call = next((call for call in calls if "asyncio" not in call.file), calls[0])
    return f"in {call.function} ({call.file}:{call.line})"


def where(task: asyncio.Task[Any]) -> str:
    """Where a task waits, as deep inside as can be seen."""
    place = ""
    inner: Any = task.get_coro()
    while inner is not None:
        frame = _first(inner, "cr_frame", "ag_frame", "gi_frame")
        if frame is not None and "asyncio" not in frame.f_code.co_filename:
            place = _spot(frame)
        inner = _first(inner, "cr_await", "ag_await", "gi_yieldfrom") or _behind(inner)
    return place or "at a place that cannot be seen"


def _first(thing: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(thing, name, None))), None)


def _behind(inner: Any) -> Any:
    """The generator behind the awaitable of its ``__anext__``, which does not tell."""
    import gc

    level = [inner]
    for _ in range(3):
        level = [
            referent
            for thing in level
            if type(thing).__name__ in _ANEXT
            for referent in gc.get_referents(thing)
        ]
        for referent in level:
            if isinstance(referent, AsyncGenerator) and referent is not inner:
                return referent
    return None


_ANEXT: Final = ("anext_awaitable", "async_generator_asend", "async_generator_athrow")


def _spot(frame: FrameType) -> str:
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name)
    return f"in {name} ({code.co_filename}:{frame.f_lineno})"
