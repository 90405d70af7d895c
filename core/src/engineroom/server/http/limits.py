"""How much at one time, and how much a minute: for all together and for each key."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Final

from engineroom.server.http.errors import RETRY_AFTER_S, ApiError
from engineroom.server.settings import ServerSettings
from engineroom.turns import WaitingLine, turn_of

__all__ = ["Limiter", "Slot", "TokenBucket"]

_MAX_BUCKETS: Final = 20_000


class TokenBucket:
    """Tokens a minute. What was promised is taken at once; what was used is settled later.

    :param per_minute: how much comes back in a minute, and how much there is at most.
    :param clock: seconds, never going back.
    """

    __slots__ = ("_clock", "_level", "_seen", "per_minute")

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._seen = clock()

    def wait_s(self, tokens: int) -> float:
        """Seconds until so many can be taken; 0: now. More than a minute's are as a minute's."""
        now = self._clock()
        gained = (now - self._seen) * self.per_minute / 60
        self._level = min(float(self.per_minute), self._level + gained)
        self._seen = now
        missing = min(tokens, self.per_minute) - self._level
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, tokens: int) -> int:
        """Take tokens; returns how many were, for :meth:`settle`."""
        taken = min(tokens, self.per_minute)
        self._level -= taken
        return taken

    def settle(self, taken: int, used: int) -> None:
        """Put right what :meth:`take` guessed. May leave a debt."""
        self._level = min(float(self.per_minute), self._level + taken - used)


@dataclass(eq=False, slots=True)
class Slot:
    """A place among the running requests.

    :param waited_s: seconds that were waited for it.
    :param used: tokens read and written; said when it is over.
    """

    waited_s: float = 0.0
    used: int = 0

    def left_of(self, timeout_s: float | None) -> float | None:
        """What the wait has left of a request's time."""
        return None if timeout_s is None else max(0.001, timeout_s - self.waited_s)


@dataclass(eq=False, slots=True)
class _Waiter:
    owner: str
    priority: int
    rank: tuple[float, int]
    count: int
    future: asyncio.Future[None]


