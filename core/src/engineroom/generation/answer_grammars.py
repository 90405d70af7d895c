"""What a whole answer must match: reasoning, then content of a certain form, or tool calls.

Pure text, as :mod:`.grammars`.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from pydantic import Field, SkipValidation

from engineroom.errors import ConfigurationError
from engineroom.generation.argument_grammars import members_of
from engineroom.generation.call_forms import ToolFormat
from engineroom.generation.grammars import (
    FORM,
    HEAD,
    bounded,
    content_rules,
    first_line,
    grammar_text,
    literal,
    missing_library,
)
from engineroom.generation.json_schemas import place_of
from engineroom.generation.tool_grammars import call_rules, calls_in_text_rules
from engineroom.schemas import InferenceRequest, StructuredOutput
from engineroom.tools import CallableTool, NamedTool, callable_tools

__all__ = ["Thoughts", "WholeAnswer", "answer_grammar", "lacking", "refusal"]

_TEXT: Final = "TEXT: /(.|\\n)*/\n"
_BLANKS: Final = "BLANKS: /[ \\n]{0,4}/\n"


class Thoughts(NamedTuple):
    """What a model thinks before it answers.

    :param begin: what it begins to think with; empty: it has begun already.
    """

    begin: str
    end: str


class WholeAnswer(StructuredOutput):
    """The grammar of an answer, reasoning and calls and all: nothing is added to it any more."""

    asked: SkipValidation[InferenceRequest | None] = Field(default=None, exclude=True, repr=False)
    """The request that it was made for."""


def answer_grammar(
    request: InferenceRequest,
    format_: ToolFormat,
    thoughts: Thoughts | None,
    *,
    closed: bool = False,
) -> str:
    """The grammar of the answer to a request that says what it must match.

    :param format_: how calls are written.
    :param thoughts: ``None``: there are none.
    :param closed: it goes on behind thoughts that were ended, and blanks may stand first.
    :raises ConfigurationError: it cannot be one; names what is wrong.
    """
    output, tools = request.params.structured_output, request.offered_tools
    if isinstance(output, WholeAnswer) and output.grammar is not None:
        return output.grammar
    if output is not None and tools is None and thoughts is None and not closed:
        return grammar_text(output)
    rules: list[str] = []
    bodies: list[str] = []
    if output is not None and not request.requires_call:
        rules += content_rules(output)
        bodies.append("content")
    if tools is not None:
        named = isinstance(request.tool_choice, NamedTool)
        several = request.parallel_tool_calls is not False and not named
        free = output is None and not request.requires_call
        make = calls_in_text_rules if free else call_rules
        bodies.append("calls_in_text" if free else "calls")
        rules += make(format_, _tools_of(request), several=several)
    start = f"({' | '.join(bodies)})"
    if thoughts is not None:
        begin = f"{literal(thoughts.begin)} " if thoughts.begin else ""
        thought = f"{begin}thought BLANKS"
        # Blanks stand before thoughts alone: before content they would be content.
        start = f"(BLANKS {thought})? {start}" if begin else f"{thought} {start}"
        rules += [f"thought[lazy]: TEXT {literal(thoughts.end)}\n", _BLANKS]
    if thoughts is None and closed:
        start = f"BLANKS {start}"
        rules.append(_BLANKS)
    if any("TEXT" in rule for rule in rules):
        rules.append(_TEXT)
    return bounded(f"{HEAD}start: {start}\n{''.join(rules)}")


def _tools_of(request: InferenceRequest) -> dict[str, CallableTool]:
    """The tools that may be called, in the order of their rules."""
    tools, choice = callable_tools(request.offered_tools or ()), request.tool_choice
    return {choice.name: tools[choice.name]} if isinstance(choice, NamedTool) else tools


# ── what cannot be one ───────────────────────────────────────────────────────────────────────

_AT: Final = re.compile(r"at (\d+)\((\d+)\): (?:failed to compile JSON schema: )?")
_ARGUMENTS: Final = re.compile(r"args_(\d+)(?:_(\d+))?\w*: ")
_PATTERN: Final = re.compile(r"regex parse error:\n\s*(.*)\n| in regex /(.*)/$", re.MULTILINE)
_HINT: Final = re.compile(r"\s*\bEnable '\w+' option[^.;\n]*|json-schema:///")
"""Of options that no client can give, and names of llguidance's own."""
_IN_OTHER_WORDS: Final = {
    "oneOf constraints are not supported.": "oneOf is not supported where more than one of its "
    "schemas may hold; write anyOf",
    # The name of llguidance's rule for a grammar that never writes anything.
    "NoExtensionBias": "a rule, or a $ref, leads to nothing but itself",
}


