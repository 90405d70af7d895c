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
from engineroom.generation.grammar_bounds import (
    check_grammar,
    check_rules,
    check_schema,
    schemas_in,
)
from engineroom.generation.json_schemas import endless, without_formats
from engineroom.schemas import MAX_GRAMMAR_CHARS, StructuredOutput

__all__ = [
    "FORM",
    "HEAD",
    "bounded",
    "check_written",
    "content_rules",
    "first_line",
    "grammar_text",
    "is_gbnf",
    "json_rule",
    "literal",
    "missing_library",
    "regex_literal",
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
_GBNF_WORD: Final = re.compile(
    r'"(?:[^"\\]|\\.)*+"?|\[(?:[^\]\\]|\\.)*+\]?|#[^\n]*+|[\w-]++(\s*+::=)?', re.DOTALL
)
"""A text, a set of characters, a comment, or a name, with what follows it where it is a rule's."""
_MAX_WRITTEN: Final = 2 * MAX_GRAMMAR_CHARS
"""Characters of a whole grammar, escapes and all."""
_ESCAPED: Final = re.compile(r"\\.|[/\n]", re.DOTALL)
FORM: Final = "params.structured_output"
"""The field of a request that says what its answer must match."""
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
        return [f"content: /{regex_literal(output.regex)}/\n"]
    if output.choice is not None:
        # One terminal, and so one automaton: as many rules would be as many rows of a parser.
        return ["content: CHOICE\n", f"CHOICE: {' | '.join(map(literal, output.choice))}\n"]
    schema = {"type": "object"} if output.json_object else output.json_schema
    assert schema is not None
    try:
        return [f"content: {json_rule(schema)}\n"]
    except ConfigurationError as error:
        error.put_within(f"{FORM}.{output.kind}")
        raise


def json_rule(schema: Mapping[str, Any] | bool, *, strict: bool = True) -> str:
    """A rule for JSON that a schema describes, to stand inside of a grammar.

    A client's own ``x-guidance``, which could switch checks off, counts for nothing. Formats that
    JSON Schema does not know are annotations, as it says.

    :param strict: formats that it does know, and no grammar here has, stay to be refused.
    :raises ConfigurationError: the schema allows nothing, is nested too deep or too large, or is
        no JSON.
    """
    if schema is False:
        raise ConfigurationError("the JSON schema false allows nothing; send another one")
    fields = {} if schema is True else {k: v for k, v in schema.items() if k != "x-guidance"}
    check_schema(fields)
    text = _json(fields)
    if '"$ref"' in text:
        _check_ends(fields)
    if '"format"' in text:
        fields = without_formats(json.loads(text), strict=strict)
    return f"%json {_json({**fields, 'x-guidance': {'lenient': False, **_white_space()}})}"


def _json(fields: Mapping[str, Any]) -> str:
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)
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

    :raises ConfigurationError: it would switch checks off, or is too large.
    """
    try:
        return _checked(grammar)
    except ConfigurationError as error:
        error.put_within(f"{FORM}.grammar")
        raise


def _checked(grammar: str) -> str:
    if "x-guidance" in _UNICODE.sub(lambda found: chr(int(found[1], 16)), grammar):
        raise ConfigurationError("x-guidance switches checks of schemas off; leave it out")
    text = grammar
    if is_gbnf(grammar):
        check_rules(grammar.count("::="))
        text = _lark(grammar)
    check_grammar(text)
    if '"$ref"' in text:
        for schema in schemas_in(text):
            _check_ends(schema)
    return text


def _check_ends(schema: Any) -> None:
    """:raises ConfigurationError: something in a schema leads to nothing but itself."""
    if (place := endless(schema)) is not None:
        raise ConfigurationError(
            "a $ref, or what must be in a value, leads to nothing but itself; give it an end",
            field=".".join(place),
        )


def _letter(found: re.Match[str]) -> str:
    """The character itself, where it means nothing to a grammar."""
    code = int(found[1] or found[2] or "0", 16)
    seen = 0xA0 < code < 0xD800 or 0xE000 <= code <= sys.maxunicode
    return chr(code) if seen else found[0]


def _distinct(grammar: str) -> str:
    """GBNF whose rules have names of their own in Lark, where ``root`` is called ``start``, and
    names differ by more than dashes and capital letters.
    """
    words = _GBNF_WORD.finditer(grammar)
    names = {word[0].removesuffix(word[1]) for word in words if word[1]} - {"root"}
    taken, own = {"start"}, dict[str, str]()
    for name in sorted(names, key=lambda name: (name != _name_in_lark(name), name)):
        wish = fresh = _name_in_lark(name)
        number = 1
        while fresh in taken:
            number += 1
            fresh = f"{wish}_{number}"
        taken.add(fresh)
        if fresh != wish:
            own[name] = fresh
    if not own:
        return grammar

    def renamed(word: re.Match[str]) -> str:
        rest = word[1] or ""
        name = word[0].removesuffix(rest)
        return own.get(name, name) + rest

    return _GBNF_WORD.sub(renamed, grammar)


def _name_in_lark(name: str) -> str:
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name.replace("-", "_")).lower()


def _lark(grammar: str) -> str:
    try:
        from llguidance.gbnf_to_lark import gbnf_to_lark
    except ImportError as error:
        raise missing_library(error, f"{FORM}.grammar", "GBNF") from error
    try:
        return str(gbnf_to_lark(_distinct(_LETTER.sub(_letter, grammar))))
    except Exception as error:
        # Of one that is nested too deep there are a thousand frames, which a log would write.
        error.with_traceback(None)
        raise ConfigurationError(f"it is not valid GBNF: {str(error)[:300]}") from error


def missing_library(error: ImportError, field: str, what: str) -> ConfigurationError:
    """What to say where llguidance is not installed.

    :param field: of the request, which cannot be honoured without it.
    :param what: of that field needs it.
    """
    return ConfigurationError(
        f"{what} needs the library llguidance, which is not installed ({error}); "
        'pip install "engineroom[structured]"',
        field=field,
    )


def regex_literal(pattern: str) -> str:
    """A regular expression as it stands between slashes, on one line."""
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


def first_line(message: str) -> str:
    """What is wrong, without the grammar, which a message must not repeat at length."""
    first, *rest = message.strip().splitlines() or ["?"]
    # What is wrong with a regular expression stands below it.
    wrong = next((line for line in rest if line.startswith("error: ")), "")
    return f"{first[:300]} {wrong[7:300]}".rstrip()