class Limiter:
    """Lets requests in as the settings say. Belongs to the event loop."""

    def __init__(
        self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self.running = 0
        self._by_key: Counter[str] = Counter()
        self._queue: WaitingLine[_Waiter] = WaitingLine(attrgetter("count"))
        self._orders = itertools.count()
        per_minute = settings.tokens_per_minute
        self._bucket = TokenBucket(per_minute, clock) if per_minute else None
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return sum(waiter.count for waiter in self._queue)

    @asynccontextmanager
    async def slot(
        self,
        key: str,
        count: int,
        tokens: int,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Slot]:
        """A place for ``count`` requests at once, held inside the ``async with``.

        :param tokens: most that they will write, as far as that is known.
        :param timeout_s: seconds to wait for it.
        :param priority: a higher one goes first; see :func:`~engineroom.turns.turn_of`.
        :raises ApiError: 429, with the seconds after which to try again; 408: it took too long.
        """
        buckets = self._take_tokens(key, tokens)
        slot = Slot()
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._enter(key, count, priority, slot)
            except TimeoutError as error:
                raise ApiError(
                    408,
                    f"its turn did not come within {timeout_s:g} s; send it again later",
                    "request_timeout",
                ) from error
            try:
                yield slot
            finally:
                self._leave(key, count)
        finally:
            for bucket, taken in buckets:
                bucket.settle(taken, slot.used)

    def _take_tokens(self, key: str, tokens: int) -> list[tuple[TokenBucket, int]]:
        buckets = [("the server", self._bucket), ("this key", self._bucket_of(key))]
        waits = [(b.wait_s(tokens), owner) for owner, b in buckets if b is not None]
        wait, whose = max(waits, default=(0.0, ""), key=itemgetter(0))
        if wait > 0:
            raise ApiError(
                429,
                f"the tokens per minute of {whose} are used up; try again in "
                f"{math.ceil(wait)} s, or ask for fewer tokens",
                "tokens_per_minute",
                retry_after_s=math.ceil(wait),
            )
        return [(bucket, bucket.take(tokens)) for _, bucket in buckets if bucket is not None]

    def _bucket_of(self, key: str) -> TokenBucket | None:
        per_minute = self._settings.key_tokens_per_minute
        if not per_minute:
            return None
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(per_minute, self._clock)
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
        return bucket

    def refuse_waiting(self, refused: ApiError) -> None:
        """Send everybody away who waits."""
        for waiter in self._queue:
            if not waiter.future.done():
                waiter.future.set_exception(refused)

    async def _enter(self, key: str, count: int, priority: int, slot: Slot) -> None:
        settings = self._settings
        for largest, whose in (
            (settings.max_running, "the server"),
            (settings.key_max_running, "a key"),
        ):
            if largest is not None and count > largest:
                raise ApiError(
                    400,
                    f"{count} answers at once are more than {whose} may run ({largest}); "
                    "ask for fewer",
                    "too_many_choices",
                )
        # Through the queue, whoever it is: new requests do not overtake, or several answers at
        # once would wait for ever.
        began = self._clock()
        rank = (turn_of(priority, began), next(self._orders))
        future = asyncio.get_running_loop().create_future()
        waiter = _Waiter(key, priority, rank, count, future)
        self._queue.add(waiter)
        self._admit()
        if future.done():
            return
        self._keep_bounds(waiter)
        try:
            await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._leave(key, count)  # let in and cancelled at the same time
            raise
        finally:
            self._drop(waiter)
            slot.waited_s = self._clock() - began
            self._admit()

    def _keep_bounds(self, newest: _Waiter) -> None:
        """Let no more wait than may. Where one key has most of what waits, its last ones go.

        :raises ApiError: it is the newest that has to go.
        """
        settings = self._settings
        mine = sum(w.count for w in self._queue if w.owner == newest.owner)
        if settings.key_max_queued is not None and mine > settings.key_max_queued:
            self._drop(newest)
            raise _full("this key", settings.key_max_queued)
        too_many = self.queued - settings.max_queued
        if too_many <= 0:
            return
        self._drop(newest)
        leaving = self._queue.yield_to(newest, too_many)
        if leaving is None:
            raise _full("the server", settings.max_queued)
        self._queue.add(newest)
        for waiter in leaving:
            self._drop(waiter)
            if not waiter.future.done():
                waiter.future.set_exception(_full("the server", settings.max_queued))

    def _drop(self, waiter: _Waiter) -> None:
        if waiter in self._queue:
            self._queue.remove(waiter)

    def _leave(self, key: str, count: int) -> None:
        self.running -= count
        self._by_key[key] -= count
        if not self._by_key[key]:
            del self._by_key[key]
        self._admit()

    def _admit(self) -> None:
        """Let in whoever fits, in the order of turns."""
        while self._admit_one():
            pass

    def _admit_one(self) -> bool:
        """Let the next one in, unless it has to wait.

        A key at its bound holds nobody else up. One that needs more places than are free holds up
        those that came after it, or it would wait for ever.
        """
        most, key_most = self._settings.max_running, self._settings.key_max_running
        latest = math.inf
        for waiter in self._queue.heads():
            key, count, order = waiter.owner, waiter.count, waiter.rank[1]
            if waiter.future.done():
                self._queue.remove(waiter)
                return True
            if order > latest or (key_most is not None and self._by_key[key] + count > key_most):
                continue
            if most is not None and self.running + count > most:
                latest = order
                continue
            self.running += count
            self._by_key[key] += count
            self._queue.serve(waiter, self._clock())
            waiter.future.set_result(None)
            return True
        return False


def _full(whose: str, most: int) -> ApiError:
    return ApiError(
        429,
        f"the queue of {whose} is full ({most} requests wait); try again later",
        "queue_full",
        retry_after_s=RETRY_AFTER_S,
    )
