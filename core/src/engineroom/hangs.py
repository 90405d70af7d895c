"""After how long what a thread does is taken for stuck: it cannot be stopped, but told of."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["STUCK_VARIABLE", "stuck_after_s"]

STUCK_VARIABLE: Final = "ENGINEROOM_STUCK_AFTER_S"
"""Environment: seconds after which a step, or reading a prompt, is taken for stuck; 0: never."""
_STUCK_AFTER_S: Final = 300.0


def stuck_after_s() -> float:
    """Seconds after which a step, or reading a prompt, is taken for stuck."""
    try:
        seconds = float(os.environ.get(STUCK_VARIABLE, ""))
    except ValueError:
        return _STUCK_AFTER_S
    return seconds if seconds > 0 else float("inf")
