"""What third parties may raise: a menu of it, for stand-ins that fail in every way there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class PanicException(BaseException):
    """Stands for pyo3's: a panic in Rust, which is no ``Exception``."""


class Mute(Exception):
    """Cannot say what happened."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class MuteByPanic(Exception):
    """Not even an ``except Exception`` gets words out of it."""

    def __str__(self) -> str:
        raise PanicException("in __str__")

    __repr__ = __str__


class Endless(Exception):
    """Says 100 MB."""

    def __str__(self) -> str:
        return "x" * 100_000_000


class OddText(str):
    """A text of a class that fails where it is used."""

    def __format__(self, spec: str) -> str:
        raise PanicException("in __format__")


class Odd(Exception):
    """Its text is no plain one, and has what cannot be encoded."""

    def __str__(self) -> str:
        return OddText("odd \ud800")


def panic() -> None:
    raise PanicException("a Rust panic")


def leave() -> None:
    raise SystemExit(3)


def interrupt() -> None:
    raise KeyboardInterrupt


def end_generator() -> None:
    raise GeneratorExit


def cancel() -> None:
    raise asyncio.CancelledError("not yours")


def stop() -> None:
    raise StopIteration(1)


def stop_async() -> None:
    raise StopAsyncIteration


def no_memory() -> None:
    raise MemoryError("no room")


def deep() -> None:
    deep()


def group() -> None:
    raise BaseExceptionGroup("several", [SystemExit(4), ValueError("one"), PanicException("two")])


def mute() -> None:
    raise Mute


def mute_by_panic() -> None:
    raise MuteByPanic


def endless() -> None:
    raise Endless


def odd() -> None:
    raise Odd


def noted() -> None:
    error = ValueError("noted")
    error.add_note("y" * 10_000_000)
    raise error


RAISERS: dict[str, Callable[[], None]] = {
    call.__name__: call
    for call in (
        panic, leave, interrupt, end_generator, cancel, stop, stop_async, no_memory, deep, group,
        mute, mute_by_panic, endless, odd, noted,
    )
}  # fmt: skip
"""Its name → what raises it."""
