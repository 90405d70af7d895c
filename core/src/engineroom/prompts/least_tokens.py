"""How many tokens a text has at least, by its length: what cannot fit is refused unread.

That can be said where a tokenizer leaves out nothing of a text: byte-level vocabularies and those
that spell in bytes what they do not know. Others strip spaces, or read a word that they do not know
as one token, however long.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from engineroom.prompts.token_bytes import byte_alphabet

__all__ = ["LeastTokens", "least_tokens_of"]

_COMPOSED: Final = 4
"""NFC makes one byte of four at most; of three letters of Hangul, nine bytes, it makes three."""


@dataclass(frozen=True, slots=True)
class LeastTokens:
    """Tells how many tokens a text has at least.

    :param longest: bytes of a text that one token stands for at most.
    :param silent: bytes that no token stands for, and of which nothing is left.
    """

    longest: int
    silent: bytes = b""

    def __call__(self, text: str) -> int:
        data = text.encode()
        return len(data.translate(None, self.silent) if self.silent else data) // self.longest


def least_tokens_of(tokenizer: Any) -> LeastTokens | None:
    """What tells it for a ``tokenizers.Tokenizer``; ``None``: a token may stand for any number of
    bytes. Goes through the vocabulary.
    """
    normaliser, splitter = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    shrinks = 1
    for step in normaliser:
        if not _keeps(step):
            return None
        shrinks *= _COMPOSED if step["type"] == "NFC" else 1
    in_bytes = any(step["type"] == "ByteLevel" for step in splitter)
    if not all(map(_splits, splitter)) or (silent := _silent(tokenizer, in_bytes)) is None:
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    own = (tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size()))
    lengths: Iterable[int] = map(len, own) if in_bytes else map(_bytes, own)
    longest = max(1, *lengths, *(_bytes(token.content) for token in added))
    return LeastTokens(shrinks * longest, silent)


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


def _silent(tokenizer: Any, in_bytes: bool) -> bytes | None:
    """Bytes that are in no token; ``None``: what is not known becomes one, however much it is."""
    model = tokenizer.model
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if any(getattr(model, name, None) for name in affixes):
        return None
    if in_bytes and type(model).__name__ == "BPE":
        letters = byte_alphabet().items()
        return bytes(byte for byte, letter in letters if tokenizer.token_to_id(letter) is None)
    spelt = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return b"" if getattr(model, "byte_fallback", False) and None not in spelt else None
