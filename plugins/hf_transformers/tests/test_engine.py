"""The scheduler on tiny models: batching, prefixes, cancellation, faults."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_benches import (
    BY_GENERATE,
    DRIVEN,
    NO_END,
    TEXT,
    Answer,
    Bench,
    Broken,
    Held,
    Rig,
    Tiny,
    ask,
    generate_threads,
    until,
)
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from engineroom import (
    InferenceError,
    QueueFullError,
    ResourceNotAvailableError,
    StreamError,
)

Make = Callable[..., Awaitable[Bench]]
PROMPTS = ("hello", "the quick brown fox", "你好，世界。🙂", TEXT[:200], "a" * 40)


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path]) -> Iterator[Tiny]:
    yield Tiny(tiny)
    gc.collect()


@pytest.fixture
async def make(tiny: Callable[[str], Path]) -> AsyncIterator[Make]:
    """Make services over a tiny model, with options of it. All are closed at the end."""
    benches: list[Bench] = []

    async def build(kind: str = "llama", **changes: Any) -> Bench:
        bench = Bench(tiny(kind), **changes)
        benches.append(bench)
        await bench.manager.load("m")
        return bench

    async with asyncio.timeout(60):
        yield build
        for bench in benches:
            await bench.service.close(drain_timeout_s=0)


# ── answers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*DRIVEN, *BY_GENERATE])
async def test_greedy_answers_are_those_of_generate(models: Tiny, kind: str) -> None:
    reference = models.reference(kind)
    with Rig(models.parts(kind)) as rig:
        assert bool(rig.engine.why_one_by_one) == (kind in BY_GENERATE)
        new = 16 if kind in BY_GENERATE else 40
        prompts = [rig.tokens(prompt) for prompt in PROMPTS]
        expected = [reference.generate(tokens, new) for tokens in prompts]
        alone = [await rig.answer(tokens, max_new_tokens=new) for tokens in prompts]
        tasks = [rig.send(tokens, ask(max_new_tokens=new, logit_bias=None)) for tokens in prompts]
        together = await asyncio.gather(*map(rig.read, tasks))
        assert [answer.tokens for answer in alone] == expected
        assert [answer.tokens for answer in together] == expected
        for answer, tokens in zip([*alone, *together], expected * 2, strict=True):
            assert answer.finish == ("length" if len(tokens) == new else "eos_token")
        await rig.idle()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "gpt2"])
async def test_the_plain_kernel_answers_alike(models: Tiny, kind: str) -> None:
    reference = models.reference(kind)
    with Rig(models.parts(kind), attn_implementation="eager") as rig:
        prompts = [rig.tokens(prompt) for prompt in PROMPTS]
        tasks = [rig.send(tokens) for tokens in prompts]
        for tokens, answer in zip(
            prompts, await asyncio.gather(*map(rig.read, tasks)), strict=True
        ):
            assert answer.tokens == reference.greedy(tokens, 24)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.3, "top_k": 5, "seed": 3},
    {"temperature": 0.8, "top_p": 0.5, "min_p": 0.05, "seed": 11},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"stop_sequences": ["e", "lo", "a", "\n", "\ufffd"]},
    {"logprobs": 3, "max_new_tokens": 5},
    {"num_beams": 3, "early_stopping": True, "max_new_tokens": 8},
]


@pytest.mark.parametrize("kind", ["llama", "t5"])
async def test_whole_and_streamed_answers_are_equal(make: Make, kind: str) -> None:
    bench = await make(kind)
    for params in SETTINGS:
        whole = await bench.service.infer(ask(**params))
        chunks, response = await bench.streamed(ask(**params))
        assert whole.error_message is None, (params, whole.error_message)
        assert "".join(chunks) == whole.generated_text == response.generated_text
        for name in (
            "finish_reason",
            "generated_tokens",
            "prompt_tokens",
            "stop_sequence",
            "logprobs",
        ):
            assert getattr(whole, name) == getattr(response, name), (params, name)


async def test_different_requests_at_once_answer_as_each_alone(make: Make) -> None:
    bench = await make(max_batch_size=8, prefix_cache=False)
    requests = [ask(f"prompt {i} " * (i + 1), **params) for i, params in enumerate(SETTINGS)]
    alone = [await bench.service.infer(r) for r in requests]
    together = await asyncio.gather(*(bench.service.infer(r) for r in requests))
    for a, b in zip(alone, together, strict=True):
        assert (a.generated_text, a.finish_reason) == (b.generated_text, b.finish_reason)
    await bench.idle()


async def test_max_new_tokens_is_exact(make: Make) -> None:
    bench = await make()
    for count in (1, 2, 17):
        response = await bench.service.infer(ask(max_new_tokens=count))
        assert (response.generated_tokens, response.finish_reason) == (count, "length")


@pytest.mark.parametrize("changes", [{}, {"prompt_lookup": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "mamba"])
async def test_without_a_limit_the_context_is_filled(
    make: Make, kind: str, changes: dict[str, Any]
) -> None:
    bench = await make(kind, max_context=64, max_batch_size=2, **changes)
    found = await asyncio.gather(
        *(bench.service.infer(ask("x" * n, max_new_tokens=None)) for n in (3, 20, 60))
    )
    for response in found:
        assert response.error_message is None
        assert response.finish_reason == "length"
        assert response.prompt_tokens + response.generated_tokens == bench.engine.n_ctx == 64
    await bench.idle()


async def test_the_whole_context_of_the_model_can_be_used(make: Make) -> None:
    bench = await make("gpt2", max_context=4096, max_batch_size=2)
    assert bench.engine.n_ctx == 512  # it has positions for no more
    response = await bench.service.infer(ask(TEXT[:500], max_new_tokens=None))
    assert response.error_message is None
    assert response.prompt_tokens + response.generated_tokens == 512


@pytest.mark.parametrize("kind", ["llama", "mamba"])
async def test_the_end_of_sequence_token_ends_and_is_not_counted(make: Make, kind: str) -> None:
    bench = await make(kind)
    response = await bench.service.infer(ask(logit_bias={1: 100.0}))
    assert response.finish_reason == "eos_token"
    assert (response.generated_text, response.generated_tokens) == ("", 0)


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(make: Make) -> None:
    bench = await make(max_context=64)
    response = await bench.service.infer(ask("x" * 100))
    assert response.error_type == "ContextLengthExceededError"
    assert "101 tokens" in response.error_message
    assert "64" in response.error_message


async def test_a_seed_gives_the_same_text_alone_and_beside_unseeded_neighbours(make: Make) -> None:
    bench = await make(max_batch_size=8)
    seeded = ask(temperature=1.0, seed=42)
    alone = await bench.service.infer(seeded)
    beside, *_ = await asyncio.gather(
        bench.service.infer(seeded),
        *(bench.service.infer(ask(temperature=1.0, top_k=k)) for k in range(7)),
    )
    assert beside.generated_text == alone.generated_text


async def test_logprobs_are_one_a_token_and_those_of_the_model(models: Tiny, make: Make) -> None:
    import torch

    bench = await make()
    response = await bench.service.infer(ask(logprobs=4, max_new_tokens=6))
    tokens = bench.engine.codec.prompt("hello", None)
    ids = [entry.token_id for entry in response.logprobs]
    with torch.inference_mode():
        logits = models.reference("llama").model(torch.tensor([tokens + ids])).logits[0]
    expected = logits.log_softmax(-1)[len(tokens) - 1 :]
    assert len(response.logprobs) == 6
    for entry, row in zip(response.logprobs, expected, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        values, best = row.topk(4)
        assert [i for i, *_ in entry.top] == best.tolist()
        assert [v for *_, v in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        own = bench.engine.codec.token_bytes
        assert bytes(entry.bytes) == own(entry.token_id)
        assert [bytes(b) for b in entry.top_bytes] == [own(token) for token, *_ in entry.top]


async def test_log_probabilities_of_a_prompt_are_those_of_the_model(
    models: Tiny, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("engineroom_hf_transformers.engine._PROMPT_LOGITS", 0)  # few rows a step
    bench = await make()
    prompt = "so it goes on and on, and never comes to its end."
    tokens = bench.engine.codec.prompt(prompt, None)
    with torch.inference_mode():
        logits = models.reference("llama").model(torch.tensor([tokens])).logits[0]
    expected = logits.log_softmax(-1)
    await bench.service.infer(ask(prompt))  # what others have computed has no logits any more
    requests = [ask(prompt, prompt_logprobs=3, max_new_tokens=n) for n in (0, 1, 9)]
    answers = await asyncio.gather(*map(bench.service.infer, [ask(prompt), *requests]))
    for response in answers[1:]:
        first, *entries = response.prompt_logprobs
        assert (first.token_id, first.logprob, first.top) == (tokens[0], None, ())
        assert [entry.token_id for entry in entries] == tokens[1:]
        for entry, row in zip(entries, expected, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [i for i, *_ in entry.top] == row.topk(3).indices.tolist()
    assert [response.generated_tokens for response in answers[1:]] == [0, 1, 9]


# ── whatever comes ───────────────────────────────────────────────────────────────────────────


@pytest.mark.long
@settings(
    max_examples=50,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    plan=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 37]),  # where in the text the prompt begins
            st.integers(1, 120),  # characters of it
            st.integers(1, 40),  # tokens to generate
            st.one_of(st.none(), st.integers(0, 12)),  # tokens after which it is cancelled
            st.integers(0, 12),  # when it comes
            st.integers(-1, 1),  # priority
        ),
        min_size=1,
        max_size=8,
    ),
    kind=st.sampled_from(["llama", "gemma2", "mistral", "gpt2"]),
    changes=st.fixed_dictionaries(
        {
            "max_batch_size": st.sampled_from([1, 2, 3, 5]),
            "prefill_chunk": st.sampled_from([1, 7, 128]),
            "max_batch_tokens": st.sampled_from([5, 16, 512]),
            "prefix_cache": st.booleans(),
            "draft_tokens": st.sampled_from([1, 4]),
        }
    ),
    drafting=st.sampled_from(["", "prompt_lookup", "the same model", "another model"]),
)
def test_whatever_comes_each_greedy_answer_is_that_of_generate_alone(
    models: Tiny, plan: list[Any], kind: str, changes: dict[str, Any], drafting: str
) -> None:
    asyncio.run(_drive(models, plan, kind, changes, drafting))


async def _drive(
    models: Tiny, plan: list[Any], kind: str, changes: dict[str, Any], drafting: str
) -> None:
    parts = models.parts(kind)
    if drafting == "the same model":
        parts.draft = models.parts(kind)
    elif drafting == "another model":
        # Its positions end where the texts need not.
        parts.draft = models.parts("llama" if kind != "llama" else "qwen2", n_context=80)
    reference = models.reference(kind)
    with Rig(parts, prompt_lookup=drafting == "prompt_lookup", **changes) as rig:

        async def one(
            begin: int, length: int, new: int, cancel: int | None, when: int, priority: int
        ) -> tuple[list[int], Answer]:
            for _ in range(when):
                await asyncio.sleep(0.001)
            tokens = rig.tokens(TEXT[begin : begin + length])
            task = rig.send(tokens, ask(max_new_tokens=new, logit_bias=None, priority=priority))
            if cancel == 0:
                rig.engine.cancel(task)
                return [], Answer()
            return reference.greedy(tokens, new), await rig.read(task, cancel)

        async with asyncio.timeout(60):
            for wanted, answer in await asyncio.gather(*(one(*item) for item in plan)):
                assert answer.error is None
                if answer.finish is None:
                    assert answer.tokens == wanted[: len(answer.tokens)]
                else:
                    assert answer.tokens == wanted
            await rig.idle()


# ── prompts ──────────────────────────────────────────────────────────────────────────────────


async def test_a_long_prompt_is_read_in_chunks_beside_those_that_decode(models: Tiny) -> None:
    with Rig(models.parts("llama"), prefill_chunk=8) as rig:
        steps: list[tuple[int, list[int]]] = []
        forward = rig.engine._forward
        assert forward is not None

        class Noted:
            cache, close = forward.cache, forward.close

            def __call__(self, tokens: Any, decoding: Any, spans: Any, *rest: Any) -> Any:
                steps.append((len(decoding), [span.count for span in spans]))
                return forward(tokens, decoding, spans, *rest)

        rig.engine._forward = Noted()  # type: ignore[assignment]
        decoding = rig.send(rig.tokens("hello"), ask(max_new_tokens=200, logit_bias=NO_END))
        await decoding.mailbox.get()
        tokens = rig.tokens(TEXT)[:150]
        long = await rig.read(rig.send(tokens))
        assert long.tokens == models.reference("llama").greedy(tokens, 24)
        beside = [counts for others, counts in steps if others and counts]
        assert all(sum(counts) <= 8 for counts in beside)
        assert sum(map(sum, beside)) == 150
        rig.engine.cancel(decoding)
        await rig.idle()


async def test_no_step_has_more_tokens_than_it_may(models: Tiny) -> None:
    with Rig(models.parts("llama"), max_batch_tokens=16, max_batch_size=4) as rig:
        most = 0
        forward = rig.engine._forward
        assert forward is not None

        class Noted:
            cache, close = forward.cache, forward.close

            def __call__(self, tokens: Any, *rest: Any) -> Any:
                nonlocal most
                most = max(most, len(tokens))
                return forward(tokens, *rest)

        rig.engine._forward = Noted()  # type: ignore[assignment]
        tasks = [rig.send(rig.tokens(TEXT[i:])[:100]) for i in range(6)]
        answers = await asyncio.gather(*map(rig.read, tasks))
        assert all(answer.finish for answer in answers)
        assert most == 16


async def test_a_common_beginning_is_not_computed_again(models: Tiny) -> None:
    with Rig(models.parts("llama")) as rig:
        text = rig.tokens(TEXT)[:100]
        first = await rig.answer(text)
        again = await rig.answer(text)
        longer = await rig.answer(text + rig.tokens("and more")[1:])
        other = await rig.answer(rig.tokens("x") + text)
        assert (first.cached, again.cached, longer.cached) == (0, 99, 100)
        assert other.cached <= 1
        assert again.tokens == first.tokens
        assert longer.tokens == models.reference("llama").greedy(
            text + rig.tokens("and more")[1:], 24
        )


async def test_what_was_generated_is_reused_as_a_conversation_goes_on(models: Tiny) -> None:
    with Rig(models.parts("llama")) as rig:
        text = rig.tokens("hello there")
        first = await rig.answer(text, logit_bias=NO_END)
        following = text + first.tokens + rig.tokens("and then?")[1:]
        answer = await rig.answer(following)
        assert answer.cached == len(text) + 23  # the last token's keys were not computed
        assert answer.tokens == models.reference("llama").greedy(following, 24)


async def test_what_another_cache_scope_has_is_computed_anew(models: Tiny) -> None:
    with Rig(models.parts("llama")) as rig:
        text = rig.tokens(TEXT)[:60]
        assert (await rig.answer(text, cache_salt="one")).cached == 0
        assert (await rig.answer(text, cache_salt="one")).cached == 59
        for salt in ("two", None):
            other = await rig.answer(text, cache_salt=salt)
            assert other.cached == 0
            assert other.tokens == models.reference("llama").greedy(text, 24)
        running = rig.send(text, ask(max_new_tokens=None, logit_bias=None, cache_salt="three"))
        await running.mailbox.get()
        assert (await rig.answer(text, cache_salt="four")).cached == 0
        rig.engine.cancel(running)
        await rig.idle()


async def test_without_the_prefix_cache_everything_is_computed(models: Tiny) -> None:
    with Rig(models.parts("llama"), prefix_cache=False) as rig:
        assert [(await rig.answer("hello" * 20)).cached for _ in range(2)] == [0, 0]


async def test_the_beginning_of_a_running_request_is_copied(models: Tiny) -> None:
    with Rig(models.parts("llama")) as rig:
        text = rig.tokens(TEXT)[:60]
        running = rig.send(text, ask(max_new_tokens=150, logit_bias=NO_END))
        await running.mailbox.get()
        beside = await rig.answer(text)
        assert beside.cached == 59
        assert beside.tokens == models.reference("llama").greedy(text, 24)
        rig.engine.cancel(running)
        await rig.idle()


# ── cancellation ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "mamba"])
async def test_closing_a_stream_frees_its_slot_and_neighbours_go_on(make: Make, kind: str) -> None:
    bench = await make(kind, max_batch_size=2)
    expected = await bench.service.infer(ask(max_new_tokens=64))
    stream = bench.service.stream(ask("another", max_new_tokens=None))
    neighbour = asyncio.create_task(bench.service.infer(ask(max_new_tokens=64)))
    assert await anext(stream)
    await stream.aclose()
    assert stream.response.finish_reason == "cancelled"
    assert (await neighbour).generated_text == expected.generated_text
    await bench.idle()


async def test_a_queued_request_is_cancelled_without_harm_to_the_running_one(make: Make) -> None:
    bench = await make(max_batch_size=1)
    running = asyncio.create_task(bench.service.infer(ask(max_new_tokens=200)))
    queued = asyncio.create_task(bench.service.infer(ask("other")))
    await bench.until(lambda: bench.engine.health().num_requests_waiting == 1)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert (await running).generated_tokens == 200
    await bench.idle()


async def test_a_request_is_cancelled_while_its_prompt_is_read(models: Tiny) -> None:
    with Rig(models.parts("llama"), max_batch_tokens=16, prefill_chunk=16) as rig:
        held = Held(rig.engine)
        text = rig.tokens(TEXT)[:100]
        tasks = [rig.send(text), rig.send(text[3:])]
        await held.begun()
        rig.engine.cancel(tasks[0])
        held.go()
        neighbour = await rig.read(tasks[1])
        assert neighbour.tokens == models.reference("llama").greedy(text[3:], 24)
        again = await rig.answer(text)
        assert again.tokens == models.reference("llama").greedy(text, 24)
        await rig.idle()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
async def test_a_lone_long_prompt_is_given_up_between_layers(
    models: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engineroom_hf_transformers import attention

    with Rig(models.parts(kind)) as rig:
        layers: list[int] = []
        task: Any = None
        attend = attention.Step.attend

        def noted(self: Any, call: Any) -> Any:
            layers.append(call.layer)
            rig.engine.cancel(task)  # as its caller would, while the first layer is computed
            return attend(self, call)

        text = rig.tokens(TEXT)[:200]
        monkeypatch.setattr(attention.Step, "attend", noted)
        with rig.engine._loop.condition:
            task = rig.send(text)
        await until(lambda: task.done)
        monkeypatch.undo()
        assert layers == [0]
        # What the one layer wrote is not taken for computed.
        again = await rig.answer(text)
        assert again.cached == 0
        assert again.tokens == models.reference(kind).greedy(text, 24)
        await rig.idle()


async def test_a_deadline_stops_the_work(make: Make) -> None:
    bench = await make(max_batch_size=1)
    hold = bench.service.stream(ask(max_new_tokens=None))
    await anext(hold)
    response = await bench.service.infer(ask(timeout_s=0.01))
    assert response.finish_reason == "timeout"
    assert response.error_type == "RequestTimeoutError"
    await hold.aclose()
    await bench.idle()


async def test_a_stream_that_is_dropped_frees_its_slot(make: Make) -> None:
    bench = await make(max_batch_size=1)
    stream = bench.service.stream(ask(max_new_tokens=None))
    await anext(stream)
    del stream
    gc.collect()
    await bench.idle()


# ── queue ────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_at_once(models: Tiny) -> None:
    with Rig(models.parts("llama"), max_batch_size=1, max_queue=1) as rig:
        running = rig.send(rig.tokens("a"), ask(max_new_tokens=None))
        await running.mailbox.get()
        queued = rig.send(rig.tokens("b"), ask(max_new_tokens=2))
        with pytest.raises(QueueFullError, match="max_queue=1"):
            rig.send(rig.tokens("c"))
        rig.engine.cancel(running)
        assert len((await rig.read(queued)).tokens) == 2
        await rig.idle()


@pytest.mark.parametrize("kind", ["llama", "mamba"])
async def test_a_higher_priority_goes_first(models: Tiny, kind: str) -> None:
    with Rig(models.parts(kind), max_batch_size=1) as rig:
        running = rig.send(rig.tokens("a"), ask(max_new_tokens=None))
        await running.mailbox.get()
        ended: list[int] = []

        async def one(priority: int) -> None:
            request = ask(max_new_tokens=2, priority=priority)
            await rig.read(rig.send(rig.tokens("b"), request))
            ended.append(priority)

        tasks = [asyncio.create_task(one(priority)) for priority in (0, -5, 10)]
        await until(lambda: rig.engine.health().num_requests_waiting == 3)
        rig.engine.cancel(running)
        await asyncio.gather(*tasks)
        assert ended == [10, 0, -5]


# ── faults ───────────────────────────────────────────────────────────────────────────────────


def _out_of_memory() -> Exception:
    """What torch raises on the CPU when an allocation fails: no class of its own."""
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    return caught.value


def _out_of_gpu_memory() -> Exception:
    import torch

    return torch.OutOfMemoryError("made up")


FAULTS: list[tuple[Callable[[], Exception], type[Exception], str]] = [
    (lambda: RuntimeError("made up\nand more"), InferenceError, "RuntimeError: made up$"),
    (MemoryError, ResourceNotAvailableError, "max_batch_size"),
    (_out_of_gpu_memory, ResourceNotAvailableError, "max_batch_size"),
    (_out_of_memory, ResourceNotAvailableError, "max_batch_size"),
]


@pytest.mark.parametrize("drafting", [False, True], ids=["alone", "with prompt_lookup"])
@pytest.mark.parametrize("fault", FAULTS, ids=["error", "memory", "gpu memory", "cpu memory"])
async def test_a_failed_step_fails_its_requests_and_the_next_are_served(
    models: Tiny,
    fault: tuple[Callable[[], Exception], type[Exception], str],
    drafting: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_error, error_type, said = fault
    error = make_error()  # a real one takes its time
    reference = models.reference("llama")
    with Rig(models.parts("llama"), prompt_lookup=drafting, max_batch_tokens=32) as rig:
        broken = Broken(rig.engine)
        text = rig.tokens(TEXT)[:100]
        first = rig.send(text, ask(max_new_tokens=None, logit_bias=NO_END))
        await first.mailbox.get()
        second = rig.send(text[5:], ask(max_new_tokens=None, logit_bias=NO_END))
        await second.mailbox.get()
        broken.error = error
        found = await asyncio.gather(rig.read(first), rig.read(second))
        for answer in found:
            assert type(answer.error) is error_type
            with pytest.raises(error_type, match=said):
                raise answer.error
            assert answer.error.__cause__ is broken.error
        assert found[0].error is not found[1].error
        assert "step failed" in caplog.text
        await rig.idle()
        broken.error = None
        again = await rig.answer(text)
        assert again.cached == 99  # what had been computed before is whole
        assert again.tokens == reference.greedy(text, 24)
        for other in (rig.tokens("hello"), text[5:], text[:50]):
            assert (await rig.answer(other)).tokens == reference.greedy(other, 24)
        await rig.idle()


async def test_what_a_failed_step_wrote_harms_nobody(models: Tiny) -> None:
    """Requests of different length are computed together over the same stretch of the cache."""
    reference = models.reference("llama")
    with Rig(models.parts("llama"), max_batch_size=2) as rig:
        broken = Broken(rig.engine)
        text = rig.tokens(TEXT)[:100]
        broken.error = RuntimeError("made up")
        assert (await rig.answer(text)).error is not None
        assert (await rig.answer(text)).error is not None
        broken.error = None
        both = [rig.send(tokens, ask(max_new_tokens=None)) for tokens in (text, text[:99])]
        for task in both:
            await task.mailbox.get()
        broken.error = RuntimeError("made up")  # now while they decode
        assert all(answer.error for answer in await asyncio.gather(*map(rig.read, both)))
        broken.error = None
        for prompts in ([TEXT[9:60], TEXT[20:190]], [TEXT[3:150], TEXT[31:80]]):
            tokens = [rig.tokens(prompt) for prompt in prompts]
            answers = await asyncio.gather(*(rig.read(rig.send(each)) for each in tokens))
            for each, answer in zip(tokens, answers, strict=True):
                assert answer.error is None
                assert answer.tokens == reference.greedy(each, 24)
        short = [rig.tokens("hello"), rig.tokens(TEXT)[50:62]]
        answers = await asyncio.gather(*(rig.read(rig.send(each)) for each in short))
        for each, answer in zip(short, answers, strict=True):
            assert answer.error is None
            assert answer.tokens == reference.greedy(each, 24)


async def test_what_lay_in_the_memory_before_harms_nobody(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory comes as it is: here with the worst that can be in it."""
    import torch

    empty = torch.empty
    parts = models.parts("llama")  # with memory as it is: only the engine is tried

    def dirty(*size: Any, **kw: Any) -> torch.Tensor:
        return empty(*size, **kw).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", dirty)
    with Rig(parts) as rig:
        monkeypatch.undo()
        assert not rig.engine.why_one_by_one
        prompts = [rig.tokens("hello"), rig.tokens(TEXT)[50:62], rig.tokens(TEXT)[:16]]
        answers = await asyncio.gather(*(rig.read(rig.send(tokens)) for tokens in prompts))
        for tokens, answer in zip(prompts, answers, strict=True):
            assert answer.error is None
            assert answer.tokens == models.reference("llama").greedy(tokens, 24)


