"""How many bytes of a text one token stands for at most: what cannot fit is refused unread.

That is so where a tokenizer leaves out nothing of a text: byte-level vocabularies and those that
spell in bytes what they do not know. Some strip spaces, or read a word that they do not know as one
token, however long; over those no such bound is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final

from engineroom.prompts.token_bytes import byte_alphabet

__all__ = ["longest_token"]

_COMPOSED: Final = 4
"""NFC makes one byte of four at most; of three letters of Hangul, nine bytes, it makes three."""


def longest_token(tokenizer: Any) -> int | None:
    """Bytes of a text that one token of a ``tokenizers.Tokenizer`` stands for at most.

    ``None`` where a token may stand for any number. Goes through the vocabulary.
    """
    normaliser, splitter = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    shrinks = 1
    for step in normaliser:
        if not _keeps(step):
            return None
        shrinks *= _COMPOSED if step["type"] == "NFC" else 1
    if not all(map(_splits, splitter)):
        return None
    in_bytes = any(step["type"] == "ByteLevel" for step in splitter)
    if not _spells_all(tokenizer, in_bytes):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    own = (tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size()))
    lengths: Iterable[int] = map(len, own) if in_bytes else map(_bytes, own)
    return shrinks * max(1, *lengths, *(_bytes(token.content) for token in added))


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _state(part: Any) -> list[dict[str, Any]]:
    """The steps of a normaliser or a pre-tokenizer; one of an unknown kind has no ``type``."""
    if part is None:
        return []
    try:
        todo = [json.loads(part.__getstate__())]
    except Exception:  # noqa: BLE001 - one written in Python has no state
        return [{"type": ""}]
    steps = []
    while todo:
        step = todo.pop(0)
        if step.get("type") == "Sequence":
            todo = [*(step.get("normalizers") or step.get("pretokenizers") or ()), *todo]
        else:
            steps.append({"type": "", **step})
    return steps


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a normaliser makes no text shorter, but for composing its characters."""
    if step["type"] == "Replace":
        replaced = (step.get("pattern") or {}).get("String")
        return replaced is not None and _bytes(step.get("content") or "") >= _bytes(replaced)
    return step["type"] in ("NFC", "Prepend")


def _splits(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves out nothing."""
    known = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")
    return step["type"] in known and step.get("behavior") != "Removed"


def _spells_all(tokenizer: Any, in_bytes: bool) -> bool:
    """Whether each byte of a text is in some token."""
    model = tokenizer.model
    has: Callable[[str], bool] = lambda token: tokenizer.token_to_id(token) is not None  # noqa: E731
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if any(getattr(model, name, None) for name in affixes):
        return False
    if in_bytes:
        return type(model).__name__ == "BPE" and all(map(has, byte_alphabet().values()))
    falls_back = bool(getattr(model, "byte_fallback", False))
    return falls_back and all(has(f"<0x{byte:02X}>") for byte in range(256))
