"""Beginnings that are not computed again, and what the account of cells makes of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from llama_benches import ask, begun_together, together

from engineroom_llamacpp.context import LlamaContext

Make = Callable[..., Awaitable[Any]]
TEXT = "all of this is written by someone who knows how long a prompt can become, and why. " * 2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step that is computed from now on."""
    sizes: list[int] = []
    decode = LlamaContext.decode

    def noted(context: LlamaContext) -> int:
        sizes.append(int(context._batch.n_tokens))
        return decode(context)

    monkeypatch.setattr(LlamaContext, "decode", noted)
    return sizes


async def test_a_prompt_that_was_there_is_not_computed_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make()
    sizes = counted(monkeypatch)
    first = await bench.service.infer(ask(TEXT))
    assert first.cached_prompt_tokens == 0
    assert max(sizes) == first.prompt_tokens
    sizes.clear()
    again = await bench.service.infer(ask(TEXT))
    assert again.generated_text == first.generated_text
    # All but the last token.
    assert again.cached_prompt_tokens == first.prompt_tokens - 1
    assert max(sizes) == first.prompt_tokens - again.cached_prompt_tokens
    await bench.idle()


async def test_each_turn_of_a_conversation_pays_for_what_is_new(make: Make) -> None:
    bench = await make(n_ctx=1024)
    fresh = await make(n_ctx=1024, prefix_cache=False)
    text, known = TEXT, 0
    for turn in range(4):
        answer = await bench.service.infer(ask(text, max_new_tokens=20))
        expected = await fresh.service.infer(ask(text, max_new_tokens=20))
        assert answer.generated_text == expected.generated_text
        assert expected.cached_prompt_tokens == 0
        # The last token of an answer is not computed any more; and text may be cut otherwise.
        assert answer.cached_prompt_tokens >= known
        known = answer.prompt_tokens // 16 * 16
        text += f"{answer.generated_text}. and turn {turn}? "
    assert known > 300


async def test_a_shared_beginning_is_shared_while_the_others_run(make: Make) -> None:
    bench = await make(n_ctx=512, n_parallel=4)
    fresh = await make(n_ctx=1024, prefix_cache=False)
    prompts = [TEXT + f"{i} and what is new" for i in range(4)]
    expected = [(await fresh.service.infer(ask(p))).generated_text for p in prompts]
    holding = bench.service.stream(ask(prompts[0], max_new_tokens=100))
    await anext(holding)
    found = await asyncio.gather(*(bench.service.infer(ask(p)) for p in prompts))
    assert [r.generated_text for r in found] == expected
    shared = len(bench.engine.model.tokenize(TEXT)) // 16 * 16
    assert shared > 100
    assert all(r.cached_prompt_tokens >= shared for r in found)
    assert bench.engine.preemptions == 0  # five times the beginning would not have had room
    await holding.aclose()
    await bench.idle()


async def test_those_that_come_together_read_a_common_beginning_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_ctx=1024, n_parallel=4, n_batch=64)
    fresh = await make(n_ctx=1024, prefix_cache=False)
    prompts = [TEXT + f"{i} and what is new" for i in range(4)]
    expected = [(await fresh.service.infer(ask(p))).generated_text for p in prompts]
    sizes = counted(monkeypatch)
    found = await together(bench, [ask(p) for p in prompts])
    assert [r.generated_text for r in found] == expected
    # Once the beginning, four times the rest and the answers; what is little is not waited for.
    shared = len(bench.engine.model.tokenize(TEXT))
    own = found[0].prompt_tokens - shared
    assert sum(sizes) <= shared + 4 * (own + 24 - 1) + 32
    first, *others = sorted(r.cached_prompt_tokens for r in found)
    assert first == 0
    assert all(shared - 32 < cached <= shared for cached in others)
    await bench.idle()


