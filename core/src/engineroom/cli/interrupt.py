"""Ctrl-C: the first stops the work in good order, the second ends the process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from engineroom.border import run_to_end
from engineroom.cli import EXIT_INTERRUPTED

__all__ = ["run_interruptible"]

GRACE_S: Final = 10.0
"""Seconds that the work gets to stop. A runtime that is busy in C may not listen at all."""

_T = TypeVar("_T")


def run_interruptible(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run ``work()`` on an event loop of its own.

    :raises KeyboardInterrupt: Ctrl-C was pressed; the work was cancelled and has ended.
    """
    interruption = _Interruption()

    async def followed() -> _T:
        interruption.follow()
        try:
            return await work()
        finally:
            interruption.unfollow()

    # A signal that is ignored (as under nohup) stays so, and only the main thread is told of one.
    replace = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if replace:
        # signal.signal rather than loop.add_signal_handler: it exists on Windows, and a second
        # Ctrl-C is heard even where a handler blocks the loop.
        signal.signal(signal.SIGINT, interruption)
    try:
        with asyncio.Runner() as runner:
            if replace:
                _wake_by_signals(runner.get_loop(), interruption)
            result = run_to_end(runner, followed())
    except BaseException as error:
        if interruption.count:
            raise KeyboardInterrupt from error
        raise
    finally:
        interruption.settle()
        if replace:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if interruption.count:
        raise KeyboardInterrupt
    return result


def _wake_by_signals(loop: asyncio.AbstractEventLoop, handler: Callable[..., None]) -> None:
    """Have a signal end the loop's wait, whichever thread of the process it was delivered to.

    Python's handlers run in the main thread, once that is awake; only a signal of its own wakes it.
    The loop has a descriptor for that, where it handles one itself. On Windows it always has.
    """
    with suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, int)  # nothing: ``handler`` does what there is to do
        signal.signal(signal.SIGINT, handler)


class _Interruption:
    """The handler of SIGINT while a loop runs."""

    def __init__(self) -> None:
        self.count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._guard: threading.Timer | None = None

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count > 1:
            _leave()
        if self._loop is None:
            raise KeyboardInterrupt
        self._loop.call_soon_threadsafe(self._cancel)

    def follow(self) -> None:
        """From now on a signal cancels the current task."""
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()

    def unfollow(self) -> None:
        self._loop = None

    def settle(self) -> None:
        """The work has ended."""
        if self._guard is not None:
            self._guard.cancel()

    def _cancel(self) -> None:
        self._guard = threading.Timer(GRACE_S, _leave)
        self._guard.daemon = True
        self._guard.start()
        if self._task is not None:
            self._task.cancel()


def _leave() -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the cursor, which a spinner hides
    # Not sys.exit: it would wait for threads, which is what could not be waited for.
    os._exit(EXIT_INTERRUPTED)
