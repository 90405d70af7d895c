"""A cache with a part for each request (``kv_unified: false``): the same texts, its own bounds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_benches import ask, move_eagerly, no_leak

from engineroom import ResourceNotAvailableError
from engineroom_llamacpp import context as context_module, layout as layout_module, moving
from engineroom_llamacpp.cells import Cells
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.layout import Layout
from engineroom_llamacpp.moving import Mover
from engineroom_llamacpp.prompt_store import PIECE
from engineroom_llamacpp.saved import SavedSequence
from engineroom_llamacpp.sequences import Sequences

Make = Callable[..., Awaitable[Any]]
TEXT = "all of this is written by someone who knows how long a prompt can become, and why. " * 4


async def test_each_request_has_its_part_and_no_more(make: Make) -> None:
    bench = await make(n_ctx=2048, n_parallel=4, kv_unified=False)
    engine = bench.engine
    assert engine.n_ctx == 512
    assert engine.sequences.count == 4
    full = await bench.service.infer(ask("x", max_new_tokens=None))
    assert (full.prompt_tokens or 0) + (full.generated_tokens or 0) == 512
    refused = await bench.service.infer(ask("x" * 600))
    assert "512" in (refused.error_message or "")
    found = await asyncio.gather(
        *(bench.service.infer(ask("x" * n, max_new_tokens=None)) for n in (100, 101, 102, 103, 104))
    )
    assert [(r.prompt_tokens or 0) + (r.generated_tokens or 0) for r in found] == [512] * 5
    assert engine.preemptions == 0
    await bench.idle()
    no_leak(engine)


async def test_what_was_read_is_copied_for_others(make: Make) -> None:
    bench = await make(n_ctx=4096, n_parallel=4, kv_unified=False)
    first = await bench.service.infer(ask(TEXT))
    again = await bench.service.infer(ask(TEXT))
    assert again.cached_prompt_tokens == first.prompt_tokens - 1
    assert again.generated_text == first.generated_text
    prompts = [f"{TEXT}{letter}" for letter in "abcd"]
    alone = [await bench.service.infer(ask(prompt)) for prompt in prompts]
    fresh = await make(n_ctx=4096, n_parallel=4, kv_unified=False)
    found = await asyncio.gather(*(fresh.service.infer(ask(prompt)) for prompt in prompts))
    assert [r.generated_text for r in found] == [r.generated_text for r in alone]
    cached = sorted(r.cached_prompt_tokens or 0 for r in found)
    assert cached[0] == 0
    assert all(count > 300 for count in cached[1:])
    await fresh.idle()
    no_leak(fresh.engine)


async def test_the_end_of_a_prompt_does_not_wait_for_another_ones_beginning(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_ctx=2048, n_parallel=4, kv_unified=False, n_batch=64, prefix_cache=False)
    steps: list[dict[int, int]] = []
    compute = LlamaContext.decode

    def decode(context: LlamaContext) -> int:
        rows = context._sequences[: int(context._batch.n_tokens)].tolist()
        steps.append({sequence: rows.count(sequence) for sequence in rows})
        return compute(context)

    monkeypatch.setattr(LlamaContext, "decode", decode)
    prompts = [letter * 150 for letter in "abcd"]
    await asyncio.gather(*(bench.service.infer(ask(p, max_new_tokens=1)) for p in prompts))
    read = dict.fromkeys(range(4), 0)
    for step in steps:
        read = {sequence: count + step.get(sequence, 0) for sequence, count in read.items()}
        # A sequence whose prompt was read may be given to the next one.
        assert len({read[sequence] % 151 > 0 for sequence in step}) == 1
    assert sum(read.values()) == 4 * 151
    assert not any(count % 151 for count in read.values())
    # Those that are short are read together.
    steps.clear()
    short = [p[:9] for p in prompts * 4]
    await asyncio.gather(*(bench.service.infer(ask(p, max_new_tokens=1)) for p in short))
    assert max(map(len, steps)) > 1
    await bench.idle()


OTHERS = [f"{i}: something else that is long enough to be moved, too; " * 5 for i in range(6)]


async def test_what_has_lost_its_part_comes_back_from_host_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_eagerly(monkeypatch)
    bench = await make(n_ctx=2048, n_parallel=2, kv_unified=False)
    store = bench.engine.mover.store
    first = await bench.service.infer(ask(TEXT))
    assert store.used == 0
    for text in OTHERS[:3]:
        await bench.service.infer(ask(text))
    assert store.used > 0
    again = await bench.service.infer(ask(TEXT))
    assert again.cached_prompt_tokens == first.prompt_tokens - 1 > 300
    assert again.generated_text == first.generated_text
    for text in OTHERS[:3]:
        await bench.service.infer(ask(text))
    longer = await bench.service.infer(ask(TEXT + first.generated_text + "and more"))
    assert longer.cached_prompt_tokens >= first.prompt_tokens // 16 * 16
    other = await bench.service.infer(ask(TEXT, cache_salt="another"))
    assert other.cached_prompt_tokens == 0
    # Only a part of what waits.
    for text in OTHERS[:3]:
        await bench.service.infer(ask(text))
    some = await bench.service.infer(ask(TEXT[:200] + "and otherwise"))
    assert 150 < some.cached_prompt_tokens < 220
    fresh = await make(n_ctx=2048, prefix_cache=False)
    expected = await fresh.service.infer(ask(TEXT[:200] + "and otherwise"))
    assert some.generated_text == expected.generated_text
    await bench.idle()
    no_leak(bench.engine)


async def test_those_that_have_started_wait_for_no_copies_but_a_share_of_the_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_eagerly(monkeypatch)
    bench = await make(n_ctx=4096, n_parallel=4, kv_unified=False)
    await asyncio.gather(*(bench.service.infer(ask(text)) for text in OTHERS[:4]))
    done: list[str] = []
    now = itertools.count()
    compute, save = LlamaContext.decode, LlamaContext.save

    def decode(context: LlamaContext) -> int:
        done.append("step")
        return compute(context)

    def copy(context: LlamaContext, *arguments: int) -> SavedSequence | None:
        done.append("copy")
        return save(context, *arguments)

    monkeypatch.setattr(LlamaContext, "decode", decode)
    monkeypatch.setattr(LlamaContext, "save", copy)
    monkeypatch.setattr(moving, "perf_counter", lambda: next(now))  # a copy takes a second
    await asyncio.gather(*(bench.service.infer(ask(text[9:])) for text in OTHERS[:4]))
    assert done.count("copy") == 4
    assert ("copy", "copy") not in itertools.pairwise(done)
    await bench.idle()
    no_leak(bench.engine)


async def test_what_comes_back_is_no_more_than_the_part_has(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_eagerly(monkeypatch)
    bench = await make(n_ctx=512, n_parallel=2, kv_unified=False)
    fresh = await make(n_ctx=512, n_parallel=1, prefix_cache=False)
    for text in (TEXT[:240], OTHERS[0][:150], OTHERS[1][:150], OTHERS[2][:150]):
        await bench.service.infer(ask(text, max_new_tokens=4))
    asked = ask(TEXT[:160] + "?" * 70, max_new_tokens=10)
    expected = await fresh.service.infer(asked)
    answer = await bench.service.infer(asked)
    assert answer.generated_text == expected.generated_text
    assert 150 < answer.cached_prompt_tokens < 170
    await bench.idle()
    no_leak(bench.engine)


async def test_those_that_come_together_each_get_it_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_eagerly(monkeypatch)
    bench = await make(n_ctx=4096, n_parallel=4, kv_unified=False)
    fresh = await make(n_ctx=4096, prefix_cache=False)
    for text in (TEXT, *OTHERS[:4]):
        await bench.service.infer(ask(text))
    prompts = [f"{TEXT}{letter} and on" for letter in "abcdef"]
    expected = [(await fresh.service.infer(ask(p))).generated_text for p in prompts]
    answers = await asyncio.gather(*(bench.service.infer(ask(p)) for p in prompts))
    assert [r.generated_text for r in answers] == expected
    assert all((r.cached_prompt_tokens or 0) > 300 for r in answers)
    await bench.idle()
    no_leak(bench.engine)


async def test_a_piece_that_has_gone_before_it_was_brought_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_eagerly(monkeypatch)
    bench = await make(n_ctx=2048, n_parallel=2, kv_unified=False)
    first = await bench.service.infer(ask(TEXT))
    for text in OTHERS[:3]:
        await bench.service.infer(ask(text))
    mover = bench.engine.mover
    look_up = Mover.look_up

    def then_the_end_goes(self: Mover, task: Any) -> None:
        look_up(self, task)
        for piece, _ in task.coming[:2]:  # the last ones
            self.store._remove(piece)

    monkeypatch.setattr(Mover, "look_up", then_the_end_goes)
    again = await bench.service.infer(ask(TEXT))
    assert again.generated_text == first.generated_text
    assert 0 < again.cached_prompt_tokens < first.prompt_tokens - 1
    assert again.cached_prompt_tokens % PIECE == 0
    assert mover.store.used > 0
    monkeypatch.setattr(Mover, "look_up", look_up)
    for text in OTHERS[:3]:
        await bench.service.infer(ask(text))
    with monkeypatch.context() as patch:  # as the other layout may have saved it
        patch.setattr(SavedSequence, "blocks", lambda _: [])
        unknown = await bench.service.infer(ask(TEXT))
    assert unknown.generated_text == first.generated_text
    assert unknown.cached_prompt_tokens == 0
    monkeypatch.setattr(LlamaContext, "restore", lambda *_: False)
    for text in OTHERS[:3]:
        await bench.service.infer(ask(text))
    third = await bench.service.infer(ask(TEXT))
    assert third.generated_text == first.generated_text
    assert third.cached_prompt_tokens == 0
    await bench.idle()
    no_leak(bench.engine)


def test_where_nothing_is_shared_a_copy_counts() -> None:
    cells = Cells(100, shared=False)
    first = cells.begin()
    cells.grow(first, 30)
    second = cells.share(first, 20)
    assert (cells.used, second.length, second.own) == (50, 20, 20)
    cells.drop(first)
    assert cells.used == 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of 256 cells are worth it."""
    monkeypatch.setattr(context_module, "_LEAST_STREAM", 256)


