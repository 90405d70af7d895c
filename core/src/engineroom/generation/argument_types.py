"""The types of arguments that a model writes as bare text, by the JSON schema of its tool."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, Final

from engineroom.generation.json_schemas import pointed_at, reference_steps
from engineroom.generation.literal_scanner import clean_json, json_text

__all__ = ["argument_json", "argument_types", "property_schema", "schema_of_arguments"]

_TYPES: Final = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_WORDS: Final = {"True": True, "False": False, "None": None, "true": True, "false": False}
_MAX_CHARS: Final = 1_000_000
"""Of a value that is read as JSON; a longer one is text."""
_MAX_PYTHON_CHARS: Final = 10_000
_MAX_REFERENCES: Final = 16
_MAX_DEPTH: Final = 64


def schema_of_arguments(parameters: Any) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The schema that has a tool's properties, where the schema of its parameters is a reference;
    and where in it that is.
    """
    node: Any = parameters
    place: tuple[str, ...] = ()
    for _ in range(_MAX_REFERENCES):
        if not isinstance(node, Mapping):
            break
        if "properties" in node or not isinstance(reference := node.get("$ref"), str):
            return place, node
        node, place = pointed_at(parameters, reference), reference_steps(reference)
    return (), {}


def property_schema(parameters: Any, name: str) -> Any:
    """The schema of an argument; ``None``: the tool knows of none such."""
    properties = schema_of_arguments(parameters)[1].get("properties")
    return properties.get(name) if isinstance(properties, Mapping) else None


def argument_types(schema: Any, root: Any = None) -> frozenset[str]:
    """The types that a schema allows; empty: it does not say.

    :param root: the schema that references are looked up in.
    """
    return _types(schema, root, {}, 0)


def _types(schema: Any, root: Any, known: dict[str, frozenset[str]], depth: int) -> frozenset[str]:
    """:param known: of references; each is followed once, or some would be without an end."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return frozenset()
    if isinstance(reference := schema.get("$ref"), str):
        if reference not in known:
            known[reference] = frozenset()
            known[reference] = _types(pointed_at(root, reference), root, known, depth + 1)
        return known[reference]
    kind = schema.get("type")
    if kind is not None:
        kinds = {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()
        types = frozenset(k for k in kinds if k in _TYPES)
        return types | {"null"} if schema.get("nullable") is True and types else types
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(choices := schema.get(key), list):
            named = [_types(choice, root, known, depth + 1) for choice in choices]
            if all(named) or key == "allOf":
                return frozenset().union(*named)
    values = schema.get("enum")
    if values is None and "const" in schema:
        values = [schema["const"]]
    if isinstance(values, list) and values:
        return frozenset(_type_of(value) for value in values)
    return frozenset()


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def argument_json(text: str, types: frozenset[str]) -> str:
    """An argument that stands as bare text, as JSON: of one of these types, if it can be read so.

    What cannot be read so is what it looks like, or text where text is allowed.

    :param types: as :func:`argument_types` gives them; empty: they are not known.
    """
    bare = text.strip()
    if types != {"string"} and len(bare) <= _MAX_CHARS:
        value, is_json = _read(bare)
        if value is not _NOTHING and (_fits(value, types) or "string" not in types):
            if is_json and "\\u" not in bare:
                return bare
            return clean_json(value)
    return f'"{json_text(text)}"'


_NOTHING: Final = object()


def _read(text: str) -> tuple[Any, bool]:
    """The value, and whether it is written in JSON; else in Python."""
    try:
        return json.loads(text, parse_constant=_refuse), True
    except (ValueError, RecursionError):
        pass
    if text in _WORDS:
        return _WORDS[text], False
    if text[:1] in "[{(" and len(text) <= _MAX_PYTHON_CHARS:
        try:
            value = ast.literal_eval(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return _NOTHING, False
        return value, False
    return _NOTHING, False


def _refuse(_: str) -> Any:
    raise ValueError("no JSON")


def _fits(value: Any, types: frozenset[str]) -> bool:
    kind = _type_of(value)
    if not types:
        return True
    if kind == "number" and value.is_integer() and "integer" in types:
        return True
    return kind in types or (kind == "integer" and "number" in types)
