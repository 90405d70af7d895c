r"""Text from anywhere, made safe to show: in a log, on a terminal, in a message.

Names, metadata of models, and errors of templates and libraries come from anyone. What a terminal
would obey (escape sequences), what would end a line of a log, what turns the order of characters
around, and what nobody sees, is written as Python writes it: ``\x1b``, ``\n``, ``\u202e``.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

__all__ = [
    "CONTROLS",
    "MAX_TRACE",
    "UNSAFE",
    "printable",
    "printable_lines",
    "printable_record",
    "terminal_text",
]

_BIDI: Final = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_TURNING: Final = "\u202a-\u202e\u2066-\u2069"
_UNSEEN: Final = (
    "\xad\u180e\u200b-\u200d\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
_CONTROL: Final = "\0-\x1f\x7f-\x9f\u2028\u2029"
CONTROLS: Final = re.compile(f"[{_CONTROL}{_BIDI}]")
"""What a name may not have: control characters, line breaks, and what turns the order around."""
_ANY: Final = re.compile(f"[{_CONTROL}{_BIDI}{_UNSEEN}\ud800-\udfff]")
UNSAFE: Final = re.compile(f"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029{_BIDI}{_UNSEEN}\ud800-\udfff]")
"""What is not seen or would be obeyed; line feeds and tabs are neither."""
_LINE_END: Final = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_OBEYED: Final = re.compile(f"\r|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_TURNING}]")

MAX_TRACE: Final = 32_768
"""Characters of a traceback in a log: a chain of errors of a library's, each in whole."""


def printable(text: str) -> str:
    """The text on one line, with escapes for what is not seen or would be obeyed."""
    return text if text.isprintable() else _ANY.sub(_escape, text)


def printable_lines(text: str) -> str:
    """As :func:`printable`; tabs stay, and line ends of every kind become line feeds."""
    return text if text.isprintable() else UNSAFE.sub(_escape, _LINE_END.sub("\n", text))


def terminal_text(text: str) -> str:
    """What a model wrote, for a terminal: it is shown, and cannot rewrite the screen.

    Control characters become U+FFFD, carriage returns go; what joins letters and emoji stays.
    """
    return text if text.isprintable() else _OBEYED.sub(_harmless, text)


def printable_record(record: logging.LogRecord) -> None:
    """Make a log record safe to write, whoever writes it.

    Its message keeps its arguments; texts among them come onto one line. A traceback is made safe
    where it needs it, and loses its middle where it is very long.
    """
    with suppress(Exception):  # one that cannot be written is for its handlers to tell
        if not record.getMessage().isprintable():
            _clean_message(record)
    if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
        trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        safe = printable_lines(_shortened(trace))
        if safe != trace:
            record.exc_text = safe


def _shortened(trace: str) -> str:
    """A traceback without its middle, where it quotes what somebody sent at length."""
    if (count := len(trace) - MAX_TRACE) <= 0:
        return trace
    half = MAX_TRACE // 2
    return f"{trace[:half]}\n  … {count} characters left out …\n{trace[-half:]}"


def _clean_message(record: logging.LogRecord) -> None:
    args = record.args
    if isinstance(args, Mapping):
        record.args = {key: _argument(value) for key, value in args.items()}
    elif args:
        record.args = tuple(map(_argument, args))
    record.msg = printable_lines(str(record.msg))


def _argument(value: Any) -> Any:
    """An argument of a message: itself, unless what it is written as is not safe."""
    if (written := str(value)).isprintable():
        return value
    safe = printable_lines(written) if isinstance(value, BaseException) else printable(written)
    return value if safe == written else safe


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _harmless(match: re.Match[str]) -> str:
    return "" if match[0] == "\r" else "\N{REPLACEMENT CHARACTER}"
