"""Tools and reasoning, by the names that OpenAI's APIs have for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from pydantic import Field, Tag

from engineroom.field_types import either
from engineroom.server.apis.request_fields import SubSchema
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.thinking import EFFORTS, contradictions, told_to_template
from engineroom.tools import MAX_TOOLS, ToolCall, schema_field

__all__ = [
    "UNTOLD",
    "CalledFunction",
    "CalledTool",
    "ChatTool",
    "Effort",
    "FunctionDefinition",
    "ReasoningConfig",
    "TemplateFields",
    "Thinking",
    "ToolChoice",
    "ToolList",
    "as_object",
    "chosen_tools",
    "is_object",
    "reasoning_of",
]

# ── tools ────────────────────────────────────────────────────────────────────────────────────


class FunctionDefinition(SubSchema):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments; without it, it has none."""
    strict: bool | None = None
    """Whether arguments are always valid by the schema; a runtime that cannot see to it refuses the
    request."""

    def as_tool(self) -> dict[str, Any]:
        """As the service has it, and templates write it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        if self.strict:
            function["strict"] = True
        return {"type": "function", "function": function}


def is_object(arguments: str) -> bool:
    """Whether the arguments of a call are whole: an object in JSON."""
    try:
        return isinstance(msgspec.json.decode(arguments), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def as_object(arguments: str) -> Any:
    """The arguments of a call as they were written, where they are an object; else an empty one."""
    return msgspec.Raw(arguments.encode()) if is_object(arguments) else {}


class ChatTool(SubSchema):
    """A tool, as the older API writes it."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(SubSchema):
    """Which function."""

    name: str


class AllowedTool(SubSchema):
    """One of those that may be called, as either API writes it."""

    type: Literal["function"]
    name: str | None = None
    function: FunctionName | None = None


class AllowedTools(SubSchema):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class ToolChoiceOf(SubSchema):
    """A certain tool, or some of them, as either API writes it."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None
    mode: Literal["auto", "required"] | None = None
    tools: (
        Annotated[list[AllowedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]
        | None
    ) = None


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(word)")]
    | Annotated[ToolChoiceOf, Tag("(tool)")],
    either("a word or a tool", {str: "(word)", dict: "(tool)"}),
]
"""Whether tools are called: ``none``, ``auto``, ``required``, a certain one, or some of them."""


class CalledFunction(SubSchema):
    """What was called, and how."""

    name: str
    arguments: str


class CalledTool(SubSchema):
    """A call that the model has made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_message(self) -> dict[str, Any]:
        """As the service's messages have it."""
        name, arguments = self.function.name, self.function.arguments
        return ToolCall(id=self.id, name=name, arguments=arguments).as_message()


ToolList = Annotated[list[ChatTool], Field(fail_fast=True, max_length=MAX_TOOLS)]


def chosen_tools(
    call: Call,
    tools: Sequence[FunctionDefinition] | None,
    choice: str | ToolChoiceOf | None,
    parallel: bool | None,
    schema_in: str,
) -> dict[str, Any]:
    """Fields of ``InferenceRequest``.

    :param call: whose errors will name the tool.
    :param schema_in: where in a tool the API has the schema of its parameters.
    :raises ApiError: 400: the choice names no tool, or one that there is not.
    """
    offered = {tool.name: tool.as_tool() for tool in tools or ()}
    if len(offered) < len(tools or ()):
        raise _wrong("two tools have the same name; rename one of them", "tools")
    named: dict[str, str] | None = None
    if isinstance(choice, ToolChoiceOf):
        if choice.type == "function":
            named = {"name": _name_of(choice, offered)}
        else:
            offered, choice = _allowed(choice, offered)
    if choice == "required" and not offered:
        raise _wrong("tool_choice asks for a call, but there are no tools")
    if not offered:
        return {}
    of_api = {tool.name: f"tools.{place}.{schema_in}" for place, tool in enumerate(tools or ())}
    call.places |= {schema_field(place): of_api[name] for place, name in enumerate(offered)}
    return {
        "tools": list(offered.values()),
        "tool_choice": named or choice,
        "parallel_tool_calls": parallel,
    }