@pytest.mark.usefixtures("small")
async def test_a_request_that_is_too_long_for_its_part_has_the_whole(make: Make) -> None:
    bench = await make(n_ctx=1024, n_parallel=4, kv_unified="auto")
    fresh = await make(n_ctx=1024, n_parallel=1, prefix_cache=False)
    engine = bench.engine
    assert (engine.n_ctx, engine._context.unified) == (1024, False)
    prompts = [f"{letter} {TEXT}"[:100] for letter in "abc"] + [TEXT + TEXT]
    asked = [ask(prompt, max_new_tokens=120) for prompt in prompts]
    alone = [await fresh.service.infer(request) for request in asked]
    assert (await bench.service.infer(asked[0])).generated_text == alone[0].generated_text
    assert not engine._context.unified
    texts = await asyncio.gather(*(bench.service.infer(request) for request in asked))
    assert [r.generated_text for r in texts] == [r.generated_text for r in alone]
    assert engine._context.unified
    # Also one that only grows out of it, and all of the context.
    full = await bench.service.infer(ask("x", max_new_tokens=None))
    assert (full.prompt_tokens or 0) + (full.generated_tokens or 0) == 1024
    for letter in "defgh":
        await bench.service.infer(ask(letter * 100, max_new_tokens=100))
    assert (await bench.service.infer(asked[0])).generated_text == alone[0].generated_text
    assert not engine._context.unified
    await bench.idle()
    no_leak(engine)


