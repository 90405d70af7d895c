"""Open files of this process: each connection is one, and the system gives a process only so many.

Many systems give 1024 by default, and more to whoever asks. Where there are none left, connections
are refused before anybody here hears of them, so that it has to be looked for.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import Final

from engineroom.border import get_logger
from engineroom.server.settings import ServerSettings

__all__ = ["DescriptorWatch", "raise_limit"]

logger = get_logger("engineroom.server.runner")

OTHERS: Final = 256
"""Files beside connections: models', engines', logs, and connections that are being refused."""
_LOOK_S: Final = 5.0
_QUIET_S: Final = 60.0
"""Seconds before the log is told again."""


def raise_limit(settings: ServerSettings) -> None:
    """Have the system give as many as the server's connections need; the log tells if it does not.

    For the whole process, and for those that it starts.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited, needed = resource.RLIM_INFINITY, settings.max_connections + OTHERS
    if soft == unlimited or soft >= needed:
        return
    most = needed if hard == unlimited else min(needed, hard)
    if most > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (OSError, ValueError):  # macOS has a lower bound of its own
            most = soft
    if most < needed:
        logger.warning(
            "this process may have %d files open, which is too few for %d connections "
            "(--max-connections) and %d others: raise the limit (ulimit -n, LimitNOFILE=), or "
            "lower --max-connections",
            most,
            settings.max_connections,
            OTHERS,
        )


class DescriptorWatch:
    """Looks now and then, inside of its ``with``, whether another file could be opened.

    Belongs to the event loop.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._told_at = -_QUIET_S

    def __enter__(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _look(self) -> None:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._tell("this process" if error.errno == errno.EMFILE else "the system")
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _tell(self, whose: str) -> None:
        now = time.monotonic()
        if now - self._told_at < _QUIET_S:
            return
        self._told_at = now
        logger.warning(
            "%s has as many files open as it may: connections are refused, and models cannot be "
            "loaded; raise the limit (ulimit -n, LimitNOFILE=), or lower --max-connections",
            whose,
        )
