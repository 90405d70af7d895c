"""Beam search over a runtime that tells the likeliest next tokens of a sequence. Pure.

It keeps the books as transformers does, so that the same weights give the same text there: of
all continuations the ``(1 + end tokens) * beams`` likeliest are looked at; those among the first
``beams`` that end are complete, with the mean log probability of their tokens for a score; the
likeliest of the others go on. Without ``early_stopping`` the search ends when the best that goes
on is worse than the worst complete one.
"""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Beam", "Expand", "search"]

Likeliest: TypeAlias = Sequence[tuple[int, float]]
Expand: TypeAlias = Callable[[list[tuple[int, ...]], int], Awaitable[list[Likeliest]]]
"""For each sequence of generated tokens its ``count`` likeliest next ones: (token, log
probability), likeliest first."""


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence of generated tokens.

    :param score: the sum of its log probabilities; of a complete one, their mean.
    :param choices: for each token the likeliest ones that it was chosen from.
    """

    tokens: tuple[int, ...]
    score: float
    choices: tuple[Likeliest, ...] = ()


async def search(
    expand: Expand,
    *,
    beams: int,
    limit: int,
    ends: frozenset[int],
    early_stopping: bool,
    least: int = 0,
) -> Beam:
    """The best sequence; its last token is one of ``ends``, or it has ``limit`` tokens.

    :param beams: sequences that are followed at one time.
    :param ends: tokens that end a sequence.
    :param early_stopping: end as soon as there are ``beams`` complete ones.
    :param least: how many likeliest tokens to ask for at least.
    """
    keep = max(2, 1 + len(ends)) * beams
    running = [Beam((), 0.0)]
    complete: list[Beam] = []
    for length in range(1, limit + 1):
        likeliest = await expand([beam.tokens for beam in running], max(keep, least))
        candidates = heapq.nlargest(
            keep,
            (
                (beam.score + logprob, -place, -rank, token)
                for place, beam in enumerate(running)
                for rank, (token, logprob) in enumerate(likeliest[place][:keep])
            ),
        )
        grown = [
            Beam(
                (*running[-place].tokens, token),
                score,
                (*running[-place].choices, likeliest[-place]),
            )
            for score, place, _, token in candidates
        ]
        last = length == limit
        complete += [
            Beam(beam.tokens, beam.score / length, beam.choices)
            for beam in grown[:beams]
            if last or beam.tokens[-1] in ends
        ]
        complete = heapq.nlargest(beams, complete, key=lambda beam: beam.score)
        running = [beam for beam in grown if beam.tokens[-1] not in ends][:beams]
        if not running:
            break
        if len(complete) == beams and (
            early_stopping or running[0].score / length <= complete[-1].score
        ):
            break
    return complete[0]
