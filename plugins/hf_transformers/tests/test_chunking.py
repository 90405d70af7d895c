"""How many tokens of prompts a step reads beside requests that decode."""

from __future__ import annotations

from typing import Any

import pytest
from hf_benches import Rig, Tiny, ask, options
from hypothesis import given, strategies as st

from engineroom_hf_transformers.chunking import ReadingCost
from engineroom_hf_transformers.model import reading_cost, why_not_driven

costs = st.dictionaries(
    st.one_of(st.none(), st.integers(1, 300)), st.floats(0, 0.1), max_size=3
).map(ReadingCost)


@pytest.fixture(scope="module")
def models(tiny: Any) -> Tiny:
    return Tiny(tiny)


@given(st.one_of(st.none(), st.integers(1, 60)), st.integers(0, 100), st.integers(0, 40))
def test_each_token_pays_for_the_positions_that_it_attends_to(
    window: int | None, start: int, count: int
) -> None:
    seen = [min(place + 1, window or place + 1) for place in range(start, start + count)]
    paid = ReadingCost({window: 0.25})(start, count)
    assert paid == count + 0.25 * sum(seen)


@given(costs, st.integers(0, 5000), st.floats(0, 300))
def test_as_many_are_read_as_the_budget_has_room_for(
    cost: ReadingCost, start: int, budget: float
) -> None:
    count = cost.most(start, budget)
    assert not count or cost(start, count) <= budget
    assert cost(start, count + 1) > budget


@given(costs, st.integers(1, 300))
def test_at_the_beginning_of_a_prompt_a_chunk_is_as_large_as_was_said(
    cost: ReadingCost, chunk: int
) -> None:
    assert cost.most(0, cost(0, chunk)) == chunk


def test_beyond_the_window_chunks_stay_the_same() -> None:
    near, far = ReadingCost({16: 0.01}), ReadingCost({None: 0.01})
    budget = near(0, 64)
    assert near.most(100, budget) == near.most(4000, budget) >= 60
    assert far.most(100, far(0, 64)) > 3 * far.most(4000, far(0, 64)) > 0


@pytest.mark.parametrize(
    ("kind", "weights", "attention"),
    [
        # Of each layer: queries and outputs, keys and values, the three of the MLP, two norms;
        # and the last norm. Then heads × (key + value), twice, of both layers.
        ("llama", 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64, {None: 2 * 2 * 128}),
        # With biases for queries, keys and values; its head is not counted, tied or not.
        (
            "qwen2",
            2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64 + 128) + 64,
            {None: 2 * 2 * 128},
        ),
        # One layer looks at 16 tokens, and the other at all.
        (
            "gemma2",
            2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 4 * 64) + 64,
            {16: 2 * 128, None: 2 * 128},
        ),
    ],
)
def test_a_models_work_is_counted(
    models: Tiny, kind: str, weights: int, attention: dict[int | None, int]
) -> None:
    parts = models.parts(kind)
    assert not why_not_driven(parts, options())
    wanted = {window: work / (2 * weights) / 0.75 for window, work in attention.items()}
    assert reading_cost(parts)._attention == pytest.approx(wanted)


async def test_chunks_late_in_a_prompt_are_smaller_beside_others(models: Tiny) -> None:
    with Rig(models.parts("llama"), prefill_chunk=32) as rig:
        steps: list[tuple[int, list[Any]]] = []
        forward = rig.engine._forward
        assert forward is not None

        class Noted:
            cache, close = forward.cache, forward.close

            def __call__(self, tokens: Any, decoding: Any, spans: Any, *rest: Any) -> Any:
                steps.append((len(decoding), spans))
                return forward(tokens, decoding, spans, *rest)

        rig.engine._forward = Noted()  # type: ignore[assignment]
        tokens = [3 + (7 * i) % 290 for i in range(220)]
        await rig.answer(tokens, max_new_tokens=1)
        # Alone, a prompt is read in the largest steps that there are.
        assert [span.count for _, spans in steps for span in spans] == [128, 92]
        steps.clear()
        rig.engine._slots._reuse = False  # type: ignore[union-attr]
        decoding = rig.send(rig.tokens("hello"), ask(max_new_tokens=200))
        await decoding.mailbox.get()
        others = [list(reversed(tokens)), tokens]
        tasks = [rig.send(each, ask(max_new_tokens=1)) for each in others]
        for task in tasks:
            assert (await rig.read(task)).finish == "length"
        beside = [spans for count, spans in steps if count and spans]
        budget = rig.engine._cost(0, 32)
        work = [sum(rig.engine._cost(s.start, s.count) for s in spans) for spans in beside]
        assert all(each <= budget for each in work)
        # All but the last one uses it, as far as a token is not divided.
        dearest = 1 + max(span.end for spans in beside for span in spans) * 0.02
        assert all(each > budget - dearest for each in work[:-1])
        slot = beside[0][0].slot
        *counts, _ = [span.count for spans in beside for span in spans if span.slot == slot]
        assert counts[0] == 32
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < 20
        assert sum(span.count for spans in beside for span in spans) == 440
        rig.engine.cancel(decoding)
        await rig.idle()


async def test_a_step_reads_at_least_a_token(models: Tiny) -> None:
    with Rig(models.parts("llama"), prefill_chunk=1) as rig:
        decoding = rig.send(rig.tokens("hello"), ask(max_new_tokens=200))
        await decoding.mailbox.get()
        tokens = [3 + (7 * i) % 290 for i in range(40)]
        answer = await rig.answer(tokens, max_new_tokens=2)
        assert answer.tokens == models.reference("llama").greedy(tokens, 2)
        rig.engine.cancel(decoding)
        await rig.idle()
