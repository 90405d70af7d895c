"""Sampling, against the contract's order written down once more in double precision."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings, strategies as st
from numpy.typing import NDArray

from engineroom import GenerationParams
from engineroom.engine import Sampler, largest, top_logprobs
from engineroom.engine.sampling import _peak, _weights

Row = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Rows of logits. Sizes around the limits at which sampling takes another way: what it guesses
# first to be enough candidates, and the blocks in which it draws from all.
SIZES = st.sampled_from([2, 3, 5, 40, 255, 256, 257, 1023, 1024, 1025, 2048, 3000]) | st.integers(
    2, 3000
)
SEEDS = st.integers(0, 2**32 - 1)
LARGEST = float(np.finfo(np.float32).max)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    size, random = draw(SIZES), np.random.default_rng(draw(SEEDS))
    kind = draw(st.sampled_from(["usual", "flat", "ties", "extreme", "impossible", "one"]))
    row = random.normal(0, 4, size)
    if kind == "flat":
        row = random.normal(0, 0.01, size)
    elif kind == "ties":
        row = random.integers(-2, 3, size).astype(float)
    elif kind == "extreme":
        row = row * 10.0 ** random.integers(-30, 38, size)
    elif kind == "impossible":  # what a mask makes of a row; one token stays possible
        row[random.random(size) < 0.8] = -np.inf
        row[random.integers(size)] = 1.0
    elif kind == "one":
        row[random.integers(size)] = 500.0
    values = row.astype(np.float32)
    values.flags.writeable = False  # it is the library's own buffer: writing to it raises
    return values


TEMPERATURES = st.floats(0.05, 2.0) | st.sampled_from([0.7, 1.0]) | st.none()
TOP_K = st.none() | st.integers(0, 3001) | st.integers(2, 50)
SHARES = st.none() | st.floats(0.0, 1.0) | st.sampled_from([0.0, 0.5, 0.9, 0.999999, 1.0])
MIN_P = st.none() | st.floats(0.0, 1.0) | st.sampled_from([0.0, 1e-30, 0.05, 1.0])


def sampler(prompt: tuple[int, ...] = (), /, *, seed: int | None = 1, **params: Any) -> Sampler:
    return Sampler(GenerationParams(seed=seed, **params), prompt)


# ── the contract, slowly ────────────────────────────────────────────────────────────────────────


def adjusted(
    row: Row, params: GenerationParams, prompt: list[int], generated: list[int]
) -> Doubles:
    """Bias, then penalties."""
    logits = row.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    penalty = params.repetition_penalty or 1.0
    for token in {*prompt, *generated}:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, count in Counter(generated).items():
        logits[token] -= (params.presence_penalty or 0.0) + count * (
            params.frequency_penalty or 0.0
        )
    return logits


def probabilities(logits: Doubles, temperature: float | None) -> Doubles:
    logits = logits / (1.0 if temperature is None else temperature)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def kept(likely: Doubles, params: GenerationParams, slack: float) -> int:
    """How many of the likeliest tokens top_k, top_p and min_p leave, one after the other.

    :param slack: what rounding may make of the two limits.
    """
    likely = np.sort(likely)[::-1]
    if params.top_k:
        likely = likely[: params.top_k]
        likely = likely / likely.sum()
    if params.top_p is not None and params.top_p < 1.0:
        before = np.cumsum(likely) - likely
        likely = likely[: max(1, int((before < params.top_p + slack).sum()))]
    if params.min_p:
        least = params.min_p * (1 - slack)
        if least < 1e-37:  # single precision knows no such weights, or hardly
            least = 1e-37 if slack < 0 else 0.0
        likely = likely[likely >= least * likely[0]]
    return len(likely)


def distribution(found: Sampler, row: Row) -> tuple[NDArray[np.int64], Doubles]:
    """Candidates and their probabilities, as the sampler is about to draw from them."""
    if not found.truncates:
        weights = _weights(row, _peak(row), found.temperature).astype(np.float64)
        ids = np.arange(row.size)
    else:
        ids, weights = found._candidates(row)
    return ids, weights / weights.sum()


@settings(deadline=None)
@example(
    row=np.array([0.0, -10.0, -200.0], np.float32),
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=1e-115,
)
@given(row=rows(), temperature=TEMPERATURES, top_k=TOP_K, top_p=SHARES, min_p=MIN_P)
def test_candidates_and_their_probabilities_are_those_of_the_contract(
    row: Row,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    params = GenerationParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assume(not params.greedy)
    ids, found = distribution(Sampler(params, ()), row)
    likely = probabilities(row.astype(np.float64), temperature)

    assert len(set(ids.tolist())) == ids.size
    assert kept(likely, params, -1e-4) <= ids.size <= kept(likely, params, 1e-4)
    # The likeliest ones, whichever of those that are equally likely ...
    best = np.sort(likely)[::-1][: ids.size]
    np.testing.assert_allclose(np.sort(likely[ids])[::-1], best, rtol=1e-3, atol=1e-30)
    # ... each as likely, among them, as it was.
    np.testing.assert_allclose(found, likely[ids] / best.sum(), rtol=1e-3, atol=1e-30)


@settings(deadline=None)
@given(
    row=rows(),
    data=st.data(),
    repetition=st.none() | st.floats(1.0, 3.0) | st.sampled_from([1e10, 3e38]),
    presence=st.none() | st.floats(-2.0, 2.0),
    frequency=st.none() | st.floats(-2.0, 2.0),
)
def test_bias_and_penalties_are_those_of_the_contract(
    row: Row,
    data: st.DataObject,
    repetition: float | None,
    presence: float | None,
    frequency: float | None,
) -> None:
    tokens = st.integers(0, row.size - 1)
    prompt = data.draw(st.lists(tokens, max_size=6))
    bias = data.draw(st.none() | st.dictionaries(tokens, st.floats(-100.0, 100.0), max_size=4))
    params = GenerationParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    found = Sampler(params, prompt)
    generated: list[int] = []
    for _ in range(4):
        expected = adjusted(row, params, prompt, generated)
        # What is less than any number of single precision is its least one.
        expected = np.where(np.isinf(expected), expected, np.maximum(expected, -LARGEST))
        token = found.sample(row)
        # Greedy takes the largest. What single precision cannot tell apart may be either one:
        # its error is a share of the number, and of what was added to and taken from it.
        error = 1e-6 * (abs(expected.max()) + 100.0)
        assert expected[token] >= expected.max() - error
        generated.append(token)


@example(row=np.array([0.0, -1.0], np.float32))
@settings(max_examples=60, deadline=None)
@given(row=rows())
def test_any_row_gives_a_token_that_is_possible(row: Row) -> None:
    # Extreme numbers raise no warning either: those are errors here.
    for params in (
        {"temperature": 1e-45},
        {"temperature": 1e-300},
        {"temperature": 0.01, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.99},
        {"temperature": 2.0, "min_p": 1e-300},
        {"temperature": 1.0},
        {"temperature": 1.0, "repetition_penalty": 1e308},
        {"temperature": 0.0, "repetition_penalty": 1e308},
    ):
        found = sampler((0, 1), **params)
        for _ in range(3):
            token = found.sample(row)
            assert 0 <= token < row.size
            assert row[token] > -np.inf


def test_the_coldest_sampling_is_greedy() -> None:
    row = np.array([1.0, 5.0, 4.999, -3.0], np.float32)
    found = sampler(temperature=1e-30)
    assert {found.sample(row) for _ in range(50)} == {1}


# ── greedy ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"do_sample": False},
        {"top_k": 1},
        {"do_sample": False, "temperature": 2.0, "top_p": 0.5},
        {"temperature": 0.0, "do_sample": None, "min_p": 0.1},
    ],
)
def test_greedy_takes_the_likeliest(params: dict[str, Any]) -> None:
    random = np.random.default_rng(7)
    found = sampler(seed=None, **params)
    for _ in range(50):
        row = random.normal(0, 0.001, 1000).astype(np.float32)  # all are nearly as likely
        assert found.sample(row) == row.argmax()


def test_greedy_takes_the_likeliest_after_bias_and_penalties() -> None:
    row = np.array([3.0, 2.5, 2.0, -9.0], np.float32)
    assert sampler(temperature=0).sample(row) == 0
    assert sampler(temperature=0, logit_bias={3: 100.0}).sample(row) == 3
    assert sampler(temperature=0, logit_bias={0: -100.0}).sample(row) == 1
    assert sampler((0,), temperature=0, repetition_penalty=1.5).sample(row) == 1


def test_a_bias_comes_before_the_repetition_penalty() -> None:
    # (2 + 1) / 2 is less than 1.8; the other way round, 2 / 2 + 1 would be more.
    row = np.array([2.0, 1.8, 0.0], np.float32)
    found = sampler((0,), temperature=0, repetition_penalty=2.0, logit_bias={0: 1.0})
    assert found.sample(row) == 1


# ── penalties ───────────────────────────────────────────────────────────────────────────────────


def test_the_repetition_penalty_counts_the_prompt() -> None:
    row = np.array([1.0, 0.9, -5.0], np.float32)
    assert sampler((), temperature=0, repetition_penalty=2.0).sample(row) == 0
    assert sampler((0, 0), temperature=0, repetition_penalty=2.0).sample(row) == 1


def test_the_repetition_penalty_counts_once_however_often_a_token_was_there() -> None:
    row = np.array([8.0, 3.0], np.float32)
    found = sampler((0, 0, 0), temperature=0, repetition_penalty=2.0)
    assert [found.sample(row) for _ in range(4)] == [0, 0, 0, 0]  # 4, never 1


def test_the_repetition_penalty_makes_negative_logits_smaller() -> None:
    row = np.array([-1.0, -1.5], np.float32)
    assert sampler((0,), temperature=0, repetition_penalty=2.0).sample(row) == 1


def test_the_repetition_penalty_counts_generated_tokens() -> None:
    row = np.array([4.0, 3.0, 2.5], np.float32)
    found = sampler(temperature=0, repetition_penalty=2.0)
    assert [found.sample(row) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_presence_and_frequency_do_not_count_the_prompt(name: str) -> None:
    row = np.array([1.0, 0.0], np.float32)
    found = sampler((0, 0, 0), temperature=0, **{name: 2.0})
    assert [found.sample(row) for _ in range(2)] == [0, 1]


def test_presence_counts_once_and_frequency_each_time() -> None:
    row = np.array([5.0, 2.5], np.float32)
    once = sampler(temperature=0, presence_penalty=2.0)
    assert [once.sample(row) for _ in range(4)] == [0, 0, 0, 0]
    each = sampler(temperature=0, frequency_penalty=2.0)
    # 5, 3, then 1 against 2.5, which then has 0.5.
    assert [each.sample(row) for _ in range(4)] == [0, 0, 1, 0]


def test_negative_penalties_ask_for_repetition() -> None:
    row = np.array([1.0, 0.9], np.float32)
    found = sampler(temperature=0, frequency_penalty=-1.0, logit_bias={0: 0.0})
    assert found.sample(row) == 0
    row = np.array([1.0, 1.5], np.float32)
    assert found.sample(row) == 0  # 1 + 1


# ── sampling ────────────────────────────────────────────────────────────────────────────────────


def unlikely(counts: Counter[int], expected: dict[int, float]) -> float:
    """Pearson's chi-square, in standard deviations from its mean."""
    draws = sum(counts.values())
    assert set(counts) <= set(expected)
    statistic = sum(
        (counts[token] - draws * share) ** 2 / (draws * share) for token, share in expected.items()
    )
    freedom = max(1, len(expected) - 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": None},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_draws_follow_the_distribution(params: dict[str, Any], seed: int) -> None:
    row = np.array([2.0, -1.0, 0.5, 1.9, -0.5, 1.0, 0.0, -2.0], np.float32)
    likely = probabilities(row.astype(np.float64), params["temperature"])
    keep = kept(likely, GenerationParams(**params), 0.0)
    best = np.argsort(-likely)[:keep]
    expected = {int(i): float(likely[i] / likely[best].sum()) for i in best}
    found = sampler(seed=seed, **params)
    counts = Counter(found.sample(row) for _ in range(4000))
    assert unlikely(counts, expected) < 5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_draws_from_a_whole_vocabulary_follow_the_distribution(seed: int) -> None:
    # Tokens at both sides of the borders of blocks, the first and the last; one block is empty.
    size = 5000
    places = [0, 1, 1022, 1023, 1024, 1025, 2047, 2048, 4095, 4096, 4998, 4999]
    row = np.full(size, -np.inf, np.float32)
    row[places] = np.linspace(-1, 1, len(places), dtype=np.float32)
    likely = probabilities(row.astype(np.float64), 1.0)
    found = sampler(seed=seed, temperature=1.0)
    counts = Counter(found.sample(row) for _ in range(6000))
    assert unlikely(counts, {place: float(likely[place]) for place in places}) < 5


class Fixed:
    """A generator that gives one number."""

    def __init__(self, number: float) -> None:
        self._number = number

    def random(self) -> float:
        return self._number


ALMOST_ONE = float(np.nextafter(1.0, 0.0))


@settings(deadline=None)
@given(seed=SEEDS, size=SIZES)
def test_what_weighs_nothing_is_never_drawn(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    row = random.normal(0, 3, size).astype(np.float32)
    row[random.random(size) < 0.9] = -np.inf
    row[size // 2 :] = -np.inf  # whole blocks of nothing at the end
    row[0] = 0.25
    found = sampler(seed=seed, temperature=1.0)
    assert all(np.isfinite(row[found.sample(row)]) for _ in range(20))


def test_the_last_digits_of_logits_hardly_ever_change_what_a_seed_draws() -> None:
    """Beside others, a runtime computes others; unlikely tokens are many, and here 4 of 10 draws.
    Where a number pointed at a place of the cumulated likelihoods, one draw of 90 differed.
    """
    random = np.random.default_rng(5)
    row = np.concatenate((random.normal(0, 1, 30), random.normal(-8, 1, 49_000)))
    row = random.permutation(row).astype(np.float32)
    near = row + random.normal(0, 1e-5, row.size).astype(np.float32)
    one, other = sampler(seed=1, temperature=1.0), sampler(seed=1, temperature=1.0)
    tokens = [(one.sample(row), other.sample(near)) for _ in range(2000)]
    assert sum(row[a] < -4 for a, _ in tokens) > 300
    assert sum(a != b for a, b in tokens) <= 1


def test_the_width_of_a_row_does_not_change_what_comes_later() -> None:
    row = np.random.default_rng(2).normal(0, 2, 3000).astype(np.float32)
    wide = np.concatenate((row, np.full(5000, -np.inf, np.float32)))
    one, other = sampler(seed=1, temperature=1.0), sampler(seed=1, temperature=1.0)
    assert [one.sample(row) for _ in range(50)] == [other.sample(wide) for _ in range(50)]


@pytest.mark.parametrize("number", [0.0, 0.5, ALMOST_ONE])
def test_what_truncation_leaves_out_is_never_drawn(number: float) -> None:
    row = np.arange(2000, dtype=np.float32) / 100
    for params, allowed in (
        ({"top_k": 3}, {1999, 1998, 1997}),
        ({"top_p": 0.0}, {1999}),
        ({"min_p": 1.0}, {1999}),
        ({"top_k": 3, "top_p": 0.0}, {1999}),
        ({"top_k": 2, "min_p": 0.0}, {1999, 1998}),
    ):
        found = sampler(temperature=1.0, **params)
        found._random = Fixed(number)  # type: ignore[assignment]
        assert found.sample(row) in allowed


def test_a_top_p_of_zero_keeps_one() -> None:
    row = np.array([0.0, 0.1, 0.0], np.float32)
    found = sampler(temperature=2.0, top_p=0.0)
    assert {found.sample(row) for _ in range(50)} == {1}


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)])
@pytest.mark.parametrize("top_k", [0, 4])
def test_top_p_keeps_no_more_than_it_needs(top_p: float, count: int, top_k: int) -> None:
    row = np.zeros(8, np.float32)
    row[4:] = -np.inf  # four are equally likely
    ids, _ = distribution(sampler(temperature=1.0, top_p=top_p, top_k=top_k), row)
    assert (row[ids] == 0).sum() == count


