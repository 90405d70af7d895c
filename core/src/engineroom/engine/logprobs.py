"""Log probabilities as answers give them, made of what a sampler says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

from engineroom.schemas import PromptLogprob, TokenLogprob

__all__ = ["MakeLogprob", "first_of_prompt", "logprob_maker"]

_KEPT: Final = 1 << 14
"""Tokens whose text and bytes are shared by all entries that have them."""

MakeLogprob: TypeAlias = Callable[[int, float, Sequence[tuple[int, float]]], TokenLogprob]
"""Makes an answer's entry of a token, its log probability, and the likeliest tokens with theirs."""


def logprob_maker(own: Callable[[int], bytes]) -> MakeLogprob:
    """What makes a model's log probabilities as answers give them.

    :param own: a token's own bytes, the text of special ones.
    """

    @lru_cache(_KEPT)
    def texts(token: int) -> tuple[str, tuple[int, ...]]:
        piece = own(token)
        return piece.decode("utf-8", "replace"), tuple(piece)

    def make(token: int, value: float, likeliest: Sequence[tuple[int, float]]) -> TokenLogprob:
        text, known = texts(token)
        return TokenLogprob(
            token_id=token,
            token=text,
            logprob=value,
            top=tuple([(i, texts(i)[0], value) for i, value in likeliest]),
            bytes=known,
            top_bytes=tuple([texts(i)[1] for i, _ in likeliest]),
        )

    return make


def first_of_prompt(make: MakeLogprob, token: int) -> PromptLogprob:
    """The entry of a prompt's first token, which has nothing before it."""
    entry = make(token, 0.0, ())
    return PromptLogprob(
        token_id=token, token=entry.token, logprob=None, bytes=entry.bytes, top_bytes=()
    )