def refusal(request: InferenceRequest, grammar: str, error: str) -> ConfigurationError:
    """What is said where the grammar of the answer to a request cannot be compiled.

    :param error: what llguidance says.
    """
    output = request.params.structured_output
    if isinstance(output, WholeAnswer) and output.asked is not None:
        request = output.asked
        output = request.params.structured_output
    at = _AT.match(error)
    wrong = first_line(error)
    if at is not None and (output is None or output.grammar is None):
        wrong = wrong[at.end() :]
    field, what, schema = _accused(request, grammar, at)
    if schema is not None:
        pattern = _PATTERN.search(error)
        quoted = None if pattern is None else pattern[1] or pattern[2]
        place = place_of(schema, wrong, quoted)
        field = f"{field}.{place}" if place else field
    wrong = _HINT.sub("", wrong)
    for words, other in _IN_OTHER_WORDS.items():
        wrong = wrong.replace(words, other)
    if not field:
        tools = request.offered_tools
        what = " and ".join(
            ["structured_output"] * (output is not None) + ["tools"] * (tools is not None)
        )
    return ConfigurationError(f"{what} cannot be honoured: {wrong}".lstrip(), field=field)


def lacking(request: InferenceRequest, error: ImportError) -> ConfigurationError:
    """What is said where the answer to a request must match something, without llguidance."""
    output, choice = request.params.structured_output, request.tool_choice
    if isinstance(output, WholeAnswer) and output.asked is not None:
        return lacking(output.asked, error)
    if request.requires_call:
        named = f"tool {choice.name!r}" if isinstance(choice, NamedTool) else repr(choice)
        return missing_library(error, "tool_choice", named)
    for name, tool in callable_tools(request.offered_tools or ()).items():
        if tool.strict:
            return missing_library(error, tool.field, f"strict of tool {name!r}")
    if output is not None:
        return missing_library(error, f"{FORM}.{output.kind}", "structured output")
    return missing_library(error, "reasoning_budget", "a bound of the reasoning")


def _accused(
    request: InferenceRequest, grammar: str, at: re.Match[str] | None
) -> tuple[str, str, Any]:
    """The field that a part of the grammar was made of, whose it is, and its JSON schema."""
    output, tools = request.params.structured_output, request.offered_tools
    lines = grammar.splitlines()
    line = lines[int(at[1]) - 1] if at is not None and int(at[1]) <= len(lines) else ""
    own = output is not None and output.grammar is not None  # which has lines of its own
    rule = None if own and tools is not None else _ARGUMENTS.match(line)
    if tools is not None and rule is not None and "%json" in line:
        name, tool = list(_tools_of(request).items())[int(rule[1])]
        field, schema = tool.field, tool.parameters
        if rule[2] is not None:
            members = members_of(schema)
            property_, schema = list(members.schemas.items())[int(rule[2])]
            field = f"{field}.{members.place}.{property_}"
        return field, f"tool {name!r}", schema
    if output is None or not (tools is None or line.startswith("content: ")):
        return "", "", None
    return f"{FORM}.{output.kind}", "", output.json_schema