def test_none_is_neutral() -> None:
    row = np.random.default_rng(3).normal(0, 2, 400).astype(np.float32)
    nothing = GenerationParams.model_validate(
        {"seed": 5} | dict.fromkeys(GenerationParams.model_fields.keys() - {"seed"})
    )
    neutral = GenerationParams(
        seed=5,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
        do_sample=True,
    )
    first, second = Sampler(nothing, [1, 2]), Sampler(neutral, [1, 2])
    assert [first.sample(row) for _ in range(100)] == [second.sample(row) for _ in range(100)]
    _, found = distribution(first, row)
    np.testing.assert_allclose(found, probabilities(row.astype(np.float64), 1.0), rtol=1e-4)


@pytest.mark.parametrize("params", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_a_seed_gives_the_same_draws_whoever_else_draws(params: dict[str, Any]) -> None:
    row = np.random.default_rng(3).normal(0, 1, 2000).astype(np.float32)

    def new(seed: int) -> Sampler:
        return sampler(seed=seed, temperature=1.0, **params)

    alone = new(9)
    expected = [alone.sample(row) for _ in range(40)]
    first, second, other = new(9), new(10), new(9)
    together = [(first.sample(row), second.sample(row)) for _ in range(40)]
    assert [a for a, _ in together] == expected
    assert [b for _, b in together] != expected
    assert [other.sample(row) for _ in range(40)] == expected
    assert len(set(expected)) > 5  # or there would have been nothing to tell


def test_without_a_seed_no_two_requests_draw_the_same() -> None:
    row = np.zeros(3000, np.float32)
    draws = {
        tuple(found.sample(row) for _ in range(8))
        for found in (sampler(seed=None, temperature=1.0) for _ in range(4))
    }
    assert len(draws) == 4


def test_the_largest_seed_is_a_seed() -> None:
    row = np.zeros(64, np.float32)
    a, b = (sampler(seed=2**63 - 1, temperature=1.0) for _ in range(2))
    assert [a.sample(row) for _ in range(9)] == [b.sample(row) for _ in range(9)]


# ── log probabilities ───────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(row=rows(), count=st.integers(0, 20), place=st.integers(0, 2999))
def test_log_probabilities_are_those_of_the_model(row: Row, count: int, place: int) -> None:
    token = place % row.size
    own, best = top_logprobs(row, token, count)
    wide = row.astype(np.float64)
    expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    assert own == pytest.approx(expected[token], rel=1e-5, abs=1e-4)
    assert len(best) == min(count, row.size)
    assert len({i for i, _ in best}) == len(best)
    values = [value for _, value in best]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(np.sort(expected)[::-1][: len(best)], rel=1e-5, abs=1e-4)
    assert [expected[i] for i, _ in best] == pytest.approx(values, rel=1e-5, abs=1e-4)


def test_log_probabilities_add_up_to_one() -> None:
    row = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    _, best = top_logprobs(row, 0, 4)
    assert [i for i, _ in best] == [3, 2, 1, 0]
    assert sum(math.exp(value) for _, value in best) == pytest.approx(1.0)


# ── the likeliest ───────────────────────────────────────────────────────────────────────────────


@given(
    values=st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 2.5]), min_size=1, max_size=40),
    data=st.data(),
)
def test_of_equals_the_lower_ids_come_first(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: -values[i])[:count]
    assert largest(np.array(values, np.float32), count).tolist() == expected


