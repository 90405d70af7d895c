"""What agents ask for, from the command line: a JSON schema, tools, and how hard to think."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from engineroom.cli.flags import flag
from engineroom.cli.output import CommandError

__all__ = [
    "REASONING_FLAG",
    "SCHEMA_FLAG",
    "TOOLS_FLAG",
    "TOOL_CHOICE_FLAG",
    "AgentFields",
    "ReasoningChoice",
    "agent_fields",
    "read_schema",
]

SCHEMA_FLAG: Final = flag(
    "The answer is JSON that is valid by the JSON schema in this file.", "--schema", metavar="FILE"
)
TOOLS_FLAG: Final = flag(
    "Tools that the model may call: a JSON list in OpenAI's form.", "--tools", metavar="FILE"
)
TOOL_CHOICE_FLAG: Final = flag(
    "Whether it calls them: auto, none, required, or a tool's name.  [default: auto]",
    "--tool-choice",
    metavar="CHOICE",
)
REASONING_FLAG: Final = flag(
    "Whether the model thinks before it answers, or how hard.  [default: the model's own way]",
    "--reasoning",
)
_TOOL: Final = '{"type": "function", "function": {"name": "…", "parameters": {…}}}'
_KEYWORDS: Final = frozenset(
    [
        "type",
        "properties",
        "required",
        "items",
        "prefixItems",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
        "pattern",
        "format",
        "additionalProperties",
        "patternProperties",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "minItems",
        "maxItems",
        "multipleOf",
        "contains",
        "propertyNames",
        "minProperties",
        "maxProperties",
        "exclusiveMinimum",
        "uniqueItems",
        "exclusiveMaximum",
        "$schema",
        "$defs",
        "definitions",
        "$ref",
        "$id",
        "$comment",
        "title",
        "description",
    ]
)
"""Of which a JSON schema has one at least, if it says anything."""
_WORDS: Final = ("none", "auto", "required")


class ReasoningChoice(StrEnum):
    """Whether the model thinks before it answers, or how hard."""

    ON = "on"
    OFF = "off"
    MINIMAL = "minimal"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"

    @property
    def field(self) -> bool | str:
        """As a request has it."""
        return {"on": True, "off": False}.get(self.value, self.value)


@dataclass(frozen=True)
class AgentFields:
    """Fields of a request, under its names; ``None``: not given."""

    tools: list[Any] | None = None
    tool_choice: str | Mapping[str, str] | None = None
    reasoning: bool | str | None = None

    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def after_results(self) -> AgentFields:
        """Those of an answer to results: it may be one, where the first had to be a call."""
        return self if self.tool_choice == "none" else replace(self, tool_choice=None)


def agent_fields(
    tools: Path | None, tool_choice: str | None, reasoning: ReasoningChoice | None
) -> AgentFields:
    """What these flags say.

    :param tools: a file with a list of tools, or with an object that has one as ``tools``.
    :raises CommandError: the file has none, or a choice is made among no tools.
    """
    if tool_choice is not None and tools is None:
        raise CommandError("--tool-choice needs tools; add --tools FILE")
    listed = None if tools is None else _read_json(tools, "--tools")
    if isinstance(listed, dict):
        alone = [listed] if {"function", "name"} & listed.keys() else None
        listed = listed.get("tools", alone)
    if tools is not None and not (isinstance(listed, list) and listed):
        raise CommandError(f"--tools {str(tools)!r} has no list of tools; write [{_TOOL}]")
    named = tool_choice is not None and tool_choice not in _WORDS
    choice = {"name": tool_choice} if named and tool_choice is not None else tool_choice
    return AgentFields(listed, choice, None if reasoning is None else reasoning.field)


def read_schema(file: Path | None) -> dict[str, Any] | None:
    """The value of ``structured_output`` for the JSON schema of a file.

    :raises CommandError: the file cannot be read, or is no JSON schema.
    """
    if file is None:
        return None
    schema = _read_json(file, "--schema")
    if not isinstance(schema, dict | bool) or (schema and not _says_something(schema)):
        raise CommandError(
            f"--schema {str(file)!r} is no JSON schema: it must be a JSON object with keywords, as "
            '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
        )
    return {"json_schema": schema}


def _says_something(schema: dict[str, Any] | bool) -> bool:
    return isinstance(schema, bool) or bool(_KEYWORDS & schema.keys())


def _read_json(file: Path, name: str) -> Any:
    try:
        return json.loads(file.expanduser().read_bytes())
    except OSError as error:
        raise CommandError(
            f"{name} {str(file)!r} cannot be read: {error.strerror}; check the path", 1
        ) from error
    except RecursionError as error:
        raise CommandError(f"{name} {str(file)!r} is nested too deeply", 1) from error
    except ValueError as error:  # no JSON, or no text
        raise CommandError(f"{name} {str(file)!r} is not JSON: {error}", 1) from error
