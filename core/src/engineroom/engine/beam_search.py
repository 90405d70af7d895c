"""The books of a beam search, over whatever tells the likeliest next tokens. Pure.

They are kept as transformers keeps them, so that the same weights give the same text there: of
all continuations the ``(1 + end tokens) * beams`` likeliest are looked at. Those among the first
``beams`` that end are complete, with the mean log probability of their tokens for a score; the
likeliest of the others go on. Without ``early_stopping`` the search ends when the best that goes
on is worse than the worst complete one.
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
    :param choices: for each token the likeliest ones that it was chosen from, if they are kept.
    """

    tokens: tuple[int, ...]
    score: float
    parent: int = 0
    choices: tuple[Likeliest, ...] = ()


class BeamSearch:
    """The search of one request, a step at a time.

    :param beams: sequences that are followed at one time; at least 1.
    :param limit: tokens that a sequence has at most; at least 1.
    :param ends: whether a token ends a sequence.
    :param end_tokens: how many tokens do.
    :param early_stopping: end as soon as there are ``beams`` complete ones.
    :param keep_choices: keep what each token was chosen from, for log probabilities.
    """

    def __init__(
        self,
        beams: int,
        limit: int,
        ends: Callable[[int], bool],
        end_tokens: int,
        *,
        early_stopping: bool,
        keep_choices: bool = False,
    ) -> None:
        self.beams = beams
        self.candidates = max(2, 1 + end_tokens) * beams
        """How many of the likeliest next tokens each beam must tell."""
        self._limit = limit
        self._ends = ends
        self._early_stopping = early_stopping
        self._keep_choices = keep_choices
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.running = [Beam((), 0.0)]
        self._complete: list[Beam] = []
        self._length = 0

    def advance(self, likeliest: Sequence[Likeliest]) -> bool:
        """Go on by a token.

        :param likeliest: for each of ``running``; more than ``candidates`` are kept as choices, and
            not looked at.
        :returns: whether the search goes on, with ``running`` as it is now.
        """
        self._length += 1
        length = self._length
        chosen = heapq.nlargest(
            self.candidates,
            (
                (beam.score + logprob, -place, -rank, token)
                for place, beam in enumerate(self.running)
                for rank, (token, logprob) in enumerate(likeliest[place][: self.candidates])
            ),
        )
        grown = [
            self._grow(-place, token, score, likeliest[-place]) for score, place, _, token in chosen
        ]
        last = length >= self._limit
        complete = self._complete + [
            Beam(beam.tokens, beam.score / length, choices=beam.choices)
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

    def _grow(self, parent: int, token: int, score: float, likeliest: Likeliest) -> Beam:
        beam = self.running[parent]
        choices = (*beam.choices, likeliest) if self._keep_choices else ()
        return Beam((*beam.tokens, token), score, parent, choices)

    @property
    def best(self) -> Beam:
        """The likeliest complete sequence, when the search has ended.

        Its last token ends it, or it has ``limit`` tokens.
        """
        return self._complete[0]
