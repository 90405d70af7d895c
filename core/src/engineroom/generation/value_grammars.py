"""Rules for values that a model writes in its own way, by their JSON schemas. Pure text.

Python has words of its own beside JSON's. Gemma has texts between marks and keys without quotes. In
what neither can express of a schema, such as what may be any value at all, values are JSON, which
the parser reads as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from engineroom.field_types import json_of
from engineroom.generation.argument_types import argument_types
from engineroom.generation.grammars import check_written, json_rule, literal
from engineroom.generation.json_schemas import pointed_at
from engineroom.generation.text_grammars import NoTextError, text_terms, text_without

__all__ = ["ANNOTATIONS", "ValueRules", "in_order", "is_bare"]

ANNOTATIONS: Final = frozenset({"type", "title", "description", "default", "examples", "$comment"})
"""Keywords that ask no more than a type."""
_BARE_NAME: Final = re.compile(r"[^\W\d][\w.-]{0,127}")
_NEVER: Final = "/a/ & /b/"
_OF_ANY_TYPE: Final = frozenset(
    ["enum", "const", "allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef"]
)
_CHOICES: Final = ("anyOf", "oneOf")
_OF_LISTS: Final = ANNOTATIONS | {"items", "minItems", "maxItems"}
_OF_OBJECTS: Final = ANNOTATIONS | {"properties", "required", "additionalProperties"}
_WORDS: Final = {True: "True", False: "False", None: "None"}


class ValueRules:
    """Makes the rules of one tool's arguments.

    :param root: the schema of the tool's parameters, in which references are looked up.
    :param strict: formats that no grammar has are refused.
    :param marks: what ends a text, or may seem to.
    :param end: what stands behind a text.
    :param begin: what stands before a text, in values of Gemma's.
    """

    def __init__(
        self,
        root: Mapping[str, Any],
        *,
        strict: bool,
        marks: Sequence[str] = (),
        end: str = "",
        begin: str = "",
    ) -> None:
        self.rules: list[str] = []
        self._root = root
        self._strict = strict
        self._plain = f"({text_without(marks)})" if marks else ""
        self._begin, self._end = begin, end
        self._written = 0

    def shared(self) -> str:
        """Rules to which those of all tools refer."""
        if not self._plain:
            return ""
        return f"PLAIN: {self._plain} {literal(self._end)}\nNEVER: {_NEVER}\n"

    def json(self, schema: Any) -> str:
        """JSON. :raises ConfigurationError: it cannot be a rule, or is too much."""
        return self._counted(json_rule(self._with_definitions(schema), strict=self._strict))

    def text(self, own: str, schema: Any) -> str:
        """A text that stands as it is, with what ends it. Raises as above.

        :param own: the name of a rule that is made for it.
        """
        if not schema.keys() - ANNOTATIONS:
            return "PLAIN"
        checked = self.json(schema)
        try:
            terms = [self._plain, *text_terms(schema, self._root)]
        except NoTextError:
            terms = [_NEVER]
        text = self._counted(f"({' & '.join(terms)}) {literal(self._end)}")
        # What llguidance refuses of a text in JSON is refused here in the same words.
        self.rules += [
            f"{own}_json: {checked}\n",
            f"{own}_text: %lark {{\nstart: TEXT\nTEXT: {text}\n}}\n",
        ]
        return f"(NEVER {own}_json | {own}_text)"

    def python(self, schema: Any) -> str:
        """As Python has it, or JSON. Raises as above."""
        words = sorted(self._words(schema, set()))
        return f"({' | '.join([*map(literal, words), self.json(schema)])})"

    def gemma(self, own: str, schema: Any) -> str:
        """As Gemma has it, or JSON. Raises as above.

        :param own: the beginning of the names of rules that are made for it.
        """
        types = argument_types(schema, self._root)
        if types == {"string"}:
            return f"{literal(self._begin)} {self.text(own, schema)}"
        if not isinstance(schema, Mapping):
            return self.json(schema)
        keys = schema.keys() - ANNOTATIONS
        if len(keys) == 1 and (key := min(keys)) in _CHOICES and "type" not in schema:
            options = self._one_of(own, schema[key])
            # llguidance refuses a oneOf of which more than one may hold.
            return options if key == "anyOf" else f"(NEVER {self.json(schema)} | {options})"
        if "string" in types and isinstance(kinds := schema.get("type"), list):
            others = [kind for kind in kinds if kind != "string"]
            parts = ({**schema, "type": kind} for kind in ("string", others) if kind)
            return self._one_of(own, list(parts))
        if types == {"array"} and not schema.keys() - _OF_LISTS and schema.get("items"):
            return self._list(own, schema)
        if types == {"object"} and not schema.keys() - _OF_OBJECTS and schema.get("properties"):
            return self._object(own, schema)
        return self.json(schema)

    def _one_of(self, own: str, schemas: Any) -> str:
        if not isinstance(schemas, list) or not schemas:
            return self.json({"anyOf": schemas})
        options = [self.gemma(f"{own}_{i}", part) for i, part in enumerate(schemas)]
        return f"({' | '.join(options)})"

    def _list(self, own: str, schema: Mapping[str, Any]) -> str:
        checked = self.json(schema)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        sizes = (least, 1 if most is None else most)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            return checked
        if most is not None and most < max(least, 1):
            return checked
        self.rules.append(f"{own}_item: {self.gemma(f'{own}_i', schema['items'])}\n")
        more = f'("," {own}_item){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        items = f"{own}_item {more}" if least else f"({own}_item {more})?"
        return f'(NEVER {checked} | "[" {items} "]")'

    def _object(self, own: str, schema: Mapping[str, Any]) -> str:
        checked = self.json(schema)
        properties, needed = schema["properties"], schema.get("required", [])
        plain = isinstance(properties, Mapping) and isinstance(needed, list)
        if not plain or set(needed) - properties.keys() or not all(map(is_bare, properties)):
            return checked
        for number, (name, part) in enumerate(properties.items()):
            value = self.gemma(f"{own}_{number}", part)
            self.rules.append(f"{own}_m{number}: {literal(f'{name}:')} {value}\n")
        members = [(f"{own}_m{i}", name in needed) for i, name in enumerate(properties)]
        self.rules += in_order(f"{own}_all", members, ",")
        return f'(NEVER {checked} | "{{" {own}_all "}}")'

    def _words(self, schema: Any, seen: set[str]) -> set[str]:
        """Python's words for values that are valid by a schema."""
        if not isinstance(schema, Mapping):
            return set()
        keys = schema.keys() & _OF_ANY_TYPE
        if not keys:
            types = argument_types({"type": schema.get("type")})
            of_type = {"boolean": {"True", "False"}, "null": {"None"}}
            return set().union(*(of_type.get(kind, set()) for kind in types))
        if len(keys) > 1 or ("type" in schema and not keys & {"enum", "const"}):
            return set()
        key = min(keys)
        value = schema[key]
        if key == "$ref" and isinstance(value, str) and value not in seen:
            seen.add(value)
            return self._words(pointed_at(self._root, value), seen)
        if key in _CHOICES and isinstance(value, list):
            return set().union(*(self._words(part, seen) for part in value))
        if key in ("enum", "const"):
            options = value if key == "enum" and isinstance(value, list) else [value]
            return {_WORDS[o] for o in options if o is None or isinstance(o, bool)}
        return set()

    def _counted(self, rule: str) -> str:
        self._written += len(rule)
        check_written(self._written)  # definitions stand with each value that refers to some
        return rule

    def _with_definitions(self, schema: Any) -> Mapping[str, Any] | bool:
        """The schema of a value, with what its references name."""
        if not isinstance(schema, Mapping):
            return bool(schema)
        text = json_of(schema)
        if b'"$ref"' not in text and b'Ref"' not in text:  # nor $dynamicRef, $recursiveRef
            return schema
        root = self._root
        return {**{k: root[k] for k in ("$defs", "definitions") if k in root}, **schema}


def is_bare(name: Any) -> bool:
    """Whether a name needs no quotes."""
    return isinstance(name, str) and _BARE_NAME.fullmatch(name) is not None


def in_order(rule: str, members: Sequence[tuple[str, bool]], comma: str) -> list[str]:
    """Rules for members of an object, of which some may be left out; the first one is ``rule``.

    :param members: the rule of each, and whether it has to be there.
    :param comma: stands between two.
    """
    between, empty = literal(comma), literal("")
    rules = [f"{rule}: {rule}_f0\n"]
    for number, (own, needed) in enumerate(members):
        after = f"{rule}_r{number + 1}"
        skipped, left = ("", "") if needed else (f" | {rule}_f{number + 1}", f" | {after}")
        rules.append(f"{rule}_f{number}: {own} {after}{skipped}\n")
        rules.append(f"{rule}_r{number}: {between} {own} {after}{left}\n")
    return [*rules, f"{rule}_f{len(members)}: {empty}\n", f"{rule}_r{len(members)}: {empty}\n"]
