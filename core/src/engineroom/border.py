"""The border to what others wrote: runtimes, plugins, observers, an application's log handlers.

Whatever such code raises ends here: as a typed error of the one request, or as a plugin or an
engine that is put aside. ``except Exception`` does not do for that. A panic of Rust's (pyo3's
``PanicException``), ``sys.exit()`` in a library and ``KeyboardInterrupt`` are none; a thread ends
with any of them, and asyncio ends its loop with the last two, whichever task they come from.

What gets through is said by :func:`is_interrupt` and :func:`passes`. An error is logged once, where
it is caught (:func:`log_failure`).

**An error that is kept has no frames.** A traceback holds every frame that the error came through,
and a frame holds its local variables: a prompt of megabytes, a model that was half loaded. One of
them mostly leads back to the error, and then all of it stays until the garbage collector comes by.
So whoever makes something of an error that outlives its work (a response, the last chunk of a
stream, the state of a model, an answer of HTTP) calls :func:`without_frames`; where many are told
of one, each is told of an :func:`own_copy`; and nobody raises what a local variable still holds.
"""

from __future__ import annotations

import asyncio
import copy as copying
import functools
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import islice
from types import CodeType, TracebackType
from typing import Any, Final, TypeAlias, TypeVar

from engineroom.errors import EngineRoomError, InferenceError, ResourceNotAvailableError

__all__ = [
    "MOST_CHARACTERS",
    "Border",
    "failure",
    "formatted",
    "get_logger",
    "guarded",
    "in_thread",
    "is_interrupt",
    "log_failure",
    "own_copy",
    "passes",
    "related",
    "run_to_end",
    "tame",
    "without_frames",
    "words",
]

_T = TypeVar("_T")
_E = TypeVar("_E", bound=BaseException)
_Log: TypeAlias = "logging.Logger | logging.LoggerAdapter[logging.Logger]"

MOST_CHARACTERS: Final = 2000
"""Of an error's text: it goes into answers and logs."""
_MOST_RELATED: Final = 100
"""Errors that are looked at for one: its causes and the members of its groups."""

_MOST_SHOWN: Final = 10
"""Of these, where they cannot be formatted as they are."""

# ── what an error says ───────────────────────────────────────────────────────────────────────────


def words(error: BaseException) -> str:
    """The error's class and text, cut where it is endless. Never raises."""
    kind = type(error).__name__
    try:
        text = _text(error)
    except BaseException as worse:
        if is_interrupt(worse):
            raise
        return f"{kind} (it cannot say what happened: {type(worse).__name__})"
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]} …"
    return f"{kind}: {text}" if text else f"{kind}()"


def _text(error: BaseException) -> str:
    text = str(error)
    # A subclass of str may do anything; a lone surrogate can neither be sent nor printed.
    shown = str.__getitem__(text, slice(None, MOST_CHARACTERS + 1))
    return shown.encode("utf-8", "backslashreplace").decode()


