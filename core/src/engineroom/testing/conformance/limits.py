"""Checks of counts and limits, of what is not claimed, and of beams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engineroom.other_requests import TokenizeRequest
from engineroom.schemas import ChatMessage
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, refused, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip

__all__ = ["LimitChecks"]

UNUSUAL: Final[Mapping[str, Any]] = {
    "max_new_tokens": 5,
    "min_tokens": 3,
    "ignore_eos": True,
    "temperature": 1.3,
    "top_p": 0.5,
    "top_k": 5,
    "repetition_penalty": 1.3,
    "do_sample": False,
    "num_beams": 2,
    "early_stopping": True,
    "min_p": 0.2,
    "seed": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {1: -1.0},
    "logprobs": 1,
    "prompt_logprobs": 1,
    "structured_output": {"regex": "a+"},
}
"""A value of each field that asks for something."""

_FILLED: Final = 1 << 14
"""Tokens of the largest context that is filled: with more, a slow model reads for minutes."""
_LEAST: Final = 48
"""Tokens that an answer must have which would often be shorter."""
_MOST_ADDED: Final = 16
"""Most tokens that a model adds to a prompt: marks of its beginning and end."""


class LimitChecks(Checks):
    """Counts, limits and claims."""

    @check()
    async def test_token_counts(self, kit: Kit) -> None:
        added: dict[str, int] = {}
        for prompt in (kit.settings.prompt, kit.prompts[1], kit.settings.prompt * 3):
            counted = kit.handler.count_tokens(kit.bench.loaded, prompt)
            if counted is None:
                skip("count_tokens() returns None: the runtime cannot tell")
            if type(counted) is not int or counted < 0:
                broken(did=f"count_tokens({prompt!r})", expected="a number", saw=repr(counted))
            response = await kit.bench.answer(kit.likely(prompt, 1))
            if response.prompt_tokens is None:
                broken(
                    did=f"infer(prompt={prompt!r})",
                    expected="prompt_tokens, as count_tokens can tell them",
                    saw="None",
                )
            added[prompt] = response.prompt_tokens - counted
            await _told(kit, prompt, response.prompt_tokens)
        if len(set(added.values())) > 1 or not 0 <= min(added.values()) <= _MOST_ADDED:
            broken(
                did="compared prompt_tokens with count_tokens(prompt), for three prompts",
                expected=f"the same difference each time, from 0 to {_MOST_ADDED}",
                saw=", ".join(f"{value:+d}" for value in added.values()),
            )

    @check()
    async def test_max_new_tokens(self, kit: Kit) -> None:
        kit.need("max_new_tokens")
        for n in (0, 1, 2, 7):
            for did, response in await kit.both(kit.likely(n=n)):
                count, reason = response.generated_tokens, response.finish_reason
                if count is None:
                    continue
                if count > n or (count < n and reason == "length"):
                    broken(
                        did=did,
                        expected=f"{n} tokens, or fewer with the finish reason eos_token",
                        saw=f"{count} tokens with {reason!r}",
                    )
                if n == 0 and (response.generated_text or reason != "length"):
                    saw = f"{response.generated_text!r} with {reason!r}"
                    broken(did=did, expected="no text, and the finish reason 'length'", saw=saw)
                if count == n and reason not in ("length", "eos_token"):
                    broken(did=did, expected="the finish reason 'length'", saw=repr(reason))

    @check()
    async def test_max_new_tokens_none(self, kit: Kit) -> None:
        kit.need("max_new_tokens")
        context = kit.bench.loaded.max_context_tokens
        if context is None:
            skip("the context is unbounded: max_context_tokens is None")
        if context > _FILLED:
            skip(
                f"the context has {context} tokens, and is filled only up to {_FILLED}; test with "
                "a smaller one"
            )
        left = 64 if context >= 160 else context // 3
        prompt = await kit.long_prompt((context - left) / context, most=context)
        request = kit.likely(
            prompt,
            params={"max_new_tokens": None},
            timeout_s=0.9 * kit.settings.timeout_s,
        )
        response = await kit.bench.infer(request)
        if response.finish_reason == "timeout":
            skip(
                f"filling the context of {context} tokens takes more than {request.timeout_s:g} s; "
                "test with a smaller one, or a larger timeout_s"
            )
        if response.error_message is not None:
            broken(did=f"infer({said(request)})", expected="an answer", saw=response.error_message)
        if response.finish_reason == "eos_token":
            return
        total = (response.prompt_tokens or 0) + (response.generated_tokens or 0)
        if response.finish_reason != "length" or (response.prompt_tokens and total < context - 2):
            broken(
                did=f"infer({said(request)}), with {response.prompt_tokens} tokens of prompt and a "
                f"context of {context}",
                expected="tokens until the context is full, or eos_token",
                saw=f"{response.generated_tokens} tokens and {response.finish_reason!r}",
            )

    @check()
    async def test_min_tokens(self, kit: Kit) -> None:
        kit.need("min_tokens", "max_new_tokens")
        await _goes_on(kit, {"min_tokens": _LEAST})
        if not kit.capabilities.stop_sequences:
            return
        prompt, _ = await kit.sample_prompt()
        for beams in [{}, {"num_beams": 2}] if kit.honours("num_beams") else [{}]:
            params = {"min_tokens": 6, **beams}
            if not (text := await kit.text(kit.likely(prompt, 12, params=params))):
                continue
            request = kit.likely(prompt, 12, params=params, stop_sequences=[text[0]])
            for did, response in await kit.both(request):
                count, shown = response.generated_tokens, response.generated_text or ""
                if (count is not None and count < 6) or not shown.startswith(text[0]):
                    broken(
                        did=did,
                        expected="at least 6 tokens: before, no stop sequence ends the text",
                        saw=f"{count} tokens, {response.finish_reason!r} and the text {shown!r}",
                    )

    @check()
    async def test_ignore_eos(self, kit: Kit) -> None:
        kit.need("ignore_eos", "max_new_tokens")
        await _goes_on(kit, {"ignore_eos": True})

    @check()
    async def test_unclaimed_parameters(self, kit: Kit) -> None:
        unclaimed = [name for name in UNUSUAL if not kit.honours(name)]
        if not unclaimed:
            skip("capabilities() claims every field")
        determined = bool(kit.greedy()) and "max_new_tokens" not in unclaimed
        plain = (await kit.plain(n=6)).generated_text if determined else None
        for name in unclaimed:
            request = kit.likely(n=6, params={name: UNUSUAL[name]})
            did = f"infer({said(request)}), which is not claimed"
            refused(await kit.bench.infer(request), did, name)
            ignored = await kit.bench.infer(again(request, on_unsupported="warn"))
            did += ', with on_unsupported="warn"'
            if ignored.error_message is not None or not any(name in w for w in ignored.warnings):
                broken(
                    did=did,
                    expected=f"an answer and a warning that names {name}",
                    saw=ignored.error_message or f"the warnings {ignored.warnings}",
                )
            if determined:
                same(did, "the text without it", plain, ignored.generated_text)

    @check()
    async def test_unknown_adapter(self, kit: Kit) -> None:
        request = kit.likely(n=6, adapter="no-such-adapter")
        named = "no-such-adapter" if kit.capabilities.adapters else "adapter"
        did = f"infer({said(request)}, adapter='no-such-adapter')"
        refused(await kit.bench.infer(request), did, named)
        await kit.plain(n=6)

    @check()
    async def test_num_beams(self, kit: Kit) -> None:
        kit.need("num_beams")
        if not await kit.has_choice():
            skip("the model says the same whatever is asked: it leaves no choice")
        other = False
        for prompt in kit.prompts:
            request = kit.likely(prompt, 24, params={"num_beams": 4})
            first, second = await kit.text(request), await kit.text(request)
            same(f"infer({said(request)}), twice", "the same text", first, second)
            other = other or first != (await kit.plain(prompt, 24)).generated_text
        if not other:
            broken(
                did=f"infer with num_beams=4, for {len(kit.prompts)} prompts",
                expected="a text that greedy search does not find",
                saw="the greedy text each time",
            )

    @check()
    async def test_early_stopping(self, kit: Kit) -> None:
        kit.need("early_stopping")
        if not kit.honours("num_beams"):
            broken(
                did="capabilities()",
                expected="early_stopping together with num_beams, which it is about",
                saw="early_stopping alone",
            )
        for prompt in kit.prompts[:2]:
            params = {**kit.greedy(), "num_beams": 2}
            counts = []
            for early in (False, True):
                request = kit.request(prompt, 24, params={**params, "early_stopping": early})
                counts.append((await kit.bench.answer(request)).generated_tokens or 0)
            if counts[1] > counts[0]:
                broken(
                    did=f"infer({said(request)})",
                    expected=f"at most {counts[0]} tokens, as without early_stopping",
                    saw=f"{counts[1]} tokens",
                )


async def _goes_on(kit: Kit, params: Mapping[str, Any]) -> None:
    """The text goes on to ``max_new_tokens``, also where the model would end it before."""
    chat = {"messages": [ChatMessage(role="user", content="Say hello.")]}
    inputs: list[dict[str, Any]] = [chat] if kit.capabilities.chat else []
    ways: list[dict[str, Any]] = [kit.greedy()]
    if kit.honours("seed"):
        hot = {"temperature": 2.0} if kit.honours("temperature") else {}
        ways += [{"seed": seed, **hot} for seed in range(1, 5)]
    for fields in [*inputs, {"prompt": kit.settings.prompt}]:
        for way in ways:
            request = kit.request(n=_LEAST, params={**way, **params}, **fields)
            response = await kit.bench.answer(request)
            count, reason = response.generated_tokens, response.finish_reason
            if reason != "length" or count not in (None, _LEAST):
                broken(
                    did=f"infer({said(request)})",
                    expected=f"{_LEAST} tokens with the finish reason 'length'",
                    saw=f"{count} tokens with {reason!r}",
                )


async def _told(kit: Kit, prompt: str, count: int) -> None:
    """What the handler tells of a prompt's tokens, where it does."""
    handler, loaded = kit.handler, kit.bench.loaded
    request = TokenizeRequest(model_id=loaded.model_id, prompt=prompt)
    ids = await kit.within(handler.tokenize(loaded, request), "tokenize")
    if ids is None:
        return
    same(f"tokenize({prompt!r})", "as many tokens as prompt_tokens says", count, len(ids))
    pieces = await kit.within(handler.token_bytes(loaded, ids), "token_bytes")
    if pieces is not None and prompt.strip().encode() not in b"".join(pieces):
        broken(
            did=f"joined token_bytes of tokenize({prompt!r})",
            expected="the bytes of the prompt",
            saw=repr(b"".join(pieces)),
        )
