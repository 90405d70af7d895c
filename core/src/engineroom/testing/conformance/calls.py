"""Checks of calls of tools: that they are valid, told apart, and answered."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from engineroom.generation.deltas import ToolCallDelta
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import Streamed, again, is_refusal, said
from engineroom.testing.conformance.entries import has_all_entries
from engineroom.testing.conformance.forms import seed_of
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip
from engineroom.testing.conformance.thoughts import bound, marked
from engineroom.tools import NamedTool, ToolCall, new_call_id

__all__ = ["CallChecks"]

_RESULT: Final = 64
"""Tokens that the result of a call takes, and the answer to it, at most."""
_HOT: Final = (1.0, 1.5)
"""Temperatures, in turn."""
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
_VALID: Final = {"t": [f'{{"u":"{unit}"}}' for unit in _UNITS], "now": ["{}"]}
"""Arguments without blanks."""
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
                calls = _check_calls(kit, asked, answer)
                ids += (call.id for call in calls)
                request, response = asked, answer
            else:
                _check_begun(asked, await kit.bench.stream(again(asked)))
        if not ids:
            skip("the context has no room for tools and a call")
        if "" in ids or len(set(ids)) < len(ids):
            broken(did=f"{len(ids)} calls", expected="an id of its own for each", saw=str(ids))
        if kit.honours("logprobs"):
            counted = _ask(kit, 1, more={"logprobs": 1})
            answer = await kit.bench.infer(again(counted))
            if answer.error_message is None:
                has_all_entries(counted, answer)
                await _check_one(kit, answer)
        streamed = await kit.bench.stream(again(request))
        told = _check_stream(kit, request, streamed)
        if await kit.can_seed():
            did = f"infer({said(request)}), and stream with the same"
            same(did, "the same call", *(str(_told(some)) for some in (calls, told)))
        await _check_told(kit)
        await _check_results(kit, calls[0], response)


def _ask(
    kit: Kit, seed: int, more: dict[str, Any] | None = None, **fields: Any
) -> InferenceRequest:
    hot = {"temperature": _HOT[seed % len(_HOT)]} if kit.honours("temperature") else {}
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


async def _check_one(kit: Kit, called: InferenceResponse) -> None:
    """One call is one, however much the model likes the beginning of another.

    :param called: an answer with a call, and its tokens.
    """
    tokens = {entry.token_id for entry in called.logprobs or () if entry.bytes}
    if not tokens or not kit.honours("logit_bias"):
        return
    more = {"logit_bias": dict.fromkeys(tokens, 100.0)}  # all but what ends the text
    request = _ask(kit, 1, more=more, parallel_tool_calls=False)
    response = await kit.bench.infer(again(request))
    if len(calls := response.tool_calls or ()) > 1:
        broken(
            did=f"infer({said(request)}, parallel_tool_calls=False)",
            expected="one call",
            saw=str(_told(calls)),
        )


async def _check_results(kit: Kit, call: ToolCall, response: InferenceResponse) -> None:
    """The model reads its calls and what they returned, and answers."""
    used = (response.prompt_tokens or 0) + 2 * (response.generated_tokens or 0) + _RESULT
    room = used <= (kit.bench.loaded.max_context_tokens or used)
    short = _history(call)
    # A history is told without the tools as well.
    tools: dict[str, Any] = {"tools": [*_TOOLS]} if room else {}
    await kit.bench.answer(kit.likely(n=4, messages=short, **tools))
    least = await _read(kit, messages=short, **tools)
    for did, longer in (
        ("a result", _history(call, result="21, 22, 23, 24, 25")),
        ("a call's name", _history(call, "what_is_the_time")),
        ("a call's arguments", _history(call, arguments='{"zone": "UTC"}')),
    ):
        _is_longer(did, least, await _read(kit, messages=longer, **tools))
    two = [_history(call, "now", name) for name in ("now", "what_is_the_time")]
    if is_refusal(await kit.bench.infer(kit.likely(n=1, messages=two[-1]))):
        return  # some models write one call at a time
    counts = [await _read(kit, messages=messages) for messages in two]
    _is_longer("a second call's name", *counts)


def _history(
    call: ToolCall, *names: str, arguments: str = "{}", result: str = "21"
) -> list[ChatMessage]:
    """A question, calls of these tools, and what they returned."""
    ids = [call.id, *(new_call_id() for _ in names[1:])]
    calls = [
        ToolCall(id=id_, name=name, arguments=arguments)
        for id_, name in zip(ids, names or ("now",), strict=True)
    ]
    asked = ChatMessage(role="assistant", tool_calls=[each.as_message() for each in calls])
    results = [ChatMessage(role="tool", content=result, tool_call_id=id_) for id_ in ids]
    return [_QUESTION, asked, *results]


def _is_longer(did: str, short: int | None, count: int | None) -> None:
    if short is not None and count is not None and count <= short:
        broken(
            did=f"infer of a conversation with {did} of some characters, and of more",
            expected=f"a longer prompt, as the model reads {did}",
            saw=f"{short} tokens, and {count}",
        )


def _check_stream(kit: Kit, request: InferenceRequest, streamed: Streamed) -> list[ToolCall]:
    """What is streamed of calls is what the response has."""
    if (response := streamed.response) is None:
        return []
    calls = _check_calls(kit, request, response)
    did = f"stream({said(request)})"
    whole = [(call.id, call.name, call.arguments) for call in calls]
    same(f"{did}, its ToolCallDeltas joined", "the calls", whole, _joined(streamed))
    same(f"{did}, its text", "the content", response.generated_text, streamed.text)
    return calls


def _joined(streamed: Streamed) -> list[tuple[str | None, str | None, str]]:
    """The id, name and arguments of each call in a stream's deltas."""
    pieces: dict[int, tuple[str | None, str | None, str]] = {}
    for chunk in streamed.chunks:
        if isinstance(chunk, ToolCallDelta):
            id_, name, arguments = pieces.get(chunk.call, (chunk.id, chunk.name, ""))
            pieces[chunk.call] = id_, name, arguments + chunk.arguments
    return list(pieces.values())


