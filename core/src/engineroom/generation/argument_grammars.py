"""The grammar of the arguments of tool calls, by the JSON schemas of the tools. Pure text.

Most forms have an object in JSON. Where a model writes each argument by itself, each has a rule of
its own, and keywords that speak of all of them together are kept to, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from engineroom.errors import ConfigurationError
from engineroom.generation.argument_types import argument_types, schema_of_arguments
from engineroom.generation.call_forms import (
    CallForm,
    ChannelForm,
    JsonForm,
    NamedForm,
    PythonicForm,
    TaggedForm,
    ToolFormat,
)
from engineroom.generation.grammars import json_rule, literal
from engineroom.generation.literal_scanner import JSON
from engineroom.generation.value_grammars import ANNOTATIONS, ValueRules, in_order, is_bare
from engineroom.tools import CallableTool

__all__ = ["argument_rules", "can_write", "members_of"]

_JOINS: Final = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})
"""With these, a schema may name properties elsewhere."""
_OF_ALL: Final = (
    "allOf", "anyOf", "oneOf", "not", "if", "enum", "const", "minProperties", "maxProperties",
    "dependentRequired", "dependentSchemas", "dependencies", "propertyNames", "patternProperties",
    "$ref", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""Keywords that speak of all arguments together."""
_MAX_GROUPS: Final = 64
"""Most groups of arguments of which one has to be there."""
_NEEDS: Final = ANNOTATIONS | {"required"}
_IN_TAGS: Final = re.compile(r"[^\s<>\"&=]{1,64}")


def argument_rules(format_: ToolFormat, tools: Mapping[str, CallableTool]) -> Iterator[str]:
    """The rules of the arguments of each tool: ``args_0``, ``args_1``, ….

    :param tools: by their names.
    :raises ConfigurationError: a schema cannot be honoured; names the tool.
    """
    form = format_.form
    by_itself = not isinstance(form, JsonForm | ChannelForm)
    if isinstance(form, NamedForm):
        by_itself = form.dialect is not JSON
    if by_itself:
        yield _values(form, {}).shared()
    for number, (name, tool) in enumerate(tools.items()):
        try:
            fields = _of_an_object(tool.parameters)
            if by_itself:
                yield from _own_rules(f"args_{number}", fields, form, strict=tool.strict)
            else:
                yield f"args_{number}: {json_rule(fields, strict=tool.strict)}\n"
        except ConfigurationError as error:
            error.put_within(tool.field, f"tool {name!r}")
            raise


def can_write(form: CallForm, tools: Mapping[str, CallableTool]) -> bool:
    """Whether the names of tools and of their arguments can stand in calls of this form."""
    if isinstance(form, JsonForm | ChannelForm) or (
        isinstance(form, NamedForm) and form.dialect is JSON
    ):
        return True
    if isinstance(form, PythonicForm) and not all(map(is_bare, tools)):
        return False
    names = (
        name
        for tool in tools.values()
        for node in [schema_of_arguments(tool.parameters)[1]]
        for name in [*_mapping(node.get("properties")), *_required(node)]
    )
    in_tags = isinstance(form, TaggedForm)
    return all(_IN_TAGS.fullmatch(name) if in_tags else is_bare(name) for name in names)


