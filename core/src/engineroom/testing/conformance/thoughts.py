"""Checks of what a model thinks before it answers."""

from __future__ import annotations

import re
from typing import Any, Final

from engineroom.generation.deltas import ReasoningDelta
from engineroom.generation.traits import PLAIN, ModelTraits
from engineroom.handlers.token_handler import TokenHandler
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, said
from engineroom.testing.conformance.entries import has_all_entries
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip

__all__ = ["ReasoningChecks", "bound", "marked", "traits_of"]

_BUDGET: Final = 12
_PATTERN: Final = "[0-9]{2}-[0-9]{2}"
_CHOICE: Final = ("on", "off")


def traits_of(kit: Kit) -> ModelTraits:
    """What the model writes beside content, as far as the handler says it."""
    handler = kit.handler
    return handler.traits(kit.bench.loaded) if isinstance(handler, TokenHandler) else PLAIN


def bound(kit: Kit) -> dict[str, Any]:
    """What bounds the thoughts of an answer, where the handler can bound them."""
    return {"reasoning_budget": _BUDGET} if kit.capabilities.reasoning_budget else {}


def marked(kit: Kit, response: InferenceResponse) -> bool:
    """Whether what stands around thoughts is in content, or was left at the thoughts."""
    if (form := traits_of(kit).reasoning) is None:
        return False
    begin, end = form.begin.strip(), form.end.strip()
    content, thoughts = response.generated_text or "", (response.reasoning or "").strip()
    apart = begin not in content and end not in content
    return not apart or thoughts.startswith(begin) or thoughts.endswith(end)


class ReasoningChecks(Checks):
    """Thoughts and content."""

    @check()
    async def test_reasoning_apart(self, kit: Kit) -> None:
        if not kit.capabilities.chat:
            skip("capabilities() does not claim chat; the service refuses messages by name")
        form = traits_of(kit).reasoning
        if form is None:
            skip("the model is not known to think; traits(loaded_model) of the handler says so")
        await kit.need_determinism()
        request = _ask(kit)
        plain = await kit.bench.answer(again(request))
        if not plain.reasoning:
            _broken(request, "reasoning beside the content", plain)
        if marked(kit, plain):
            _broken(request, f"neither {form.begin!r} nor {form.end!r} in them", plain)
        stream = await kit.bench.stream(again(request))
        thoughts = [chunk.text for chunk in stream.chunks if isinstance(chunk, ReasoningDelta)]
        did = f"stream({said(request)})"
        same(f"{did}, its ReasoningDeltas", "the reasoning", plain.reasoning, "".join(thoughts))
        same(f"{did}, its text", "the content", plain.generated_text, stream.text)
        if kit.honours("logprobs"):
            counted = _ask(kit, logprobs=1)
            has_all_entries(counted, await kit.bench.answer(again(counted)))
        await _check_stops(kit, request, plain)
        await _check_forms(kit)


def _ask(kit: Kit, **params: Any) -> InferenceRequest:
    question = ChatMessage(role="user", content="How warm is it?")
    return kit.likely(n=96, messages=[question], params=params, **bound(kit))


async def _check_stops(kit: Kit, request: InferenceRequest, plain: InferenceResponse) -> None:
    """What stands in the thoughts alone stops nothing."""
    content, thoughts = plain.generated_text or "", plain.reasoning or ""
    alone = [text for text in thoughts.strip() if text not in content and text.isprintable()]
    if not alone:
        return
    stopping = again(request, stop_sequences=alone[:1])
    response = await kit.bench.answer(stopping)
    same(f"infer({said(stopping)})", "the reasoning without it", thoughts, response.reasoning)
    same(f"infer({said(stopping)})", "the content without it", content, response.generated_text)


async def _check_forms(kit: Kit) -> None:
    """Thoughts are free, and content has the form."""
    kinds = kit.capabilities.structured_output
    if not kit.honours("structured_output") or not kit.capabilities.reasoning_budget:
        return
    forms = {"regex": _PATTERN, "choice": [*_CHOICE]}
    for kind in filter(kinds.__contains__, forms):
        request = _ask(kit, structured_output={kind: forms[kind]})
        response = await kit.bench.answer(again(request))
        text = response.generated_text or ""
        fits = re.fullmatch(_PATTERN, text) if kind == "regex" else text in _CHOICE
        if not response.reasoning or not fits:
            _broken(request, f"reasoning, and content that matches the {kind}", response)
        streamed = await kit.bench.stream(again(request))
        same(f"stream({said(request)}), its text", "the content", text, streamed.text)


def _broken(request: InferenceRequest, expected: str, response: InferenceResponse) -> None:
    broken(
        did=f"infer({said(request)})",
        expected=expected,
        saw=f"reasoning {response.reasoning!r}, content {response.generated_text!r}",
    )
