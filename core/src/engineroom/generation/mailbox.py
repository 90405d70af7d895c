"""From an engine's thread to asyncio: one wake-up a step for all requests of a loop.

For runtimes that decode in a thread of their own. Each request has a :class:`Mailbox`, made on
its event loop; after a step the thread hands over what all of them get with :func:`deliver`::

    async def generate_tokens(self, loaded_model, request):
        mailbox = Mailbox()
        task = loaded_model.model_object.submit(request, mailbox)  # the engine's queue
        try:
            yield mailbox  # the steps are in there
        finally:
            task.cancel()
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from engineroom.border import get_logger
from engineroom.errors import EngineRoomError
from engineroom.generation.waker import LoopWaker

if TYPE_CHECKING:
    from engineroom.generation.steps import TokenStep

__all__ = ["Mailbox", "StepBatch", "deliver"]

logger = get_logger("engineroom.mailbox")


class Mailbox:
    """What an engine has for one request. The request's limit of tokens bounds what it holds.

    Belongs to the event loop on which it was made; the engine hands over through
    :func:`deliver`. It has one reader, which takes step by step (:meth:`get`) or is called with
    each (:meth:`push_to`).
    """

    __slots__ = ("_failure", "_items", "_take", "_waiter", "loop", "waker")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.waker = LoopWaker.of(self.loop)
        self._items: deque[TokenStep | EngineRoomError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[TokenStep], bool] | None = None
        self._failure: BaseException | None = None

    def put(self, item: TokenStep | EngineRoomError) -> None:
        """Add a step, or the error that ends the request. On the loop only."""
        take, waiter = self._take, self._waiter
        if take is None or waiter is None:
            self._items.append(item)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
            return
        if waiter.done():  # the reader was cancelled, and does not know it yet
            self._items.append(item)
            return
        try:
            if isinstance(item, EngineRoomError):
                raise item
            if take(item):
                return
        except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
            self._failure = error
        self._take = None
        if not waiter.done():  # the taker may have cancelled the task that waits
            waiter.set_result(None)

    async def get(self) -> TokenStep:
        """The next step. :raises EngineRoomError: the request has failed."""
        items = self._items
        while not items:
            try:
                await self._new_waiter()
            finally:
                self._waiter = None
        item = items.popleft()
        if isinstance(item, EngineRoomError):
            raise item
        return item

    async def push_to(self, take: Callable[[TokenStep], bool]) -> None:
        """Have each step taken as it comes, without waking the task that waits here for it.

        :param take: takes a step, soon after :func:`deliver` and outside of this task; returns
            whether it takes another one. What it raises is raised here.
        :raises EngineRoomError: the request has failed.
        """
        items = self._items
        while items:
            item = items.popleft()
            if isinstance(item, EngineRoomError):
                raise item
            if not take(item):
                return
        self._take = take
        try:
            await self._new_waiter()
            if self._failure is not None:
                raise self._failure
        finally:
            self._waiter = self._take = self._failure = None

    def _new_waiter(self) -> asyncio.Future[None]:
        waiter = self._waiter = self.loop.create_future()
        return waiter


StepBatch: TypeAlias = Iterable[tuple[Mailbox, "TokenStep | EngineRoomError"]]
"""What one step of an engine gives its requests: steps, or the errors that end them."""


def deliver(batch: StepBatch) -> None:
    """Hand steps over, from any thread; one wake-up for each event loop."""
    by_waker: dict[LoopWaker, list[tuple[Mailbox, TokenStep | EngineRoomError]]] = {}
    for entry in batch:
        by_waker.setdefault(entry[0].waker, []).append(entry)
    for waker, entries in by_waker.items():
        try:
            waker.call(_put_all, entries)
        except RuntimeError:  # the loop was closed under its requests
            logger.debug("%d steps had no event loop to go to any more", len(entries))


def _put_all(entries: StepBatch) -> None:
    for mailbox, item in entries:
        mailbox.put(item)
