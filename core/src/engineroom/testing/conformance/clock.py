"""Time as it passes for this process, so that a slow machine is never a handler's fault."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Clock"]

_LATE: Final = 2.0
"""A look that comes so many times later than it was meant to is not counted in whole."""


class Clock:
    """Seconds, told by looking at it again and again.

    The wall clock runs on while the machine sleeps, or has no processor to spare for us. A look
    counts for little more than it was meant to take, or for what the process has computed
    meanwhile if that is more, and never for more than has passed.

    :param look_s: seconds from one look to the next, as they are meant to be.
    """

    def __init__(self, look_s: float) -> None:
        self._look_s = look_s
        self._wall = time.monotonic()
        self._computed = time.process_time()

    def passed(self) -> float:
        """Seconds that count since the last look."""
        wall, computed = time.monotonic(), time.process_time()
        counted = min(wall - self._wall, max(_LATE * self._look_s, computed - self._computed))
        self._wall, self._computed = wall, computed
        return max(counted, 0.0)
