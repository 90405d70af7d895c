"""Proposals from the text itself, against a search; and common beginnings."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from engineroom.engine import PromptLookup, common_prefix

# ── what followed before ─────────────────────────────────────────────────────────────────────


def test_it_proposes_what_followed_the_same_words_the_last_time() -> None:
    lookup = PromptLookup()
    tokens = [1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 1, 2, 3]
    assert lookup.propose([(0, tokens, 3)]) == {0: [5, 6, 7]}
    assert lookup.propose([(0, tokens, 1)]) == {0: [5]}
    assert lookup.propose([(1, [1, 2, 3, 1, 2, 3], 7)]) == {1: [1, 2, 3, 1, 2, 3, 1]}
    assert lookup.propose([(0, [*tokens, 8], 3)]) == {0: []}


def test_it_proposes_nothing_from_nothing() -> None:
    lookup = PromptLookup()
    for tokens in ([1], [1, 2], [1, 2, 3], [1, 2, 3, 4]):
        assert lookup.propose([(0, tokens, 4)]) == {0: []}


def test_a_sequence_knows_nothing_of_the_request_before() -> None:
    lookup = PromptLookup()
    lookup.propose([(0, [1, 2, 3, 4, 5], 4)])
    lookup.forget(0)
    lookup.forget(3)
    assert lookup.propose([(0, [7, 1, 2, 3], 4), (1, [4, 1, 2, 3], 4)]) == {0: [], 1: []}


@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60), count=st.integers(1, 5))
def test_as_the_text_grows_it_finds_what_a_search_finds(tokens: list[int], count: int) -> None:
    lookup = PromptLookup()
    for length in range(1, len(tokens) + 1):
        so_far = tokens[:length]
        expected: list[int] = []
        for end in range(3, length):
            if so_far[end - 3 : end] == so_far[-3:]:
                expected = so_far[end : end + count]
                while len(expected) < count:  # as if it went on repeating itself
                    expected.append((so_far + expected)[end + len(expected)])
        assert lookup.propose([(5, so_far, count)]) == {5: expected}


# ── common beginnings ────────────────────────────────────────────────────────────────────────


@settings(max_examples=500)
@given(
    common=st.lists(st.integers(0, 1), max_size=70),
    a=st.lists(st.integers(0, 1), max_size=20),
    b=st.lists(st.integers(0, 1), max_size=20),
)
def test_the_common_beginning_is_that_found_one_by_one(
    common: list[int], a: list[int], b: list[int]
) -> None:
    first, second = common + a, common + b
    naive = 0
    while naive < min(len(first), len(second)) and first[naive] == second[naive]:
        naive += 1
    assert common_prefix(first, second) == naive