def _allowed(
    choice: ToolChoiceOf, offered: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], str]:
    some = choice.allowed_tools
    tools, mode = (some.tools, some.mode) if some is not None else (choice.tools, choice.mode)
    if tools is None or mode is None:
        raise _wrong("allowed_tools needs mode and tools")
    names = [_name_of(tool, offered) for tool in tools]
    return {name: tool for name, tool in offered.items() if name in names}, mode


def _name_of(choice: ToolChoiceOf | AllowedTool, offered: Collection[str]) -> str:
    name = choice.function.name if choice.function is not None else choice.name
    if name is None:
        raise _wrong("tool_choice names no function")
    if name not in offered:
        there = ", ".join(list(offered)[:8]) or "none"
        raise _wrong(f"tool_choice names {name[:64]!r}, but the tools are: {there[:500]}")
    return name


def _wrong(message: str, param: str = "tool_choice") -> ApiError:
    return ApiError(400, message, "invalid_value", param)


# ── reasoning ────────────────────────────────────────────────────────────────────────────────

Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""How hard the model is to think; ``none``: not at all. What is above ``high`` is ``high``."""


class TemplateFields(SubSchema):
    """Extensions that conversations have: what the chat template is told."""

    chat_template_kwargs: dict[str, Any] | None = None
    """More names for the model's chat template, as in vLLM."""
    reasoning_budget: Annotated[int, Field(ge=0)] | None = None
    """Most tokens of reasoning; then it is ended and the answer begins."""


class Thinking(SubSchema):
    """Whether the model thinks before it answers, as Anthropic's API and others write it."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most tokens of it."""
    display: Literal["summarized", "omitted"] | None = None
    """``omitted``: the answer says that the model thought, and not what."""

    @property
    def asked(self) -> bool | None:
        """``InferenceRequest.reasoning``; ``None``: the model's own way."""
        return {"enabled": True, "disabled": False}.get(self.type)


UNTOLD: Final = Thinking(type="auto")
"""Where nothing is said."""


class ReasoningConfig(SubSchema):
    """Whether and how hard the model thinks before it answers."""

    effort: Effort | None = None
    summary: str | None = None
    """Without effect: reasoning is told as it is."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    """What the model thought is left out of the answer."""

    @property
    def asked(self) -> bool | str | None:
        """``InferenceRequest.reasoning``; ``None``: the model's own way."""
        return self.enabled if self.effort is None else self.effort


def reasoning_of(
    asked: Mapping[str, bool | str | None],
    budgets: Mapping[str, int | None],
    template_args: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Fields of ``InferenceRequest``.

    :param asked: fields of the body → whether to think, or how hard.
    :param budgets: fields of the body → most tokens of it.
    :param template_args: the body's ``chat_template_kwargs``, which may say it as well.
    :raises ApiError: 400: they contradict each other.
    """
    wishes = {name: EFFORTS.get(v, v) if isinstance(v, str) else v for name, v in asked.items()}
    given = {name: wish for name, wish in wishes.items() if wish is not None}
    # That it thinks at all is no contradiction to how hard.
    distinct = set(given.values())
    if len(distinct - {True}) > 1 or {True, False} <= distinct:
        raise ApiError(
            400, f"{' and '.join(given)} contradict each other", "invalid_value", next(iter(given))
        )
    told = {f"chat_template_kwargs.{n}": v for n, v in told_to_template(template_args).items()}
    if names := contradictions(given, told):
        raise ApiError(
            400,
            f"{' and '.join(names)} contradict each other; give one of them",
            "invalid_value",
            names[0],
        )
    most = {name: budget for name, budget in budgets.items() if budget is not None}
    if len(set(most.values())) > 1:
        raise ApiError(400, f"give one of {' and '.join(most)}", "invalid_value", next(iter(most)))
    fields: dict[str, Any] = {}
    if distinct:
        fields["reasoning"] = next(iter(distinct - {True}), True)
    if most:
        fields["reasoning_budget"] = next(iter(most.values()))
    return fields