class Nonsense:
    """A fake forward pass: a token of the prompt makes the model compute NaN."""

    def __init__(self, rig: Rig, culprit: int) -> None:
        forward = rig.engine._forward
        assert forward is not None
        self._forward = forward
        self._culprit = culprit
        self.cache, self.close = forward.cache, forward.close
        rig.engine._forward = self  # type: ignore[assignment]

    def __call__(self, tokens: Any, decoding: Any, spans: Any, *rest: Any) -> Any:
        import torch

        found = self._forward(tokens, decoding, spans, *rest)
        with torch.inference_mode():
            for span in (*decoding, *spans):
                if self._culprit in tokens[span.row : span.row + span.count]:
                    for store in (self.cache._keys, self.cache._values):
                        for tensor in store.values():
                            tensor[span.slot, span.start : span.end] = float("nan")
                    for i, place in enumerate(rest[0]):
                        if span.row <= place < span.row + span.count:
                            found[i] = float("nan")
        return found


async def test_nan_fails_its_request_alone_and_names_the_remedy(models: Tiny) -> None:
    reference = models.reference("llama")
    with Rig(models.parts("llama"), max_batch_size=2) as rig:
        culprit = rig.tokens("é")[-1]
        text = rig.tokens(TEXT)[:40]
        Nonsense(rig, culprit)
        good = rig.send(text)
        bad = await rig.answer([*text[:30], culprit])
        assert type(bad.error) is InferenceError
        assert "dtype: float32 or bfloat16" in str(bad.error)
        assert (await rig.read(good)).tokens == reference.greedy(text, 24)
        # Neither is the nonsense reused, nor does it reach those that get the slot afterwards.
        prompts = [text, rig.tokens("hello")]
        answers = await asyncio.gather(*(rig.read(rig.send(tokens)) for tokens in prompts))
        for tokens, answer in zip(prompts, answers, strict=True):
            assert answer.tokens == reference.greedy(tokens, 24)
        await rig.idle()


