"""Checks of calls of tools: that they are valid, told apart, and answered."""

from __future__ import annotations

import json
from typing import Any, Final

from engineroom.generation.deltas import ToolCallDelta
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import Streamed, again, is_refusal, said
from engineroom.testing.conformance.entries import has_all_entries
from engineroom.testing.conformance.forms import seed_of
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip
from engineroom.testing.conformance.thoughts import bound
from engineroom.tools import NamedTool, ToolCall

__all__ = ["CallChecks"]

_RESULT: Final = 64
"""Tokens that the result of a call takes, and the answer to it, at most."""
_UNITS: Final = ("C", "K")
_TOOLS: Final = (
    {"name": "t", "parameters": {"properties": {"u": {"enum": [*_UNITS]}}, "required": ["u"]}},
    {"name": "now"},
)
"""Short: a tiny model has a token a letter, and a context of 512."""
_CHOICES: Final[tuple[dict[str, Any], ...]] = (
    {"parallel_tool_calls": False},
    {"tool_choice": {"name": "t"}},
    {"tool_choice": {"name": "now"}},
)
"""What is asked for, in turn."""
_QUESTION: Final = ChatMessage(role="user", content="Warm?")


class CallChecks(Checks):
    """Calls of tools."""

    @check()
    async def test_tool_calls(self, kit: Kit) -> None:
        if not kit.capabilities.chat:
            skip("capabilities() does not claim chat; the service refuses messages by name")
        if "grammar" not in kit.capabilities.structured_output:
            skip("capabilities() does not claim grammars; calls that have to be are refused")
        first = await kit.bench.infer(_ask(kit, 0))
        if is_refusal(first):
            skip(f"the model takes no conversation with tools ({first.error_message})")
        ids: list[str] = []
        for seed in range(1, 7):
            asked = _ask(kit, seed, **_CHOICES[seed % len(_CHOICES)])
            answer = await kit.bench.answer(again(asked))
            if _fits(kit, answer):
                calls = _check_calls(asked, answer)
                ids += (call.id for call in calls)
                request, response = asked, answer
        if not ids:
            skip("the context has no room for tools and a call")
        if "" in ids or len(set(ids)) < len(ids):
            broken(did=f"{len(ids)} calls", expected="an id of its own for each", saw=str(ids))
        if kit.honours("logprobs"):
            counted = _ask(kit, 1, more={"logprobs": 1})
            answer = await kit.bench.infer(again(counted))
            if answer.error_message is None:
                has_all_entries(counted, answer)
        streamed = await kit.bench.stream(again(request))
        told = _check_stream(request, streamed)
        if await kit.can_seed():
            did = f"infer({said(request)}), and stream with the same"
            same(did, "the same call", *(str(_told(some)) for some in (calls, told)))
        await _check_told(kit)
        await _check_results(kit, calls[0], response)


def _ask(
    kit: Kit, seed: int, more: dict[str, Any] | None = None, **fields: Any
) -> InferenceRequest:
    hot = {"temperature": 1.0} if kit.honours("temperature") else {}
    params = {**hot, **seed_of(kit, seed), **(more or {})}
    fields = {"messages": [_QUESTION], "tool_choice": "required", **bound(kit), **fields}
    return kit.request(None, 256, params=params, tools=list(_TOOLS), **fields)


async def _read(kit: Kit, **fields: Any) -> int | None:
    """How many tokens the prompt has."""
    return (await kit.bench.answer(kit.likely(n=1, **fields))).prompt_tokens


async def _check_told(kit: Kit) -> None:
    """The model is told of the tools that it may call."""
    fields: dict[str, Any] = {"messages": [_QUESTION]}
    plain = await _read(kit, **fields)
    told = await _read(kit, **fields, tools=list(_TOOLS))
    none = await _read(kit, **fields, tools=list(_TOOLS), tool_choice="none")
    if plain is None or told is None:
        return
    if told <= plain:
        broken(
            did="infer with tools, and without",
            expected="a longer prompt with them, as the model is told of them",
            saw=f"{told} tokens with them, {plain} without",
        )
    same("infer with tools and tool_choice='none'", "the prompt without tools", plain, none)


async def _check_results(kit: Kit, call: ToolCall, response: InferenceResponse) -> None:
    """The model reads its calls and what they returned, and answers."""
    used = (response.prompt_tokens or 0) + 2 * (response.generated_tokens or 0) + _RESULT
    room = used <= (kit.bench.loaded.max_context_tokens or used)

    def history(result: str, name: str = "now") -> dict[str, Any]:
        named = ToolCall(id=call.id, name=name, arguments="{}")
        returned = ChatMessage(role="tool", content=result, tool_call_id=call.id)
        asked = ChatMessage(role="assistant", tool_calls=[named.as_message()])
        # A history is told without the tools as well.
        tools = [*_TOOLS] if room else None
        return {"messages": [_QUESTION, asked, returned], "tools": tools}

    await kit.bench.answer(kit.likely(n=4, **history("21")))
    short = await _read(kit, **history("21"))
    for did, longer in (
        ("a result", history("21, 22, 23, 24, 25")),
        ("a call", history("21", "what_is_the_time")),
    ):
        count = await _read(kit, **longer)
        if short is not None and count is not None and count <= short:
            broken(
                did=f"infer of a conversation with {did} of some characters, and of more",
                expected=f"a longer prompt, as the model reads {did}",
                saw=f"{short} tokens, and {count}",
            )


def _check_stream(request: InferenceRequest, streamed: Streamed) -> list[ToolCall]:
    """What is streamed of calls is what the response has."""
    if (response := streamed.response) is None:
        return []
    calls = _check_calls(request, response)
    pieces: dict[int, tuple[str | None, str | None, str]] = {}
    for chunk in streamed.chunks:
        if isinstance(chunk, ToolCallDelta):
            id_, name, arguments = pieces.get(chunk.call, (chunk.id, chunk.name, ""))
            pieces[chunk.call] = id_, name, arguments + chunk.arguments
    did = f"stream({said(request)})"
    whole = [(call.id, call.name, call.arguments) for call in calls]
    same(f"{did}, its ToolCallDeltas joined", "the calls", whole, list(pieces.values()))
    same(f"{did}, its text", "the content", response.generated_text, streamed.text)
    return calls


def _fits(kit: Kit, response: InferenceResponse) -> bool:
    """Whether the context had room for the answer."""
    context = kit.bench.loaded.max_context_tokens
    used = (response.prompt_tokens or 0) + (response.generated_tokens or 0)
    return response.finish_reason != "length" or context is None or used < context


def _check_calls(request: InferenceRequest, response: InferenceResponse) -> list[ToolCall]:
    calls = response.tool_calls or []
    named = request.tool_choice.name if isinstance(request.tool_choice, NamedTool) else None
    valid = len(calls) == 1 and _is_valid(calls[0]) and named in (None, calls[0].name)
    text = (response.generated_text or "").strip()
    if response.finish_reason != "tool_calls" or not valid or text:
        broken(
            did=f"infer({said(request)}, tool_choice={named or 'required'!r})",
            expected="one call of a tool that was offered, of the one that was named, with "
            "arguments that are valid by its schema, and no content",
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