def _of_an_object(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of an object with no properties but those that it names, where it names some and
    does not speak of others.
    """
    if fields.get("type", "object") != "object":
        raise ConfigurationError("its parameters must be of type object")
    closed = "properties" in fields and not _JOINS & fields.keys()
    others = {"additionalProperties": False} if closed else {}
    return {"type": "object", **others, **fields}


# ── each by itself ───────────────────────────────────────────────────────────────────────────


class Members(NamedTuple):
    """The arguments of a tool.

    :param schemas: by their names, in their order.
    :param place: where these are in the schema of the tool's parameters.
    :param needs: groups of names; all of one of them have to be there.
    """

    schemas: Mapping[str, Any]
    place: str
    needs: list[frozenset[str]]


def members_of(parameters: Mapping[str, Any]) -> Members:
    """The arguments that a tool takes.

    :raises ConfigurationError: the schema says of them together what single ones cannot keep to;
        names the keyword.
    """
    path, node = schema_of_arguments(parameters)
    schemas = {**_mapping(node.get("properties"))}
    needs = [_required(node)]
    for key in _OF_ALL:
        if key in node:
            needs = _needs(key, node[key], needs, schemas)
    others = node.get("additionalProperties", True)
    for name in sorted(frozenset().union(*needs) - schemas.keys()):
        if others is False or (others is not True and argument_types(others) != {"string"}):
            raise ConfigurationError(f"required names {name[:64]!r}, which properties has not")
        schemas[name] = {"type": "string"} if others is True else others
    return Members(schemas, ".".join((*path, "properties")), needs)


def _required(node: Any) -> frozenset[str]:
    names = node.get("required") if isinstance(node, Mapping) else None
    return frozenset(filter(_is_text, names)) if isinstance(names, list) else frozenset()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _needs(
    key: str, value: Any, needs: list[frozenset[str]], schemas: Mapping[str, Any]
) -> list[frozenset[str]]:
    """What is needed with one more keyword. :raises ConfigurationError: it is another one."""
    if key in ("allOf", "anyOf") and isinstance(value, list):
        parts = [part for part in value if not isinstance(part, Mapping) or part.keys() <= _NEEDS]
        groups = [_required(part) for part in parts]
        if len(parts) == len(value) <= _MAX_GROUPS // len(needs) and False not in value:
            if key == "allOf":
                return [need.union(*groups) for need in needs]
            return [need | group for need in needs for group in groups]
    elif key == "minProperties" and isinstance(value, int):
        if all(len(need) >= value for need in needs):
            return needs
    elif key == "maxProperties" and isinstance(value, int):
        if len(schemas) <= value:
            return needs
    elif key == "patternProperties" and not schemas:
        return needs
    raise ConfigurationError(
        f"{key} of all parameters is nothing that calls as this model writes them can keep to; "
        "leave it out, or load the model with the option tool_format: generic"
    )


# ── as a model writes them ───────────────────────────────────────────────────────────────────


class _Style(NamedTuple):
    """How the arguments of a call are written, each by itself."""

    comma: str
    opening: str = ""
    closing: str = ""


_PYTHON: Final = _Style(", ")
_GEMMA: Final = _Style(",", "{", "}")


def _values(form: CallForm, fields: Mapping[str, Any], *, strict: bool = False) -> ValueRules:
    if isinstance(form, TaggedForm):
        line = "\n" if form.lines else ""
        end = f"{line}{form.value_end}"
        marks = [end, f"\n{form.parameter}", f"{line}{form.call_end}", *["<![CDATA["] * form.cdata]
        return ValueRules(fields, strict=strict, marks=marks, end=end)
    if isinstance(form, NamedForm) and form.dialect.mark is not None:
        mark = form.dialect.mark.texts[0]
        return ValueRules(fields, strict=strict, marks=[mark], begin=mark, end=mark)
    return ValueRules(fields, strict=strict)


def _own_rules(
    rule: str, fields: Mapping[str, Any], form: CallForm, *, strict: bool
) -> Iterator[str]:
    """Each property by itself, in the schema's order; some may be missing."""
    schemas, place, needs = members_of(fields)
    values = _values(form, fields, strict=strict)
    for number, (name, schema) in enumerate(schemas.items()):
        own = f"{rule}_{number}"
        try:
            if isinstance(form, TaggedForm):
                member = _tagged(own, name, schema, form, values, fields)
            elif isinstance(form, PythonicForm):
                member = f"{literal(f'{name}=')} {values.python(schema)}"
            else:
                member = f"{literal(f'{name}:')} {values.gemma(own, schema)}"
        except ConfigurationError as error:
            error.put_within(f"{place}.{name}")
            raise
        yield f"{own}: {member}\n"
    yield from values.rules
    bodies = []
    for number, need in enumerate(needs):
        members = [(f"{rule}_{i}", name in need) for i, name in enumerate(schemas)]
        if isinstance(form, TaggedForm):
            body = " ".join(own if needed else f"{own}?" for own, needed in members)
            bodies.append(body or literal(""))
            continue
        style = _PYTHON if isinstance(form, PythonicForm) else _GEMMA
        yield from in_order(f"{rule}_all{number}", members, style.comma)
        bodies.append(f"{literal(style.opening)} {rule}_all{number} {literal(style.closing)}")
    yield f"{rule}: {' | '.join(bodies)}\n"


def _tagged(
    own: str,
    name: str,
    schema: Any,
    form: TaggedForm,
    values: ValueRules,
    fields: Mapping[str, Any],
) -> str:
    types = argument_types(schema, fields)
    is_text = types == {"string"}
    line = "\n" if form.lines else ""
    written = form.written_parameter.replace("{type}", min(types, default="object"))
    written = written.replace("{string}", "true" if is_text else "false").replace("{name}", name)
    before = f"{form.parameter}{written}{form.parameter_end}{form.key_gap}{line}"
    end = literal(f"{line}{form.value_end}")
    value = values.text(own, schema) if is_text else f"{values.json(schema)} {end}"
    return f"{literal(before)} {value} {literal(form.gap)}"
