"""What the library tells its users on the terminal, kept from there."""

from __future__ import annotations

import logging
import os
import threading

from engineroom_hf_transformers.compat_transformers import put_log_handler

__all__ = ["quieten"]

logger = logging.getLogger("engineroom.hf_transformers")


class _ToOurs(logging.Handler):
    """What the library tells its users on the terminal is for the log of those who debug."""

    def emit(self, record: logging.LogRecord) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s", record.name, record.getMessage())


_quiet_lock = threading.Lock()
_quiet = False


def quieten() -> None:
    """Turn the library's bars off and its advice into our records of level debug, once.

    Only its own default handler is replaced: handlers that an application gave it stay.
    """
    global _quiet  # noqa: PLW0603 - the process has one such library
    with _quiet_lock:
        if _quiet:
            return
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # advice of its own, on stderr
        put_log_handler(_ToOurs())
        _quiet = True
