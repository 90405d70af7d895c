"""Where the tokens of a text end, so that those of a part of it can be counted."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left

__all__ = ["TokenPlaces"]


class TokenPlaces:
    """Which tokens a text is made of, step by step; a step costs two numbers."""

    __slots__ = ("_counts", "_ends", "_waiting")

    def __init__(self) -> None:
        self._ends = array("q", [0])  # characters up to the end of each step
        self._counts = array("q", [0])  # and tokens
        self._waiting = 0  # tokens that had no characters yet

    @property
    def total(self) -> int:
        """Tokens that have characters."""
        return self._counts[-1]

    def add(self, tokens: int, characters: int) -> None:
        """A step has come. A token without characters belongs to those that come next."""
        self._waiting += tokens
        if characters:
            self._ends.append(self._ends[-1] + characters)
            self._counts.append(self._counts[-1] + self._waiting)
            self._waiting = 0

    def between(self, start: int, end: int) -> int:
        """How many tokens have characters from one place to another.

        Where a step has several tokens, they are taken to be of the same length.
        """
        if start >= end:
            return 0
        return math.ceil(self._before(end)) - math.floor(self._before(start))

    def _before(self, place: int) -> float:
        step = bisect_left(self._ends, place)
        if step == 0:
            return 0
        if step == len(self._ends):
            return self._counts[-1]
        before, end = self._ends[step - 1], self._ends[step]
        counted, count = self._counts[step - 1], self._counts[step]
        return counted + (count - counted) * (place - before) / (end - before)
