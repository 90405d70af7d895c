"""For scripts and notebooks without an event loop of their own: one, in a thread.

A service belongs to one event loop. If it is already used on a running one, blocking calls from
other threads go there; otherwise the portal starts a thread with a loop, which ``close`` ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

from engineroom.border import get_logger, log_failure
from engineroom.errors import ConfigurationError
from engineroom.forks import Home
from engineroom.inference.streams import InferenceStream
from engineroom.schemas import InferenceResponse

__all__ = ["BlockingPortal", "BlockingStream"]

logger = get_logger("engineroom.service")

_HEARS_S: Final = 0.2
"""So long, and the main thread hears of signals that were given to others."""

_T = TypeVar("_T")


class BlockingPortal:
    """Runs coroutines on the service's event loop and waits for them."""

    def __init__(self) -> None:
        self.home = Home("this service")
        self._lock = threading.Lock()
        self._bound: asyncio.AbstractEventLoop | None = None
        self._own: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    def bind(self) -> None:
        """Note that the service is used on the running loop.

        :raises ConfigurationError: it is being used on another one, or in another process.
        """
        self.home.settle()
        loop = asyncio.get_running_loop()
        if self._bound is loop:
            return
        if self._bound is not None and self._bound.is_running():
            raise ConfigurationError(
                "this service is in use on another event loop; use it on one loop, and call "
                "run() or stream_sync() from other threads"
            )
        self._bound = loop

    def run(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run ``work()`` on the loop and return its result; an interrupt cancels it.

        :raises ConfigurationError: the caller is that loop, or in another process.
        """
        self.home.settle()
        loop = self._loop()
        future = asyncio.run_coroutine_threadsafe(work(), loop)
        try:
            _wait(future)
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # with what it raised, whose frames hold this one
            if self._stopped:  # the loop was made only to say so
                self.stop()
                self.join()

    def stop(self) -> None:
        """Let the portal's own loop end, if there is one, after what it is doing now."""
        with self._lock:
            self._stopped = True
            own, self._own = self._own, None
        if own is not None:
            own.call_soon_threadsafe(own.stop)

    def join(self) -> None:
        """Wait until the thread has ended."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> asyncio.AbstractEventLoop:
        bound = self._bound
        if bound is not None and bound.is_running():
            try:
                here = asyncio.get_running_loop()
            except RuntimeError:
                here = None
            if here is bound:
                raise ConfigurationError(
                    "run() and stream_sync() would block the event loop that does the work; "
                    "use `await service.process_inference(request)` here"
                )
            return bound
        with self._lock:
            if self._own is None:
                own = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=(own,), name="engineroom-blocking", daemon=True
                )
                self._thread.start()
                self._own = own
            return self._own


def _wait(future: concurrent.futures.Future[Any]) -> None:
    """Until it is done. Python's handlers of signals run in the main thread, between its waits: one
    without end would hold them up on Windows, and where another thread was given the signal.
    """
    if threading.current_thread() is threading.main_thread():
        while not future.done():
            concurrent.futures.wait([future], timeout=_HEARS_S)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        while True:
            try:
                loop.run_forever()
            except BaseException as error:  # noqa: BLE001 - of a library's own task or callback
                log_failure(logger, error, "the event loop goes on after a library's failure")
            else:
                break
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class BlockingStream(Iterator[str]):
    """The chunks of one request, for a caller that blocks. Iterating starts the work."""

    def __init__(self, portal: BlockingPortal, make: Callable[[], InferenceStream]) -> None:
        self._portal = portal
        self._make = make
        self._stream: InferenceStream | None = None
        self._closed = False

    @property
    def response(self) -> InferenceResponse | None:
        """What came of the request; ``None`` until the stream has ended."""
        return self._stream.response if self._stream is not None else None

    def __next__(self) -> str:
        if self._closed:
            raise StopIteration
        chunk = self._portal.run(self._advance)
        if chunk is None:
            self._closed = True
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Stop the work and give the slot back. May be called twice, and after the end."""
        if not self._closed:
            self._closed = True
            self._portal.run(self._end)

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    async def _advance(self) -> str | None:
        return await anext(self._opened(), None)

    async def _end(self) -> None:
        await self._opened().aclose()

    def _opened(self) -> InferenceStream:
        if self._stream is None:
            self._stream = self._make()
        return self._stream
