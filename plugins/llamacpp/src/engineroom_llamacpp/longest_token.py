"""How many bytes of a text one token stands for at most: what cannot fit is refused unread."""

from __future__ import annotations

from typing import Any

from engineroom.prompts import byte_alphabet

__all__ = ["longest_token"]


def longest_token(library: Any, vocab: Any) -> int | None:
    """Bytes of a text that one token of a vocabulary stands for at most.

    ``None`` where a token may stand for any number: llama.cpp's other tokenizers drop spaces, or
    read a word that they do not know as one token; and so do tokens that take the spaces beside
    them along. Goes through the vocabulary.
    """
    kind = library.llama_vocab_type(vocab)
    in_bytes = kind == library.LLAMA_VOCAB_TYPE_BPE
    if not in_bytes and kind != library.LLAMA_VOCAB_TYPE_SPM:
        return None
    strips = library.LLAMA_TOKEN_ATTR_LSTRIP | library.LLAMA_TOKEN_ATTR_RSTRIP
    added = library.LLAMA_TOKEN_ATTR_CONTROL | library.LLAMA_TOKEN_ATTR_USER_DEFINED
    longest, missing = 1, {letter.encode() for letter in byte_alphabet().values()}
    for token in range(library.llama_vocab_n_tokens(vocab)):
        attributes = library.llama_vocab_get_attr(vocab, token)
        if attributes & strips:
            return None
        text = library.llama_vocab_get_text(vocab, token) or b""
        if in_bytes and not attributes & added:
            missing.discard(text)
            longest = max(longest, len(text.decode("utf-8", "replace")))  # a letter a byte
        else:
            longest = max(longest, len(text))
    # Of a byte that has no token, nothing is left.
    return None if in_bytes and missing else longest
