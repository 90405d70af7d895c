"""GGUF files put together by hand, to lie in any place."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

Entry = tuple[str, list[int], int, int]
"""A tensor's name, shape, type and place."""


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def i32(value: int) -> bytes:
    return struct.pack("<Ii", 5, value)


def f32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def flag(value: bool) -> bytes:
    return struct.pack("<I?", 7, value)


def string(value: bytes) -> bytes:
    return struct.pack("<IQ", 8, len(value)) + value


def numbers(code: str, values: Iterable[float]) -> bytes:
    values = list(values)
    kind = {"I": 4, "i": 5, "f": 6, "B": 0}[code]
    return struct.pack(f"<IIQ{len(values)}{code}", 9, kind, len(values), *values)


def strings(values: Iterable[bytes]) -> bytes:
    values = list(values)
    body = b"".join(struct.pack("<Q", len(value)) + value for value in values)
    return struct.pack("<IIQ", 9, 8, len(values)) + body


def image(pairs: Mapping[str, bytes], entries: Sequence[Entry] = (), data: bytes = b"") -> bytes:
    """The bytes of a file.

    :param pairs: key → its value, as the functions above make it.
    """
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(pairs))
    for key, value in pairs.items():
        head += struct.pack("<Q", len(key.encode())) + key.encode() + value
    for name, shape, kind, offset in entries:
        head += struct.pack("<Q", len(name.encode())) + name.encode()
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + data