# ── constraints ──────────────────────────────────────────────────────────────────────────────────


class FakeConstraint:
    """Some tokens are always allowed, and no others."""

    def __init__(self, allowed: set[int], size: int) -> None:
        self.mask = np.zeros(size, bool)
        self.mask[list(allowed)] = True
        self.masked = 0

    def allows(self, token: int) -> bool:
        return bool(self.mask[token])

    def allowed(self) -> Any:
        self.masked += 1
        return self.mask.copy()

    def take(self, token: int) -> None:
        assert self.mask[token]


@pytest.mark.parametrize("allowed", [{0, 3, 5}, {6}, {0, 1, 2, 3, 4, 5, 6}])
def test_drawing_first_is_as_likely_to_give_each_token_as_masking_first(allowed: set[int]) -> None:
    row = np.array([1.5, 2.0, 0.1, 0.7, -1.0, 0.9, -2.0], np.float32)
    limit: Any = FakeConstraint(allowed, row.size)
    sampler = Sampler(GenerationParams(temperature=1.0, seed=5), (), limit)
    draws = 20_000
    counts = Counter(sampler.sample(row) for _ in range(draws))
    weights = np.exp(row.astype(np.float64)) * limit.mask
    expected = weights / weights.sum()
    for token, share in enumerate(expected):
        # Five standard deviations, of a seed that is always the same.
        assert abs(counts[token] / draws - share) <= 5 * math.sqrt(share / draws) + 1e-9
    refused = 1 - weights.sum() / np.exp(row.astype(np.float64)).sum()
    assert limit.masked / draws == pytest.approx(refused, abs=0.02)


def test_truncation_sees_the_masked_row() -> None:
    row = np.array([5.0, 4.0, 3.0, 2.0, 1.0], np.float32)
    for params, kept in (({"top_k": 2}, {2, 4}), ({"top_p": 0.7}, {2})):
        limit: Any = FakeConstraint({2, 4}, row.size)
        sampler = Sampler(GenerationParams(temperature=1.0, seed=5, **params), (), limit)
        assert {sampler.sample(row) for _ in range(200)} == kept


def test_the_likeliest_of_what_is_allowed_is_greedy() -> None:
    row = np.array([5.0, 4.0, 3.0, 2.0, 1.0], np.float32)
    limit: Any = FakeConstraint({3, 4}, row.size)
    assert Sampler(GenerationParams(temperature=0.0), (), limit).sample(row) == 3
    limit = FakeConstraint({0, 4}, row.size)
    assert Sampler(GenerationParams(temperature=0.0), (), limit).sample(row) == 0
    assert limit.masked == 0
