"""The last message of a conversation, where the answer is to go on with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engineroom.generation.call_forms import ReasoningFormat, ToolFormat
from engineroom.schemas import ChatMessage

__all__ = ["LONGEST_CALL", "Continued", "continued_message", "open_call"]

LONGEST_CALL: Final = 4096
"""Characters of a call that has begun; what is longer is text, for the event loop reads it."""


@dataclass(frozen=True, slots=True)
class Continued:
    """A message of the assistant's, as far as it has come.

    :param content: what goes on, or what stands behind the reasoning; empty: nothing does.
    :param reasoning: the reasoning that goes on, and is not over.
    :param thinking: it is the reasoning that goes on.
    """

    content: str = ""
    reasoning: str = ""
    thinking: bool = False

    @property
    def fresh(self) -> bool:
        """Nothing has come yet: an answer begins as it does behind a question."""
        return not self.thinking and not self.content.strip()


def continued_message(
    message: ChatMessage, form: ReasoningFormat | None, *, channels: bool = False
) -> Continued:
    """What of the last message goes on: its content, or reasoning that has no content behind it.

    :param form: what stands around the model's reasoning, which may be in the content.
    :param channels: the model reasons in a channel of its own.
    """
    content = message.content or ""
    thinks = form is not None or channels
    if thinks and message.reasoning and not content:
        return Continued(reasoning=message.reasoning, thinking=True)
    if form is None:
        return Continued(content)
    if form.anywhere:
        before, begin, thought = content.rpartition(form.begin)
        if begin and form.end not in thought:
            return Continued(reasoning=thought, thinking=True)
        return Continued(thought if begin else before + thought)
    begun = content.lstrip()
    if not begun.startswith(form.begin):
        return Continued(content)
    # Looked for from the front: that is quick in any text, and one of megabytes comes from anyone.
    thought, end, rest = begun[len(form.begin) :].partition(form.end)
    return Continued(rest) if end else Continued(reasoning=thought, thinking=True)


def open_call(content: str, format_: ToolFormat) -> str:
    """The end of a content from where it has begun calls that are not over; empty: it has not."""
    marks = ((format_.section[0], format_.section[1]), (format_.opening, format_.end))
    for begin, end in ((begin.strip(), end.strip()) for begin, end in marks):
        at = content.rfind(begin) if begin else -1
        if at >= 0 and len(content) - at <= LONGEST_CALL:
            call = content[at:]
            if not end or end not in call:
                return call
    return ""
