"""A model's vocabulary as grammars need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["ModelTokens"]


@dataclass(frozen=True, slots=True, eq=False)
class ModelTokens:
    """A model's vocabulary as grammars need it.

    :param pieces: the bytes of each token by its id, as many as the model has logits; the text of
        those that are special; nothing for what no token is.
    :param special: ids of tokens that control something.
    :param ends: ids of tokens that end the generation.
    :param encode: the token ids of a text in which there are no special ones.
    """

    pieces: Sequence[bytes]
    special: frozenset[int]
    ends: Sequence[int]
    encode: Callable[[str], list[int]]
