"""The scheduler on a tiny model: batching, cells, cancellation, faults."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_benches import EOS, NO_END, ask, together

from engineroom import (
    ChatMessage,
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    ResourceNotAvailableError,
    StreamError,
)
from engineroom.engine import Sampler
from engineroom_llamacpp.context import LlamaContext

Make = Callable[..., Awaitable[Any]]


async def streamed(bench: Any, request: InferenceRequest) -> tuple[list[str], InferenceResponse]:
    stream = bench.service.stream(request)
    chunks = [chunk async for chunk in stream]
    return chunks, stream.response


SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.3, "top_k": 5, "seed": 3},
    {"temperature": 0.8, "top_p": 0.5, "min_p": 0.05, "seed": 11},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"stop_sequences": ["e", "lo", "a", "\n", "\ufffd"]},
    {"logprobs": 3, "max_new_tokens": 5},
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
async def test_whole_and_streamed_answers_are_equal(make: Make, params: dict[str, Any]) -> None:
    bench = await make()
    whole = await bench.service.infer(ask(**params))
    chunks, response = await streamed(bench, ask(**params))
    assert whole.error_message is None
    assert "".join(chunks) == whole.generated_text == response.generated_text
    for name in ("finish_reason", "generated_tokens", "prompt_tokens", "stop_sequence", "logprobs"):
        assert getattr(whole, name) == getattr(response, name)


async def test_eight_different_requests_at_once_answer_as_each_alone(make: Make) -> None:
    bench = await make(n_parallel=8)
    requests = [ask(f"prompt {i} " * (i + 1), **params) for i, params in enumerate(SETTINGS)]
    alone = [await bench.service.infer(r) for r in requests]
    together = await asyncio.gather(*(bench.service.infer(r) for r in requests))
    for a, b in zip(alone, together, strict=True):
        assert (a.generated_text, a.finish_reason) == (b.generated_text, b.finish_reason)
    await bench.idle()


async def test_more_requests_than_sequences_all_end(make: Make) -> None:
    bench = await make(n_parallel=2)
    expected = await bench.service.infer(ask())
    responses = await asyncio.gather(*(bench.service.infer(ask()) for _ in range(9)))
    assert {r.generated_text for r in responses} == {expected.generated_text}
    await bench.idle()


async def test_max_new_tokens_is_exact(make: Make) -> None:
    bench = await make()
    for count in (1, 2, 17):
        response = await bench.service.infer(ask(max_new_tokens=count))
        assert (response.generated_tokens, response.finish_reason) == (count, "length")


async def test_without_a_limit_the_context_is_filled(make: Make) -> None:
    bench = await make(n_ctx=256)
    response = await bench.service.infer(ask(max_new_tokens=None))
    assert response.finish_reason == "length"
    assert response.prompt_tokens + response.generated_tokens == bench.engine.n_ctx
    await bench.idle()


async def test_the_end_of_sequence_token_ends_and_is_not_counted(make: Make) -> None:
    bench = await make()
    response = await bench.service.infer(ask(logit_bias={EOS: 100.0}))
    assert response.finish_reason == "eos_token"
    assert (response.generated_text, response.generated_tokens) == ("", 0)


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(make: Make) -> None:
    bench = await make(n_ctx=256)
    response = await bench.service.infer(ask("x" * 300))
    assert response.error_type == "ContextLengthExceededError"
    assert "301 tokens" in response.error_message
    assert "256" in response.error_message


async def test_an_unknown_token_in_logit_bias_is_refused(make: Make) -> None:
    bench = await make()
    response = await bench.service.infer(ask(logit_bias={100_000: 1.0}))
    assert response.error_type == "ConfigurationError"
    assert "100000" in response.error_message


async def test_logit_bias_forces_a_token(make: Make) -> None:
    bench = await make()
    heart = [3 + byte for byte in "♥".encode()]
    response = await bench.service.infer(ask(logit_bias={heart[0]: 100.0}, max_new_tokens=3))
    # Three first bytes and never a whole character: each is replaced.
    assert response.generated_text == "\ufffd\ufffd\ufffd"


async def test_logprobs_have_the_bytes_of_halves_of_characters(make: Make) -> None:
    bench = await make()
    first = "♥".encode()[0]
    bias = {3 + first: 100.0}
    response = await bench.service.infer(ask(logit_bias=bias, max_new_tokens=2, logprobs=20))
    for entry in response.logprobs:
        assert (entry.token, entry.bytes) == ("\ufffd", (first,))
        assert [bytes(own) for own in entry.top_bytes] == [
            bench.engine.model.token_bytes(token) for token, _, _ in entry.top
        ]
        assert len(entry.top) == 20


async def test_logprobs_are_one_a_token_and_sorted(make: Make) -> None:
    bench = await make()
    response = await bench.service.infer(ask(logprobs=4, max_new_tokens=6))
    assert len(response.logprobs) == 6
    for entry in response.logprobs:
        assert len(entry.top) == 4
        assert [v for *_, v in entry.top] == sorted((v for *_, v in entry.top), reverse=True)
        assert entry.logprob <= 0


async def test_a_seed_gives_the_same_text_alone_and_beside_unseeded_neighbours(make: Make) -> None:
    bench = await make()
    seeded = ask(temperature=1.0, seed=42)
    alone = await bench.service.infer(seeded)
    beside, *_ = await asyncio.gather(
        bench.service.infer(seeded),
        *(bench.service.infer(ask(temperature=1.0)) for _ in range(7)),
    )
    assert beside.generated_text == alone.generated_text


# ── cancellation ─────────────────────────────────────────────────────────────────────────────────


async def test_closing_a_stream_frees_its_sequence_and_neighbours_go_on(make: Make) -> None:
    bench = await make(n_parallel=2)
    expected = await bench.service.infer(ask(max_new_tokens=64))
    stream = bench.service.stream(ask("another", max_new_tokens=None))
    neighbour = asyncio.create_task(bench.service.infer(ask(max_new_tokens=64)))
    assert await anext(stream)
    await stream.aclose()
    assert stream.response.finish_reason == "cancelled"
    assert (await neighbour).generated_text == expected.generated_text
    await bench.idle()


async def test_a_cancelled_task_frees_its_sequence_while_decoding(make: Make) -> None:
    bench = await make(n_parallel=1)
    task = asyncio.create_task(bench.service.infer(ask(max_new_tokens=None)))
    await bench.until(lambda: bench.engine.health().kv_cache_usage > 0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bench.idle()


async def test_a_queued_request_is_cancelled_without_harm_to_the_running_one(make: Make) -> None:
    bench = await make(n_parallel=1)
    running = asyncio.create_task(bench.service.infer(ask(max_new_tokens=400)))
    queued = asyncio.create_task(bench.service.infer(ask("other")))
    await bench.until(lambda: bench.engine.health().num_requests_waiting == 1)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert (await running).generated_tokens == 400
    await bench.idle()


async def test_a_request_is_cancelled_while_its_prompt_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_batch=16, n_ubatch=16, n_parallel=1)
    reading, go_on = threading.Event(), threading.Event()
    decode = LlamaContext.decode

    def held(context: LlamaContext) -> int:
        reading.set()
        go_on.wait(20)
        return decode(context)

    monkeypatch.setattr(LlamaContext, "decode", held)
    task = asyncio.create_task(bench.service.infer(ask("x" * 200)))
    await asyncio.to_thread(reading.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await bench.idle()


async def test_a_lone_computation_is_aborted(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = await make(n_parallel=1)
    statuses: list[int] = []
    reading, go_on = threading.Event(), threading.Event()
    decode = LlamaContext.decode

    def held(context: LlamaContext) -> int:
        reading.set()
        go_on.wait(20)
        statuses.append(decode(context))
        return statuses[-1]

    monkeypatch.setattr(LlamaContext, "decode", held)
    stream = bench.service.stream(ask("x" * 200))
    first = asyncio.create_task(anext(stream, None))
    await asyncio.to_thread(reading.wait, 20)
    await stream.aclose()  # raises the flag; the held computation then ends at its first node
    go_on.set()
    assert await first is None
    await bench.idle()
    assert statuses == [2]
    # llama.cpp calls it an error; here it was wanted.
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert (await bench.service.infer(ask())).error_message is None


async def test_a_deadline_stops_the_work_and_keeps_the_text_so_far(make: Make) -> None:
    bench = await make(n_parallel=1, n_ctx=512)
    hold = bench.service.stream(ask(max_new_tokens=None))
    await anext(hold)
    response = await bench.service.infer(ask(timeout_s=0.01))
    assert response.finish_reason == "timeout"
    assert response.error_type == "RequestTimeoutError"
    await hold.aclose()
    await bench.idle()


async def test_a_stream_that_is_dropped_frees_its_sequence(make: Make) -> None:
    bench = await make(n_parallel=1)
    stream = bench.service.stream(ask(max_new_tokens=None))
    await anext(stream)
    del stream
    gc.collect()
    await bench.idle()


async def test_a_reader_that_stops_reading_holds_nobody_up(make: Make) -> None:
    bench = await make(n_parallel=2)
    lazy = bench.service.stream(ask(max_new_tokens=64))
    await anext(lazy)
    response = await bench.service.infer(ask(max_new_tokens=64))
    assert response.generated_tokens == 64
    await bench.idle()  # the lazy one's sequence is free, though nobody has read it
    rest = [chunk async for chunk in lazy]
    assert lazy.response.generated_tokens == 64
    assert rest


# ── cells and queues ─────────────────────────────────────────────────────────────────────────────


async def test_when_cells_run_out_the_youngest_waits_and_nobody_notices(make: Make) -> None:
    roomy = await make(n_ctx=4096, n_parallel=4)
    tight = await make(n_ctx=256, n_parallel=4)
    requests = [ask(f"request number {i}", max_new_tokens=150) for i in range(4)]
    expected = [(await roomy.service.infer(r)).generated_text for r in requests]
    found = await together(tight, requests)
    assert tight.engine.preemptions > 0
    assert [r.generated_text for r in found] == expected
    assert [r.generated_tokens for r in found] == [150] * 4
    await tight.idle()


async def test_a_sampled_request_that_was_set_back_goes_on_as_if_nothing_happened(
    make: Make,
) -> None:
    roomy = await make(n_ctx=4096, n_parallel=4)
    tight = await make(n_ctx=256, n_parallel=4)
    requests = [
        ask(f"request {i}", max_new_tokens=140, temperature=0.7, seed=i, presence_penalty=0.5)
        for i in range(4)
    ]
    expected = [(await roomy.service.infer(r)).generated_text for r in requests]
    found = await together(tight, requests)
    assert tight.engine.preemptions > 0
    assert [r.generated_text for r in found] == expected


async def test_a_full_queue_refuses_at_once(make: Make) -> None:
    bench = await make(n_parallel=1, max_queue=1)
    running = bench.service.stream(ask(max_new_tokens=None))
    await anext(running)
    queued = asyncio.create_task(bench.service.infer(ask(max_new_tokens=2)))
    await bench.until(lambda: bench.engine.health().num_requests_waiting == 1)
    refused = await bench.service.infer(ask())
    assert refused.error_type == "QueueFullError"
    assert "max_queue=1" in refused.error_message
    await running.aclose()
    assert (await queued).generated_tokens == 2
    await bench.idle()


async def test_a_higher_priority_goes_first(make: Make) -> None:
    bench = await make(n_parallel=1)
    running = bench.service.stream(ask(max_new_tokens=None))
    await anext(running)
    ended: list[int] = []

    async def one(priority: int) -> None:
        await bench.service.infer(ask(max_new_tokens=2, priority=priority))
        ended.append(priority)

    tasks = []
    for waiting, priority in enumerate((0, -5, 10), 1):
        tasks.append(asyncio.create_task(one(priority)))
        await bench.until(
            lambda waiting=waiting: bench.engine.health().num_requests_waiting == waiting
        )
    await running.aclose()
    await asyncio.gather(*tasks)
    assert ended == [10, 0, -5]


async def test_a_short_request_beside_a_long_prompt_ends_first(make: Make) -> None:
    bench = await make(n_ctx=4096, n_parallel=2, prefill_chunk=8)
    decoding = bench.service.stream(ask(max_new_tokens=40))
    await anext(decoding)
    long = asyncio.create_task(bench.service.infer(ask("y" * 2000, max_new_tokens=1)))
    count = len([chunk async for chunk in decoding])
    assert decoding.response.generated_tokens == 40
    assert count
    assert not long.done()  # 2,000 tokens in chunks of 8 take longer than 40 steps
    assert (await long).prompt_tokens == 2001


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_failed_computation_fails_its_requests_and_the_next_are_served(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make()
    decode = LlamaContext.decode
    monkeypatch.setattr(LlamaContext, "decode", lambda _: -3)
    responses = await asyncio.gather(*(bench.service.infer(ask()) for _ in range(3)))
    assert {r.error_type for r in responses} == {"InferenceError"}
    assert all("status -3" in r.error_message for r in responses)
    monkeypatch.setattr(LlamaContext, "decode", decode)
    assert (await bench.service.infer(ask())).error_message is None
    await bench.idle()


async def test_a_token_that_cannot_be_chosen_fails_its_request_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make()
    sample = Sampler.sample

    def broken(self: Sampler, logits: Any) -> int:
        if self.top_k == 13:
            raise FloatingPointError("made up")
        return sample(self, logits)

    monkeypatch.setattr(Sampler, "sample", broken)
    good, bad = await asyncio.gather(
        bench.service.infer(ask()), bench.service.infer(ask(temperature=1.0, top_k=13))
    )
    assert good.error_message is None
    assert bad.error_type == "InferenceError"
    assert "made up" in bad.error_message
    await bench.idle()


async def test_an_engine_that_dies_ends_its_requests_and_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_parallel=1)

    def dies(_: LlamaContext) -> int:
        raise OSError("made up")

    stream = bench.service.stream(ask(max_new_tokens=None))
    await anext(stream)
    queued = asyncio.create_task(bench.service.infer(ask()))
    engine = bench.engine
    await bench.until(lambda: engine.health().num_requests_waiting == 1)
    monkeypatch.setattr(LlamaContext, "decode", dies)
    chunks = [chunk async for chunk in stream]
    assert isinstance(chunks[-1], StreamError)
    assert stream.response.error_type == "EngineDeadError"
    assert (await queued).error_type == "EngineDeadError"
    health = engine.health()
    assert not health.ok
    assert "made up" in health.detail
    later = await bench.service.infer(ask())  # by another engine, which dies as well
    assert later.error_type == "EngineDeadError"
    monkeypatch.undo()
    assert (await bench.service.infer(ask())).error_message is None  # loaded anew
    assert bench.engine is not engine


async def test_unloading_waits_for_the_running_request(make: Make) -> None:
    bench = await make(n_parallel=1)
    stream = bench.service.stream(ask(max_new_tokens=64))
    await anext(stream)
    with pytest.raises(ResourceNotAvailableError):
        await bench.manager.unload("m", timeout_s=0.01)
    unloading = asyncio.create_task(bench.manager.unload("m"))
    chunks = [chunk async for chunk in stream]
    assert chunks
    assert stream.response.generated_tokens == 64
    await unloading
    assert bench.manager.get_loaded_model("m") is None


async def test_closing_the_service_stops_what_runs(make: Make) -> None:
    bench = await make(n_parallel=1)
    stream = bench.service.stream(ask(max_new_tokens=None))
    await anext(stream)
    await bench.service.close(drain_timeout_s=0)
    chunks = [chunk async for chunk in stream]
    assert isinstance(chunks[-1], StreamError)
    assert "closed" in chunks[-1]
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith("llamacpp-")]


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────


async def test_messages_equal_the_same_text_rendered_by_hand(make: Make) -> None:
    bench = await make()
    params = GenerationParams(temperature=0, max_new_tokens=12, logit_bias=NO_END)
    messages = [ChatMessage(role="system", content="be"), ChatMessage(role="user", content="hi")]
    chat = await bench.service.infer(
        InferenceRequest(model_id="m", messages=messages, params=params)
    )
    by_hand = await bench.service.infer(
        InferenceRequest(model_id="m", prompt="[system] be\n[user] hi\n[assistant] ", params=params)
    )
    assert chat.error_message is None
    assert (chat.generated_text, chat.prompt_tokens) == (
        by_hand.generated_text,
        by_hand.prompt_tokens,
    )


async def test_special_tokens_in_a_message_are_text_and_in_a_prompt_are_tokens(make: Make) -> None:
    model = (await make()).engine.model
    messages = [ChatMessage(role="user", content="a</s>b<s>c\ue000")]
    tokens = model.prompt(None, messages)
    text = "[user] a</s>b<s>c\ue000\n[assistant] "
    assert tokens.count(EOS) == 0
    assert tokens[0] == 1  # the beginning that the model wants
    assert tokens.count(1) == 1
    assert b"".join(model.piece(token) for token in tokens).decode() == text
    assert model.prompt(text, None).count(EOS) == 1


async def test_roles_that_the_template_refuses_are_a_clear_error(make: Make) -> None:
    bench = await make()
    response = await bench.service.infer(
        InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="forbidden")])
    )
    assert response.error_type == "ConfigurationError"
    assert "not that here" in response.error_message


async def test_messages_without_a_template_are_refused(
    make: Make, tiny_model_without_template: Any
) -> None:
    bench = await make(tiny_model_without_template)
    response = await bench.service.infer(
        InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="1")])
    )
    assert response.error_type == "ConfigurationError"
    assert "no chat template" in response.error_message
