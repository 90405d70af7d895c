"""What is said before the command's name, and the logging that follows from it."""

from __future__ import annotations

import copy
import logging
import sys
import traceback
from enum import StrEnum
from typing import Final

from engineroom.cli.output import say
from engineroom.cli.sigterm import NotedSigterm
from engineroom.telemetry import LOGGER_NAME

__all__ = ["LogLevel", "Settings"]


class LogLevel(StrEnum):
    """How much of the log is shown on standard error."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Settings:
    """The options of every command."""

    def __init__(self) -> None:
        self.debug = False
        self.log_level: LogLevel | None = None
        self.sigterm = NotedSigterm()
        self._handler: logging.Handler | None = None

    @property
    def logging(self) -> bool:
        """Whether anything is logged."""
        return self._handler is not None

    def start_logging(self) -> None:
        """Log to standard error, if that was asked for.

        Without ``--debug`` and ``--log-level`` nothing is: what went wrong, the command says.
        """
        level = LogLevel.DEBUG if self.debug and self.log_level is None else self.log_level
        if level is None:
            return
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT) if self.debug else _OneLine(_FORMAT))
        logger = logging.getLogger(LOGGER_NAME)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        self._handler = handler

    def stop_logging(self) -> None:
        """Undo :meth:`start_logging`."""
        if self._handler is not None:
            logger = logging.getLogger(LOGGER_NAME)
            logger.removeHandler(self._handler)
            logger.setLevel(logging.NOTSET)
            self._handler = None

    def show_traceback(self) -> bool:
        """Print the traceback of the exception being handled, if ``--debug`` asks for it."""
        if self.debug:
            say(traceback.format_exc().rstrip("\n"))
        return self.debug


class _OneLine(logging.Formatter):
    """Leaves tracebacks out."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_info = record.exc_text = record.stack_info = None
        return super().format(record)
