"""Steps beside decoding requests take no longer, the further on in a prompt they read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st
from llama_benches import ask

from engineroom_llamacpp import context as context_module, engine as engine_module
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.pace import PromptPace

DECODING = 20.0


class Machine:
    """A made-up machine, on which a token takes 1, and ``rise`` for each that comes before it."""

    def __init__(self, rise: float) -> None:
        self.rise = rise

    def takes(self, position: int, count: int) -> float:
        return count * (1 + self.rise * (position + count / 2))


def read(
    pace: PromptPace, machine: Machine, tokens: int, start: int = 0
) -> list[tuple[int, float]]:
    """Read a prompt beside decoding requests; the sizes of the steps, and what they took."""
    steps = []
    while start < tokens:
        pace.begin()
        count = pace.most(start, tokens - start)
        pace.add(start, count)
        took = machine.takes(start, count) + DECODING
        pace.end(took, decoding=True)
        steps.append((count, took))
        start += count
    return steps


def decode(pace: PromptPace, seconds: float = DECODING) -> None:
    pace.begin()
    pace.end(seconds, decoding=True)


@pytest.mark.parametrize("masked", [0.1, 1.0])
def test_beside_what_others_have_a_step_takes_no_longer(masked: float) -> None:
    pace, machine, others = PromptPace(128, masked), Machine(1 / 900), 8000
    decode(pace)
    read(pace, machine, 1500)
    took = []
    for start in range(0, 1500, 16):
        pace.begin()
        place = pace.place(start, start + others)
        assert place == start + int(masked * others)
        count = pace.most(place, 1500 - start)
        took += [machine.takes(place, count)] if count > 16 else []
    assert max(took, default=0.0) <= machine.takes(0, 128) + 1e-6


@pytest.mark.parametrize("rise", [1 / 4000, 1 / 900, 1 / 200])
def test_once_learnt_no_step_takes_longer_than_a_chunk_at_the_beginning(rise: float) -> None:
    pace, machine = PromptPace(128), Machine(rise)
    decode(pace)
    first = read(pace, machine, 2000)
    whole = machine.takes(0, 128) + DECODING
    assert first[0] == (128, whole)
    # What it learns from: two chunks, and none of the others takes longer than the second.
    assert max(took for _, took in first) <= first[1][1] + 1e-6
    again = read(pace, machine, 2000)
    # 16 tokens are read whatever they take: here behind 2,000 others.
    assert max(took for count, took in again if count > 16) <= whole + 1e-6
    assert all(a >= b for (a, _), (b, _) in pairwise(again[:-1]))
    # It does not dawdle either: but for rounding to 16, steps take as long as they may.
    assert all(machine.takes(0, 128) / took < 1.45 for count, took in again[:-1] if count > 32)


def test_where_later_tokens_are_as_cheap_all_chunks_are_whole() -> None:
    pace = PromptPace(100)
    decode(pace)
    assert [count for count, _ in read(pace, Machine(0.0), 350)] == [100, 100, 100, 50]


def test_a_prompt_that_begins_further_on_gets_fewer_at_once() -> None:
    pace, machine = PromptPace(128), Machine(1 / 500)
    decode(pace)
    read(pace, machine, 1000)
    ((count, took), *_) = read(pace, machine, 2000, start=1000)
    assert 32 <= count <= 48
    assert took <= machine.takes(0, 128) + DECODING


def test_a_stall_is_soon_forgotten() -> None:
    pace, machine = PromptPace(128), Machine(1 / 900)
    decode(pace)
    before = [count for count, _ in read(pace, machine, 1000)]
    before = [count for count, _ in read(pace, machine, 1000)]
    pace.begin()
    pace.add(900, 64)
    pace.end(100 * machine.takes(900, 64), decoding=True)
    decode(pace, 100 * DECODING)
    assert min(count for count, _ in read(pace, machine, 1000)[:-1]) >= 32
    for _ in range(20):
        decode(pace)
    for _ in range(5):
        after = [count for count, _ in read(pace, machine, 1000)]
    assert after == pytest.approx(before, abs=16)


def test_what_is_read_alone_is_no_measure() -> None:
    pace = PromptPace(128)
    decode(pace)
    for position, seconds in ((0, 1.0), (512, 900.0), (1024, 5000.0)):
        pace.begin()
        pace.add(position, 512)
        pace.end(seconds, decoding=False)
    pace.begin()
    assert pace.most(1024, 500) == 128


def test_prompts_of_one_step_share_what_it_may_take() -> None:
    pace, machine = PromptPace(128), Machine(1 / 900)
    decode(pace)
    read(pace, machine, 1000)
    pace.begin()
    assert pace.most(0, 40) == 40
    pace.add(0, 40)
    second = pace.most(0, 500)
    assert 64 <= second <= 88
    pace.add(0, second)
    assert pace.most(900, 500) < 16


def test_a_machine_without_a_clock_to_speak_of() -> None:
    pace = PromptPace(128)
    for _ in range(10):
        pace.begin()
        pace.add(0, pace.most(0, 500))
        pace.end(0.0, decoding=True)
    assert read(pace, Machine(1 / 900), 300)[0][0] == 128


@given(
    chunk=st.integers(1, 300),
    steps=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 5000)), max_size=4),
            st.floats(0, 1e4),
            st.booleans(),
        ),
        max_size=40,
    ),
)
def test_whatever_steps_take_a_prompt_goes_on_and_never_by_more_than_a_chunk(
    chunk: int, steps: list[tuple[list[tuple[int, int]], float, bool]]
) -> None:
    pace = PromptPace(chunk)
    for prompts, seconds, decoding in steps:
        pace.begin()
        total = 0
        for number, (position, wanted) in enumerate(prompts):
            count = pace.most(position, wanted)
            assert 0 <= count <= wanted
            assert count > 0 or number > 0
            total += count
            if count:
                pace.add(position, count)
        assert total <= chunk
        pace.end(seconds, decoding=decoding)


async def test_the_engine_spares_decoding_requests(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_MASKED_FUSED", 0.0)  # on the made-up machine
    monkeypatch.setattr(context_module, "_TILE", 0)
    options = {"n_parallel": 2, "prefill_chunk": 64, "prefix_cache": False}
    bench = await make(n_ctx=4096, flash_attn="auto", **options)
    machine = Machine(1 / 300)
    now = 0.0
    steps: list[tuple[int, float]] = []
    compute = LlamaContext.decode

    def decode(context: LlamaContext) -> int:
        nonlocal now
        size = int(context._batch.n_tokens)
        # The prompt's tokens come last, after one of the request that decodes.
        beside = size > 1 and context._sequences[0] != context._sequences[size - 1]
        reads = size - 1 if beside else size
        took = machine.takes(int(context._positions[size - reads]), reads) if size > 1 else 1.0
        if beside and reads > 1:
            steps.append((reads, took))
        now += took
        return compute(context)

    monkeypatch.setattr(LlamaContext, "decode", decode)
    monkeypatch.setattr(engine_module, "perf_counter", lambda: now)
    decoding = bench.service.stream(ask(max_new_tokens=None))
    await anext(decoding)
    for _ in range(2):
        steps.clear()
        response = await bench.service.infer(ask("y" * 1500, max_new_tokens=1))
        assert response.prompt_tokens == 1501
    await decoding.aclose()
    assert sum(count for count, _ in steps) >= 1490
    assert steps[0][0] == 64
    assert steps[-2][0] == 16
    assert max(took for count, took in steps if count > 16) <= machine.takes(0, 64) * 1.05
    await bench.idle()


@pytest.mark.parametrize(
    ("waiting", "decoding", "most"),
    [(1, 1, 128), (1, 8, 128), (2, 8, 256), (4, 4, 1024), (7, 1, 6272)],
)
def test_where_many_prompts_wait_a_step_reads_more(waiting: int, decoding: int, most: int) -> None:
    pace = PromptPace(128)
    pace.begin(waiting, decoding)
    assert pace.most(0, 10_000) == most
    pace.add(0, most)
    assert pace.most(0, 10_000) == 0


def test_no_step_reads_less_than_a_block_while_there_is_more() -> None:
    pace, machine = PromptPace(128, least=64), Machine(1 / 20)
    decode(pace)
    assert min(count for count, _ in read(pace, machine, 3000)[:-1]) >= 64


async def test_where_attention_computes_blocks_prompts_and_answers_go_in_turn(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_ctx=4096, flash_attn="auto", n_parallel=3, prefix_cache=False)
    decoding = bench.service.stream(ask(max_new_tokens=None))
    await anext(decoding)
    steps: list[tuple[int, int]] = []
    compute = LlamaContext.decode

    def decode(context: LlamaContext) -> int:
        size = int(context._batch.n_tokens)
        steps.append((size, len(set(context._sequences[:size].tolist()))))
        return compute(context)

    monkeypatch.setattr(LlamaContext, "decode", decode)
    await bench.service.infer(ask("y" * 1000, max_new_tokens=1))
    read = [at for at, (size, _) in enumerate(steps) if size > 2]
    assert sum(steps[at][0] for at in read) == pytest.approx(1001, abs=64)
    assert all(steps[at][1] == 1 and steps[at][0] >= 64 for at in read[:-1])
    # What is left at the end is no block and needs no step of its own, but has its turn: the other
    # does not wait for two steps with tokens of the prompt.
    assert [steps[at + 1] for at in read[:-1]] == [(1, 1)] * (len(read) - 1)
    steps.clear()
    await bench.service.infer(ask("short", max_new_tokens=1))  # in one step with the other's token
    assert (7, 2) in steps
    await decoding.aclose()
    await bench.idle()