@pytest.mark.usefixtures("small")
async def test_idle_prompts_stay_when_the_layout_changes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_eagerly(monkeypatch)
    monkeypatch.setattr(layout_module, "_PATIENCE", 0)
    monkeypatch.setattr(layout_module, "_MOST_PATIENCE", 0)
    bench = await make(n_ctx=1024, n_parallel=4, kv_unified="auto")
    engine = bench.engine
    short = TEXT[:100]
    first = await bench.service.infer(ask(short))
    for prompt, unified in ((TEXT + "!", True), ("x", False)):
        await bench.service.infer(ask(prompt))
        assert engine._context.unified == unified
        again = await bench.service.infer(ask(short))
        assert again.cached_prompt_tokens == first.prompt_tokens - 1
        assert again.generated_text == first.generated_text
    await bench.idle()
    no_leak(engine)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("first", [0, 2])
async def test_those_that_have_nearly_all_in_common_have_it_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    bench = await make(n_ctx=2048, n_parallel=8, kv_unified="auto")
    fresh = await make(n_ctx=512, n_parallel=1, prefix_cache=False)
    engine = bench.engine
    # One of them is read before, or two run when the others come.
    asked = [ask(f"{TEXT[:205]}{letter}", max_new_tokens=40) for letter in "abcdefgh"]
    alone = [(await fresh.service.infer(request)).generated_text for request in asked]
    used: list[int] = []
    decode = LlamaContext.decode

    def noted(context: LlamaContext) -> int:
        if context is engine._context and context.unified and len(engine.running) == 8:
            used.append(engine.sequences.cells.busy)
        return decode(context)

    monkeypatch.setattr(LlamaContext, "decode", noted)
    early = [asyncio.create_task(bench.service.infer(request)) for request in asked[:first]]
    while len([task for task in engine.running if task.decodes]) < first:
        await asyncio.sleep(0.001)
    assert not engine._context.unified
    late = [bench.service.infer(request) for request in asked[first:]]
    answers = await asyncio.gather(*early, *late)
    assert [r.generated_text for r in answers] == alone
    assert engine._context.unified
    assert max(used) <= 210 + 8 * 45
    await bench.idle()
    no_leak(engine)


