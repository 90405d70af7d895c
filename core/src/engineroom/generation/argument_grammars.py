"""The grammar of the arguments of tool calls, by the JSON schemas of the tools. Pure text.

Most forms have an object in JSON. Where a model writes each argument by itself, each has a rule of
its own, and keywords that speak of all of them together are kept to, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from engineroom.errors import ConfigurationError
from engineroom.field_types import json_of
from engineroom.generation.argument_types import argument_types, schema_of_arguments
from engineroom.generation.call_forms import TaggedForm, ToolFormat
from engineroom.generation.grammars import check_written, json_rule, literal
from engineroom.generation.text_grammars import NoTextError, text_terms, text_without
from engineroom.tools import CallableTool

__all__ = ["argument_rules", "members_of"]

_JOINS: Final = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})
"""With these, a schema may name properties elsewhere."""
_OF_ALL: Final = (
    "allOf", "anyOf", "oneOf", "not", "if", "enum", "const", "minProperties", "maxProperties",
    "dependentRequired", "dependentSchemas", "dependencies", "propertyNames", "patternProperties",
    "$ref", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""Keywords that speak of all arguments together."""
_ANNOTATIONS: Final = frozenset({"type", "title", "description", "default", "examples", "$comment"})
"""Keywords that ask nothing of a text."""


def argument_rules(format_: ToolFormat, tools: Mapping[str, CallableTool]) -> Iterator[str]:
    """The rules of the arguments of each tool: ``args_0``, ``args_1``, ….

    :param tools: by their names.
    :raises ConfigurationError: a schema cannot be honoured; names the tool.
    """
    form = format_.form
    if isinstance(form, TaggedForm):
        yield f"PLAIN: ({_plain(form)}) {_end(form)}\nNEVER: {_NEVER}\n"
    for number, (name, tool) in enumerate(tools.items()):
        try:
            fields = _of_an_object(tool.parameters)
            if isinstance(form, TaggedForm):
                yield from _tagged(f"args_{number}", fields, form, strict=tool.strict)
            else:
                yield f"args_{number}: {json_rule(fields, strict=tool.strict)}\n"
        except ConfigurationError as error:
            error.put_within(tool.field, f"tool {name!r}")
            raise


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
    properties = node.get("properties")
    schemas = {**properties} if isinstance(properties, Mapping) else {}
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


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _needs(
    key: str, value: Any, needs: list[frozenset[str]], schemas: Mapping[str, Any]
) -> list[frozenset[str]]:
    """What is needed with one more keyword. :raises ConfigurationError: it is another one."""
    if key in ("allOf", "anyOf") and isinstance(value, list):
        parts = [part for part in value if not isinstance(part, Mapping) or part.keys() <= _NEEDS]
        groups = [_required(part) for part in parts]
        if len(parts) == len(value) <= MAX_GROUPS // len(needs) and False not in value:
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


MAX_GROUPS: Final = 64
"""Most groups of arguments of which one has to be there."""
_NEEDS: Final = _ANNOTATIONS | {"required"}


# ── between tags ─────────────────────────────────────────────────────────────────────────────


_NEVER: Final = "/a/ & /b/"


def _plain(form: TaggedForm) -> str:
    """A term for what a text may be that no mark ends before its end."""
    line = "\n" if form.lines else ""
    marks = [f"{line}{form.value_end}", f"\n{form.parameter}", f"{line}{form.call_end}"]
    return text_without([*marks, *["<![CDATA["] * form.cdata])


def _end(form: TaggedForm) -> str:
    return literal(f"\n{form.value_end}" if form.lines else form.value_end)


def _tagged(
    rule: str, fields: Mapping[str, Any], form: TaggedForm, *, strict: bool
) -> Iterator[str]:
    """Each property between tags, in the schema's order; those that are not required may be
    missing.
    """
    schemas, place, needs = members_of(fields)
    plain, end = _plain(form), _end(form)
    written = 0
    for number, (name, schema) in enumerate(schemas.items()):
        own = f"{rule}_{number}"
        types = argument_types(schema, fields)
        value = "PLAIN"
        if types != {"string"} or schema.keys() - _ANNOTATIONS:
            try:
                checked = json_rule(_with_definitions(schema, fields), strict=strict)
                terms = text_terms(schema, fields) if types == {"string"} else []
            except NoTextError:
                terms = [_NEVER]
            except ConfigurationError as error:
                error.put_within(f"{place}.{name}")
                raise
            if types != {"string"}:
                value = f"{checked} {end}"
            else:  # what llguidance refuses of a string in JSON is refused here in the same words
                yield f"{own}_json: {checked}\n"
                value = f"(NEVER {own}_json | {own}_text)"
                text = f"({' & '.join([f'({plain})', *terms])}) {end}"
                yield f"{own}_text: %lark {{\nstart: TEXT\nTEXT: {text}\n}}\n"
                written += len(checked) + len(text)
            written += len(value)
            check_written(written)  # definitions stand with each property that refers to some
        yield f"{own}: {literal(_before_value(name, form, types))} {value} {literal(form.gap)}\n"
    bodies = (
        " ".join(
            f"{rule}_{number}" if name in need else f"{rule}_{number}?"
            for number, name in enumerate(schemas)
        )
        for need in needs
    )
    yield f"{rule}: {' | '.join(body or literal('') for body in bodies)}\n"


def _before_value(name: str, form: TaggedForm, types: frozenset[str]) -> str:
    written = form.written_parameter.replace("{type}", min(types, default="object"))
    written = written.replace("{string}", "true" if types == {"string"} else "false")
    line = "\n" if form.lines else ""
    named = written.replace("{name}", name)
    return f"{form.parameter}{named}{form.parameter_end}{form.key_gap}{line}"


def _with_definitions(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any] | bool:
    """The schema of a property, with what its references name."""
    if not isinstance(schema, Mapping):
        return bool(schema)
    text = json_of(schema)
    if b'"$ref"' not in text and b'Ref"' not in text:  # nor $dynamicRef, $recursiveRef
        return schema
    return {**{k: root[k] for k in ("$defs", "definitions") if k in root}, **schema}
