"""Tokens that may come next, proposed before the model has chosen them.

What is proposed changes no answer: the model chooses each token as it would have anyway, and a
right proposal only saves the step in which it would have been computed (Leviathan et al., 2023,
arXiv:2211.17192, with the model's own draw in place of their rejection test). Prompt lookup
proposes what followed the same words before; runtimes add drafters that ask a smaller model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["DraftRequest", "Drafter", "PromptLookup", "common_prefix"]

_NGRAM: Final = 3


class DraftRequest(NamedTuple):
    """Which proposals a drafter is asked for.

    :param sequence: where the request's tokens lie in the runtime's cache.
    :param tokens: the request's tokens, the prompt's first.
    :param most: how many tokens to propose at most; at least 1.
    :param scope: the request's ``cache_scope``; what was read in another one is of no use to it.
    """

    sequence: int
    tokens: Sequence[int]
    most: int
    scope: str = ""


class Drafter(ABC):
    """Proposes what may come next, out of a request's own tokens and of nobody else's.

    Called on the engine's thread, but for :meth:`interrupt`.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes for itself, weights apart."""
        return 0

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest]) -> dict[int, list[int]]:
        """Sequence → tokens, as many as were asked for or fewer."""

    def forget(self, sequence: int) -> None:
        """The sequence's request has ended."""

    def interrupt(self, on: bool) -> None:
        """Abort what is being computed, or (``False``) let it through; from any thread."""

    def close(self) -> None:
        """Give everything back."""


class PromptLookup(Drafter):
    """Proposes what followed the last three tokens where they stood before."""

    def __init__(self) -> None:
        # Sequence → how far it is indexed, and where each three tokens ended last.
        self._indices: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> dict[int, list[int]]:
        """See :class:`Drafter`. A text is indexed once, as it grows."""
        return {
            sequence: self._look_up(sequence, tokens, most)
            for sequence, tokens, most, *_ in requests
        }

    def _look_up(self, sequence: int, tokens: Sequence[int], count: int) -> list[int]:
        indexed, index = self._indices.get(sequence, (_NGRAM, {}))
        for end in range(indexed, len(tokens)):  # not the last one: nothing follows it yet
            index[tuple(tokens[end - _NGRAM : end])] = end
        self._indices[sequence] = (max(indexed, len(tokens)), index)
        place = index.get(tuple(tokens[-_NGRAM:]))
        if place is None:
            return []
        proposed = list(tokens[place : place + count])
        while len(proposed) < count:  # as if it went on repeating itself
            proposed.append(proposed[place + len(proposed) - len(tokens)])
        return proposed

    def forget(self, sequence: int) -> None:
        """See :class:`Drafter`."""
        self._indices.pop(sequence, None)

    def close(self) -> None:
        """See :class:`Drafter`."""
        self._indices.clear()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning.

    Compares slices, doubling and then halving, so that the work is done outside of Python.
    """
    most = min(len(a), len(b))
    if not most or a[0] != b[0]:
        return 0
    low, high = 1, 2  # a[:low] == b[:low]; what is beyond is looked for below high
    while high <= most and a[low:high] == b[low:high]:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
