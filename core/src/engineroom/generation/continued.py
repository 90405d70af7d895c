"""The last message of a conversation, where the answer is to go on with it."""

from __future__ import annotations

from dataclasses import dataclass

from engineroom.generation.call_forms import ReasoningFormat
from engineroom.schemas import ChatMessage

__all__ = ["Continued", "continued_message"]


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
