"""Checks of texts that have a form whatever is drawn."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from engineroom.schemas import STRUCTURED_KINDS, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, is_refusal, said
from engineroom.testing.conformance.entries import has_all_entries
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.limits import UNUSUAL
from engineroom.testing.conformance.outcomes import broken, same, skip

__all__ = ["FormChecks", "seed_of"]

_SEEDS: Final = 50
_AT_ONCE: Final = 3
_HOT: Final = 1.5
_ANSWER: Final = "Answer: "
_SCHEMA: Final = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "of": {"enum": ["a", "b", None]}},
    "required": ["ok", "of"],
    "additionalProperties": False,
}
_BESIDES: Final = (
    (),
    ("repetition_penalty",),
    ("presence_penalty", "frequency_penalty"),
    ("logit_bias",),
    ("top_k",),
    ("top_p", "min_p"),
    ("logprobs",),
)
"""What is asked for beside a schema, in turn."""
_PATTERN: Final = "(yes|no)"
_VALUES: Final[Mapping[str, Any]] = {
    "regex": _PATTERN,
    "json_schema": {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    },
    "grammar": 'root ::= "yes" | "no"',
    "choice": ["yes", "no"],
    "json_object": True,
}
_JSON: Final = ("json_schema", "json_object")
"""Kinds whose text may be cut, for a small model may write on for ever."""
_WORDS: Final = ("true", "false", "null")


class FormChecks(Checks):
    """What a grammar holds."""

    @check()
    async def test_structured_output(self, kit: Kit) -> None:
        kit.need("structured_output")
        kinds = kit.capabilities.structured_output
        if not kinds or not kinds.issubset(STRUCTURED_KINDS):
            broken(
                did="capabilities()",
                expected=f"the kinds of structured_output, of {', '.join(STRUCTURED_KINDS)}",
                saw=f"structured_output among params, and the kinds {sorted(kinds)}",
            )
        for kind in filter(kinds.__contains__, _VALUES):
            params = {"structured_output": {kind: _VALUES[kind]}}
            request = kit.likely("Is the sky blue? Answer: ", 96, params=params)
            response = await kit.bench.answer(again(request))
            text, cut = response.generated_text or "", response.finish_reason == "length"
            expected, saw = f"a text that matches the {kind}", repr(text)
            if cut:
                expected = "the end of the text once it matches"
                saw = f"{response.generated_tokens} tokens: {text!r}"
            if not (kind in _JSON and _begins_json(text) if cut else _matches(kind, text)):
                broken(did=f"infer({said(request)})", expected=expected, saw=saw)
            if kit.greedy() and kind != "json_object":
                streamed = await kit.bench.stream(again(request))
                same(f"stream({said(request)})", "the text of infer", text, streamed.text)
                if kind not in _JSON and kit.capabilities.stop_sequences:
                    stopping = again(request, stop_sequences=[text[-1]])
                    stopped = await kit.text(stopping)
                    same(f"infer({said(stopping)})", "the text before it", text[:-1], stopped)

    @check()
    async def test_structured_seeds(self, kit: Kit) -> None:
        kit.need("structured_output")
        if "json_schema" not in kit.capabilities.structured_output:
            skip("capabilities() does not claim structured_output by json_schema")
        hot = {"temperature": _HOT} if kit.honours("temperature") else {}
        form = {"structured_output": {"json_schema": _SCHEMA}}
        neighbour = kit.likely(n=24)
        values = {**UNUSUAL, "logit_bias": await _bias(kit)}

        def of(number: int) -> InferenceRequest:
            names = filter(kit.honours, _BESIDES[number % len(_BESIDES)])
            besides = {name: values[name] for name in names}
            params = {**hot, **form, **seed_of(kit, number), **besides}
            return kit.request(_ANSWER, 96, params=params)

        async def ask(numbers: range) -> None:
            for request in map(of, numbers):
                _check_json(request, await kit.bench.infer(again(request)))

        async def beside(watched: InferenceRequest) -> InferenceResponse:
            asking = asyncio.gather(*(ask(range(n, _SEEDS, _AT_ONCE)) for n in range(_AT_ONCE)))
            try:
                return await kit.bench.answer(again(watched))
            finally:
                await asking

        await kit.unchanged(
            f"infer({said(neighbour)}) beside {_SEEDS} requests with a schema",
            "the text that it has alone",
            neighbour,
            beside,
        )
        if await kit.can_seed():
            request = of(0)
            texts = [await kit.text(request) for _ in range(2)]
            same(f"infer({said(request)}), twice", "one text", texts[:1] * 2, texts)


async def _bias(kit: Kit) -> Mapping[int, float]:
    """One that a form outweighs: to the token that would come first without it."""
    if kit.honours("logprobs"):
        free = await kit.bench.answer(kit.likely(_ANSWER, 1, params={"logprobs": 1}))
        for entry in free.logprobs or ():
            return {entry.token_id: 100.0}
    bias: Mapping[int, float] = UNUSUAL["logit_bias"]
    return bias


def seed_of(kit: Kit, number: int) -> Mapping[str, Any]:
    """A seed, where the handler takes one."""
    return {"seed": number} if kit.honours("seed") else {}


def _matches(kind: str, text: str) -> bool:
    if kind not in _JSON:
        return re.fullmatch(_PATTERN, text) is not None
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or kind == "json_object":
        return isinstance(value, dict)
    return set(value) == {"ok"} and isinstance(value["ok"], bool)


def _begins_json(text: str) -> bool:
    """Whether an object may begin like that."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        cut = not rest or rest == "-" or any(word.startswith(rest) for word in _WORDS)
        return text.lstrip().startswith("{") and (cut or error.msg.startswith(_CUT))
    return False  # it is whole, and should have ended


_CUT: Final = ("Unterminated string", "Invalid \\")
"""How ``json`` tells of a text that ends within a string."""


def _check_json(request: InferenceRequest, response: InferenceResponse) -> None:
    besides = len(request.params.model_fields_set & UNUSUAL.keys() - _ALWAYS)
    if besides and is_refusal(response):
        return  # what cannot be had together is refused
    text = response.generated_text or ""
    if besides and response.finish_reason == "length" and _begins_json(text):
        return  # truncation, for one, lets blanks come again and again
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    valid = isinstance(value, dict) and value.keys() == {"ok", "of"}
    if not valid or not isinstance(value["ok"], bool) or value["of"] not in ("a", "b", None):
        broken(
            did=f"infer({said(request)})",
            expected="JSON that is valid by the schema",
            saw=f"{response.finish_reason}: {response.error_message or response.generated_text!r}",
        )
    has_all_entries(request, response)


_ALWAYS: Final = {"temperature", "structured_output", "seed", "max_new_tokens"}
"""What each request with a schema has."""
