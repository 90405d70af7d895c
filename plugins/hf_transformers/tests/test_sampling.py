"""Sampling, against the contract's order written down once more in double precision."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from numpy.typing import NDArray

from engineroom import GenerationParams, InferenceError
from engineroom.engine import Sampler, SamplerState
from engineroom_hf_transformers import sampling
from engineroom_hf_transformers.sampling import choose, logprobs_of

Row = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Rows of logits. Sizes around the first guess of how many have to be sorted.
SIZES = st.sampled_from([2, 3, 5, 40, 255, 256, 257, 1000, 2049]) | st.integers(2, 3000)
SEEDS = st.integers(0, 2**32 - 1)
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


def row_of(size: int, seed: int, kind: str) -> Row:
    random = np.random.default_rng(seed)
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
    return row.astype(np.float32)


KINDS = st.sampled_from(["usual", "flat", "ties", "extreme", "impossible", "one"])
rows = st.builds(row_of, SIZES, SEEDS, KINDS)
TEMPERATURES = st.floats(0.05, 2.0) | st.sampled_from([0.7, 1.0]) | st.none()
TOP_K = st.none() | st.integers(0, 3001) | st.integers(2, 50)
SHARES = st.none() | st.floats(0.0, 1.0) | st.sampled_from([0.0, 0.5, 0.9, 0.999999, 1.0])
MIN_P = st.none() | st.floats(0.0, 1.0) | st.sampled_from([0.0, 1e-30, 0.05, 1.0])


def state(prompt: tuple[int, ...] = (), /, *, seed: int | None = 1, **params: Any) -> SamplerState:
    return SamplerState(GenerationParams(seed=seed, **params), prompt)


def sample(row: Row | list[float], found: SamplerState) -> int:
    (token,) = choose(torch.tensor(np.asarray(row, np.float32))[None], [found])
    assert token is not None
    return token


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
        likely = likely[likely >= params.min_p * (1 - slack) * likely[0]]
    return len(likely)


class Fixed:
    """A generator that gives one number."""

    def __init__(self, number: float) -> None:
        self._number = number

    def random(self) -> float:
        return self._number


ALMOST_ONE = float(np.nextafter(1.0, 0.0))


@settings(deadline=None, max_examples=300)
@example(
    row=row_of(3000, 0, "flat"), temperature=1.0, top_k=None, top_p=0.9, min_p=None, number=0.99
)
@example(
    row=row_of(3, 3174696, "extreme"),
    temperature=None,
    top_k=None,
    top_p=0.0,
    min_p=None,
    number=0.0,
)
@example(
    row=row_of(2049, 0, "ties"), temperature=None, top_k=None, top_p=0.0, min_p=None, number=0.0
)
@example(
    row=row_of(3000, 0, "ties"), temperature=1.0, top_k=300, top_p=None, min_p=None, number=0.999
)
@given(
    row=rows,
    temperature=TEMPERATURES,
    top_k=TOP_K,
    top_p=SHARES,
    min_p=MIN_P,
    number=st.floats(0.0, ALMOST_ONE) | st.sampled_from([0.0, ALMOST_ONE]),
)
def test_a_draw_falls_where_the_contract_puts_it(
    row: Row,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    number: float,
) -> None:
    """Of the tokens that are left, likeliest first, the one that the number points at."""
    params = GenerationParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = SamplerState(params, ())
    assume(not params.greedy and found.truncates)  # else tokens race
    found._random = Fixed(number)  # type: ignore[assignment]
    token = sample(row, found)

    likely = probabilities(row.astype(np.float64), temperature)
    # What single precision cannot tell from nothing is nothing.
    likely = np.where(likely < SMALLEST * likely.max(), 0.0, likely)
    order = np.argsort(-likely, kind="stable")
    counts = {kept(likely, params, slack) for slack in (-1e-5, 0.0, 1e-5)}
    assume(not any(abs(a - b) > 0 for a in counts for b in counts))  # rounding decides
    left = likely[order[: counts.pop()]]
    first = last = int(np.flatnonzero(order == token)[0])
    # Among tokens that differ by less than single precision tells, rounding decides the order.
    near = np.abs(likely[order] - likely[token]) <= 1e-6 * likely[token]
    if (likely[order][near] != likely[token]).any():
        first, last = (int(place) for place in np.flatnonzero(near)[[0, -1]])
    assert first < len(left)
    last = min(last, len(left) - 1)
    cumulative = np.cumsum(left)
    # Single precision has a relative error in each weight.
    error = 1e-4 * cumulative[-1] + left[last]
    target = number * cumulative[-1]
    assert cumulative[first] - left[first] - error <= target <= cumulative[last] + error


@settings(deadline=None, max_examples=200)
@given(
    row=rows,
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
    found = SamplerState(params, prompt)
    # Neighbours of other kinds, which must not matter, in the same batch.
    random = np.random.default_rng(row.size)
    neighbour = random.normal(0, 1, row.size).astype(np.float32)
    beside = state((0,), temperature=1.0, repetition_penalty=1.7, logit_bias={1: 4.0}, top_k=3)
    generated: list[int] = []
    for _ in range(4):
        expected = adjusted(row, params, prompt, generated)
        # What is less than any number of single precision is its least one.
        expected = np.where(np.isinf(expected), expected, np.maximum(expected, -LARGEST))
        logits = torch.tensor(np.stack([neighbour, row]))
        before = logits.clone()
        _, token = choose(logits, [beside, found])
        assert torch.equal(logits, before)
        assert token is not None
        # Greedy takes the largest. What single precision cannot tell apart may be either one:
        # its error is a share of the number, and of what was added to and taken from it.
        error = 1e-6 * (abs(expected.max()) + 100.0)
        assert expected[token] >= expected.max() - error
        generated.append(token)


@example(row=np.array([0.0, -1.0], np.float32))
@settings(max_examples=60, deadline=None)
@given(row=rows)
def test_any_row_gives_a_token_that_is_possible(row: Row) -> None:
    found = [
        state((0, 1), **params)
        for params in (
            {"temperature": 1e-45},
            {"temperature": 1e-300},
            {"temperature": 0.01, "top_k": 5},
            {"temperature": 2.0, "top_p": 0.99},
            {"temperature": 2.0, "min_p": 1e-300},
            {"temperature": 1.0},
            {"temperature": 1.0, "repetition_penalty": 1e308},
            {"temperature": 0.0, "repetition_penalty": 1e308},
        )
    ]
    logits = torch.tensor(row).expand(len(found), -1)
    for _ in range(3):
        for token in choose(logits, found):
            assert token is not None
            assert 0 <= token < row.size
            assert row[token] > -np.inf


def test_the_coldest_sampling_is_greedy() -> None:
    found = state(temperature=1e-30)
    assert {sample([1.0, 5.0, 4.999, -3.0], found) for _ in range(50)} == {1}


# ── nonsense ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "bad",
    [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3, [math.nan] * 3],
    ids=str,
)
def test_a_row_without_numbers_gives_nothing_and_its_neighbours_get_theirs(
    bad: list[float],
) -> None:
    good = [0.0, 5.0, 1.0]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.01},
        {"temperature": 0.01, "top_k": 2},
        {"temperature": 0.01, "top_p": 0.9},
        {"temperature": 0.0, "logit_bias": {2: 1.0}, "repetition_penalty": 1.2},
    ]
    found = [state((), **kind) for kind in kinds for _ in range(2)]
    tokens = choose(torch.tensor([bad, good] * len(kinds)), found)
    assert tokens == [None, 1] * len(kinds)
    assert all(not row.counts for row in found[::2])


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
    found = state(seed=None, **params)
    for _ in range(50):
        row = random.normal(0, 0.001, 1000).astype(np.float32)  # all are nearly as likely
        assert sample(row, found) == row.argmax()


def test_of_equals_greedy_takes_the_first() -> None:
    assert sample([1.0, 3.0, 0.0, 3.0], state(temperature=0)) == 1


def test_greedy_takes_the_likeliest_after_bias_and_penalties() -> None:
    row = [3.0, 2.5, 2.0, -9.0]
    assert sample(row, state(temperature=0)) == 0
    assert sample(row, state(temperature=0, logit_bias={3: 100.0})) == 3
    assert sample(row, state(temperature=0, logit_bias={0: -100.0})) == 1
    assert sample(row, state((0,), temperature=0, repetition_penalty=1.5)) == 1


def test_a_bias_comes_before_the_repetition_penalty() -> None:
    # (2 + 1) / 2 is less than 1.8; the other way round, 2 / 2 + 1 would be more.
    found = state((0,), temperature=0, repetition_penalty=2.0, logit_bias={0: 1.0})
    assert sample([2.0, 1.8, 0.0], found) == 1


def test_penalties_come_before_temperature() -> None:
    # Taken from the logit of 4: as likely as the other. Taken after it was divided: never drawn.
    found = state(temperature=0.1, presence_penalty=2.0)
    found.take(0)
    draws = Counter()
    for _ in range(200):
        found.counts = Counter({0: 1})
        draws[sample([4.0, 2.0], found)] += 1
    assert 60 < draws[0] < 140


# ── penalties ───────────────────────────────────────────────────────────────────────────────────


def test_the_repetition_penalty_counts_the_prompt() -> None:
    row = [1.0, 0.9, -5.0]
    assert sample(row, state((), temperature=0, repetition_penalty=2.0)) == 0
    assert sample(row, state((0, 0), temperature=0, repetition_penalty=2.0)) == 1


def test_the_repetition_penalty_counts_once_however_often_a_token_was_there() -> None:
    found = state((0, 0, 0), temperature=0, repetition_penalty=2.0)
    assert [sample([8.0, 3.0], found) for _ in range(4)] == [0, 0, 0, 0]  # 4, never 1


def test_the_repetition_penalty_makes_negative_logits_smaller() -> None:
    assert sample([-1.0, -1.5], state((0,), temperature=0, repetition_penalty=2.0)) == 1


def test_the_repetition_penalty_counts_generated_tokens() -> None:
    found = state(temperature=0, repetition_penalty=2.0)
    assert [sample([4.0, 3.0, 2.5], found) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_presence_and_frequency_do_not_count_the_prompt(name: str) -> None:
    found = state((0, 0, 0), temperature=0, **{name: 2.0})
    assert [sample([1.0, 0.0], found) for _ in range(2)] == [0, 1]


def test_presence_counts_once_and_frequency_each_time() -> None:
    once = state(temperature=0, presence_penalty=2.0)
    assert [sample([5.0, 2.5], once) for _ in range(4)] == [0, 0, 0, 0]
    each = state(temperature=0, frequency_penalty=2.0)
    # 5, 3, then 1 against 2.5, which then has 0.5.
    assert [sample([5.0, 2.5], each) for _ in range(4)] == [0, 0, 1, 0]


def test_negative_penalties_ask_for_repetition() -> None:
    found = state(temperature=0, frequency_penalty=-1.0)
    assert sample([1.0, 0.9], found) == 0
    assert sample([1.0, 1.5], found) == 0  # 1 + 1


# ── distributions ───────────────────────────────────────────────────────────────────────────────


def unlikely(counts: Counter[int], expected: dict[int, float]) -> float:
    """Pearson's chi-square, in standard deviations from its mean."""
    draws = sum(counts.values())
    assert set(counts) <= set(expected)
    statistic = sum(
        (counts[token] - draws * share) ** 2 / (draws * share) for token, share in expected.items()
    )
    freedom = max(1, len(expected) - 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


def warped(row: Row, **params: Any) -> dict[int, float]:
    """What Transformers' own warpers leave of a row, in the order of the contract."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.tensor(row)[None]
    ids = torch.zeros((1, 0), dtype=torch.long)
    if params.get("temperature") is not None:
        logits = TemperatureLogitsWarper(params["temperature"])(ids, logits)
    if params.get("top_k"):
        logits = TopKLogitsWarper(params["top_k"])(ids, logits)
    if params.get("top_p") is not None:
        logits = TopPLogitsWarper(params["top_p"])(ids, logits)
    if params.get("min_p") is not None:
        logits = MinPLogitsWarper(params["min_p"])(ids, logits)
    shares = logits.double().softmax(-1)[0].tolist()
    return {token: share for token, share in enumerate(shares) if share > 0}


DISTRIBUTIONS: list[dict[str, Any]] = [
    {"temperature": None},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_draws_follow_the_distribution_of_transformers_warpers(
    params: dict[str, Any], seed: int
) -> None:
    row = np.array([2.0, -1.0, 0.5, 1.9, -0.5, 1.0, 0.0, -2.0], np.float32)
    expected = warped(row, **params)
    # Each draw is a row of one batch; the rows share a generator, as one request's steps do.
    found = state(seed=seed, **params)
    counts = Counter(
        token
        for _ in range(8)
        for token in choose(torch.tensor(row).expand(500, -1), [found] * 500)
    )
    assert unlikely(counts, expected) < 5  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.95}])
def test_draws_from_a_wide_vocabulary_follow_the_distribution(
    params: dict[str, Any], seed: int
) -> None:
    size = 5000
    places = [0, 1, 255, 256, 257, 2047, 2048, 4998, 4999]
    row = np.full(size, -np.inf, np.float32)
    row[places] = np.linspace(-1, 1, len(places), dtype=np.float32)
    found = state(seed=seed, **params)
    counts = Counter(
        token
        for _ in range(40)
        for token in choose(torch.tensor(row).expand(100, -1), [found] * 100)
    )
    assert unlikely(counts, warped(row, **params)) < 5  # type: ignore[arg-type]


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
        found = state(temperature=1.0, **params)
        found._random = Fixed(number)  # type: ignore[assignment]
        assert sample(row, found) in allowed


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)])
@pytest.mark.parametrize("top_k", [0, 4])
def test_top_p_keeps_no_more_than_it_needs(top_p: float, count: int, top_k: int) -> None:
    row = np.zeros(8, np.float32)
    row[4:] = -np.inf  # four are equally likely
    params = {"temperature": 1.0, "top_p": top_p, "top_k": top_k}
    draws = {sample(row, state(seed=seed, **params)) for seed in range(60)}
    assert draws == set(range(count))  # of equals those with the lower ids


@pytest.mark.parametrize("kind", ["usual", "flat", "ties"])
def test_how_many_are_sorted_first_changes_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = torch.tensor(row_of(3000, 4, kind))
    params: list[dict[str, Any]] = [
        {"top_p": 0.5},
        {"top_p": 0.99},
        {"min_p": 0.3},
        {"min_p": 1e-4},
        {"top_k": 20},
        {"top_k": 1500, "top_p": 0.7},
        {"top_p": 0.999, "min_p": 0.01},
    ]

    def draws() -> list[list[int | None]]:
        found = [state(seed=i, temperature=0.9, **p) for i, p in enumerate(params)]
        return [choose(row.expand(len(found), -1), found) for _ in range(30)]

    expected = draws()
    for guess in (1, 7, 3000):
        monkeypatch.setattr(sampling, "_FIRST_GUESS", guess)
        assert draws() == expected


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
    first, second = SamplerState(nothing, [1, 2]), SamplerState(neutral, [1, 2])
    assert not first.truncates
    assert not first.touches
    assert [sample(row, first) for _ in range(100)] == [sample(row, second) for _ in range(100)]


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────

OTHERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_p": 0.99},
    {"top_k": 700},
    {"min_p": 1e-6},
    {"repetition_penalty": 1.3, "logit_bias": {3: 5.0}},
    {},
]


@pytest.mark.parametrize("kind", ["usual", "ties", "half"])
@pytest.mark.parametrize(
    "params", [{}, {"top_k": 20}, {"top_k": 100}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str
)
def test_a_seed_gives_the_same_draws_whoever_else_draws(params: dict[str, Any], kind: str) -> None:
    row = row_of(2000, 3, kind)
    if kind == "half":  # what a model in half precision computes: many are equal
        row = torch.tensor(row).bfloat16().float().numpy()
    neighbour = row_of(2000, 4, "flat")

    def new(seed: int) -> SamplerState:
        return state(seed=seed, **({"temperature": 1.0} | params))

    alone = new(9)
    expected = [sample(row, alone) for _ in range(40)]
    for other in OTHERS:
        found, beside = new(9), state(seed=None, **({"temperature": 1.0} | other))
        logits = torch.tensor(np.stack([neighbour, row]))
        assert [choose(logits, [beside, found])[1] for _ in range(40)] == expected, other
    another = new(10)
    assert [sample(row, another) for _ in range(40)] != expected


@pytest.mark.parametrize("kind", ["usual", "flat", "ties", "impossible", "one"])
def test_a_seed_draws_the_same_tokens_in_numpy_and_in_torch(kind: str) -> None:
    row = row_of(3000, 6, kind)
    params: list[dict[str, Any]] = [
        {},
        {"temperature": 0.3},
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"top_k": 20},
        {"top_k": 700, "top_p": 0.7},
        {"top_p": 0.95, "presence_penalty": 0.5},
        {"min_p": 0.02, "frequency_penalty": 0.25, "logit_bias": {3: 5.0, 2999: 4.0}},
        {"top_p": 0.999, "min_p": 1e-4, "temperature": 1.7},
    ]
    asked = [GenerationParams(seed=seed, **given) for seed, given in enumerate(params)]
    in_torch = [SamplerState(each, (1, 2)) for each in asked]
    in_numpy = [Sampler(each, (1, 2)) for each in asked]
    for _ in range(60):
        expected = choose(torch.tensor(row).expand(len(asked), -1), in_torch)
        assert [one.sample(row) for one in in_numpy] == expected


def test_without_a_seed_no_two_requests_draw_the_same() -> None:
    row = np.zeros(3000, np.float32)
    draws = {
        tuple(sample(row, found) for _ in range(8))
        for found in (state(seed=None, temperature=1.0) for _ in range(4))
    }
    assert len(draws) == 4


def test_the_largest_seed_is_a_seed() -> None:
    row = np.zeros(64, np.float32)
    a, b = (state(seed=2**63 - 1, temperature=1.0) for _ in range(2))
    assert [sample(row, a) for _ in range(9)] == [sample(row, b) for _ in range(9)]


# ── log probabilities ───────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(row=rows, counts=st.lists(st.integers(0, 20), min_size=1, max_size=3), place=SEEDS)
def test_log_probabilities_are_those_of_the_model(row: Row, counts: list[int], place: int) -> None:
    token = place % row.size
    found = logprobs_of(torch.tensor(row).expand(len(counts), -1), [token] * len(counts), counts)
    wide = row.astype(np.float64)
    expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    for (own, best), count in zip(found, counts, strict=True):
        assert own == pytest.approx(expected[token], rel=1e-5, abs=1e-4)
        assert len(best) == min(count, row.size)
        assert len({i for i, _ in best}) == len(best)
        values = [value for _, value in best]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(np.sort(expected)[::-1][: len(best)], rel=1e-5, abs=1e-4)
        assert [expected[i] for i, _ in best] == pytest.approx(values, rel=1e-5, abs=1e-4)


def test_log_probabilities_add_up_to_one() -> None:
    ((_, best),) = logprobs_of(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), [0], [4])
    assert [i for i, _ in best] == [3, 2, 1, 0]
    assert sum(math.exp(value) for _, value in best) == pytest.approx(1.0)


# ── constraints ──────────────────────────────────────────────────────────────────────────────────


class FakeConstraint:
    """Some tokens are always allowed, and no others."""

    def __init__(self, allowed: NDArray[np.bool_]) -> None:
        self._allowed = allowed
        self.asked: list[int] = []

    def allows(self, token: int) -> bool:
        return bool(self._allowed[token])

    def allowed(self) -> NDArray[np.bool_]:
        return self._allowed.copy()

    def take(self, token: int) -> None:
        assert self._allowed[token]
        self.asked.append(token)


@given(
    size=st.integers(2, 600),
    kind=st.sampled_from(["usual", "flat", "ties"]),
    seeds=st.lists(SEEDS, min_size=3, max_size=3),
    share=st.sampled_from([0.02, 0.3, 0.9]),
    cut=st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}]),
)
@settings(max_examples=60)
def test_constrained_draws_are_the_same_in_numpy_and_in_torch(
    size: int, kind: str, seeds: list[int], share: float, cut: dict[str, Any]
) -> None:
    found = [row_of(size, seed, kind) for seed in seeds]
    masks = [np.random.default_rng(seed).random(size) < share for seed in seeds]
    for mask, seed in zip(masks, seeds, strict=True):
        mask[seed % size] = True
    asked = [GenerationParams(**{"temperature": 1.0, **cut, "seed": seed}) for seed in seeds]
    limits: list[Any] = [FakeConstraint(masks[0]), None, FakeConstraint(masks[2])]
    others: list[Any] = [FakeConstraint(masks[0]), None, FakeConstraint(masks[2])]
    in_torch = [SamplerState(p, (), c) for p, c in zip(asked, limits, strict=True)]
    in_numpy = [Sampler(p, (), c) for p, c in zip(asked, others, strict=True)]
    before = np.array(found)
    for _ in range(4):
        expected = [one.sample(row) for one, row in zip(in_numpy, found, strict=True)]
        assert choose(torch.tensor(np.array(found)), in_torch) == expected
        assert masks[0][expected[0]] and masks[2][expected[2]]
    assert np.array_equal(before, np.array(found))
    assert limits[0].asked == others[0].asked


def test_a_constraint_that_allows_nothing_ends_its_row_alone() -> None:
    class Nothing(FakeConstraint):
        def allowed(self) -> NDArray[np.bool_]:
            raise InferenceError("nothing may follow")

    for params in ({}, {"top_k": 3}, {"temperature": 0.0}):
        row = row_of(40, 1, "usual")
        rows = [
            SamplerState(GenerationParams(seed=1, **params), (), Nothing(np.zeros(40, bool))),  # type: ignore[arg-type]
            state(**params),
        ]
        refused, chosen = choose(torch.tensor(np.array([row, row])), rows)
        assert isinstance(refused, InferenceError)
        assert chosen == sample(row, state(**params))
