"""What one prompt may take while a thread reads it, and the way to stop that from outside.

A thread cannot be interrupted. So what reads a prompt asks on its way whether anybody still waits
(:func:`check_stopped`), and tells how many tokens there are before it lists them
(:func:`expect_tokens`): nobody else runs while a list of millions is made.

Threads that run Python's code take turns of five milliseconds with all others, the event loop
among them. So of those that render (:func:`taking_turns`) one does at a time, for a slice after
which it rests; beside four looping templates the event loop then waits a third as long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import Final

from engineroom.forks import renew_in_child

__all__ = [
    "Reading",
    "ReadingStoppedError",
    "TooManyTokensError",
    "check_stopped",
    "expect_tokens",
    "take_turn_from",
    "taking_turns",
]

_SLICE_S: Final = 0.002
_REST_S: Final = 0.0002
_LISTED: Final = 100_000
"""So many tokens more than there may be are listed all the same, which takes milliseconds, and the
refusal tells the exact number."""


class ReadingStoppedError(Exception):
    """Nobody waits for the prompt any more."""


class TooManyTokensError(Exception):
    """A text has far more tokens than it may have.

    :param least: so many at least.
    """

    def __init__(self, least: int) -> None:
        super().__init__(f"at least {least} tokens")
        self.least = least


class _Current(threading.local):
    stopped: Callable[[], bool] | None = None
    most: int | None = None
    turn_began: float | None = None


_current: Final = _Current()


class _Turn:
    """A lock that can be taken from a thread that will not give it back."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nobody has it; in a process that is forked, too, which has none of the threads."""
        self._freed = threading.Condition()
        self._holder: int | None = None

    def acquire(self) -> None:
        """Wait until nobody has it."""
        with self._freed:
            self._freed.wait_for(lambda: self._holder is None)
            self._holder = threading.get_ident()

    def release(self, thread: int) -> None:
        """Nothing happens where another thread has it."""
        with self._freed:
            if self._holder == thread:
                self._holder = None
                self._freed.notify()


_turn: Final = _Turn()
renew_in_child(_turn.begin)


class Reading:
    """What this thread reads, while it is in the ``with`` block.

    :param stopped: whether nobody waits for it any more.
    :param most: tokens that a text may have; ``None``: any number.
    """

    __slots__ = ("_before", "_most", "_stopped")

    def __init__(self, stopped: Callable[[], bool], most: int | None = None) -> None:
        self._stopped = stopped
        self._most = most

    def __enter__(self) -> None:
        self._before = _current.stopped, _current.most
        _current.stopped, _current.most = self._stopped, self._most

    def __exit__(self, *_: object) -> None:
        _current.stopped, _current.most = self._before


def check_stopped() -> None:
    """To be called now and then by what may take long.

    :raises ReadingStoppedError: nobody waits for what this thread reads.
    """
    if (stopped := _current.stopped) is None:
        return
    if stopped():
        raise ReadingStoppedError
    began = _current.turn_began
    if began is not None and perf_counter() - began > _SLICE_S:
        _turn.release(threading.get_ident())
        try:
            sleep(_REST_S)  # whoever waits has the turn meanwhile, or the interpreter
        finally:
            _turn.acquire()
            _current.turn_began = perf_counter()


@contextmanager
def taking_turns() -> Iterator[None]:
    """What runs Python's code for long, while it is in the ``with`` block.

    It has to call :func:`check_stopped` now and then. Elsewhere than in a thread for prompts, and
    inside of another such block, it changes nothing.
    """
    if _current.stopped is None or _current.turn_began is not None:
        yield
        return
    _turn.acquire()
    _current.turn_began = perf_counter()
    try:
        yield
    finally:
        _current.turn_began = None
        _turn.release(threading.get_ident())


def take_turn_from(thread: int) -> None:
    """Let others render where a thread that is stuck has the turn."""
    _turn.release(thread)


def expect_tokens(least: int, *, unread: bool = False) -> None:
    """To be called before tokens are listed.

    :param least: how many the text has at least.
    :param unread: they have still to be read; they are refused where they are too many, else
        where they are far too many.
    :raises TooManyTokensError: there are more than the text may have.
    """
    if (most := _current.most) is not None and least > most + (0 if unread else _LISTED):
        raise TooManyTokensError(least)
