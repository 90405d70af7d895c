"""The grammar of tool calls, in the form in which a model writes them. Pure text.

So what the model likes best is allowed, and what it writes is read as if nothing had made it. The
arguments of each call are valid by its tool's JSON schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from engineroom.generation.argument_grammars import argument_rules, can_write
from engineroom.generation.call_forms import (
    ChannelForm,
    JsonForm,
    NamedForm,
    PythonicForm,
    TaggedForm,
    ToolFormat,
)
from engineroom.generation.grammars import literal
from engineroom.generation.tool_formats import GENERIC
from engineroom.tools import CallableTool

__all__ = ["MAX_CALLS", "call_rules", "calls_in_text_rules", "writable"]

MAX_CALLS: Final = 16
"""Most calls of an answer that has to have some."""
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


def writable(format_: ToolFormat, tools: _Tools) -> ToolFormat:
    """The format, if the names of these tools can stand in it; else the generic one."""
    return format_ if can_write(format_.form, tools) else GENERIC


def call_rules(format_: ToolFormat, tools: _Tools, *, several: bool) -> list[str]:
    """Rules for one call, or more; the first one is ``calls``.

    :param tools: by their names.
    :raises ConfigurationError: a schema cannot be honoured; names the tool.
    """
    shape = _shape(format_)
    call = " | ".join(_call(name, i, shape, shape.begin) for i, name in enumerate(tools))
    more = _more(shape, several=several)
    around = f"{literal(shape.opening)} call{more} {literal(shape.closing)}"
    return [f"calls: {around}\n", f"call: {call}\n", *argument_rules(format_, tools)]


def calls_in_text_rules(format_: ToolFormat, tools: _Tools, *, several: bool) -> list[str]:
    """Rules for text in which calls may stand; the first one is ``calls_in_text``. They refer to
    ``TEXT``, any text. The same parameters as of :func:`call_rules`.
    """
    shape = _shape(format_)
    if not shape.trigger:
        text = "/\\s*([^\\s{\\[](.|\\n)*)?/"
        if format_.begin:
            text += f" & ~(/(.|\\n)*/ {literal(format_.begin)} /(.|\\n)*/)"
        text = f"calls_in_text: calls | UNMARKED\nUNMARKED: {text}\n"
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
    return [text, *rules, *argument_rules(format_, tools)]


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
    if isinstance(form, PythonicForm):
        if not form.brackets:
            return _Shape("", "(", ")", "\n", opening + begin, end + closing, trigger)
        opening, closing = f"{opening}{begin}[", f"]{end}{closing}"
        return _Shape("", "(", ")", ", ", opening, closing, trigger)
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
