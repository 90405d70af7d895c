"""Whose turn it is: priority, and waiting that grows into it. Pure."""

from __future__ import annotations

from typing import Final

__all__ = ["SECONDS_A_STEP", "turn_of"]

SECONDS_A_STEP: Final = 2.0
"""So many seconds of waiting are worth one step of priority. From the lowest priority to the
highest there are 200 steps: whoever came 400 s later goes later, whatever its priority. That is
less than the 600 s that a server gives a request by default."""


def turn_of(priority: int, arrived: float) -> float:
    """What waiting requests are sorted by: the smallest goes first.

    Every second of waiting raises all who wait by the same amount, so that their order never
    changes: it is known when they come. Among equal priorities, the one that came first goes first.

    :param priority: a higher one goes first.
    :param arrived: when it came, in seconds, on a clock that all of them share.
    """
    return arrived - priority * SECONDS_A_STEP
