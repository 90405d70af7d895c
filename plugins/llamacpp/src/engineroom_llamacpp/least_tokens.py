"""How many tokens a text has at least, by its length: what cannot fit is refused unread."""

from __future__ import annotations

from typing import Any

from engineroom.prompts import LeastTokens, byte_alphabet

__all__ = ["least_tokens_of"]


def least_tokens_of(library: Any, vocab: Any) -> LeastTokens | None:
    """What tells it for a vocabulary; ``None``: a token may stand for any number of bytes.

    llama.cpp's other tokenizers drop spaces, or read a word that they do not know as one token; and
    some tokens take the spaces beside them along. Goes through the vocabulary.
    """
    kind = library.llama_vocab_type(vocab)
    in_bytes = kind == library.LLAMA_VOCAB_TYPE_BPE
    if not in_bytes and kind != library.LLAMA_VOCAB_TYPE_SPM:
        return None
    strips = library.LLAMA_TOKEN_ATTR_LSTRIP | library.LLAMA_TOKEN_ATTR_RSTRIP
    added = library.LLAMA_TOKEN_ATTR_CONTROL | library.LLAMA_TOKEN_ATTR_USER_DEFINED
    longest = 1
    missing = {letter.encode(): byte for byte, letter in byte_alphabet().items()}
    for token in range(library.llama_vocab_n_tokens(vocab)):
        attributes = library.llama_vocab_get_attr(vocab, token)
        if attributes & strips:
            return None
        text = library.llama_vocab_get_text(vocab, token) or b""
        if in_bytes and not attributes & added:
            missing.pop(text, None)
            longest = max(longest, len(text.decode("utf-8", "replace")))  # a letter a byte
        else:
            longest = max(longest, len(text))
    return LeastTokens(longest, bytes(missing.values()) if in_bytes else b"")
