"""Bytes on the wire: JSON and server-sent events, put together once a step.

What does not change within a stream is encoded once, when the stream begins; a step adds its
text as a JSON string. No object is built for a chunk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec

__all__ = ["DONE", "BadJsonError", "dumps", "event", "framer", "json_text", "loads", "named_event"]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

DONE: Final = b"data: [DONE]\n\n"
_MARK: Final = "\ue000text\ue000"
_MARK_JSON: Final = _encode(_MARK)


class BadJsonError(ValueError):
    """What came is no JSON; the message says why."""


def dumps(value: Any) -> bytes:
    """JSON, without spaces."""
    try:
        return _encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, from a runtime that let it pass
        return json.dumps(value, separators=(",", ":")).encode()


def json_text(text: str) -> bytes:
    """A string in JSON."""
    try:
        return _encode(text)
    except UnicodeEncodeError:
        return json.dumps(text.encode("utf-8", "replace").decode()).encode()


def loads(data: bytes | bytearray) -> Any:
    """Read JSON. :raises BadJsonError: it is none, or nested too deeply."""
    try:
        return _decode(data)
    except RecursionError as error:
        raise BadJsonError("it is nested too deeply") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadJsonError(str(error)) from error


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """A server-sent event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + dumps(value) + b"\n\n"


def framer(make: Any, name: str | None = None) -> Callable[[str], bytes]:
    """What makes an event of a text, without encoding again what does not change.

    :param make: gives the event's value for a text.
    :param name: the event's name.
    """
    whole = event(make(_MARK)) if name is None else named_event(name, make(_MARK))
    before, mark, after = whole.partition(_MARK_JSON)
    assert mark
    encode = _encode

    def frame(text: str) -> bytes:
        try:
            return before + encode(text) + after
        except UnicodeEncodeError:
            return before + json_text(text) + after

    return frame
