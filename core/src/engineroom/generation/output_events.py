"""What an output parser reads out of a model's text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

__all__ = [
    "CallArguments",
    "CallBegin",
    "CallEnd",
    "Content",
    "OutputEvent",
    "OutputReader",
    "Reasoning",
]


class Content(NamedTuple):
    """Text of the answer; never empty."""

    text: str


class Reasoning(NamedTuple):
    """Text of the reasoning before it, without the markers around it; never empty."""

    text: str


class CallBegin(NamedTuple):
    """A tool call begins: its name is known."""

    call: int
    """Which of the answer's calls it is, from 0."""
    name: str


class CallArguments(NamedTuple):
    """The next characters of a call's arguments, as JSON; never empty."""

    call: int
    text: str


class CallEnd(NamedTuple):
    """A call is complete: the joined arguments are JSON. A call that is cut short has no end."""

    call: int


OutputEvent: TypeAlias = Content | Reasoning | CallBegin | CallArguments | CallEnd


class OutputReader(Protocol):
    """Tells content, reasoning and calls apart. Cutting the text otherwise changes nothing but
    where the pieces of content, reasoning and arguments end.
    """

    def begin(self, prompt_tail: str) -> None:
        """Before the first text: how the prompt ends, which may have begun the reasoning."""

    def feed(self, text: str) -> list[OutputEvent]:
        """Take the next piece of the model's text."""

    def finish(self, *, limited: bool = False) -> list[OutputEvent]:
        """The text has ended: what was held back.

        :param limited: it was ended from outside, perhaps in the midst of a marker.
        """

    @property
    def cut_call(self) -> bool:
        """Whether the text has ended within a call."""

    @property
    def reasoned(self) -> Sequence[tuple[int, int]] | None:
        """From where to where there is reasoning in the text; ``None``: there is never any."""
