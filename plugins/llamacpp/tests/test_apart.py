"""A cache with a part for each request (``kv_unified: false``): the same texts, its own bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_benches import ask, no_leak

from engineroom import ResourceNotAvailableError
from engineroom_llamacpp import context as context_module
from engineroom_llamacpp.cells import Cells
from engineroom_llamacpp.context import LlamaContext

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
    assert fresh.engine.mover.store.budget == 0
    await fresh.idle()
    no_leak(fresh.engine)


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
    for _ in range(2):
        assert (await bench.service.infer(asked[0])).generated_text == alone[0].generated_text
    assert not engine._context.unified
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


def refuse(context: LlamaContext, *, unified: bool) -> None:
    raise ResourceNotAvailableError("no memory")
