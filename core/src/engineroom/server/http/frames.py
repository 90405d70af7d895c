"""Bytes on the wire: JSON and server-sent events, put together once a step.

What does not change within a stream is encoded once, when the stream begins; a step adds its
text as a JSON string. No object is built for a chunk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

__all__ = [
    "DONE",
    "Answer",
    "Framer",
    "Pieces",
    "chunker",
    "dumps",
    "event",
    "json_text",
    "line",
    "named_event",
    "slices",
    "taken",
]

_encode = msgspec.json.Encoder().encode

DONE: Final = b"data: [DONE]\n\n"
_SHORT: Final = 64
_MARK: Final = "\ue000text\ue000"
_MARK_JSON: Final = _encode(_MARK)


class Answer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object that is sent. Its fields and docstring are its schema, too.

    A field that may be absent has the default ``UNSET``.
    """


def dumps(value: Any) -> bytes:
    """JSON, without spaces."""
    try:
        return _encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, from a runtime that let it pass
        plain = msgspec.to_builtins(value)
        return json.dumps(plain, separators=(",", ":")).encode()


def json_text(text: str) -> bytes:
    """A string in JSON."""
    try:
        return _encode(text)
    except UnicodeEncodeError:
        return json.dumps(text.encode("utf-8", "replace").decode()).encode()


_A = TypeVar("_A", bound=Answer)
_T = TypeVar("_T")


class Pieces(Generic[_A]):
    """An answer with long lists, encoded piece by piece: all at once would hold the loop."""

    def __init__(self) -> None:
        self._last: _A | None = None
        self._lists: dict[str, list[bytes]] = {}

    def add(self, piece: _A) -> None:
        """The next part of its lists; all else is as the last piece has it."""
        self._last = piece
        for name in piece.__struct_fields__:
            if isinstance(value := getattr(piece, name), list):
                encoded = self._lists.setdefault(name, [])
                if value:
                    encoded.append(dumps(value)[1:-1])

    def whole(self) -> _A:
        """The answer, to be encoded and no more. There was a piece."""
        assert self._last is not None
        lists: dict[str, Any] = {
            name: msgspec.Raw(b"[" + b",".join(encoded) + b"]")
            for name, encoded in self._lists.items()
        }
        return msgspec.structs.replace(self._last, **lists)


def slices(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """The items, so many at a time; once nothing where there are none."""
    return (items[start : start + size] for start in range(0, max(1, len(items)), size))


def taken(items: list[_T], size: int) -> Iterator[list[_T]]:
    """The items like :func:`slices`, out of the list: to let go of many takes as long as to make
    them.
    """
    while True:
        some = items[:size]
        del items[:size]
        yield some
        if not items:
            return


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """A server-sent event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + dumps(value) + b"\n\n"


def line(value: Any) -> bytes:
    """A line of JSON, as streams of ``application/x-ndjson`` have them."""
    return dumps(value) + b"\n"


class Framer:
    """Makes an event of a text, or a line, without encoding again what does not change.

    :param make: gives the event's value for a text.
    :param name: the event's name.
    :param encode: what makes bytes of a value where there is no name.
    """

    __slots__ = ("after", "before")

    def __init__(
        self,
        make: Callable[[str], Any],
        name: str | None = None,
        *,
        encode: Callable[[Any], bytes] = event,
    ) -> None:
        whole = encode(make(_MARK)) if name is None else named_event(name, make(_MARK))
        self.before, mark, self.after = whole.partition(_MARK_JSON)
        assert mark

    def __call__(self, text: str) -> bytes:
        """The event."""
        return self.before + json_text(text) + self.after


def _chunk(frame: bytes) -> bytes:
    """Nothing for an empty one: an empty chunk ends a body."""
    return b"%x\r\n%b\r\n" % (len(frame), frame) if frame else b""


def chunker(frame_of: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """What makes a chunk, as HTTP 1.1 sends bodies of unknown length, of a text's frame."""
    if not isinstance(frame_of, Framer):
        return lambda text: _chunk(frame_of(text))
    encode, before = _encode, frame_of.before
    after = frame_of.after + b"\r\n"
    around = len(before) + len(frame_of.after)
    begins: dict[int, bytes] = {}  # by the text's length: most texts are short

    def chunk(text: str) -> bytes:
        try:
            encoded = encode(text)
        except UnicodeEncodeError:
            encoded = json_text(text)
        size = len(encoded)
        begin = begins.get(size)
        if begin is None:
            begin = b"%x\r\n%b" % (around + size, before)
            if size < _SHORT:
                begins[size] = begin
        return begin + encoded + after

    return chunk
