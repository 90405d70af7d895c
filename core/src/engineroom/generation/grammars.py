"""What a text must match, as one grammar in Lark, which llguidance reads. Pure text.

Everything that constrains a text becomes such a grammar: a JSON schema, a regular expression,
choices, a grammar in Lark or GBNF. So there is one thing to compile, to keep and to hand to a
runtime that compiles by itself.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from engineroom.errors import ConfigurationError
from engineroom.generation.grammar_bounds import check_grammar, check_rules, check_schema
from engineroom.schemas import MAX_GRAMMAR_CHARS, StructuredOutput

__all__ = [
    "HEAD",
    "bounded",
    "check_written",
    "content_rules",
    "grammar_text",
    "is_gbnf",
    "json_rule",
    "literal",
    "missing_library",
]

_WHITESPACE: Final = r"(?: |\n {0,16})?"
"""Between the tokens of JSON: a blank, or a line break with what a line is indented by. Bounded: a
small model writes blanks until it is stopped."""
_MARKS: Final = (("item", ","), ("key", ":"))
_LETTER: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
"""How llama.cpp writes characters in GBNF, which llguidance does not read; and other escapes, whose
second character begins none."""
_UNICODE: Final = re.compile(r"\\u([0-9a-fA-F]{4})")
_GBNF_RULE: Final = re.compile(r"^[ \t]*+[A-Za-z][A-Za-z0-9_-]*+\s*+::=", re.MULTILINE)
_MAX_WRITTEN: Final = 2 * MAX_GRAMMAR_CHARS
"""Characters of a whole grammar, escapes and all."""
_ESCAPED: Final = re.compile(r"\\.|[/\n]", re.DOTALL)
HEAD: Final = '%llguidance {"no_forcing": true}\n'
"""Without it, llguidance writes out for each mask what text must follow, which takes the thread
that decodes 0.4 s for a long one, and allows that text in one cut into tokens alone."""


def grammar_text(output: StructuredOutput) -> str:
    """The grammar of what a request asks for.

    :raises ConfigurationError: it cannot be one; names what is wrong with it.
    """
    if output.grammar is not None:
        return bounded(f"{_own(output.grammar)}\n{HEAD}")
    return bounded(f"{HEAD}start: content\n{''.join(content_rules(output))}")


def bounded(text: str) -> str:
    """A grammar, unless it is too long. :raises ConfigurationError: it is."""
    check_written(len(text))
    return text


def check_written(size: int) -> None:
    """:raises ConfigurationError: a grammar of so many characters is too long."""
    if size > _MAX_WRITTEN:
        raise ConfigurationError(
            f"the grammar of what was asked for (structured_output, tools) has {size} "
            f"characters as it is written out, or more; {_MAX_WRITTEN} are the most"
        )


def content_rules(output: StructuredOutput) -> list[str]:
    """What a request asks for, as the rule ``content`` of a grammar, and what that refers to.

    :raises ConfigurationError: it cannot be one; names what is wrong with it.
    """
    if output.grammar is not None:
        return [f"content: %lark {{\n{_own(output.grammar)}\n}}\n"]
    if output.regex is not None:
        return [f"content: /{_regex(output.regex)}/\n"]
    if output.choice is not None:
        # One terminal, and so one automaton: as many rules would be as many rows of a parser.
        return ["content: CHOICE\n", f"CHOICE: {' | '.join(map(literal, output.choice))}\n"]
    schema = {"type": "object"} if output.json_object else output.json_schema
    assert schema is not None
    return [f"content: {json_rule(schema)}\n"]


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """A rule for JSON that a schema describes, to stand inside of a grammar.

    A client's own ``x-guidance``, which could switch checks off, counts for nothing.

    :raises ConfigurationError: the schema allows nothing, is nested too deep or too large, or is
        no JSON.
    """
    if schema is False:
        raise ConfigurationError("the JSON schema false allows nothing; send another one")
    fields = {} if schema is True else {k: v for k, v in schema.items() if k != "x-guidance"}
    check_schema(fields)
    fields["x-guidance"] = {"lenient": False, **_white_space()}
    try:
        return f"%json {json.dumps(fields, ensure_ascii=False, allow_nan=False)}"
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the JSON schema is no JSON: {error}") from error


@cache
def _white_space() -> Mapping[str, Any]:
    """How llguidance is told of it. Before 1.8 (vLLM 0.32 takes no later one) it knows no pattern
    for it: then none stands next to brackets, where any would be without a bound.
    """
    try:
        numbers = version("llguidance").split(".")[:2]
    except PackageNotFoundError:  # told when the grammar is compiled
        numbers = []
    if numbers != ["1", "7"]:
        return {"whitespace_pattern": _WHITESPACE}
    around = {f"{name}_separator": f"{_WHITESPACE}{mark}{_WHITESPACE}" for name, mark in _MARKS}
    return {"whitespace_flexible": False, **around}


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is in GBNF, as llama.cpp reads it: its rules have ``::=``."""
    return _GBNF_RULE.search(grammar) is not None


def _own(grammar: str) -> str:
    """A client's own, to which ours is added: what comes last counts.

    :raises ConfigurationError: it would switch checks off.
    """
    if "x-guidance" in _UNICODE.sub(lambda found: chr(int(found[1], 16)), grammar):
        raise ConfigurationError("x-guidance switches checks of schemas off; leave it out")
    text = grammar
    if is_gbnf(grammar):
        check_rules(grammar.count("::="))
        text = _lark(grammar)
    check_grammar(text)
    return text


def _letter(found: re.Match[str]) -> str:
    """The character itself, where it means nothing to a grammar."""
    code = int(found[1] or found[2] or "0", 16)
    seen = 0xA0 < code < 0xD800 or 0xE000 <= code <= sys.maxunicode
    return chr(code) if seen else found[0]


def _lark(grammar: str) -> str:
    try:
        from llguidance.gbnf_to_lark import gbnf_to_lark
    except ImportError as error:
        raise missing_library(error) from error
    try:
        return str(gbnf_to_lark(_LETTER.sub(_letter, grammar)))
    except Exception as error:
        # Of one that is nested too deep there are a thousand frames, which a log would write.
        error.with_traceback(None)
        raise ConfigurationError(
            f"structured_output.grammar is not valid GBNF: {str(error)[:300]}"
        ) from error


def missing_library(error: ImportError) -> ConfigurationError:
    """What to say where llguidance is not installed."""
    return ConfigurationError(
        f'structured output needs llguidance ({error}); pip install "engineroom[structured]"'
    )


def _regex(pattern: str) -> str:
    """As it stands between slashes, on one line."""
    special = {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}
    return _ESCAPED.sub(lambda match: special.get(match[0], match[0]), pattern)


def literal(text: str) -> str:
    """A text as a grammar has it: as JSON writes it, with escapes for what cannot be seen."""
    characters = (
        c if c.isprintable() else _escape(c) for c in json.dumps(text, ensure_ascii=False)
    )
    return "".join(characters)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
