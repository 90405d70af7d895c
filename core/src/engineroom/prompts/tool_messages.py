"""Tools told in messages, for chat templates that know of none.

The form is that of Hermes (NousResearch/Hermes-Function-Calling), which small models imitate best:
definitions in the system message, calls between ``<tool_call>`` and ``</tool_call>``, results
between ``<tool_response>`` and ``</tool_response>`` in a message of the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engineroom.generation.call_forms import JsonForm, PythonicForm, ToolFormat
from engineroom.prompts.messages import arguments_of
from engineroom.prompts.work import check_stopped
from engineroom.schemas import ChatMessage

__all__ = ["calls_as_text", "tools_as_messages"]

_CALL = '<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>'


def tools_as_messages(
    messages: Sequence[ChatMessage],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    system: bool = True,
) -> list[ChatMessage]:
    """The conversation with tools, calls and results as text.

    :param tools: in OpenAI's form; what a history has of calls is told without them as well.
    :param system: the template knows system messages; else the first message of the user's says
        what the tools are.
    """
    told: list[ChatMessage] = []
    results: list[str] = []  # of one message
    for message in messages:
        check_stopped()
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.content or ''}\n</tool_response>")
            continue
        _end(results, told)
        if message.tool_calls:
            parts = [message.content or "", *map(_call, message.tool_calls)]
            text = "\n".join(filter(None, parts))
            told.append(_said(message.role, text, name=message.name, reasoning=message.reasoning))
        else:
            told.append(message)
    _end(results, told)
    return _with_definitions(told, tools, system) if tools else told


def calls_as_text(messages: Sequence[ChatMessage], format_: ToolFormat) -> list[ChatMessage]:
    """The conversation with its calls in the content, for templates that leave them out in silence.

    They are written as the model writes them, for it goes on as it sees that it has begun.
    """
    told: list[ChatMessage] = []
    for message in messages:
        check_stopped()
        if message.tool_calls:
            parts = (message.content, _written(message.tool_calls, format_))
            text = "\n".join(filter(None, parts))
            told.append(_said(message.role, text, name=message.name, reasoning=message.reasoning))
        else:
            told.append(message)
    return told


def _written(calls: Sequence[Mapping[str, Any]], format_: ToolFormat) -> str:
    form = format_.form
    named = [_name_and_arguments(call) for call in calls]
    if isinstance(form, PythonicForm) and all(isinstance(a, Mapping) for _, a in named):
        made = [f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in named]
        body = f"[{', '.join(made)}]" if form.brackets else "\n".join(made)
        return f"{format_.begin}{body}{format_.end}"
    if isinstance(form, JsonForm):
        keys = form.name_key, form.arguments_key
        objects = [
            json.dumps(
                dict(zip(keys, c, strict=True)) if keys[0] else {c[0]: c[1]}, ensure_ascii=False
            )
            for c in named
        ]
        bodies = [f"[{', '.join(objects)}]"] if form.many else objects
        marked = [f"{format_.begin}{body}{format_.end}" for body in bodies]
        return (format_.between or form.separator).join(marked)
    return "\n".join(map(_call, calls))


def _end(results: list[str], told: list[ChatMessage]) -> None:
    """Results, one after another, are one message."""
    if results:
        told.append(_said("user", "\n".join(results)))
        results.clear()


def _call(call: Mapping[str, Any]) -> str:
    name, arguments = _name_and_arguments(call)
    written = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>"


def _name_and_arguments(call: Mapping[str, Any]) -> tuple[Any, Any]:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    return function.get("name"), arguments_of(function.get("arguments"))


def _with_definitions(
    messages: list[ChatMessage], tools: Sequence[Mapping[str, Any]], system: bool
) -> list[ChatMessage]:
    definitions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You can call functions. Their definitions are between <tools> and </tools>, one a line.\n"
        f"<tools>\n{definitions}\n</tools>\n"
        "To call one, write a JSON object with its name and its arguments, like this:\n"
        f"{_CALL}"
    )
    roles = ("system", "developer") if system else ("user",)
    for place, message in enumerate(messages):
        if message.role in roles:
            content = f"{message.content}\n\n{text}" if system else f"{text}\n\n{message.content}"
            messages[place] = message.model_copy(update={"content": content})
            return messages
    return [_said("system" if system else "user", text), *messages]


def _said(role: str, text: str, **more: Any) -> ChatMessage:
    """A message; what is no text in it is refused where it is rendered."""
    fields: dict[str, Any] = {"role": role, "content": text, **more}
    return ChatMessage.model_construct(**fields)
