"""The bytes that a vocabulary's tokens stand for, by the way it writes bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

__all__ = ["byte_alphabet", "bytes_of_token", "decoder_kinds"]

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al., 2019).

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return alphabet | {byte: chr(byte) for byte in printable}


_BYTES: Final[Mapping[str, int]] = {character: byte for byte, character in byte_alphabet().items()}


def decoder_kinds(tokenizer: Any) -> frozenset[str]:
    """Names of the steps of a ``tokenizers.Tokenizer``'s decoder."""
    if tokenizer.decoder is None:
        return frozenset()
    try:
        steps = [json.loads(tokenizer.decoder.__getstate__())]
    except Exception:  # noqa: BLE001 - one written in Python has no state
        return frozenset()
    kinds = set()
    while steps:
        step = steps.pop()
        kinds.add(str(step.get("type")))
        steps += step.get("decoders") or ()
    return frozenset(kinds)


def bytes_of_token(text: str, kinds: Collection[str]) -> bytes | None:
    """The bytes of a token by its text in the vocabulary; ``None``: only its decoder can tell.

    :param kinds: the decoder's steps: ``ByteLevel`` tells the bytes of every token,
        ``ByteFallback`` those of byte tokens (``<0x41>``).
    """
    if "ByteLevel" in kinds:
        try:
            return bytes(map(_BYTES.__getitem__, text))
        except KeyError:  # added later, and written as it is
            return text.encode()
    if "ByteFallback" in kinds and (match := _BYTE_TOKEN.fullmatch(text)):
        return bytes((int(match[1], 16),))
    return None