async def test_what_another_cache_scope_has_is_computed_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle, running, or read just now: neither counts nor work tell of it."""
    bench = await make(n_ctx=1024, n_parallel=4)
    sizes = counted(monkeypatch)
    first = await bench.service.infer(ask(TEXT, cache_salt="one"))
    sizes.clear()
    for salt in ("two", None):
        other = await bench.service.infer(ask(TEXT, cache_salt=salt))
        assert (other.cached_prompt_tokens, max(sizes)) == (0, first.prompt_tokens)
        assert other.generated_text == first.generated_text
        sizes.clear()
    running = bench.service.stream(ask(TEXT, cache_salt="three", max_new_tokens=100))
    await anext(running)
    beside = await bench.service.infer(ask(TEXT, cache_salt="four"))
    assert beside.cached_prompt_tokens == 0
    await running.aclose()
    again = await bench.service.infer(ask(TEXT, cache_salt="one"))
    assert again.cached_prompt_tokens == first.prompt_tokens - 1
    sizes.clear()
    salts = [f"{i}" for i in range(4)]
    found = await together(bench, [ask(TEXT, cache_salt=salt) for salt in salts])
    assert [r.cached_prompt_tokens for r in found] == [0] * 4
    assert sum(sizes) >= 4 * first.prompt_tokens
    await bench.idle()


async def test_there_is_no_room_made_by_what_another_cache_scope_has(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a request is let in does not tell of it either; see the test of what is shared below."""
    bench = await make(n_ctx=256, n_parallel=3)
    seen = threading.Event()
    decode = LlamaContext.decode

    def braked(context: LlamaContext) -> int:
        seen.wait(0.05)  # else it may have ended before the other one comes
        return decode(context)

    monkeypatch.setattr(LlamaContext, "decode", braked)
    held = bench.service.stream(ask(TEXT, cache_salt="one", max_new_tokens=60))
    await anext(held)
    waits = asyncio.create_task(
        bench.service.infer(ask(TEXT + "x", cache_salt="two", max_new_tokens=4))
    )
    await bench.until(lambda: bench.engine.health().num_requests_waiting == 1)
    seen.set()
    await held.aclose()
    assert (await waits).cached_prompt_tokens == 0
    await bench.idle()


async def test_without_it_everything_is_computed_each_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(prefix_cache=False)
    sizes = counted(monkeypatch)
    for _ in range(2):
        response = await bench.service.infer(ask(TEXT, max_new_tokens=2))
        assert response.cached_prompt_tokens == 0
        assert max(sizes) == response.prompt_tokens
        sizes.clear()
    assert bench.engine.sequences.idle == 0


async def test_what_was_used_goes_for_what_is_needed(make: Make) -> None:
    bench = await make(n_ctx=256, n_parallel=2)
    for i in range(6):
        response = await bench.service.infer(ask(f"{i} " * 60, max_new_tokens=100))
        assert response.generated_tokens == 100
        assert bench.engine.sequences.cells.used <= 256
        assert bench.engine.sequences.idle >= 1
    await bench.idle()


async def test_a_cancelled_prompt_is_of_use_as_far_as_it_was_read(make: Make) -> None:
    bench = await make(n_ctx=512, n_batch=16, n_ubatch=16)
    stream = bench.service.stream(ask(TEXT, max_new_tokens=100))
    await anext(stream)
    await stream.aclose()
    await bench.until(lambda: bench.engine.health().num_requests_running == 0)
    response = await bench.service.infer(ask(TEXT))
    assert response.cached_prompt_tokens == response.prompt_tokens - 1


async def test_who_had_to_wait_computes_nothing_twice(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(f"{i}" * 40, max_new_tokens=120) for i in range(2)]
    computed: dict[tuple[bool, bool], int] = {}
    texts = set()
    for reuse, saves in ((True, True), (False, True), (True, False), (False, False)):
        bench = await make(n_ctx=256, n_parallel=2, prefix_cache=reuse)
        sizes = counted(monkeypatch)
        if not saves:
            monkeypatch.setattr(LlamaContext, "save", lambda *_: None)
        found = await together(bench, requests)
        assert bench.engine.preemptions > 0
        # Its own work is nobody else's: it does not count as reused.
        assert all(r.cached_prompt_tokens <= 1 for r in found)
        texts.add(tuple(r.generated_text for r in found))
        computed[reuse, saves] = sum(sizes)
        tokens = sum(r.prompt_tokens + r.generated_tokens for r in found)
        assert not saves or sum(sizes) in (tokens - 2, tokens - 3)
        monkeypatch.undo()
        await bench.idle()
    assert len(texts) == 1
    # What could not be saved is read again, but for the part that nobody needed.
    assert computed[True, True] < computed[True, False] < computed[False, False]


async def test_what_cannot_be_brought_back_is_read_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = await make(n_ctx=1024, n_parallel=2)
    tight = await make(n_ctx=256, n_parallel=2)
    requests = [ask(f"{i}" * 40, max_new_tokens=120) for i in range(2)]
    expected = [(await roomy.service.infer(r)).generated_text for r in requests]
    monkeypatch.setattr(LlamaContext, "restore", lambda *_: False)
    found = await together(tight, requests)
    assert [r.generated_text for r in found] == expected
    assert tight.engine.preemptions > 0
    await tight.idle()


async def test_what_is_saved_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = LlamaContext.save

    def noted(context: LlamaContext, sequence: int, length: int, start: int = 0) -> Any:
        saved.append(length)
        return save(context, sequence, length, start)

    monkeypatch.setattr(LlamaContext, "save", noted)
    bench = await make(n_ctx=256, n_parallel=8)
    await together(bench, [ask(f"{i} " * 9, max_new_tokens=100) for i in range(8)])
    assert saved
    assert max(saved) <= 128
    assert all(task.saved is None for task in bench.engine.running)
    await bench.idle()


