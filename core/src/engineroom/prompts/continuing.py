"""Prompts that end within the last message of a conversation, for the model to go on with it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

from engineroom.generation.call_forms import ReasoningFormat
from engineroom.generation.continued import Continued
from engineroom.schemas import ChatMessage

__all__ = ["cut_at", "marked", "new_mark"]


def new_mark() -> str:
    """What is put where a message is to go on, to be found in what a template writes of it.

    Digits: filters of templates leave them alone, and white space in front of them.
    """
    return f"{secrets.randbits(64):020d}"


def marked(
    message: ChatMessage, continued: Continued, mark: str, form: ReasoningFormat | None
) -> Iterator[ChatMessage]:
    """The message with a mark where it goes on, in the ways in which a template may write it.

    :param form: what stands around the model's reasoning.
    """
    if not continued.thinking:
        yield message.model_copy(update={"content": f"{message.content or ''}{mark}"})
        return
    yield message.model_copy(update={"content": "", "reasoning": f"{continued.reasoning}{mark}"})
    if form is not None:  # most templates leave earlier reasoning out, but not from the content
        text = message.content or f"{form.begin}\n{continued.reasoning}"
        yield message.model_copy(update={"content": f"{text}{mark}", "reasoning": None})


def cut_at(mark: str, segments: Sequence[str]) -> list[str] | None:
    """What a template wrote, up to the mark; ``None``: it is not in there.

    :param segments: as ``ControlTokens.segments`` gives them.
    """
    for place in range(len(segments) - 1, -1, -1):
        before, found, _ = segments[place].rpartition(mark)
        if found:
            return [*segments[:place], before]
    return None
