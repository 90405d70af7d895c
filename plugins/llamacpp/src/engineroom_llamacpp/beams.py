"""Beam search, a step at a time, over whatever tells the likeliest next tokens. Pure.

It keeps the books as transformers does, so that the same weights give the same text there: of
all continuations, those among the ``beams`` likeliest that end are complete, with the mean log
probability of their tokens for a score; the likeliest of the others go on. Without
``early_stopping`` the search ends when the best that goes on is worse than the worst complete one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Beam", "BeamSearch", "Likeliest"]

Likeliest: TypeAlias = Sequence[tuple[int, float]]
"""Next tokens and their log probabilities, likeliest first."""


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence of generated tokens.

    :param score: the sum of its log probabilities; of a complete one, their mean.
    :param parent: which of the beams before the step it continues.
    """

    tokens: tuple[int, ...]
    score: float
    parent: int = 0


class BeamSearch:
    """The search of one request.

    :param beams: sequences that are followed at one time.
    :param limit: tokens that a sequence has at most; at least 1.
    :param ends: whether a token ends a sequence.
    :param end_tokens: how many tokens do.
    :param early_stopping: end as soon as there are ``beams`` complete ones.
    """

    def __init__(
        self,
        beams: int,
        limit: int,
        ends: Callable[[int], bool],
        end_tokens: int,
        *,
        early_stopping: bool,
    ) -> None:
        self.beams = beams
        self.candidates = max(2, 1 + end_tokens) * beams
        """How many of the likeliest next tokens each beam must tell."""
        self._limit = limit
        self._ends = ends
        self._early_stopping = early_stopping
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.running = [Beam((), 0.0)]
        self._complete: list[Beam] = []
        self._length = 0

    def advance(self, likeliest: Sequence[Likeliest]) -> bool:
        """Go on by a token.

        :param likeliest: for each of ``running``.
        :returns: whether the search goes on, with ``running`` as it is now.
        """
        self._length += 1
        length = self._length
        chosen = heapq.nlargest(
            self.candidates,
            (
                (beam.score + logprob, -place, -rank, token)
                for place, beam in enumerate(self.running)
                for rank, (token, logprob) in enumerate(likeliest[place])
            ),
        )
        grown = [
            Beam((*self.running[-place].tokens, token), score, -place)
            for score, place, _, token in chosen
        ]
        last = length >= self._limit
        complete = self._complete + [
            Beam(beam.tokens, beam.score / length)
            for beam in grown[: self.beams]
            if last or self._ends(beam.tokens[-1])
        ]
        self._complete = heapq.nlargest(self.beams, complete, key=lambda beam: beam.score)
        self.running = [beam for beam in grown if not self._ends(beam.tokens[-1])][: self.beams]
        if last or not self.running:
            return False
        enough = len(self._complete) == self.beams
        worst = self._complete[-1].score if enough else 0.0
        return not (enough and (self._early_stopping or self.running[0].score / length <= worst))

    @property
    def best(self) -> tuple[int, ...]:
        """The likeliest complete sequence, when the search has ended."""
        return self._complete[0].tokens