async def test_a_failed_step_leaves_nothing_that_would_be_used_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make()
    decode = LlamaContext.decode
    monkeypatch.setattr(LlamaContext, "decode", lambda context: decode(context) or -3)
    failed = await bench.service.infer(ask(TEXT))
    assert failed.error_type == "InferenceError"
    monkeypatch.undo()
    assert bench.engine.sequences.idle == 0
    assert (await bench.service.infer(ask(TEXT))).cached_prompt_tokens == 0
    await bench.idle()


async def test_a_prompt_that_shares_all_but_little_is_let_in_beside(make: Make) -> None:
    """What is shared counts once where it is decided whether there is room."""
    bench = await make(n_ctx=256, n_parallel=3)
    held = bench.service.stream(ask(TEXT, max_new_tokens=60))
    await anext(held)
    response = await bench.service.infer(ask(TEXT + "x", max_new_tokens=4))
    assert response.error_message is None
    assert held.response is None, "the other one has not waited for the first to end"
    await held.aclose()
    await bench.idle()


# ── models whose cache cannot be cut ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["window", "state"])
async def test_what_cannot_be_cut_is_not_reused(
    make: Make, write_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    path = write_model(tmp_path / f"{kind}.gguf", kind=kind)
    bench = await make(path, n_parallel=3)
    alone = await make(path, n_parallel=1, prefix_cache=False)
    prompts = [TEXT, TEXT + "and more", TEXT[:40], "other", TEXT]
    expected = [(await alone.service.infer(ask(p))).generated_text for p in prompts]
    assert len(set(expected)) > 3
    found = await asyncio.gather(*(bench.service.infer(ask(p)) for p in prompts))
    assert [r.generated_text for r in found] == expected
    assert [r.cached_prompt_tokens for r in found] == [0] * 5
    beams = [(await b.service.infer(ask(TEXT, num_beams=3))).generated_text for b in (bench, alone)]
    if kind == "window":
        assert beams[0] == beams[1]
    await bench.idle()


# ── no numbers ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
async def test_no_numbers_fail_their_request_and_no_other(
    make: Make,
    write_model: Callable[..., Path],
    tmp_path: Path,
    flash_attn: str,
    temperature: float,
) -> None:
    """The tiny model's "é" is NaN. Where attention is not fused, it spoils the whole batch."""
    path = write_model(tmp_path / "nan.gguf", spoilt="é")
    bench = await make(path, flash_attn=flash_attn, n_parallel=4)
    params = {"temperature": temperature, "seed": 5, "max_new_tokens": 30}
    alone = [(await bench.service.infer(ask(f"ask {i}", **params))).generated_text for i in "abc"]
    *good, bad = await asyncio.gather(
        *(bench.service.infer(ask(f"ask {i}", **params)) for i in "abc"),
        bench.service.infer(ask("é é", **params)),
    )
    assert [r.generated_text for r in good] == alone
    assert bad.error_type == "InferenceError"
    assert "no numbers" in bad.error_message
    assert "cache_type_k" in bad.error_message
    after = await bench.service.infer(ask("ask a", **params))
    assert after.generated_text == alone[0]
    await bench.idle()


# ── who is read first ────────────────────────────────────────────────────────────────────────


async def test_a_short_prompt_does_not_wait_for_long_ones_before_it(make: Make) -> None:
    bench = await make(n_ctx=4096, n_parallel=4, n_batch=64, prefill_chunk=32)
    ends: list[str] = []

    async def read(name: str, prompt: str) -> None:
        response = await bench.service.infer(ask(prompt, max_new_tokens=1))
        assert response.error_message is None
        ends.append(name)

    prompts = {name: name * 1000 for name in "xyz"} | {"short": "a short one"}
    await begun_together(bench, [read(*item) for item in prompts.items()])
    assert ends[0] == "short"
    await bench.idle()


async def test_a_long_prompt_is_read_however_many_short_ones_come(make: Make) -> None:
    bench = await make(n_ctx=4096, n_parallel=3, n_batch=64)
    long = asyncio.create_task(bench.service.infer(ask("x" * 1000, max_new_tokens=1)))
    await bench.until(lambda: bench.engine.health().num_requests_running == 1)
    count = 0
    while not long.done():
        both = (bench.service.infer(ask(f"{count}{i}" * 12, max_new_tokens=1)) for i in "ab")
        await asyncio.gather(*both)
        count += 1
    assert (await long).error_message is None
    assert count < 1000 / 32 + 5
    await bench.idle()
