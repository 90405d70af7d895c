"""Requests that come without a key or with a wrong one: all counted, some of them logged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from engineroom.border import get_logger

__all__ = ["KeyFailure", "KeyFailures"]

logger = get_logger("engineroom.server.keys")

KeyFailure: TypeAlias = Literal["missing", "unknown"]
LINES: Final = 10
"""Lines in the log in each ``WINDOW_S``: anybody can cause as many as they like."""
WINDOW_S: Final = 60.0
_MOST_ADDRESSES: Final = 1000


class KeyFailures:
    """Says where failed keys come from, a few lines a minute, and then how many more there were.

    :param count: counts one of them by its kind.
    :param clock: seconds, never going back.
    """

    def __init__(
        self,
        count: Callable[[KeyFailure], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._clock = clock
        self._window_ends = 0.0
        self._lines = 0
        self._unwritten = 0
        self._addresses: set[str] = set()
        self._summary: asyncio.TimerHandle | None = None

    def add(self, kind: KeyFailure, address: str, request_id: str) -> None:
        """One more. On the event loop.

        :param address: where it came from.
        :param request_id: what its answer is called by.
        """
        self._count(kind)
        now = self._clock()
        if now >= self._window_ends:
            self.summarise()
            self._window_ends, self._lines = now + WINDOW_S, 0
        if self._lines < LINES:
            self._lines += 1
            what = "no key" if kind == "missing" else "an unknown key"
            logger.warning(
                "a request with %s came from %s (request %s)",
                what,
                address,
                request_id,
                extra={"request_id": request_id, "model_id": "-", "key_name": "-"},
            )
            return
        self._unwritten += 1
        if len(self._addresses) < _MOST_ADDRESSES:
            self._addresses.add(address)
        if self._summary is None:
            loop = asyncio.get_running_loop()
            self._summary = loop.call_later(self._window_ends - now, self.summarise)

    def summarise(self) -> None:
        """Say how many were not written, if any."""
        if self._summary is not None:
            self._summary.cancel()
            self._summary = None
        if self._unwritten:
            more = "at least " if len(self._addresses) >= _MOST_ADDRESSES else ""
            logger.warning(
                "%d more requests with no or an unknown key came within a minute, from %s%d "
                "addresses",
                self._unwritten,
                more,
                len(self._addresses),
            )
        self._unwritten = 0
        self._addresses.clear()
