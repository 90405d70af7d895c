"""Ahead of vLLM's own queue: who may put a request into it next.

vLLM serves by priority and arrival. It knows of no keys, and a request cannot be taken out again to
let another go first. So it is given only as many as it works on, and a few more, for it to have the
next one at hand when one ends; the others wait here, key by key. In vLLM's own queue they go
in the order in which they were let through, but for their priorities.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from engineroom import EngineRoomError, WaitingLine, turn_of

__all__ = ["Turnstile"]


@dataclass(eq=False, slots=True)
class _Waiter:
    owner: str
    priority: int
    rank: tuple[float, int]
    future: asyncio.Future[None]


class Turnstile:
    """Lets so many through at a time. Belongs to the event loop.

    :param places: how many.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.inside = 0
        self._line: WaitingLine[_Waiter] = WaitingLine()
        self._orders = itertools.count()

    @property
    def waiting(self) -> int:
        """How many wait to be let through."""
        return len(self._line)

    @asynccontextmanager
    async def passed(
        self,
        owner: str,
        priority: int = 0,
        *,
        most: int | None = None,
        full: Callable[[], EngineRoomError] = lambda: EngineRoomError(""),
    ) -> AsyncIterator[None]:
        """Inside of the ``async with`` it is through.

        :param owner: name of the key whose it is; keys go in turn.
        :param most: how many may wait; ``None``: any number. Where one key has most of them, its
            last one goes for another's.
        :param full: what is raised in those that are too many.
        """
        rank = (turn_of(priority, time.monotonic()), next(self._orders))
        waiter = _Waiter(owner, priority, rank, asyncio.get_running_loop().create_future())
        if self.inside < self.places and not self._line:
            self.inside += 1
        else:
            self._keep_bound(waiter, most, full)
            await self._wait(waiter)
        try:
            yield
        finally:
            self._leave()

    def _keep_bound(
        self, newest: _Waiter, most: int | None, full: Callable[[], EngineRoomError]
    ) -> None:
        missing = 0 if most is None else len(self._line) + 1 - most
        if missing <= 0:
            return
        leaving = self._line.yield_to(newest, missing)
        if leaving is None:
            raise full()
        for waiter in leaving:
            self._line.remove(waiter)
            if not waiter.future.done():
                waiter.future.set_exception(full())

    async def _wait(self, waiter: _Waiter) -> None:
        self._line.add(waiter)
        try:
            await waiter.future
        except BaseException:
            future = waiter.future
            if waiter in self._line:
                self._line.remove(waiter)
            elif future.done() and not future.cancelled() and future.exception() is None:
                self._leave()  # let through and cancelled at the same time
            raise

    def _leave(self) -> None:
        self.inside -= 1
        while self._line and self.inside < self.places:
            waiter = self._line.heads()[0]
            self._line.serve(waiter, time.monotonic())
            if not waiter.future.done():
                self.inside += 1
                waiter.future.set_result(None)
