"""Slots: which one a prompt gets, what is reused, and that nothing bad stays in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from engineroom_hf_transformers.cache import LayerShape, Slot, SlotCache, Slots

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """As engines compute."""
    with torch.inference_mode():
        yield


def shape(dtype: torch.dtype = torch.float32, *, heads: int = 2, key: int = 4) -> LayerShape:
    return LayerShape(heads=heads, key=key, value=3, dtype=dtype, device=CPU)


def cache(slots: int = 3, length: int = 64) -> SlotCache:
    return SlotCache({0: shape(), 5: shape(torch.bfloat16)}, slots, length)


def fill(store: SlotCache, slot: int, tokens: Sequence[int]) -> None:
    """As if the keys of a token were the token."""
    for layer in (0, 5):
        keys = torch.tensor(tokens, dtype=store._keys[layer].dtype)[:, None, None].expand(-1, 2, 4)
        places = slot * store.length + torch.arange(len(tokens))
        store.write(layer, places, keys, keys[..., :3])


def content(store: SlotCache, slot: int, count: int) -> list[int]:
    keys, values = store.read(0, slice(slot, slot + 1), slice(0, count))
    assert keys.shape == (1, 2, count, 4)
    assert values.shape == (1, 2, count, 3)
    assert bool((keys[..., :3] == values).all())
    return [int(x) for x in keys[0, 0, :, 0]]


# ── memory ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_cache_is_all_zeros_and_says_its_size(dtype: torch.dtype) -> None:
    store = SlotCache({0: shape(dtype)}, 3, 8)
    assert store.nbytes == 3 * 8 * 2 * (4 + 3) * dtype.itemsize
    for tensor in (store._keys[0], store._values[0]):
        assert tensor.dtype == dtype
        assert not tensor.any()
    store.close()
    assert store.nbytes == 0


def test_what_is_written_is_read_whatever_else_is_written() -> None:
    store = cache()
    fill(store, 1, range(10, 30))
    fill(store, 0, range(5))
    fill(store, 2, range(64))
    assert content(store, 1, 20) == list(range(10, 30))
    keys, _ = store.gather(0, torch.tensor([2, 0]), slice(1, 5))
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 3, 4], [1, 2, 3, 4]]
    store.copy(2, 0, 10)
    assert content(store, 0, 11) == [*range(10), 0]
    assert content(store, 1, 20) == list(range(10, 30))


def test_clearing_leaves_the_rest() -> None:
    store = cache()
    fill(store, 1, range(1, 11))
    store.clear(1, slice(4, 8))
    assert content(store, 1, 10) == [1, 2, 3, 4, 0, 0, 0, 0, 9, 10]


# ── who gets which slot ──────────────────────────────────────────────────────────────────────


def used(slots: Slots, tokens: Sequence[int]) -> Slot:
    slot, _ = slots.take(tokens)
    slots.give_back(slot, tokens)
    return slot


def test_fresh_slots_are_given_from_the_first_on() -> None:
    slots = Slots(cache(), reuse=True)
    assert [slots.take([1, 2])[0].index for _ in range(3)] == [0, 1, 2]
    assert slots.free == 0


def test_never_all_of_a_prompt_is_taken_as_computed() -> None:
    slots = Slots(cache(), reuse=True)
    used(slots, [1, 2, 3])
    slot, common = slots.take([1, 2, 3])
    assert common == 2
    slots.give_back(slot, [1, 2])
    assert slots.take([1])[1] == 0


def test_the_slot_with_the_longest_common_beginning_is_used_in_place() -> None:
    slots = Slots(cache(), reuse=True)
    a, b = slots.take([0])[0], slots.take([0])[0]
    slots.give_back(a, [1, 2, 3])
    slots.give_back(b, [1, 2, 3, 4])
    assert slots.take([1, 2, 3, 4, 5]) == (b, 4)


def test_without_reuse_nothing_is_remembered() -> None:
    slots = Slots(cache(), reuse=False)
    slot = used(slots, [1, 2, 3])
    assert slot.tokens == []
    assert slots.take([1, 2, 3, 4])[1] == 0


def test_a_slot_with_much_more_than_the_common_part_is_copied_and_kept() -> None:
    store = cache()
    slots = Slots(store, reuse=True)
    text = list(range(60))
    first = used(slots, text)
    fill(store, first.index, text)
    slot, common = slots.take([*range(20), 99])
    assert (slot is first, common) == (False, 20)
    assert content(store, slot.index, 20) == list(range(20))
    assert first.tokens == text
    assert content(store, first.index, 60) == text


def test_a_short_common_part_is_not_worth_a_copy() -> None:
    slots = Slots(cache(), reuse=True)
    first = used(slots, range(60))
    slot, common = slots.take([0, 1, 2, 99])
    assert (slot is first, common) == (False, 0)
    assert first.tokens == list(range(60))


def test_the_last_free_slot_is_used_in_place_whatever_is_lost() -> None:
    slots = Slots(cache(slots=1), reuse=True)
    first = used(slots, range(60))
    assert slots.take([0, 1, 2, 99]) == (first, 3)
    assert first.tokens == []


def test_the_beginning_of_a_busy_slot_is_copied() -> None:
    store = cache()
    slots = Slots(store, reuse=True)
    busy, _ = slots.take(list(range(40)))
    fill(store, busy.index, range(40))
    slot, common = slots.take([*range(30), 99], [(busy, list(range(40)))])
    assert slot is not busy
    assert common == 30
    assert content(store, slot.index, 30) == list(range(30))
    # Too short to copy.
    assert slots.take([0, 1, 99], [(busy, list(range(40)))])[1] == 0


def test_the_longest_unused_slot_is_given_away() -> None:
    slots = Slots(cache(), reuse=True)
    taken = [slots.take([n])[0] for n in range(3)]
    for slot in (taken[1], taken[2], taken[0]):
        slots.give_back(slot, [slot.index + 100] * 20)
    assert [slots.take([7, 7])[0].index for _ in range(3)] == [1, 2, 0]


def test_nothing_of_another_cache_scope_is_used() -> None:
    store = cache(slots=4)
    slots = Slots(store, reuse=True)
    text = list(range(40))
    idle, _ = slots.take(text, scope="one")
    slots.give_back(idle, text)
    busy, known = slots.take(text, scope="two")
    assert known == 0
    running = [(busy, text)]
    assert [slots.take(text, running, scope)[1] for scope in ("three", "two", "one")] == [0, 39, 39]


@pytest.mark.parametrize("reuse", [True, False])
def test_what_may_be_no_numbers_is_wiped_before_a_slot_is_given(reuse: bool) -> None:
    store = cache(slots=1)
    slots = Slots(store, reuse=reuse)
    slot, _ = slots.take(range(20))
    fill(store, 0, range(1, 9))
    for tensor in (*store._keys.values(), *store._values.values()):
        tensor[0, 8:20] = float("nan")
    slots.give_back(slot, list(range(1, 9)), unsound=20)
    slot, common = slots.take([*range(1, 9), 50])
    assert common == (8 if reuse else 0)
    assert slot.unsound == 0
    kept = list(range(1, 9)) if reuse else [0] * 8
    assert content(store, 0, 20) == [*kept, *[0] * 12]


@settings(max_examples=100, deadline=None)
@given(
    reuse=st.booleans(),
    slots=st.integers(1, 4),
    plan=st.lists(
        st.tuples(
            st.lists(st.integers(1, 2), min_size=1, max_size=40),  # a prompt
            st.integers(0, 40),  # how much of it gets computed
            st.integers(0, 3),  # which of the running ones ends, when there is no slot
            st.sampled_from(["", "one", "two"]),  # its cache scope
        ),
        max_size=25,
    ),
)
def test_whatever_is_taken_and_given_back_what_is_reused_is_the_prompts_own(
    reuse: bool, slots: int, plan: list[Any]
) -> None:
    store = cache(slots)
    owner = Slots(store, reuse=reuse)
    running: list[tuple[Slot, list[int]]] = []
    had: set[tuple[str, tuple[int, ...]]] = set()  # beginnings that were computed in a scope
    for prompt, computed, ends, scope in plan:
        if not owner.free:
            owner.give_back(*running.pop(ends % len(running)))
        slot, common = owner.take(prompt, running, scope)
        assert not common or (scope, tuple(prompt[:common])) in had
        assert common < len(prompt)
        assert all(slot is not other for other, _ in running)
        assert content(store, slot.index, common) == prompt[:common]
        if not reuse:
            assert common == 0
        done = prompt[: max(common, min(computed, len(prompt)))]
        fill(store, slot.index, done)
        had |= {(scope, tuple(done[:length])) for length in range(1, len(done) + 1)}
        running.append((slot, done))
        for other, tokens in running:
            assert content(store, other.index, len(tokens)) == tokens
    assert owner.free + len(running) == slots