def related(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes and the members of groups, as a traceback shows them."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo and len(seen) < _MOST_RELATED:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += (current.__cause__, current.__context__)
        if isinstance(current, BaseExceptionGroup):
            todo += current.exceptions[:_MOST_RELATED]


def _is_plain(error: BaseException) -> bool:
    """Whether it can be formatted as it is."""
    try:
        shown = list(related(error))
        for one in shown:
            notes = getattr(one, "__notes__", ())
            if len(_text(one)) > MOST_CHARACTERS or len("".join(notes)) > MOST_CHARACTERS:
                return False
    except BaseException as worse:
        if is_interrupt(worse):
            raise
        return False
    return len(shown) < _MOST_RELATED


def log_failure(log: _Log, error: BaseException, message: str, *args: object) -> None:
    """Write an error to the log, with its traceback; its words are bounded there as well.

    :raises BaseException: it :func:`is_interrupt`, which is raised on instead.
    """
    if is_interrupt(error):
        raise error
    if _is_plain(error):
        log.error(message, *args, exc_info=error, stacklevel=2)
    else:
        log.error(f"{message}\n%s", *args, formatted(error), stacklevel=2)


def formatted(error: BaseException) -> str:
    """The error with its traceback and its causes, as text of bounded length."""
    if _is_plain(error):
        return "".join(traceback.format_exception(error))
    parts: list[str] = []
    for one in islice(related(error), _MOST_SHOWN):
        trace = "".join(traceback.format_tb(one.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{trace}{words(one)}\n")
    return "\n".join(reversed(parts))


def without_frames(error: _E) -> _E:
    """The error, for keeping: it and its causes refer no more to the frames that they went through,
    nor to errors that are hidden behind them (``raise … from``).
    """
    for one in related(error):
        BaseException.with_traceback(one, None)
        if one.__suppress_context__:
            one.__context__ = None
    return error


def own_copy(error: EngineRoomError) -> EngineRoomError:
    """The error once more, without frames, for one of several who are told of it.

    Each can then name its own request in its copy. The causes are shared.
    """
    try:
        copy = copying.copy(error)
        copy.__cause__, copy.__context__ = error.__cause__, error.__context__
        copy.__suppress_context__ = error.__suppress_context__
        copy.message = copy.message[:MOST_CHARACTERS]
        copy.describe()
    except Exception:  # noqa: BLE001 - a class of a handler's own, which may do anything
        return failure(error)
    return copy


# ── what has to get through ──────────────────────────────────────────────────────────────────────


def is_interrupt(error: BaseException) -> bool:
    """Whether a signal raised it, Ctrl-C for one: that is the program's own, wherever it strikes.

    Signals are handled in the main thread alone, in the midst of whatever runs there. So it is one
    where a signal's handler is among the frames that it came through; Python's own for Ctrl-C has
    none, and where that one is in place each ``KeyboardInterrupt`` of the main thread counts.
    """
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_interrupt, error.exceptions[:_MOST_RELATED]))
    if isinstance(error, KeyboardInterrupt):
        handler = signal.getsignal(signal.SIGINT)
        if handler is None or handler is signal.default_int_handler:
            return True
    codes = set(_signal_handlers())
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _signal_handlers() -> Iterator[CodeType]:
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        if callable(handler):
            function = getattr(handler, "__func__", handler)
            if not hasattr(function, "__code__"):  # an object that can be called
                function = getattr(handler.__call__, "__func__", None)
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                yield code


def passes(error: BaseException) -> bool:
    """Whether what came out of an awaited call is no failure of the call.

    That is an interrupt, the cancellation of the current task, and the end of the coroutine that
    asks (where it is closed while it awaits). A ``CancelledError`` or ``GeneratorExit`` of the
    call's own is a failure. Ask in the very frame that caught the error.
    """
    if isinstance(error, Exception):
        return False
    if isinstance(error, asyncio.CancelledError):
        return _is_cancelled()
    if isinstance(error, GeneratorExit):
        # Python closes what is awaited first, and raises it anew in each frame on the way.
        return error.__traceback__ is None or error.__traceback__.tb_next is None
    return is_interrupt(error)


def _is_cancelled() -> bool:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return False
    return task is not None and task.cancelling() > 0


# ── the log ──────────────────────────────────────────────────────────────────────────────────────


class _Guarded(logging.Logger):
    """A logger that whoever logs can rely on."""

    def handle(self, record: logging.LogRecord) -> None:
        try:
            super().handle(record)
        except BaseException as error:
            if is_interrupt(error):
                raise
            if logging.raiseExceptions and sys.stderr is not None:
                with suppress(Exception):
                    sys.stderr.write(f"--- Logging error ---\n{formatted(error)}")


def get_logger(name: str) -> logging.Logger:
    """As :func:`logging.getLogger`; what a filter or handler of its raises is told on ``stderr``.

    Else one that fails would end whatever writes to the log: an engine, or the loop.
    """
    return guarded(logging.getLogger(name))


def guarded(log: logging.Logger) -> logging.Logger:
    """The same logger, guarded as those of :func:`get_logger` are."""
    kind = type(log)
    if not issubclass(kind, _Guarded):
        plain = kind is logging.Logger
        log.__class__ = _Guarded if plain else type(kind.__name__, (_Guarded, kind), {})
    return log


logger = get_logger("engineroom.border")


# ── typed errors ─────────────────────────────────────────────────────────────────────────────────


def failure(
    error: BaseException, what: str = "", *, model_id: str | None = None
) -> EngineRoomError:
    """A typed error for what foreign code raised, with that as its cause. Log it first.

    :param what: who did what, to begin the message with.
    """
    kind: type[EngineRoomError] = InferenceError
    said = words(error)
    if isinstance(error, MemoryError):
        kind = ResourceNotAvailableError
        said = f"memory ran out ({said}); send it again later, or unload a model"
    typed = kind(f"{what}: {said}" if what else said, model_id=model_id)
    typed.__cause__ = without_frames(error)
    return typed


@dataclass(slots=True)
class Border(AbstractContextManager[None]):
    """What foreign code raises in the ``with`` block is logged, and comes out typed.

    Typed errors come out as they are, and so does what :func:`passes`.

    :param log: where failures are written to.
    :param what: who does what, as in ``handler 'x': infer``.
    :param model_id: the model that it is done for.
    """

    log: _Log
    what: str
    model_id: str | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, EngineRoomError) or passes(error):
            return
        what = f"{self.what} failed"
        for_model = "" if self.model_id is None else f" for model {self.model_id!r}"
        log_failure(self.log, error, "%s%s", what, for_model)
        raise failure(error, what, model_id=self.model_id) from error


# ── threads and loops ────────────────────────────────────────────────────────────────────────────


async def in_thread(call: Callable[[], _T]) -> _T:
    """As :func:`asyncio.to_thread`, for calls that may raise anything.

    :raises Exception: what the call raised.
    :raises EngineRoomError: that was something which would end the event loop, or let who waits
        wait forever; it is logged.
    """
    return await asyncio.to_thread(tame(call))


def tame(call: Callable[[], _T]) -> Callable[[], _T]:
    """The call, to be made in another thread: it raises nothing that a future or loop cannot take.

    No future takes ``StopIteration``. What is no ``Exception`` ends the thread, or, raised again
    where it is awaited, the loop.
    """

    def called() -> _T:
        try:
            return call()
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                raise
            log_failure(logger, error, "a call in a thread failed")
            raise failure(error) from error

    return called


def run_to_end(runner: asyncio.Runner, work: Coroutine[Any, Any, _T]) -> _T:
    """As ``runner.run``, but only ``work`` or a signal ends it.

    A loop stops where any of its tasks or callbacks raises ``SystemExit`` or
    ``KeyboardInterrupt``, a library's own ones too. That is logged here, and the loop goes on.
    """
    task = runner.get_loop().create_task(work)

    async def followed() -> None:
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
        if task.cancelled():
            raise asyncio.CancelledError

    while True:
        try:
            runner.run(followed())
            return task.result()
        except (SystemExit, KeyboardInterrupt) as error:
            if task.done() or is_interrupt(error):
                raise
            log_failure(
                logger, error, "a task or callback of a library would have ended the program"
            )