@pytest.mark.usefixtures("small")
async def test_without_memory_for_the_other_layout_only_those_end_that_need_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_ctx=1024, n_parallel=4, kv_unified="auto")
    monkeypatch.setattr(LlamaContext, "lay_out", refuse)
    short, long = await asyncio.gather(
        bench.service.infer(ask("short", max_new_tokens=60)), bench.service.infer(ask(TEXT))
    )
    assert short.error_message is None
    assert "no memory" in (long.error_message or "")
    assert (await bench.service.infer(ask("short"))).error_message is None
    await bench.idle()
    no_leak(bench.engine)


@pytest.mark.usefixtures("small")
async def test_without_memory_for_the_whole_what_is_in_common_is_copied(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_ctx=2048, n_parallel=8, kv_unified="auto")
    tried: list[bool] = []

    def noted(context: LlamaContext, *, unified: bool) -> None:
        tried.append(unified)
        refuse(context, unified=unified)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaContext, "lay_out", noted)
        for _ in range(2):
            asked = [ask(f"{TEXT[:205]}{letter}", max_new_tokens=40) for letter in "abcdefgh"]
            answers = await asyncio.gather(*(bench.service.infer(request) for request in asked))
            assert all(r.error_message is None for r in answers)
        assert tried == [True]
    # Where it has to be, it is tried again.
    assert (await bench.service.infer(ask(TEXT))).error_message is None
    await bench.idle()
    no_leak(bench.engine)


def test_where_streams_are_too_small_soon_they_are_tried_again_later_each_time() -> None:
    class Context:
        """A fake."""

        stream, changes, unified, sequences, cells = 100, True, False, 4, 400

        def lay_out(self, *, unified: bool) -> None:
            self.unified = unified

    context: Any = Context()
    sequences = Sequences(context, 4, 400, reuse=True, shared=False)
    layout = Layout(context, sequences, 0)

    def waits() -> int:
        """Goes over to the whole; tokens until streams would do again."""
        layout.change()
        assert context.unified
        began = sequences.clock
        while not layout.is_wrong([]):
            sequences.clock += 10
        layout.change()
        return sequences.clock - began

    assert [waits() for _ in range(8)] == [200, 400, 800, 1600, 3200, 6400, 6400, 6400]
    sequences.clock += 20000
    assert waits() == 200


def refuse(context: LlamaContext, *, unified: bool) -> None:
    raise ResourceNotAvailableError("no memory")
