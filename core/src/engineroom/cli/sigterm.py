"""SIGTERM before a server has a handler of its own: noted instead of obeyed.

The kernel ignores it where the process is the first of a container and handles it not: it would be
lost while the command is still being imported. Light, because it comes before all of that.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, Final

__all__ = ["NotedSigterm"]

_STATUS: Final = 128 + signal.SIGTERM


class NotedSigterm:
    """Notes one SIGTERM; a second one ends the process."""

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def note(self) -> None:
        """From now on. Only the main thread is told of signals: elsewhere this does nothing."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take)

    def forget(self) -> None:
        """No more: it means again what it meant before. May be called again."""
        before, self._before = self._before, None
        if before is not None:
            signal.signal(signal.SIGTERM, before)

    def _take(self, *_: object) -> None:
        if self.came:
            os._exit(_STATUS)
        self.came = True