def _check_begun(request: InferenceRequest, streamed: Streamed) -> None:
    """What the context has no room for begins as it should."""
    for _, name, arguments in _joined(streamed):
        begun = re.sub(r"\s", "", arguments)
        if not any(valid.startswith(begun) for valid in _VALID.get(name or "", ())):
            broken(
                did=f"stream({said(request)}, {_chosen(request)})",
                expected="a call of a tool that was offered, with arguments that begin as its "
                "schema says",
                saw=f"{name}({arguments}",
            )


def _fits(kit: Kit, response: InferenceResponse) -> bool:
    """Whether the context had room for the answer."""
    context = kit.bench.loaded.max_context_tokens
    used = (response.prompt_tokens or 0) + (response.generated_tokens or 0)
    return response.finish_reason != "length" or context is None or used < context


def _chosen(request: InferenceRequest) -> str:
    choice = request.tool_choice
    return f"tool_choice={choice.name if isinstance(choice, NamedTool) else choice!r}"


def _check_calls(
    kit: Kit, request: InferenceRequest, response: InferenceResponse
) -> list[ToolCall]:
    calls = response.tool_calls or []
    named = request.tool_choice.name if isinstance(request.tool_choice, NamedTool) else None
    valid = len(calls) == 1 and _is_valid(calls[0]) and named in (None, calls[0].name)
    text = (response.generated_text or "").strip()
    did = f"infer({said(request)}, {_chosen(request)})"
    if response.finish_reason != "tool_calls" or not valid or text:
        broken(
            did=did,
            expected="one call of a tool that was offered, of the one that was named, with "
            "arguments that are valid by its schema, and no content",
            saw=f"{response.finish_reason}: {_told(calls)}, {response.generated_text!r}",
        )
    if marked(kit, response):
        broken(did=did, expected="reasoning without its markers", saw=repr(response.reasoning))
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


def _told(calls: Sequence[ToolCall]) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in calls]
