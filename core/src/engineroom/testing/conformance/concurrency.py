"""Checks of several requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import Bench, again, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, skip

__all__ = ["ConcurrencyChecks"]

_MANY = 8
_TRIES = 3


class ConcurrencyChecks(Checks):
    """Many requests at once."""

    @check()
    async def test_requests_do_not_mix(self, kit: Kit) -> None:
        await kit.need_determinism()
        requests = [kit.watched(r) for r in _different(kit)]
        alone = [await kit.bench.answer(again(r)) for r in requests]
        wrong: list[str | None] = ["nothing"] * len(requests)
        for _ in range(1 if kit.settings.batch_invariant else 4):
            answers = await asyncio.gather(
                *(_either(kit, again(r), place % 2 == 1) for place, r in enumerate(requests))
            )
            for place, (request, one, other) in enumerate(
                zip(requests, alone, answers, strict=True)
            ):
                if wrong[place] is not None:
                    wrong[place] = await kit.difference(request, one, other)
            if not any(wrong):
                return
        for request, one, saw in zip(requests, alone, wrong, strict=True):
            if saw is not None:
                broken(
                    did=f"infer({said(request)}) beside {_MANY - 1} other requests",
                    expected=f"the text that it has alone, {one.generated_text!r}",
                    saw=saw,
                )

    @check()
    async def test_cache_scopes_apart(self, kit: Kit) -> None:
        prompt = f"Unlike the others: {await kit.long_prompt(share=0.4, most=150)}"
        request = kit.likely(prompt, 4, cache_salt="conformance-1")
        await kit.bench.answer(request)
        reused = (await kit.bench.answer(again(request))).cached_prompt_tokens
        if not reused:
            skip("a prompt that is sent again has no cached_prompt_tokens: nothing is used again")
        await _computed_anew(kit, again(request, cache_salt="conformance-2"), "after")
        # Of other checks' prompts without a salt it may have a beginning, as a token of the start.
        await _computed_anew(kit, again(request, cache_salt=None), "after", most=reused // 2)
        running = kit.bench.open(kit.likely(prompt, 64, cache_salt="conformance-3"))
        await kit.within(anext(running, None), f"stream({said(request)})")
        # Read on: a runtime with one place gives it to the next when this one has ended.
        reading = kit.spawn(_read_on(running))
        await _computed_anew(kit, again(request, cache_salt="conformance-4"), "beside")
        await kit.within(reading, f"the end of stream({said(request)})")

    @check()
    async def test_short_overtakes_long(self, kit: Kit) -> None:
        long = await kit.lengthy()
        short = kit.likely(kit.prompts[1], 2)
        one_at_a_time = False
        # A decoding thread may be done before a slow loop has sent the second request.
        for _ in range(_TRIES):
            ended: list[str] = []

            async def run(name: str, request: InferenceRequest, ended: list[str] = ended) -> None:
                await kit.bench.stream(request)
                ended.append(name)

            first = kit.spawn(run("the long one", again(long)))
            await kit.turns()
            if first.done():
                skip("the long request ended at once: there was nothing to overtake")
            second = kit.spawn(run("the short one", again(short)))
            while not (second.done() or first.done()):
                health = kit.bench.health()
                if health.num_requests_running == 1 and health.num_requests_waiting >= 1:
                    one_at_a_time = True
                await asyncio.wait(
                    [first, second], timeout=0.001, return_when=asyncio.FIRST_COMPLETED
                )
            await kit.within(second, "the short request")
            await kit.within(first, "the long request")
            if ended[0] == "the short one":
                return
            if one_at_a_time:
                skip(
                    "the runtime runs one request at a time here, as health says; load it with more"
                )
        broken(
            did=f"stream({said(long)}), and while it ran, stream({said(short)}), {_TRIES} times",
            expected="that the short one ends first: a slot is free",
            saw="that it waited until the long one had ended",
        )

    @check()
    async def test_queue_bound(self, kit: Kit) -> None:
        async with kit.narrow_model() as bench:
            request = await kit.lengthy(bench)
            answers = await asyncio.gather(*(bench.infer(again(request)) for _ in range(_MANY)))
            did = (
                f"{_MANY} requests at once, with the options "
                f"{dict(kit.settings.queue_options or {})}"
            )
            refused = [a for a in answers if a.error_message is not None]
            for answer in refused:
                if answer.error_type != "QueueFullError":
                    broken(did=did, expected="QueueFullError", saw=str(answer.error_message))
            if not refused or len(refused) == _MANY:
                broken(
                    did=did,
                    expected="that those beyond the bound are refused, and the others answered",
                    saw=f"{_MANY - len(refused)} answered, {len(refused)} refused",
                )
            await _usable(bench, request)


async def _read_on(stream: AsyncIterator[str]) -> None:
    async for _ in stream:
        pass


async def _computed_anew(kit: Kit, request: InferenceRequest, when: str, most: int = 0) -> None:
    """:raises BrokenRuleError: it has used what was computed in another cache scope."""
    cached = (await kit.bench.answer(request)).cached_prompt_tokens
    if cached and cached > most:
        broken(
            did=f"infer({said(request)}, cache_salt={request.cache_salt!r}) {when} others with the "
            "same prompt in other cache scopes",
            expected="no cached_prompt_tokens",
            saw=f"{cached} of them",
        )


async def _usable(bench: Bench, request: InferenceRequest) -> None:
    answer = await bench.infer(again(request))
    if answer.error_message is not None:
        broken(
            did="a request after the queue had been full",
            expected="an answer",
            saw=answer.error_message,
        )


async def _either(kit: Kit, request: InferenceRequest, streamed: bool) -> InferenceResponse:
    if not streamed:
        return await kit.bench.answer(request)
    stream = await kit.bench.stream(request)
    if stream.response is None:
        return InferenceResponse(
            request_id=request.request_id, model_id=request.model_id, generated_text=stream.text
        )
    return stream.response.model_copy(update={"generated_text": stream.text})


def _different(kit: Kit) -> list[InferenceRequest]:
    """Greedy requests that differ in all that the handler has."""
    greedy = kit.greedy()
    variants: list[tuple[int, dict[str, Any], list[str] | None]] = [
        (4, {}, None),
        (24, {}, None),
        (12, {"repetition_penalty": 1.5}, None),
        (16, {"presence_penalty": 1.5}, None),
        (20, {"frequency_penalty": 1.0}, None),
        (24, {}, ["e", "E"]),
        (8, {"logprobs": 1}, None),
        (24, {"logit_bias": {65: -5.0}}, [" "]),
    ]
    requests = []
    for place, (n, params, stops) in enumerate(variants):
        claimed = {name: value for name, value in params.items() if kit.honours(name)}
        requests.append(
            kit.request(
                f"{kit.prompts[place % len(kit.prompts)]} {place}",
                n,
                params={**greedy, **claimed},
                stop_sequences=stops if kit.capabilities.stop_sequences else None,
            )
        )
    return requests
