"""The grammar of tool calls, in the form in which a model writes them. Pure text.

So what the model likes best is allowed, and what it writes is read as if nothing had made it. The
arguments of each call are valid by its tool's JSON schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from engineroom.errors import ConfigurationError
from engineroom.field_types import json_of
from engineroom.generation.argument_types import argument_types
from engineroom.generation.call_forms import (
    ChannelForm,
    JsonForm,
    NamedForm,
    TaggedForm,
    ToolFormat,
)
from engineroom.generation.grammars import check_written, json_rule, literal
from engineroom.generation.literal_scanner import JSON
from engineroom.generation.tool_formats import GENERIC
from engineroom.tools import CallableTool

__all__ = ["MAX_CALLS", "call_rules", "calls_in_text_rules", "writable"]

MAX_CALLS: Final = 16
"""Most calls of an answer that has to have some."""
_JOINS: Final = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})
"""With these, a schema may name properties elsewhere."""
_Tools = Mapping[str, CallableTool]


class _Shape(NamedTuple):
    """How calls are written: each is ``begin`` name ``middle`` arguments ``end``."""

    begin: str
    middle: str
    end: str
    between: str = ""
    opening: str = ""
    closing: str = ""
    trigger: str = ""
    """What a call begins with, in the midst of text; empty: only an answer's first character
    tells."""
    one: bool = False
    """There can be no more than one."""


def writable(format_: ToolFormat) -> ToolFormat:
    """The format, if calls in it can be made to be valid; else the generic one."""
    form = format_.form
    if isinstance(form, JsonForm | TaggedForm | ChannelForm):
        return format_
    return format_ if isinstance(form, NamedForm) and form.dialect is JSON else GENERIC


def call_rules(format_: ToolFormat, tools: _Tools, *, several: bool) -> list[str]:
    """Rules for one call, or more; the first one is ``calls``.

    :param tools: by their names.
    :raises ConfigurationError: a schema cannot be honoured; names the tool.
    """
    shape = _shape(format_)
    call = " | ".join(_call(name, i, shape, shape.begin) for i, name in enumerate(tools))
    more = _more(shape, several=several)
    around = f"{literal(shape.opening)} call{more} {literal(shape.closing)}"
    return [f"calls: {around}\n", f"call: {call}\n", *_arguments(format_, tools)]


def calls_in_text_rules(format_: ToolFormat, tools: _Tools, *, several: bool) -> list[str]:
    """Rules for text in which calls may stand; the first one is ``calls_in_text``. They refer to
    ``TEXT``, any text. The same parameters as of :func:`call_rules`.
    """
    shape = _shape(format_)
    if not shape.trigger:
        text = "calls_in_text: calls | /([^{\\[](.|\\n)*)?/\n"
        return [text, *call_rules(format_, tools, several=several)]
    begin = (shape.opening + shape.begin).removeprefix(shape.trigger)
    first = " | ".join(_call(name, i, shape, begin) for i, name in enumerate(tools))
    rules = [f"trigger[lazy]: TEXT {literal(shape.trigger)}\n", f"first: {first}\n"]
    more = ""
    if several and shape.opening:  # else each call has a trigger of its own
        call = " | ".join(_call(name, i, shape, shape.begin) for i, name in enumerate(tools))
        rules.append(f"call: {call}\n")
        more = _more(shape, several=several)
    rules.append(f"called: trigger first{more} {literal(shape.closing)}\n")
    several = several and not shape.one
    text = "calls_in_text: called* TEXT\n" if several else "calls_in_text: called | TEXT\n"
    return [text, *rules, *_arguments(format_, tools)]


def _more(shape: _Shape, *, several: bool) -> str:
    if not several or shape.one:
        return ""
    return f" ({literal(shape.between)} call){{0,{MAX_CALLS - 1}}}"


def _call(name: str, number: int, shape: _Shape, before: str) -> str:
    return f"{literal(before + name + shape.middle)} args_{number} {literal(shape.end)}"


def _shape(format_: ToolFormat) -> _Shape:
    form = format_.form
    opening, closing = format_.section
    begin, end = format_.begin, format_.end
    if format_ is GENERIC:
        begin, end = f"{begin}\n", f"\n{end}"
    elif format_.bare:  # models that may leave it out do
        begin = end = ""
    trigger = (opening or begin).rstrip()
    if isinstance(form, JsonForm):
        middle = f'", "{form.arguments_key}": ' if form.name_key else '": '
        before = f'{{"{form.name_key}": "' if form.name_key else '{"'
        if form.many:
            opening, closing = f"{opening}{begin}[", f"]{end}{closing}"
            return _Shape(before, middle, "}", ", ", opening, closing, trigger)
        between = format_.between or form.separator
        return _Shape(
            begin + before, middle, f"}}{end}", between, opening, closing, trigger, one=not between
        )
    if isinstance(form, NamedForm):
        before, behind = form.written.replace("{index}", "0").split("{name}")
        return _Shape(
            f"{begin}{form.before}{before}", f"{behind}{form.after}", f"{form.close}{end}",
            format_.between, opening, closing, trigger,
        )  # fmt: skip
    if isinstance(form, TaggedForm):
        before, behind = form.written_call.replace("{index}", "1").split("{name}")
        return _Shape(
            f"{begin}{form.call}{before}", f"{behind}{form.name_end}{form.gap}",
            f"{form.call_end}{end}", format_.between, opening, closing,
            trigger or form.call.rstrip(),
        )  # fmt: skip
    assert isinstance(form, ChannelForm)
    to = "<|channel|>commentary to=functions."
    return _Shape(to, " <|constrain|>json<|message|>", "", trigger=to, one=True)


# ── arguments ────────────────────────────────────────────────────────────────────────────────


def _arguments(format_: ToolFormat, tools: _Tools) -> Iterator[str]:
    for number, (name, tool) in enumerate(tools.items()):
        try:
            fields = _of_an_object(tool.parameters)
            if isinstance(form := format_.form, TaggedForm):
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


def _tagged(
    rule: str, fields: Mapping[str, Any], form: TaggedForm, *, strict: bool
) -> Iterator[str]:
    """Each property between tags, in the schema's order; those that are not required may be
    missing.
    """
    properties = fields.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    needed = fields.get("required")
    needed = needed if isinstance(needed, list) else []
    parts = []
    written = 0
    for number, (name, schema) in enumerate(properties.items()):
        own = f"{rule}_{number}"
        parts.append(own if name in needed else f"{own}?")
        types = argument_types(schema, fields)
        end = f"\n{form.value_end}" if form.lines else form.value_end
        if types != {"string"}:
            value = f"{_rule_of(name, _with_definitions(schema, fields), strict)} {literal(end)}"
            written += len(value)
            check_written(written)  # definitions stand with each property that refers to some
        elif options := _texts_of(schema):
            value = f"({' | '.join(map(literal, options))}) {literal(end)}"
        else:
            value = f"{own}_text"
            yield f"{own}_text[lazy]: TEXT {literal(end)}\n"
        yield f"{own}: {literal(_before_value(name, form, types))} {value} {literal(form.gap)}\n"
    yield f"{rule}: {' '.join(parts) or literal('')}\n"


def _rule_of(name: str, schema: Mapping[str, Any] | bool, strict: bool) -> str:
    try:
        return json_rule(schema, strict=strict)
    except ConfigurationError as error:
        error.put_within(f"properties.{name}")
        raise


def _before_value(name: str, form: TaggedForm, types: frozenset[str]) -> str:
    written = form.written_parameter.replace("{type}", min(types, default="object"))
    written = written.replace("{string}", "true" if types == {"string"} else "false")
    line = "\n" if form.lines else ""
    named = written.replace("{name}", name)
    return f"{form.parameter}{named}{form.parameter_end}{form.key_gap}{line}"


def _texts_of(schema: Any) -> list[str]:
    """The texts that a value has to be one of; empty: any."""
    options = schema.get("enum", [schema.get("const")]) if isinstance(schema, Mapping) else None
    options = options if isinstance(options, list) else []
    return options if all(isinstance(option, str) for option in options) else []


def _with_definitions(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any] | bool:
    """The schema of a property, with what its references name."""
    if not isinstance(schema, Mapping):
        return bool(schema)
    text = json_of(schema)
    if b'"$ref"' not in text and b'Ref"' not in text:  # nor $dynamicRef, $recursiveRef
        return schema
    return {**{k: root[k] for k in ("$defs", "definitions") if k in root}, **schema}
