"""Tells of a step that runs for longer than any should: nobody can stop it, but all can be told."""

from __future__ import annotations

import time
from typing import Any

from engineroom.hangs import STUCK_VARIABLE, stuck_after_s

__all__ = ["StepWatch"]


class StepWatch:
    """When the current step began. Written by one thread, and read by any.

    :param logger: has a record of a step that is stuck, once, and of its end.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._step: tuple[float, str] | None = None
        self._told: tuple[float, str] | None = None

    def begins(self, whose: str) -> None:
        """A step begins, or has come a bit further."""
        self._step = (time.monotonic(), whose)

    def ends(self) -> None:
        """Nothing runs."""
        self._step = None

    def look(self) -> str:
        """What to tell of the step that runs; empty: it has not been running for long."""
        step, told = self._step, self._told
        if told is not None and step is not told:
            self._told = None
            self._logger.warning("the step of %r goes on, or has ended", told[1])
        if step is None:
            return ""
        seconds = time.monotonic() - step[0]
        if seconds < stuck_after_s():
            return ""
        words = (
            f"a step of model {step[1]!r} has been running for {seconds:.0f} s; should it never "
            "end, restart the process"
        )
        if self._told is not step:
            self._told = step
            self._logger.error("%s (%s says after how long this is told)", words, STUCK_VARIABLE)
        return words
