"""The books of a beam search, against a search written plainly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given, settings, strategies as st

from engineroom.engine import BeamSearch

Odds = Callable[[tuple[int, ...]], Sequence[float]]


def plain_search(
    odds: Odds, beams: int, limit: int, ends: set[int], *, early: bool
) -> tuple[int, ...]:
    """Beam search as transformers documents it, with everything looked at and nothing clever."""
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    complete: list[tuple[tuple[int, ...], float]] = []
    for length in range(1, limit + 1):
        grown = [
            ((*tokens, token), score + value)
            for tokens, score in running
            for token, value in enumerate(odds(tokens))
        ]
        grown.sort(key=lambda each: -each[1])
        for place, (tokens, score) in enumerate(grown):
            if place < beams and (tokens[-1] in ends or length == limit):
                complete.append((tokens, score / length))
        complete.sort(key=lambda each: -each[1])
        del complete[beams:]
        running = [each for each in grown if each[0][-1] not in ends][:beams]
        if len(complete) == beams and (early or running[0][1] / length <= complete[-1][1]):
            break
    return complete[0][0]


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10_000),
    beams=st.integers(2, 5),
    limit=st.integers(1, 7),
    ends=st.sets(st.integers(0, 5), max_size=2),
    early=st.booleans(),
    sharp=st.sampled_from([0.3, 2.0]),
)
def test_it_finds_what_a_plain_search_finds(
    seed: int, beams: int, limit: int, ends: set[int], early: bool, sharp: float
) -> None:
    def odds(tokens: tuple[int, ...]) -> Sequence[float]:
        values = np.random.default_rng([seed, *tokens]).normal(0, sharp, 8)
        return list(values - math.log(np.exp(values).sum()))

    search = BeamSearch(beams, limit, ends.__contains__, len(ends), early_stopping=early)
    for _ in range(2):  # the second time after a restart
        while True:
            rows = []
            for beam in search.running:
                ranked = sorted(enumerate(odds(beam.tokens)), key=lambda each: -each[1])
                rows.append(ranked[: search.candidates])
            before = [beam.tokens for beam in search.running]
            if not search.advance(rows):
                break
            assert [before[b.parent] for b in search.running] == [
                b.tokens[:-1] for b in search.running
            ]
        assert search.best.tokens == plain_search(odds, beams, limit, ends, early=early)
        search.restart()
