"""What the command writes: answers and tables to standard output, all else to standard error.

Text goes out as it is: no markup, no wrapping, no colour codes. Reasoning alone is dimmed, and on a
terminal only.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, TextIO

from engineroom.cli import EXIT_FAILED
from engineroom.errors import (
    ConfigurationError,
    EngineRoomError,
    ModelNotFoundError,
    NoSuitableHandlerError,
)
from engineroom.printable import UNSAFE, printable, printable_lines, terminal_text

__all__ = [
    "CommandError",
    "Dimmed",
    "OutputClosedError",
    "error_line",
    "prepare_streams",
    "say",
    "show",
    "table",
    "warning_line",
    "write",
    "write_document",
    "write_json",
    "write_text",
]

_NOT_ASCII: Final = re.compile("[^\0-\x7f]")
_SELF_EXPLAINING: Final = (ConfigurationError, ModelNotFoundError, NoSuitableHandlerError)


class CommandError(Exception):
    """What is asked for cannot be done; its text is the whole message.

    :param status: exit status; 2 where the arguments are wrong.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class OutputClosedError(Exception):
    """Nobody reads standard output any more."""


def prepare_streams() -> None:
    """Let neither a stream that is closed end the command, nor a character that a terminal lacks.

    Of a stream that the shell has closed (``>&-``) Python has ``None``, and the next file or socket
    gets its number: a library that complains on standard error would write into that. Here it is
    open to nowhere, as ``/dev/null`` is, also for the processes of a runtime.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if not _is_open(number):
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = os.fdopen(number, mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def write(text: str) -> None:
    """Write to standard output and flush; names in it are shown, and rewrite no screen.

    :raises OutputClosedError: its reader has gone.
    :raises CommandError: it cannot be written, for instance to a disk that is full.
    """
    _put(printable_lines(text))


def write_text(text: str) -> None:
    """Write a model's text; on a terminal without control sequences, elsewhere as it is."""
    _put(terminal_text(text) if sys.stdout.isatty() else text)


def write_json(value: Any) -> None:
    """Write one JSON document, indented."""
    write_document(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def write_document(document: str) -> None:
    """Write a JSON document; with escapes for what is not seen, and for what the output lacks."""
    document = UNSAFE.sub(_json_escape, document)
    try:
        document.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):  # it would come out as question marks
        document = _NOT_ASCII.sub(_json_escape, document)
    _put(document + "\n")


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _put(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        # Windows says EINVAL where others say EPIPE.
        if error.errno in (errno.EPIPE, errno.EINVAL, errno.ESHUTDOWN):
            raise OutputClosedError from error
        raise CommandError(
            f"standard output cannot be written: {error.strerror or error}", EXIT_FAILED
        ) from error


def show(as_json: bool, facts: Any, text: str | Callable[[], str]) -> None:
    """Write the facts as JSON, or the text for people; a function makes it only then."""
    if as_json:
        write_json(facts)
    else:
        write(text if isinstance(text, str) else text())


def warning_line(message: str) -> None:
    """One ``warning: …`` on standard error."""
    say(f"warning: {message}")


def error_line(error: EngineRoomError | str) -> None:
    """``error: …`` on standard error; a message of several lines keeps them."""
    if isinstance(error, EngineRoomError):
        message = error.message or type(error).__name__
        if not isinstance(error, _SELF_EXPLAINING) and not message.startswith(error.label):
            message = f"{error.label}: {message}"
    else:
        message = error
    say(f"error: {message}")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns, two spaces apart, however wide they get."""
    lines = [[header.upper() for header in headers]]
    lines += [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def say(text: str) -> None:
    """A line on standard error."""
    try:
        sys.stderr.write(printable_lines(text) + "\n")
        sys.stderr.flush()
    except OSError:  # there is nobody left to tell
        _discard(sys.stderr)


class Dimmed:
    """Text beside the answer: dimmed on standard error if that is a terminal, else nowhere.

    With ``NO_COLOR`` set it is written without control sequences.
    """

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._on, self._off = ("", "") if plain else ("\x1b[2m", "\x1b[22m")
        self._last = ""

    def write(self, text: str) -> None:
        """Show a piece of it."""
        if self._shown and text:
            self._put(f"{self._on}{terminal_text(text)}{self._off}")
            self._last = text

    def end_line(self) -> None:
        """End its line, if it has begun one."""
        if self._last and not self._last.endswith("\n"):
            self._put("\n")
        self._last = ""

    def _put(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # there is nobody left to tell
            self._shown = False
            _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Send what the stream still holds nowhere, so that the interpreter's end is quiet."""
    try:
        target = stream.fileno()
    except (OSError, ValueError):  # not a real file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, target)
    os.close(nowhere)
