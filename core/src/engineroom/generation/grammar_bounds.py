"""How large a grammar may be: what a request must not bring to llguidance. Pure.

llguidance descends into a grammar's rules, and a schema's definitions, by recursion: some thousand
of them in a chain are more than a thread's stack holds, and would end the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from engineroom.errors import ConfigurationError
from engineroom.field_types import levels_exceeded
from engineroom.generation.json_schemas import pointed_at
from engineroom.schemas import MAX_GRAMMAR_CHARS, MAX_LITERAL_CHARS

__all__ = [
    "MAX_GRAMMAR_DEPTH",
    "MAX_RULES",
    "check_grammar",
    "check_rules",
    "check_schema",
    "schemas_in",
]

MAX_GRAMMAR_DEPTH: Final = 64
"""Most levels of mappings and lists in a JSON schema."""
MAX_REFERRED_DEPTH: Final = 768
"""Most levels of a schema and of all that it refers to, together. From 1,700 on, llguidance's
recursion takes 8 MiB of stack."""
MAX_PROPERTIES: Final = 1000
"""Most properties of one object: those that may be left out cost llguidance a time that grows with
their square, which it keeps the interpreter for (12 ms for so many)."""
MAX_RULES: Final = 1000
"""Most rules of a grammar. From 2,500 on, in a chain, they take 8 MiB of stack."""
_TOKEN: Final = re.compile(
    r'"(?:[^"\\\n]|\\.)*+"?|/(?:[^/\\\n]|\\.)*+/?|(?<![\w.-])[A-Za-z_][\w.-]*+\s*+(?=[:\[{])'
)
"""A text, a regular expression, or a name that a rule may begin with. Each character is looked at
once, however they come."""
_AFTER_NAME: Final = re.compile(r"(?:[\[{][^\]}\n]{0,200}[\]}]\s*+){0,2}:")
_JSON: Final = re.compile(r"%json\s*+(?=[{\[])")
_WORDS: Final = frozenset({"title", "description", "$comment", "default", "examples"})
"""Keys whose values constrain nothing."""
_FLATTER: Final = "move what is deep into $defs, and refer to it by $ref"
_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")


def check_grammar(text: str) -> None:
    """A grammar in Lark.

    :raises ConfigurationError: it has too many rules, a text in it is too long, or a schema in it
        is too large.
    """
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ConfigurationError(f"it has {len(text)} characters; {MAX_GRAMMAR_CHARS} are the most")
    rules = 0
    for match in _TOKEN.finditer(text):
        if text[match.start()] not in '"/':
            rules += _AFTER_NAME.match(text, match.end()) is not None
        elif match.end() - match.start() > MAX_LITERAL_CHARS + 2:
            raise ConfigurationError(
                "it has a text or regular expression of more than "
                f"{MAX_LITERAL_CHARS} characters; make it shorter"
            )
    check_rules(rules)
    for schema in schemas_in(text):
        check_schema(schema)


def check_rules(count: int) -> None:
    """:raises ConfigurationError: a grammar of so many rules has too many."""
    if count > MAX_RULES:
        raise ConfigurationError(f"it has {count} rules; {MAX_RULES} are the most")


def schemas_in(text: str) -> Iterator[Any]:
    """The JSON schemas in a grammar in Lark. :raises ConfigurationError: they are too many."""
    decoder = json.JSONDecoder()
    for count, match in enumerate(_JSON.finditer(text)):
        check_rules(count)
        try:
            yield decoder.raw_decode(text, match.end())[0]
        except RecursionError:
            raise ConfigurationError(
                f"a JSON schema in it may have {MAX_GRAMMAR_DEPTH} levels of objects and lists, "
                f"and has many more; {_FLATTER}"
            ) from None
        except ValueError:  # llguidance says where it is wrong
            continue


def check_schema(schema: Any) -> None:
    """A JSON schema, whether it is valid or not.

    :raises ConfigurationError: it is nested too deep, refers to too much, or is too large; names
        what is.
    """
    nodes: list[tuple[Any, int]] = [(schema, -1)]
    """Mappings and lists, and the place of what they are in."""
    references: set[str] = set()
    size = 0
    for place, (node, _) in enumerate(nodes):
        for key, value in _items(node):
            size += len(key) + (len(value) if isinstance(value, str) else 1)
            if isinstance(value, Mapping | list | tuple):
                nodes.append((value, place))
            elif isinstance(value, str) and key in _REFERENCES:
                references.add(value)
        if size > MAX_GRAMMAR_CHARS:
            raise ConfigurationError(
                f"the JSON schema has more than {MAX_GRAMMAR_CHARS} characters; make it smaller"
            )
    heights = [1] * len(nodes)
    for place in range(len(nodes) - 1, 0, -1):
        parent = nodes[place][1]
        heights[parent] = max(heights[parent], heights[place] + 1)
    if heights[0] > MAX_GRAMMAR_DEPTH:
        said = levels_exceeded(schema, MAX_GRAMMAR_DEPTH)
        raise ConfigurationError(f"the JSON schema {said}; it has {heights[0]}; {_FLATTER}")
    height_of = {id(node): height for (node, _), height in zip(nodes, heights, strict=True)}
    _check_references(schema, references, height_of, heights[0])


def _items(node: Any) -> Iterator[tuple[str, Any]]:
    """What stands in a mapping or list, with its key where it has one; looks at the texts, too."""
    if not isinstance(node, Mapping):
        for value in node:
            _check_length(value)
            yield "", value
        return
    for key, value in node.items():
        _check_length(key)
        if key not in _WORDS:
            _check_length(value)
        if key == "properties" and isinstance(value, Mapping) and len(value) > MAX_PROPERTIES:
            raise ConfigurationError(
                f"the JSON schema has an object of {len(value)} properties; {MAX_PROPERTIES} are "
                "the most"
            )
        yield str(key), value


def _check_length(text: Any) -> None:
    if isinstance(text, str) and len(text) > MAX_LITERAL_CHARS:
        raise ConfigurationError(
            f"the JSON schema has a text of {len(text)} characters; {MAX_LITERAL_CHARS} are the "
            "most"
        )


def _check_references(
    schema: Any, references: set[str], height_of: Mapping[int, int], height: int
) -> None:
    levels = height
    for reference in references:
        target = pointed_at(schema, reference)
        levels += height if target is None else height_of.get(id(target), 1)
        if levels > MAX_REFERRED_DEPTH:
            raise ConfigurationError(
                f"the JSON schema and what it refers to have more than {MAX_REFERRED_DEPTH} levels "
                "together; use fewer or flatter definitions"
            )
