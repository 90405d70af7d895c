"""Log probabilities of prompts, whoever else computes, and whatever was computed before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_benches import EXACT, ask, move_eagerly, together

from engineroom import InferenceResponse
from engineroom_llamacpp import context as contexts
from engineroom_llamacpp.context import LlamaContext

Make = Callable[..., Awaitable[Any]]
TEXT = "all of this is written by someone who knows how long a prompt can become, and why. " * 2


def scores(response: InferenceResponse) -> list[tuple[int, float | None]]:
    assert response.error_message is None
    assert len(response.prompt_logprobs or ()) == response.prompt_tokens
    return [(entry.token_id, entry.logprob) for entry in response.prompt_logprobs or ()]


def are_close(one: list[tuple[int, float | None]], other: list[tuple[int, float | None]]) -> None:
    assert [token for token, _ in one] == [token for token, _ in other]
    assert one[0][1] is other[0][1] is None
    for (_, value), (_, expected) in zip(one[1:], other[1:], strict=True):
        assert value == pytest.approx(expected, abs=1e-3)


async def alone(make: Make, prompt: str) -> list[tuple[int, float | None]]:
    bench = await make(prefix_cache=False, n_parallel=1, n_ctx=1024, **EXACT)
    response = await bench.service.infer(ask(prompt, prompt_logprobs=0, max_new_tokens=0))
    assert (response.generated_tokens, response.finish_reason) == (0, "length")
    return scores(response)


async def test_they_are_those_that_the_same_tokens_have_when_they_are_generated(make: Make) -> None:
    bench = await make(n_ctx=1024, **EXACT)
    first = await bench.service.infer(ask(TEXT, prompt_logprobs=2, logprobs=2, max_new_tokens=12))
    told = [*(first.prompt_logprobs or ()), *(first.logprobs or ())]
    again = ask(
        prompt=None,
        prompt_token_ids=[e.token_id for e in told],
        prompt_logprobs=2,
        max_new_tokens=0,
    )
    second = await bench.service.infer(again)
    are_close(scores(second), [(entry.token_id, entry.logprob) for entry in told])
    for one, other in zip(told[1:], (second.prompt_logprobs or ())[1:], strict=True):
        assert [i for i, *_ in one.top] == [i for i, *_ in other.top]
        assert one.bytes == other.bytes


@pytest.mark.parametrize("unified", [True, False])
async def test_what_was_computed_before_and_beside_takes_none_away(
    make: Make, monkeypatch: pytest.MonkeyPatch, unified: bool
) -> None:
    monkeypatch.setattr(contexts, "_MOST_PROMPT_ROWS", contexts._LEAST_PROMPT_ROWS)
    move_eagerly(monkeypatch)
    expected = await alone(make, TEXT)
    bench = await make(n_ctx=2048, n_parallel=4, kv_unified=unified, **EXACT)
    most: list[int] = []
    decode = LlamaContext.decode

    def noted(context: LlamaContext) -> int:
        most.append(int(context._outputs[: context._batch.n_tokens].sum()))
        assert most[-1] <= context.n_outputs + context.prompt_rows
        return decode(context)

    monkeypatch.setattr(LlamaContext, "decode", noted)
    await bench.service.infer(ask(TEXT))
    for limits in ([0], [9, 0, 9, 9], [1, 1]):
        requests = [ask(TEXT, prompt_logprobs=0, max_new_tokens=limit) for limit in limits]
        requests.insert(1, ask(TEXT + "and more", max_new_tokens=30))
        answers = await asyncio.gather(*map(bench.service.infer, requests))
        other = answers.pop(1)
        assert other.error_message is None
        for answer in answers:
            are_close(scores(answer), expected)
            assert answer.cached_prompt_tokens == 0
    assert max(most) > 4
    # What they have read is there for others.
    after = await bench.service.infer(ask(TEXT))
    assert after.cached_prompt_tokens == after.prompt_tokens - 1


async def test_who_gives_way_is_told_of_each_token_once(make: Make) -> None:
    expected = await alone(make, TEXT)
    room = len(expected) * 5 // 2
    bench = await make(n_ctx=room, n_parallel=4, kv_unified=True, **EXACT)
    requests = [ask(TEXT, prompt_logprobs=0, max_new_tokens=room // 3) for _ in range(4)]
    for answer in await together(bench, requests):
        are_close(scores(answer), expected)
    assert bench.engine.preemptions > 0


async def test_a_prompt_with_too_many_is_refused(make: Make) -> None:
    bench = await make(n_ctx=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engineroom.prompts.limits._MOST_PROMPT_ENTRIES", 100)
        response = await bench.service.infer(ask(TEXT, prompt_logprobs=20))
    assert "log probabilities, and 100 are told at most" in (response.error_message or "")
