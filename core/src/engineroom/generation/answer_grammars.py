"""What a whole answer must match: reasoning, then content of a certain form, or tool calls.

Pure text, as :mod:`.grammars`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from engineroom.generation.call_forms import ToolFormat
from engineroom.generation.grammars import HEAD, bounded, content_rules, grammar_text, literal
from engineroom.generation.tool_grammars import call_rules, calls_in_text_rules
from engineroom.schemas import InferenceRequest, StructuredOutput
from engineroom.tools import NamedTool, tool_parameters

__all__ = ["Thoughts", "WholeAnswer", "answer_grammar"]

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


def answer_grammar(
    request: InferenceRequest, format_: ToolFormat, thoughts: Thoughts | None
) -> str:
    """The grammar of the answer to a request that says what it must match.

    :param format_: how calls are written.
    :param thoughts: ``None``: there are none.
    :raises ConfigurationError: it cannot be one; names what is wrong.
    """
    output, tools = request.params.structured_output, request.offered_tools
    if isinstance(output, WholeAnswer) and output.grammar is not None:
        return output.grammar
    if output is not None and tools is None and thoughts is None:
        return grammar_text(output)
    rules: list[str] = []
    bodies: list[str] = []
    if output is not None and not request.requires_call:
        rules += content_rules(output)
        bodies.append("content")
    if tools is not None:
        schemas, choice = tool_parameters(tools), request.tool_choice
        several = request.parallel_tool_calls is not False
        if isinstance(choice, NamedTool):
            schemas, several = {choice.name: schemas[choice.name]}, False
        free = output is None and not request.requires_call
        make = calls_in_text_rules if free else call_rules
        bodies.append("calls_in_text" if free else "calls")
        rules += make(format_, schemas, several=several)
    start = f"({' | '.join(bodies)})"
    if thoughts is not None:
        begin = f"{literal(thoughts.begin)} " if thoughts.begin else ""
        thought = f"{begin}thought BLANKS"
        start = f"BLANKS ({thought})? {start}" if begin else f"{thought} {start}"
        rules += [f"thought[lazy]: TEXT {literal(thoughts.end)}\n", _BLANKS]
    if any("TEXT" in rule for rule in rules):
        rules.append(_TEXT)
    return bounded(f"{HEAD}start: {start}\n{''.join(rules)}")
