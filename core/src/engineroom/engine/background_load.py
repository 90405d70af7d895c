"""A load that can be given up: in a thread of its own, and given back when nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from engineroom.border import failure, get_logger, log_failure
from engineroom.engine.decode_loop import run_in_new_thread
from engineroom.errors import ResourceNotAvailableError

__all__ = ["BackgroundLoad"]

logger = get_logger("engineroom.loading")

_T = TypeVar("_T")
_NOTHING: Final = object()


@dataclass(eq=False)
class BackgroundLoad(Generic[_T]):
    """A load in a thread, which cannot be stopped there: what it makes is given back instead.

    A handler's ``load_model`` awaits :meth:`result`. Where that is cancelled, or the handler calls
    :meth:`abandon`, ``free`` gets what was made, as soon as it is there.

    :param make: loads. Blocks, in the load's thread.
    :param free: gives back what ``make`` returned. Blocks, in a thread; called once at most.
    :param name: how the threads' names begin.
    :param stop: makes a ``make`` that is under way end early. May block.
    """

    make: Callable[[], _T]
    free: Callable[[_T], object]
    name: str = field(kw_only=True)
    stop: Callable[[], object] | None = field(default=None, kw_only=True)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _abandoned: bool = field(default=False, init=False)
    _ended: bool = field(default=False, init=False)
    _made: _T | object = field(default=_NOTHING, init=False)

    async def result(self) -> _T:
        """Load in a new thread, and wait for it. Cancelling gives the load up.

        :raises EngineRoomError: as ``make`` raised it.
        :raises ResourceNotAvailableError: memory ran out.
        :raises InferenceError: ``make`` raised what is no ``Exception``, such as a panic of Rust's,
            which would end more than this load.
        """
        try:
            return await run_in_new_thread(self._typed, f"{self.name}-load")
        except asyncio.CancelledError:
            self.abandon()
            raise

    def run(self) -> _T:
        """Load in this thread. What is made after :meth:`abandon` is given back at once."""
        try:
            made = self.make()
        finally:
            with self._lock:
                self._ended = True
        with self._lock:
            abandoned = self._abandoned
            self._made = _NOTHING if abandoned else made
        if abandoned:
            self.free(made)  # what it raises is dropped with the load: see `result`
        return made

    def abandon(self) -> None:
        """Give the load up, whether it has ended or not. Does not block; may be called again."""
        with self._lock:
            first, self._abandoned = not self._abandoned, True
            made, self._made = self._made, _NOTHING
            stop = self.stop if first and not self._ended else None
        if made is not _NOTHING:  # it came, but nobody got it
            self._in_thread(lambda: self.free(made))  # type: ignore[arg-type]
        elif stop is not None:
            self._in_thread(stop)

    def _in_thread(self, call: Callable[[], object]) -> None:
        def called() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - nobody waits for it
                log_failure(logger, error, "%s: a load could not be given back", self.name)

        threading.Thread(target=called, name=f"{self.name}-unload", daemon=True).start()

    def _typed(self) -> _T:
        try:
            return self.run()
        except MemoryError as error:
            raise ResourceNotAvailableError(
                "there was not enough memory to load the model; unload another one, or take a "
                "smaller one"
            ) from error
        except Exception:
            raise  # whoever called the handler makes it typed, with its name
        except BaseException as error:
            log_failure(logger, error, "%s: a load failed", self.name)
            raise failure(error, "the load failed") from error
