"""Which formats a model writes calls and reasoning in, found from its chat template.

Markers in the template's source say what to try. What proves it is a trial: the template writes a
conversation with calls, as it does for every history, and the format has to read them back.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final, TypeVar

from engineroom.border import is_interrupt
from engineroom.errors import ConfigurationError
from engineroom.generation.call_forms import ReasoningFormat, ToolFormat, problem_of
from engineroom.generation.outputs import OutputParser, read_events, read_output
from engineroom.generation.tool_formats import GENERIC, REASONING_FORMATS, TOOL_FORMATS
from engineroom.schemas import ChatMessage

__all__ = ["Render", "find_format", "find_reasoning", "tool_formats"]

logger = logging.getLogger("engineroom.outputs")

Render = Callable[[Sequence[ChatMessage], "Sequence[dict[str, Any]] | None"], str]
"""Makes the prompt of a conversation with tools; empty text where it cannot."""

_T = TypeVar("_T")
GROUP: Final = "engineroom.tool_formats"
NO_REASONING: Final = "none"
_TEXT: Final = 'A "b" {c} <d>\nand é'
_PLAIN: Final = "Zq7 Zq8"
_CALLS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("trial_one", {"text": _TEXT, "count": 7}),
    ("trial_two", {}),
)
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A trial.",
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": "string" if isinstance(value, str) else "integer"}
                    for key, value in arguments.items()
                },
                "required": list(arguments),
            },
        },
    }
    for name, arguments in _CALLS
]


@cache
def tool_formats() -> tuple[ToolFormat, ...]:
    """All formats, those of other packages first.

    An entry point of the group ``engineroom.tool_formats`` that gives no format is left out with a
    warning.
    """
    added: dict[str, ToolFormat] = {}
    for entry in entry_points(group=GROUP):
        try:
            format_ = entry.load()
        except BaseException as error:
            if is_interrupt(error):
                raise
            logger.warning("the tool format %r cannot be loaded", entry.name, exc_info=True)
            continue
        if not isinstance(format_, ToolFormat):
            logger.warning("the tool format %r is no ToolFormat", entry.name)
        elif problem := problem_of(format_):
            logger.warning("the tool format %r is left out: %s", entry.name, problem)
        else:
            added[format_.name] = format_
    own = (*TOOL_FORMATS, GENERIC)
    return (*added.values(), *(format_ for format_ in own if format_.name not in added))


def find_format(
    source: str | None, render: Render | None = None, name: str | None = None
) -> ToolFormat:
    """The format of a model's calls; :data:`GENERIC`, where its template knows of no tools.

    :param source: the chat template's source, if the model has one.
    :param render: renders conversations with it.
    :param name: the format that an option asks for instead.
    :raises ConfigurationError: there is no format of that name.
    """
    formats = tool_formats()
    if name is not None:
        return _named("tool_format", name, {format_.name: format_ for format_ in formats})
    if not source:
        return GENERIC
    likely = [format_ for format_ in formats if _fits(source, format_.templates)]
    trials = [] if render is None else list(_trials(render))
    for format_ in likely:
        if any(_reads(format_, *trial) for trial in trials):
            return format_
    if not trials:  # the template writes no calls of a history
        return likely[0] if likely else GENERIC
    for format_ in formats:
        if format_ is not GENERIC and any(_reads(format_, *trial) for trial in trials):
            return format_
    if likely:
        logger.warning(
            "the chat template looks like that of the tool format %r, but its calls are not; tools "
            "are told in a message instead. The option tool_format chooses another one",
            likely[0].name,
        )
    return GENERIC


def find_reasoning(source: str | None, name: str | None = None) -> ReasoningFormat | None:
    """What stands around a model's reasoning; ``None``: nothing is known of any.

    :param source: the chat template's source, if the model has one.
    :param name: the format that an option asks for instead; ``none``: there is none.
    :raises ConfigurationError: there is no format of that name.
    """
    if name == NO_REASONING:
        return None
    if name is not None:
        known = {format_.name: format_ for format_ in REASONING_FORMATS}
        return _named("reasoning_format", name, known, NO_REASONING)
    if not source:
        return None
    return next((f for f in REASONING_FORMATS if _fits(source, f.forms)), None)


def _named(option: str, name: str, known: Mapping[str, _T], *more: str) -> _T:
    if (format_ := known.get(name)) is None:
        names = ", ".join(sorted([*known, *more]))
        raise ConfigurationError(f"{option} {name!r} is not known; there are {names}")
    return format_


def _fits(source: str, groups: Iterable[tuple[str, ...]]) -> bool:
    return any(all(text in source for text in group) for group in groups)


def _trials(render: Render) -> Iterable[tuple[str, str, int]]:
    """What stands in front of calls in a conversation, the calls, and how many there are."""
    user = ChatMessage(role="user", content="a")
    for count in (2, 1):  # some templates have one call in a message
        calls = [
            {
                "id": f"trial000{number}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for number, (name, arguments) in enumerate(_CALLS[:count])
        ]
        called = render([user, ChatMessage(role="assistant", content="", tool_calls=calls)], _TOOLS)
        plain = render([user, ChatMessage(role="assistant", content=_PLAIN)], _TOOLS)
        written = _difference(called, plain)
        if all(name in written for name, _ in _CALLS[:count]):
            yield called[: called.index(written)], written, count
            return


def _difference(text: str, other: str) -> str:
    """What one text has where another one has something else; markers are not cut."""
    start = _common(text, other)
    end = len(text) - _common(text[start:][::-1], other[start:][::-1])
    before = text[:start]
    for opened, closed in ("<>", "[]"):
        if (cut := before.rfind(opened)) > before.rfind(closed):
            start = min(start, cut)
    if (rest := re.match(r"[^<>[\]\n]*[>\]]", text[end:])) is not None:
        end += rest.end()
    return text[start:end]


def _common(text: str, other: str) -> int:
    """How many characters two texts begin alike with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _reads(format_: ToolFormat, before: str, written: str, count: int) -> bool:
    """Whether a format reads the calls of a trial."""
    parser = OutputParser(format_, _TOOLS, prompt_tail=before[-200:])
    calls = read_output(read_events(parser, written)).calls
    return [(name, json.loads(arguments)) for name, arguments in calls] == list(_CALLS[:count])
