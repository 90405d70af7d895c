"""How long the kit waits for what a handler does, and how a check's leavings are ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from engineroom.testing.conformance.clock import Clock
from engineroom.testing.conformance.loop import contained, where
from engineroom.testing.conformance.outcomes import HungError

__all__ = ["Patience", "quietly"]

_T = TypeVar("_T")

_MOST_STEPS: Final = 20
"""A stream that goes on may take so many times the limit for one chunk."""
_QUICK_TURNS: Final = 32
_LONGEST_PAUSE_S: Final = 0.02
_LONGEST_GOODBYE_S: Final = 5.0


class Patience:
    """Waiting with limits, so that what hangs is named; on the event loop of a check.

    :param timeout_s: seconds for one answer, one chunk or one load.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.opened: list[Callable[[], Awaitable[Any]]] = []
        """What closes the streams and generators of the check."""
        self._tasks: list[asyncio.Task[Any]] = []

    async def within(
        self, work: Awaitable[_T], did: str, progress: Callable[[], int] = lambda: 0
    ) -> _T:
        """Wait for something that a handler does, at most ``timeout_s`` seconds.

        :param did: what is waited for, as it is named in the error.
        :param progress: as for :meth:`ended`.
        :raises HungError: it did not end; it was cancelled, and left behind if that did nothing.
        """
        task: asyncio.Future[_T] = asyncio.ensure_future(
            work if asyncio.isfuture(work) else contained(work)
        )
        if await self.ended(task, progress=progress):
            return task.result()
        place = where(task) if isinstance(task, asyncio.Task) else "in a future"
        task.cancel()
        stopped = await self.ended(task, limit_s=self._goodbye_s)
        raise HungError(
            did=did,
            expected=f"its end, or its next chunk, within {self.timeout_s:g} s",
            saw=f"it waited {place}"
            + ("" if stopped else "; it did not end when it was cancelled, either"),
        )

    async def ended(
        self,
        *work: asyncio.Future[Any],
        limit_s: float | None = None,
        progress: Callable[[], int] = lambda: 0,
    ) -> bool:
        """Wait for tasks; ``False``: they go on, and that for too long without any progress.

        :param limit_s: seconds that count; ``None``: ``timeout_s``.
        :param progress: a number that grows while something comes of the work; the limit is then
            for each step, and there is another for all of them.
        """
        limit = self.timeout_s if limit_s is None else limit_s
        pause = min(limit / 4, 0.5)
        clock = Clock(pause)
        patience, most, count = limit, _MOST_STEPS * limit, progress()
        while patience > 0 and most > 0:
            _, going = await asyncio.wait(work, timeout=pause)
            if not going:
                return True
            passed = clock.passed()
            if (now := progress()) != count:
                count, patience = now, limit
            patience -= passed
            most -= passed
        return False

    async def until(self, condition: Callable[[], bool]) -> bool:
        """Let the loop turn until something is so; ``False``: it did not come to be."""
        clock = Clock(_LONGEST_PAUSE_S)
        waited, turns, pause = 0.0, 0, 0.0
        while not condition():
            if waited > self.timeout_s:
                return False
            await asyncio.sleep(pause)
            waited += clock.passed()
            turns += 1
            # Turns first: what runs on the loop alone would be over after a pause.
            if turns > _QUICK_TURNS:
                pause = min(_LONGEST_PAUSE_S, pause * 2 + 0.0005)
        return True

    async def turns(self, count: int = 12) -> None:
        """Let the loop turn, so that what was begun gets somewhere."""
        for _ in range(count):
            await asyncio.sleep(0)

    def spawn(self, work: Awaitable[_T]) -> asyncio.Task[_T]:
        """A task that is cancelled with the check."""
        task: asyncio.Task[_T] = asyncio.ensure_future(work)
        self._tasks.append(task)
        return task

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Tasks of the loop that are not the kit's own."""
        return asyncio.all_tasks() - set(self._tasks) - {asyncio.current_task()}

    async def clean_up(self) -> None:
        """End what the check has left open."""
        tasks, self._tasks = [t for t in self._tasks if not t.done()], []
        for task in tasks:
            task.cancel()
        if tasks:
            await self.ended(*tasks, limit_s=self._goodbye_s)
        closers, self.opened = self.opened, []
        for closer in closers:
            closing = asyncio.ensure_future(quietly(closer()))
            if not await self.ended(closing, limit_s=self._goodbye_s):
                closing.cancel()

    @property
    def _goodbye_s(self) -> float:
        """Seconds for what was cancelled; what has not ended then is left behind."""
        return min(self.timeout_s, _LONGEST_GOODBYE_S)


async def quietly(work: Awaitable[Any]) -> None:
    """Wait for an end, whatever it is: a check of its own looks at that."""
    with suppress(Exception, asyncio.CancelledError):
        await work
