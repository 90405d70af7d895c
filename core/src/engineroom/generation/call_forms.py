"""What tool calls look like in a model's text: the parts that formats are made of.

A format is data. What it says is enough to read calls (:mod:`engineroom.generation.outputs`) and to
write the grammar of a call (:mod:`engineroom.generation.tool_grammars`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from engineroom.generation.literal_scanner import JSON, Dialect

__all__ = [
    "CallForm",
    "ChannelForm",
    "JsonForm",
    "NamedForm",
    "PythonicForm",
    "ReasoningFormat",
    "TaggedForm",
    "ToolFormat",
    "problem_of",
]


@dataclass(frozen=True, slots=True)
class JsonForm:
    """An object with the name and the arguments of a call, or a list of such objects."""

    name_key: str = "name"
    """Empty: the name is the key of the arguments, which are all that there is."""
    arguments_key: str = "arguments"
    many: bool = False
    """Calls stand in a list, also a single one."""
    separator: str = ""
    """Between calls that stand in no list and have no markers around them."""


@dataclass(frozen=True, slots=True)
class NamedForm:
    """A name, then arguments as an object."""

    before: str = ""
    """In front of the name."""
    after: str = ""
    """Between the name and the arguments."""
    close: str = ""
    """Behind the arguments."""
    id_mark: str = ""
    """Between the name and an id, which ``after`` follows."""
    name: re.Pattern[str] = re.compile(r"\s*(?P<name>[^\s`]+)[\s\S]*")
    """Finds the name in what stands there."""
    written: str = "{name}"
    """How a name is written: with ``{name}``, and ``{index}`` for which call it is."""
    dialect: Dialect = JSON
    """How the arguments are written."""


@dataclass(frozen=True, slots=True)
class TaggedForm:
    """A name, then each argument between tags, as bare text or as JSON."""

    parameter: str
    """Begins an argument; its name follows."""
    parameter_end: str
    """Behind the name of an argument, and before its value."""
    value_end: str
    call_end: str
    call: str = ""
    """Begins a call; its name follows. Empty: the name stands right behind the format's begin."""
    name_end: str = ""
    """Behind the name of a call."""
    written_call: str = "{name}"
    """How the name of a call is written: with ``{name}``, and ``{index}`` for which call it is,
    from 1."""
    written_parameter: str = "{name}"
    """How the name of an argument is written: with ``{name}``, and with ``{string}`` (``true`` or
    ``false``) or ``{type}`` where that is said."""
    attributes: bool = False
    """Names stand in attributes: ``name="f"``."""
    types: Literal["schema", "string", "type"] = "schema"
    """What says how a value is read: the tool's schema, or an attribute of the argument:
    ``string="true"``, ``type="number"``."""
    lines: bool = False
    """A value stands on lines of its own; the line breaks around it do not belong to it."""
    gap: str = ""
    """Behind the name of a call, and behind each argument."""
    key_gap: str = ""
    """Between the name of an argument and its value, where that is a tag of its own."""
    cdata: bool = False
    """Text may stand in CDATA sections of XML."""


@dataclass(frozen=True, slots=True)
class PythonicForm:
    """Calls as Python has them, with arguments by name."""

    brackets: bool = True
    """They stand in a list; else each has a line."""


@dataclass(frozen=True, slots=True)
class ChannelForm:
    """Messages with a header each, which names a channel and a recipient (OpenAI's Harmony)."""

    marks: tuple[str, ...] = (
        "<|start|>assistant",
        "<|channel|>",
        "<|constrain|>",
        "<|message|>",
        "<|end|>",
        "<|call|>",
        "<|return|>",
    )


CallForm: TypeAlias = JsonForm | NamedForm | TaggedForm | PythonicForm | ChannelForm


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """What stands around a model's reasoning."""

    name: str
    begin: str
    end: str
    also_ends: tuple[str, ...] = ()
    """What can only follow, and so ends it as well; stays unread."""
    anywhere: bool = False
    """It may begin in the middle of an answer: the markers are no text that a model quotes."""
    forms: tuple[tuple[str, ...], ...] = ()
    """Texts that a chat template has together, if it knows this reasoning."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls of tools.

    :ivar name: by which an option chooses it.
    :ivar form: what a call looks like between ``begin`` and ``end``.
    :ivar begin: in front of each call, or of each list; empty: nothing, calls are told by what
        they look like, and by the names of the tools that were offered.
    :ivar end: behind it; may be missing where the text ends.
    :ivar section: around all calls.
    :ivar between: between calls of a section, or of none.
    :ivar bare: calls may stand there without ``begin``, as the first thing in the content.
    :ivar trims: white space in front of a call is no content.
    :ivar ignored: markup that is neither content nor part of a call.
    :ivar templates: texts that a chat template has together, if it writes this format; one of
        these groups is enough.
    """

    name: str
    form: CallForm
    begin: str = ""
    end: str = ""
    section: tuple[str, str] = ("", "")
    between: str = ""
    bare: bool = False
    trims: bool = False
    ignored: tuple[str, ...] = ()
    templates: tuple[tuple[str, ...], ...] = ()

    @property
    def markers(self) -> frozenset[str]:
        """All texts that tell what of an answer is what; control tokens of models are in them."""
        values = [getattr(self.form, field.name) for field in fields(self.form)]
        texts = {value for value in values if isinstance(value, str)}
        if isinstance(self.form, ChannelForm):
            texts |= set(self.form.marks)
        if isinstance(self.form, NamedForm) and self.form.dialect.mark is not None:
            texts |= set(self.form.dialect.mark.texts)
        texts |= {self.begin, self.end, *self.section, *self.ignored}
        return frozenset(text for text in map(str.strip, texts) if not text.isalnum() and text)

    @property
    def opening(self) -> str:
        """What a single call begins with; empty: nothing."""
        return self.begin or (self.form.call if isinstance(self.form, TaggedForm) else "")


def problem_of(format_: ToolFormat) -> str:
    """What keeps a format that another package made from being used; empty: nothing does."""
    if not isinstance(format_.form, CallForm):
        return f"form must be a form of calls, not {type(format_.form).__name__}"
    for name in ("name", "begin", "end", "between"):
        if not isinstance(getattr(format_, name), str):
            return f"{name} must be text"
    if not _are_texts(format_.section, 2):
        return "section must be two texts"
    if not _are_texts(format_.ignored):
        return "ignored must be a tuple of texts"
    templates = format_.templates
    if not (_is_list(templates) and all(map(_are_texts, templates))):
        return "templates must be a tuple of groups, each of them a tuple of texts"
    return ""


def _are_texts(values: object, count: int | None = None) -> bool:
    if not isinstance(values, tuple | list) or count not in (None, len(values)):
        return False
    return all(isinstance(value, str) for value in values)


def _is_list(values: object) -> bool:
    return isinstance(values, tuple | list)