async def test_a_token_that_cannot_be_chosen_fails_the_step_and_nobody_is_forgotten(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request gets nonsense, and then, while proposals are checked, choosing fails."""
    from engineroom_hf_transformers import outcomes as module

    with Rig(models.parts("llama"), prompt_lookup=True) as rig:
        tasks = [
            rig.send(rig.tokens("ab" * 30), ask(max_new_tokens=None, logit_bias={66: 100.0}))
            for _ in range(3)
        ]
        for task in tasks:
            await task.mailbox.get()
        choose = module.choose
        calls = 0

        def fails(logits: Any, rows: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1 or len(rows) < 2:
                found = choose(logits, rows)
                return [None, *found[1:]] if len(rows) > 1 else found
            raise RuntimeError("made up")

        monkeypatch.setattr(module, "choose", fails)
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*map(rig.read, tasks))
        assert all(type(answer.error) is InferenceError for answer in answers)
        monkeypatch.undo()
        await rig.idle()


async def test_a_broken_generate_fails_its_request_and_the_next_are_served(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = models.parts("mamba")
    with Rig(parts) as rig:
        for make_error, error_type, said in FAULTS:
            error = make_error()

            def fails(*_: Any, error: Exception = error, **__: Any) -> Any:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(type(parts.model), "forward", fails)
                answer = await rig.answer("hello")
            assert type(answer.error) is error_type
            with pytest.raises(error_type, match=said):
                raise answer.error
            await rig.idle()
        tokens = rig.tokens("hello")
        assert (await rig.answer(tokens)).tokens == models.reference("mamba").greedy(tokens, 24)


async def test_nan_by_generate_names_the_remedy(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    parts = models.parts("mamba")
    forward = type(parts.model).forward

    def nonsense(*args: Any, **kw: Any) -> Any:
        found = forward(*args, **kw)
        found.logits = torch.full_like(found.logits, float("nan"))
        return found

    monkeypatch.setattr(type(parts.model), "forward", nonsense)
    with Rig(parts) as rig:
        answer = await rig.answer("hello")
        assert type(answer.error) is InferenceError
        assert "dtype: float32 or bfloat16" in str(answer.error)


@pytest.mark.parametrize("text", ["yes", "yes, and no, and so on"])
async def test_beams_that_are_drawn_keep_to_a_grammar_that_allows_less_than_there_are(
    make: Make, text: str
) -> None:
    pytest.importorskip("llguidance")
    bench = await make()
    form = {"choice": [text]}
    for seed in range(3):
        how = {"num_beams": 4, "temperature": 1.0, "seed": seed, "structured_output": form}
        answer = await bench.service.infer(ask(max_new_tokens=60, logit_bias=None, **how))
        assert (answer.generated_text, answer.finish_reason) == (text, "eos_token")


# ── closing ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "mamba"])
async def test_closing_stops_what_runs_and_leaves_no_thread(
    make: Make, kind: str, beams: int
) -> None:
    bench = await make(kind, max_batch_size=1)
    stream = bench.service.stream(ask(max_new_tokens=None, num_beams=beams))
    first = asyncio.create_task(anext(stream))
    await bench.until(lambda: bench.engine.health().num_requests_running)
    if beams == 1:
        await first
    await bench.service.close(drain_timeout_s=0)
    last = await first if beams > 1 else [chunk async for chunk in stream][-1]
    assert isinstance(last, StreamError)
    assert "closed" in last
    assert not generate_threads()


async def test_an_engine_closed_by_itself_tells_its_requests(models: Tiny) -> None:
    rig = Rig(models.parts("llama"), max_batch_size=2)
    running = rig.send(rig.tokens("a"), ask(max_new_tokens=None))
    beams = rig.send(rig.tokens("a"), ask(max_new_tokens=None, num_beams=2))
    queued = rig.send(rig.tokens("b"))
    await running.mailbox.get()
    await until(generate_threads)
    await asyncio.to_thread(rig.engine.close)
    for task in (running, beams, queued):
        answer = await rig.read(task)
        assert isinstance(answer.error, ResourceNotAvailableError)
    assert not generate_threads()
    with pytest.raises(ResourceNotAvailableError):
        rig.send(rig.tokens("c"))


async def test_unloading_waits_for_the_running_request(make: Make) -> None:
    bench = await make(max_batch_size=1)
    stream = bench.service.stream(ask(max_new_tokens=64))
    await anext(stream)
    with pytest.raises(ResourceNotAvailableError):
        await bench.manager.unload("m", timeout_s=0.001)
    unloading = asyncio.create_task(bench.manager.unload("m"))
    assert [chunk async for chunk in stream]
    assert stream.response.generated_tokens == 64
    await unloading
    assert bench.manager.get_loaded_model("m") is None
