"""The life of one request: its clock, its deadline, and the way to stop it from outside."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

from engineroom.border import own_copy
from engineroom.errors import EngineRoomError, InferenceError
from engineroom.generation.generation import Generation
from engineroom.inference.delivery import Sink
from engineroom.schemas import InferenceRequest, InferenceResponse

__all__ = ["WAITED_S", "RequestScope"]

WAITED_S: ContextVar[float] = ContextVar("engineroom_waited_s", default=0.0)
"""Seconds that requests of this context waited before they came to the service."""


class RequestScope:
    """Lets a timer, ``close()`` or another task stop a request, and tell that from a cancellation.

    While the request's code runs (between :meth:`begin` and :meth:`end`) it is stopped by
    cancelling its task, as :func:`asyncio.timeout` does: the cancellation is taken back where
    :meth:`uncancel_if_ours` says that it was ours. A stream whose reader is busy elsewhere is
    closed in a task of the scope's own, and the reader finds the error in ``unread`` when it
    comes back.
    """

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.started = time.perf_counter()
        self.deadline = (
            None
            if request.timeout_s is None
            else asyncio.get_running_loop().time() + request.timeout_s
        )
        self.generation: Generation | None = None  # how far it has come, where that is known
        self.handler: str | None = None  # its name, once one is chosen
        self.handler_module = ""  # where its class is written
        self.warnings: list[str] = []  # about what its handler does not honour
        self.queued_s = WAITED_S.get()  # until the handler was asked
        self.whose: str = "nobody"  # who has to mend what made it fail
        self.turned_away = False  # by a limit; it never began
        self.pushed_out = False  # it had to make room for another key's
        self.cause: EngineRoomError | None = None
        self.quiet = False  # nobody waits for the error: the reader asked for the end
        self.leaving = False  # a task closes the stream
        self.closer: asyncio.Task[None] | None = None
        self.sink: Sink | None = None  # where the reader wants to be given chunks unasked
        self.unread: str | None = None  # the last chunk, where nobody read as it came
        self.response: InferenceResponse | None = None
        self.error: EngineRoomError | None = None  # what the response tells of
        self.stopped = False
        self._begun = False
        self._task: asyncio.Task[Any] | None = None
        self._baseline = 0
        self._cancelled = False
        self._chunks: weakref.ref[AsyncGenerator[str, None]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def waits(self) -> bool:
        """Whether it is known to wait still: for its model, or in its engine."""
        if self.cause is not None:
            return False
        generation = self.generation
        return self.handler is None if generation is None else generation.prompt_tokens is None

    @property
    def reading(self) -> bool:
        """Whether the request's code runs or waits in some task."""
        return self._task is not None

    def watch(self, chunks: AsyncGenerator[str, None]) -> None:
        """Close ``chunks`` on an interruption while nobody reads them.

        Not kept alive: a reader that lets go of the stream ends it.
        """
        self._chunks = weakref.ref(chunks)

    def begin(self) -> None:
        """The request's code is entered by the current task."""
        if self._task is not None:
            raise RuntimeError("a stream has one reader; another task is reading this one")
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._begun = True
        self._baseline = task.cancelling()

    def raise_error(self) -> None:
        """Raise what the response tells of, if it tells of any. The kept error gets no frames."""
        if self.error is not None:
            raise own_copy(self.error)

    def end(self) -> None:
        """The request's code is left."""
        task, self._task = self._task, None
        if self._cancelled and task is not None:  # swallowed, or overtaken by the end
            self._cancelled = False
            task.uncancel()

    def arm(self, expire: EngineRoomError) -> None:
        """Interrupt with ``expire`` at the deadline, if there is one."""
        if self.deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(self.deadline, self.interrupt, expire)

    def interrupt(self, cause: EngineRoomError, quiet: bool = False) -> None:
        """Stop the request now, whether it is read or not. Only the first cause counts."""
        if self.cause is not None or self.stopped:
            return
        self.cause, self.quiet = cause, quiet
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()
        elif not self._begun:
            return  # its first step raises the cause
        elif self._chunks is not None and (chunks := self._chunks()) is not None:
            self.closer = asyncio.get_running_loop().create_task(_close(chunks))

    def leave(self) -> None:
        """The reader itself asks for the end; from here on nothing interrupts the cleaning up."""
        self.leaving = True
        if self.cause is None:
            self.cause, self.quiet = InferenceError("the stream was closed"), True

    def check(self) -> None:
        """Raise what stopped the request, should its handler have swallowed it."""
        if self.overruled:
            raise asyncio.CancelledError
        if self.cause is not None:
            raise self.cause

    def uncancel_if_ours(self) -> bool:
        """Take a caught ``CancelledError`` back, if it came from :meth:`interrupt`.

        :returns: ``False`` where the task was (also) cancelled by somebody else.
        """
        if not self._cancelled or self._task is None:
            return False
        self._cancelled = False
        return self._task.uncancel() <= self._baseline

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancels the task that runs the request's code, or that closes it."""
        task = self._task or asyncio.current_task()
        return task is not None and task.cancelling() > 0

    @property
    def overruled(self) -> bool:
        """Whether somebody else has cancelled that task since the request's code was entered."""
        task = self._task
        return task is not None and task.cancelling() > self._baseline + self._cancelled

    async def closed(self) -> None:
        """Wait until what closes the stream, the scope's own task or another, has done so."""
        if self.closer is not None and not self.closer.done():
            await asyncio.wait([self.closer])
        elif self.leaving and not self.stopped:
            await self.finished()

    def finished(self) -> asyncio.Future[None]:
        """A future that is done when the request has ended."""
        future = asyncio.get_running_loop().create_future()
        if self.stopped:
            future.set_result(None)
        else:
            self._waiters.append(future)
        return future

    def stop(self, response: InferenceResponse) -> None:
        """The request has ended with ``response``."""
        self.stopped = True
        self.response = response
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


async def _close(generator: AsyncGenerator[str, None]) -> None:
    await generator.aclose()
