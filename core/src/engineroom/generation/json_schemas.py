"""Walking JSON schemas: what is in one, what it refers to, and where a mistake is. Pure."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, Final

__all__ = [
    "endless",
    "is_unkept",
    "place_of",
    "pointed_at",
    "reference_steps",
    "subschemas",
    "without_formats",
]

_Path = tuple[str, ...]
_MAPS: Final = ("properties", "patternProperties", "dependentSchemas")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_ALONE: Final = (
    "items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains",
    "propertyNames", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_DEFINITIONS: Final = ("$defs", "definitions")
_HOLDING: Final = frozenset((*_MAPS, *_LISTS, *_ALONE, *_DEFINITIONS))
"""The keys that hold other schemas."""
_KEPT_FORMATS: Final = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
)
_UNKEPT_FORMATS: Final = frozenset(
    [
        "idn-email",
        "idn-hostname",
        "uri-reference",
        "iri",
        "iri-reference",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
        "regex",
    ]
)
"""Formats of JSON Schema that no grammar here has."""


def subschemas(schema: Any) -> Iterator[tuple[_Path, dict[str, Any]]]:
    """A schema and all that is in it, each with its path; definitions last. Lazily: who stops
    early has waited for no more than what came.
    """
    todo: list[Iterator[tuple[_Path, Any]]] = [iter([((), schema)])]
    paths: list[_Path] = [()]
    while todo:
        if (found := next(todo[-1], None)) is None:
            todo.pop()
            paths.pop()
        elif isinstance(node := found[1], dict):
            path = (*paths[-1], *found[0])
            yield path, node
            todo.append(_parts(node))
            paths.append(path)


def _parts(node: Mapping[str, Any], definitions: bool = True) -> Iterator[tuple[_Path, Any]]:
    if _HOLDING.isdisjoint(node):  # most nodes, of wide schemas
        return
    for key in (*_MAPS, *(_DEFINITIONS if definitions else ())):
        if isinstance(parts := node.get(key), Mapping):
            yield from (((key, str(name)), part) for name, part in parts.items())
    for key in _LISTS:
        if isinstance(parts := node.get(key), list | tuple):
            yield from (((key, str(number)), part) for number, part in enumerate(parts))
    yield from (((key,), node[key]) for key in _ALONE if isinstance(node.get(key), Mapping))


def pointed_at(schema: Any, reference: str) -> Any:
    """What a reference within the schema leads to; ``None`` where that is not plain to see."""
    if reference == "#":
        return schema
    if not reference.startswith("#/") or "%" in reference:
        return None
    node = schema
    for step in reference[2:].split("/"):
        if isinstance(node, list) and step.isdecimal() and len(step) < 7:
            node = node[int(step)] if int(step) < len(node) else None
        elif isinstance(node, Mapping):
            node = node.get(step.replace("~1", "/").replace("~0", "~"))
        else:
            return None
    return node


# ── what leads to nothing but itself ─────────────────────────────────────────────────────────


def endless(schema: Any) -> _Path | None:
    """Where a value would have to contain itself, or a reference leads back to itself; ``None``:
    nowhere. Definitions that nothing refers to do not count.
    """
    nodes: dict[int, tuple[_Path, Mapping[str, Any]]] = {}
    todo: list[tuple[_Path, Any]] = [((), schema)]
    while todo:
        path, node = todo.pop()
        if not isinstance(node, Mapping) or id(node) in nodes:
            continue
        nodes[id(node)] = path, node
        if path and "$id" in node:  # references in it do not begin at the whole schema
            return None
        todo += [((*path, *step), part) for step, part in _parts(node, definitions=False)]
        if isinstance(reference := node.get("$ref"), str):
            todo.append((reference_steps(reference), pointed_at(schema, reference)))
    needs = {key: _needs(schema, node) for key, (_, node) in nodes.items()}
    unmet = {key: len(groups) for key, groups in needs.items()}
    asked: dict[int, list[tuple[int, int]]] = {}  # who needs it, and for which of its needs
    for key, groups in needs.items():
        for number, group in enumerate(groups):
            for part in group:
                asked.setdefault(id(part), []).append((key, number))
    met: set[tuple[int, int]] = set()
    ended = deque(key for key, count in unmet.items() if not count)
    while ended:
        for need in asked.get(ended.popleft(), ()):
            if need not in met:
                met.add(need)
                unmet[need[0]] -= 1
                if not unmet[need[0]]:
                    ended.append(need[0])
    return next((nodes[key][0] for key, count in unmet.items() if count), None)


def _needs(schema: Any, node: Mapping[str, Any]) -> list[list[Any]]:
    """What must have a value for the node to have one: of each group, one member."""
    groups: list[list[Any]] = []
    if isinstance(reference := node.get("$ref"), str):
        groups.append([pointed_at(schema, reference)])
    groups += [[part] for part in _list(node.get("allOf"))]
    groups += [_list(node[key]) for key in ("anyOf", "oneOf") if _list(node.get(key))]
    properties = node.get("properties")
    if node.get("type") == "object" and isinstance(properties, Mapping):
        names = [name for name in _list(node.get("required")) if isinstance(name, str)]
        groups += [[properties[name]] for name in names if name in properties]
    least = node.get("minItems")
    if node.get("type") == "array" and isinstance(least, int) and least > 0:
        first = _list(node.get("prefixItems"))
        groups += [[part] for part in first[:least]]
        groups += [[node.get("items")]] if len(first) < least else []
    # What is no mapping has a value, or none at all, which the grammar tells.
    return [group for group in groups if all(isinstance(part, Mapping) for part in group)]


def _list(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list | tuple) else []


def reference_steps(reference: str) -> _Path:
    """The path of what a reference within a schema leads to."""
    return tuple(filter(None, reference.removeprefix("#").split("/")))


# ── formats ──────────────────────────────────────────────────────────────────────────────────


def without_formats(schema: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    """The schema, changed: without the formats that no grammar here has. They are annotations.

    :param strict: those of JSON Schema itself stay, to be refused.
    """
    for _, node in subschemas(schema):
        name = node.get("format")
        known = _KEPT_FORMATS | _UNKEPT_FORMATS if strict else _KEPT_FORMATS
        if isinstance(name, str) and name not in known:
            del node["format"]
    return schema


def is_unkept(name: Any) -> bool:
    """Whether it is a format of JSON Schema itself that is not kept to."""
    return isinstance(name, str) and name in _UNKEPT_FORMATS


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────

_KEYS: Final = re.compile(r'Unimplemented keys: \["([^"]*)"')
_SOMETIMES: Final = ("oneOf", "min/maxProperties")
"""What is refused only where it stands beside other things."""
_SHAPES: Final[Mapping[str, tuple[type, ...]]] = {
    "type": (str, list), "properties": (dict,), "enum": (list,), "$ref": (str,),
}  # fmt: skip


def place_of(schema: Any, wrong: str, pattern: str | None = None) -> str:
    """Where in a schema is what a grammar's compiler says is wrong; empty: it is not known.

    Where it may be at several places, that is what they are all in.

    :param wrong: what it says.
    :param pattern: the regular expression that it speaks of.
    """
    places = (path for path, node in subschemas(schema) if _is_at(node, wrong, pattern))
    place = list(next(places, ()))
    if wrong.startswith(_SOMETIMES):
        for other in places:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(place, other, strict=False))
            place = [step for step, _ in same]
    return ".".join(place)


def _is_at(node: Mapping[str, Any], wrong: str, pattern: str | None) -> bool:
    if pattern is not None:
        patterns = node.get("patternProperties")
        return pattern == node.get("pattern") or pattern in (patterns or ())
    if keys := _KEYS.match(wrong):
        return keys[1] in node
    return any(_says(wrong, key, value) for key, value in node.items())


def _says(wrong: str, key: str, value: Any) -> bool:
    """Whether it is a keyword with this value that is wrong."""
    if wrong.startswith(f"{key} must be "):
        return not isinstance(value, _SHAPES.get(key, ()))
    if f" for '{key}', got " in wrong:
        return wrong.endswith(f", got {json.dumps(value, ensure_ascii=False)}")
    if key == "format":
        return wrong == f"Unknown format: {value}"
    if key == "type":
        values = value if isinstance(value, list) else [value]
        return any(wrong == f"Invalid type: {name}" for name in values)
    if key == "$ref" and isinstance(value, str):
        missing = f"Pointer '{value.removeprefix('#')}' does not exist"
        return wrong == missing or wrong.startswith(f"Resource '{value}'")
    if wrong.startswith("min/maxProperties"):
        return key in ("minProperties", "maxProperties")
    return key == "oneOf" and wrong.startswith(key)
