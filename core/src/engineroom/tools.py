"""Tools that a model may call, and its calls, as requests and responses have them.

A tool is a mapping in OpenAI's form, ``{"type": "function", "function": {"name": …,
"description": …, "parameters": JSON schema}}``, since that is what chat templates walk; a bare
function (``{"name": …}``) is put into that form.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Tag

from engineroom.field_types import check_values, either, json_of

__all__ = [
    "MAX_TOOLS",
    "MAX_TOOL_BYTES",
    "CallableTool",
    "NamedTool",
    "ToolCall",
    "ToolChoice",
    "Tools",
    "callable_tools",
    "new_call_id",
    "schema_field",
    "tool_names",
]

MAX_TOOLS: Final = 128
"""Most tools of a request, as in OpenAI's API."""
MAX_TOOL_BYTES: Final = 1_000_000
"""Most bytes that the definitions of a request's tools may have together, as JSON."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SCHEMAS: Final = ("input_schema", "inputSchema")
"""What Anthropic's API and MCP call the schema of a tool's parameters."""
_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ToolCall(_Frozen):
    """A call of a tool that a model has written."""

    id: str
    """Of its own; the message with its result names it in ``tool_call_id``."""
    name: str
    arguments: str
    """A JSON object, as text."""

    def as_message(self) -> dict[str, Any]:
        """As a message of the assistant has it in ``tool_calls``."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class NamedTool(_Frozen):
    """The one tool that is to be called."""

    name: Annotated[str, Field(min_length=1)]


def new_call_id() -> str:
    """An id for a call, which no other one has."""
    return f"call_{secrets.token_hex(12)}"


def _named(value: Any) -> Any:
    """The name out of ``{"type": "function", "function": {"name": …}}``, or beside ``type``."""
    if isinstance(value, Mapping) and set(value) <= {"type", "function", "name"}:
        function = value.get("function", value)
        if isinstance(function, Mapping):
            return {"name": function.get("name")}
    return value


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(word)")]
    | Annotated[NamedTool, BeforeValidator(_named), Tag("(tool)")],
    either("a word or a tool", {str: "(word)", Mapping: "(tool)", NamedTool: "(tool)"}),
]
"""Whether tools are called: not at all, as the model likes, at least one, or a certain one."""


def _tool(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"a tool must be a mapping, not {type(value).__name__}")
    if value.get("type", "function") != "function":
        raise ValueError(f"tools of type {str(value['type'])[:40]!r} are not known; use 'function'")
    if (function := value.get("function")) is None:
        function = {key: item for key, item in value.items() if key != "type"}
    if not isinstance(function, Mapping):
        raise ValueError("function must be a mapping with name, description and parameters")
    name = function.get("name")
    if not isinstance(name, str):
        raise ValueError(
            f"{str(name)[:40]!r} is no name of a tool; write "
            '{"type": "function", "function": {"name": "…", "parameters": {…}}}'
        )
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:40]!r} is no name of a tool; use ASCII letters, digits and _ . : -, "
            "128 at most"
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise ValueError(f"tool {name!r}: description must be text")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping | bool):
        raise ValueError(f"tool {name!r}: parameters must be a JSON schema")
    if parameters is None and (other := next(filter(function.__contains__, _SCHEMAS), None)):
        raise ValueError(f"tool {name!r}: {other} is called parameters here")
    made = dict(function)
    if made.get("strict") is None and value.get("strict") is not None:  # beside the function
        made["strict"] = value["strict"]
    if not isinstance(made.get("strict"), bool | None):
        raise ValueError(f"tool {name!r}: strict must be true or false")
    return {"type": "function", "function": made}


def _distinct(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = tool_names(tools)
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"two tools are called {twice!r}; rename one of them")
    data = json_of(tools)
    if len(data) > MAX_TOOL_BYTES:
        raise ValueError(f"may have {MAX_TOOL_BYTES} bytes as JSON together, not {len(data)}")
    check_values(data)
    return tools


Tools: TypeAlias = Annotated[
    list[Annotated[dict[str, Any], BeforeValidator(_tool)]],
    Field(fail_fast=True, max_length=MAX_TOOLS),
    AfterValidator(_distinct),
]
"""Tools in OpenAI's form, each with a name of its own."""


def tool_names(tools: Iterable[Mapping[str, Any]]) -> list[str]:
    """The tools' names, in their order."""
    return [tool["function"]["name"] for tool in tools]


class CallableTool(NamedTuple):
    """What a call's arguments must be.

    :param parameters: their JSON schema.
    :param field: where that is in a request.
    :param strict: they must be valid by all of it.
    """

    parameters: Mapping[str, Any]
    field: str
    strict: bool


def callable_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, CallableTool]:
    """What the arguments of each tool's calls must be, by the tool's name."""
    made: dict[str, CallableTool] = {}
    for place, function in enumerate(tool["function"] for tool in tools):
        schema = function.get("parameters")
        schema = {"type": "object"} if schema is True else schema or _NO_PARAMETERS
        strict = function.get("strict") is True
        made[function["name"]] = CallableTool(schema, schema_field(place), strict)
    return made


def schema_field(place: int) -> str:
    """Where the JSON schema of a tool's parameters is in a request."""
    return f"tools.{place}.function.parameters"
