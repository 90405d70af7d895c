"""Checks of what has a form whatever is drawn: schemas, and calls of tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip
from engineroom.testing.conformance.thoughts import bound
from engineroom.tools import ToolCall

__all__ = ["FormChecks"]

_SEEDS: Final = 50
_AT_ONCE: Final = 3
_HOT: Final = 1.5
_RESULT: Final = 64
"""Tokens that the result of a call takes, and the answer to it, at most."""
_SCHEMA: Final = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "of": {"enum": ["a", "b", None]}},
    "required": ["ok", "of"],
    "additionalProperties": False,
}
_UNITS: Final = ("C", "K")
_TOOLS: Final = (
    {"name": "t", "parameters": {"properties": {"u": {"enum": [*_UNITS]}}, "required": ["u"]}},
    {"name": "now"},
)
"""Short: a tiny model has a token a letter, and a context of 512."""


class FormChecks(Checks):
    """What a grammar holds."""

    @check()
    async def test_structured_seeds(self, kit: Kit) -> None:
        kit.need("structured_output")
        if "json_schema" not in kit.capabilities.structured_output:
            skip("capabilities() does not claim structured_output by json_schema")
        hot = {"temperature": _HOT} if kit.honours("temperature") else {}
        form = {"structured_output": {"json_schema": _SCHEMA}}
        neighbour = kit.likely(n=24)

        async def ask(numbers: range) -> None:
            for number in numbers:
                params = {**hot, **form, **_seed(kit, number)}
                request = kit.request("Answer: ", 96, params=params)
                _check_json(request, await kit.bench.answer(request))

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

    @check()
    async def test_tool_calls(self, kit: Kit) -> None:
        if not kit.capabilities.chat:
            skip("capabilities() does not claim chat; the service refuses messages by name")
        if "grammar" not in kit.capabilities.structured_output:
            skip("capabilities() does not claim grammars; calls that have to be are refused")
        hot = {"temperature": 1.0} if kit.honours("temperature") else {}
        question = ChatMessage(role="user", content="Warm?")

        def ask(seed: int, **fields: Any) -> InferenceRequest:
            params = {**hot, **_seed(kit, seed)}
            fields = {"messages": [question], "tool_choice": "required", **bound(kit), **fields}
            return kit.request(None, 256, params=params, tools=list(_TOOLS), **fields)

        first = await kit.bench.infer(ask(0))
        if first.error_type == "ConfigurationError":
            skip(f"the model takes no conversation with tools ({first.error_message})")
        for seed in range(1, 9):
            request = ask(seed, parallel_tool_calls=False)
            response = await kit.bench.answer(request)
            calls = _check_calls(kit, request, response)
        if await kit.can_seed():
            streamed = (await kit.bench.stream(again(request))).response
            told = [] if streamed is None else _check_calls(kit, request, streamed)
            did = f"infer({said(request)}), and stream with the same"
            same(did, "the same call", *(str(_told(some)) for some in (calls, told)))
        used = (response.prompt_tokens or 0) + 2 * (response.generated_tokens or 0) + _RESULT
        room = used <= (kit.bench.loaded.max_context_tokens or used)
        call = calls[0]
        result = ChatMessage(role="tool", content="21", tool_call_id=call.id)
        history = [question, ChatMessage(role="assistant", tool_calls=[call.as_message()]), result]
        # A history is told without the tools as well.
        tools = [*_TOOLS] if room else None
        await kit.bench.answer(kit.likely(n=4, messages=history, tools=tools))


def _seed(kit: Kit, number: int) -> Mapping[str, Any]:
    return {"seed": number} if kit.honours("seed") else {}


def _check_json(request: InferenceRequest, response: InferenceResponse) -> None:
    try:
        value = json.loads(response.generated_text or "")
    except ValueError:
        value = None
    valid = isinstance(value, dict) and value.keys() == {"ok", "of"}
    if not valid or not isinstance(value["ok"], bool) or value["of"] not in ("a", "b", None):
        broken(
            did=f"infer({said(request)})",
            expected="JSON that is valid by the schema",
            saw=f"{response.finish_reason}: {response.generated_text!r}",
        )


def _check_calls(
    kit: Kit, request: InferenceRequest, response: InferenceResponse
) -> list[ToolCall]:
    calls = response.tool_calls or []
    context = kit.bench.loaded.max_context_tokens
    used = (response.prompt_tokens or 0) + (response.generated_tokens or 0)
    if response.finish_reason == "length" and context is not None and used >= context:
        skip("the context has no room for tools and a call")
    if response.finish_reason != "tool_calls" or len(calls) != 1 or not _is_valid(calls[0]):
        broken(
            did=f"infer({said(request)}, tool_choice='required')",
            expected="one call of a tool that was offered, with arguments that are valid by its "
            "schema",
            saw=f"{response.finish_reason}: {_told(calls)}, {response.generated_text!r}",
        )
    return calls


def _is_valid(call: ToolCall) -> bool:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        return False
    if call.name == "now":
        return bool(arguments == {})
    known = isinstance(arguments, dict) and arguments.keys() == {"u"}
    return known and call.name == "t" and arguments["u"] in _UNITS


def _told(calls: list[ToolCall]) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in calls]
