"""Log probabilities as answers give them, made of what a sampler says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from engineroom.schemas import TokenLogprob

__all__ = ["MakeLogprob", "logprob_maker"]

MakeLogprob: TypeAlias = Callable[[int, float, Sequence[tuple[int, float]]], TokenLogprob]
"""Makes an answer's entry of a token, its log probability, and the likeliest tokens with theirs."""


def logprob_maker(own: Callable[[int], bytes]) -> MakeLogprob:
    """What makes a model's log probabilities as answers give them.

    :param own: a token's own bytes, the text of special ones.
    """

    def make(token: int, value: float, likeliest: Sequence[tuple[int, float]]) -> TokenLogprob:
        piece, pieces = own(token), [own(i) for i, _ in likeliest]
        return TokenLogprob(
            token_id=token,
            token=piece.decode("utf-8", "replace"),
            logprob=value,
            top=tuple(
                [
                    (i, piece.decode("utf-8", "replace"), value)
                    for (i, value), piece in zip(likeliest, pieces, strict=True)
                ]
            ),
            bytes=tuple(piece),
            top_bytes=tuple(map(tuple, pieces)),
        )

    return make
