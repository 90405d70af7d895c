"""Beam search, against a search that looks at everything, and over a made-up model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st

from engineroom.engine import Beam, Likeliest
from engineroom_vllm.beams import search

TOKENS = 4
END = 0


class MadeUpModel:
    """A table of probabilities: no model, only something that the search can be held against."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.asked: list[tuple[int, ...]] = []
        self.counts: set[int] = set()

    def logprobs(self, sequence: Sequence[int]) -> list[float]:
        state = self._seed
        for token in sequence:
            state = (state * 31 + token * 7 + 11) % 10007
        weights = [1 + (state * (place + 3) * (place + 5)) % 97 for place in range(TOKENS)]
        return [math.log(weight / sum(weights)) for weight in weights]

    async def expand(self, sequences: list[tuple[int, ...]], count: int) -> list[Likeliest]:
        self.asked += sequences
        self.counts.add(count)
        return [
            sorted(enumerate(self.logprobs(s)), key=lambda choice: -choice[1])[:count]
            for s in sequences
        ]

    def best(self, limit: int) -> float:
        """The best mean of all sequences that end, or have ``limit`` tokens."""
        found = -math.inf
        for length in range(1, limit + 1):
            for tokens in itertools.product(range(TOKENS), repeat=length):
                if END in tokens[:-1] or (tokens[-1] != END and length < limit):
                    continue
                total = sum(self.logprobs(tokens[:i])[token] for i, token in enumerate(tokens))
                found = max(found, total / length)
        return found


async def run(
    model: MadeUpModel, beams: int, limit: int, early: bool = False, least: int = 0
) -> Beam:
    return await search(
        model.expand,
        beams=beams,
        limit=limit,
        ends=frozenset({END}),
        early_stopping=early,
        least=least,
    )


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), beams=st.integers(1, 8), limit=st.integers(1, 4))
async def test_what_is_found_is_a_whole_sequence_with_its_score(
    seed: int, beams: int, limit: int
) -> None:
    model = MadeUpModel(seed)
    found = await run(model, beams, limit)
    total = sum(model.logprobs(found.tokens[:i])[t] for i, t in enumerate(found.tokens))
    assert found.score == pytest.approx(total / len(found.tokens))
    assert END not in found.tokens[:-1]
    assert found.tokens[-1] == END or len(found.tokens) == limit
    assert found.score <= model.best(limit) + 1e-9
    for token, choices in zip(found.tokens, found.choices, strict=True):
        assert token in dict(choices)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
async def test_beams_enough_for_everything_find_the_best(seed: int) -> None:
    # With as many beams as there are sequences, only the end of the search may come too soon:
    # its rule supposes that a longer sequence has no better mean.
    model = MadeUpModel(seed)
    found = await run(model, TOKENS**2, 2)
    ends = [model.logprobs(())[END]]
    assert found.score >= max(ends) - 1e-9


async def test_one_beam_of_a_model_that_never_ends_is_the_greedy_sequence() -> None:
    class Endless(MadeUpModel):
        def logprobs(self, sequence: Sequence[int]) -> list[float]:
            found = super().logprobs(sequence)
            return [-1e9, *found[1:]]

    model = Endless(5)
    tokens: list[int] = []
    for _ in range(6):
        values = model.logprobs(tokens)
        tokens.append(values.index(max(values)))
    assert list((await run(model, 1, 6)).tokens) == tokens


async def test_an_end_beyond_the_first_beams_is_not_complete() -> None:
    async def expand(sequences: list[tuple[int, ...]], count: int) -> list[Likeliest]:
        return [[(1, math.log(0.6)), (END, math.log(0.3))] for _ in sequences]

    found = await search(expand, beams=1, limit=3, ends=frozenset({END}), early_stopping=True)
    assert found.tokens == (1, 1, 1)


async def test_no_sequence_ends_before_it_has_so_many_tokens() -> None:
    async def expand(sequences: list[tuple[int, ...]], count: int) -> list[Likeliest]:
        return [[(END, math.log(0.6)), (1, math.log(0.3)), (2, math.log(0.1))] for _ in sequences]

    for least in (0, 1, 3):
        found = await search(
            expand, beams=1, limit=5, ends=frozenset({END}), early_stopping=True, least_tokens=least
        )
        assert found.tokens == (*[1] * least, END)


async def test_early_stopping_asks_no_more_than_without_it() -> None:
    for seed in range(20):
        patient, hasty = MadeUpModel(seed), MadeUpModel(seed)
        await run(patient, 2, 8)
        await run(hasty, 2, 8, early=True)
        assert len(hasty.asked) <= len(patient.asked)


async def test_enough_likeliest_tokens_are_asked_for() -> None:
    model = MadeUpModel(1)
    await run(model, 3, 2)
    assert model.counts == {6}
    await run(model, 3, 2, least=9)
    assert model.counts == {6, 9}
