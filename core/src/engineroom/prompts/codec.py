"""A request's input to token ids: the rules that are the same on every runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

from engineroom.errors import ConfigurationError
from engineroom.generation.call_forms import ChannelForm
from engineroom.generation.continued import continued_message
from engineroom.prompts.chat_template import TAIL, ChatTemplate, ModelTemplates
from engineroom.prompts.continuing import cut_at, marked, new_mark
from engineroom.prompts.limits import check_text
from engineroom.prompts.model_tokens import ModelTokens
from engineroom.prompts.pairs import PairFrame, PairTokens
from engineroom.prompts.special_tokens import ControlTokens
from engineroom.prompts.threads import PromptLane
from engineroom.prompts.tool_messages import calls_as_text, tools_as_messages
from engineroom.prompts.work import check_stopped, expect_tokens, taking_turns
from engineroom.schemas import ChatMessage

__all__ = ["PromptCodec"]

_BREAK: Final = "\ue000"
"""A private character, put into a special token's text so that it is not read as one."""


class PromptCodec(ABC):
    """One model's way from text to token ids. Its methods may be called from any thread.

    A runtime writes :meth:`read`, and what it can of :meth:`read_located`.

    :param templates: the model's chat templates.
    :param control: tokens that are text where a message has them.
    :param begin: what the tokenizer writes before a text.
    :param end: what it writes after one that is not to be continued.
    :param unknown: the token for what the vocabulary does not have, which controls nothing.
    """

    def __init__(
        self,
        templates: ModelTemplates,
        control: ControlTokens,
        *,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
        unknown: int | None = None,
    ) -> None:
        self._templates = templates
        self._control = control
        self.traits: Final = templates.traits
        """What the model writes beside content, and what its template can be told."""
        self.shown: Final = control.ids_in(self.traits.markers)
        """Control tokens that are part of the text, since they tell what of it is what."""
        self.frame: PairFrame | None = None
        """What stands around two texts, where that is known."""
        self._begin = list(begin)
        self._end = list(end)
        self._unknown = unknown
        self.lane: Final = PromptLane()
        """Where this model's prompts are read. Closed before what reads them is freed."""

    @abstractmethod
    def read(self, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such, and nothing added."""

    def read_located(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """The same, and from where to where in the text each token stands; ``None``: not told."""
        return None

    def read_without(self, text: str, places: Sequence[int]) -> list[int] | None:
        """Token ids of a text but for those of the characters at ``places``, which ascend.

        ``None`` where that cannot be told: one of them has no token to itself.
        """
        if (located := self.read_located(text)) is None:
            return None
        tokens, spans = located
        breaks = set(places)
        own = {(start, start + 1) for start in breaks}
        melted = any(
            at in breaks for start, end in spans if end - start > 1 for at in range(start, end)
        )
        if melted or not own.issubset(spans):
            return None
        pairs = zip(tokens, spans, strict=True)
        return [token for token, span in pairs if span not in own]

    def count_read(self, text: str) -> int:
        """How many tokens :meth:`read` gives; cheaper where they need not be listed."""
        return len(self.read(text))

    def read_literal(self, text: str) -> list[int]:
        """Token ids of a special token's text, read as the characters that it consists of."""
        tokens = self.read(text[:1]) + self.read(text[1:])
        if any(t in self._control and t != self._unknown for t in tokens):
            tokens = [token for character in text for token in self.read(character)]
        return [t for t in tokens if t not in self._control or t == self._unknown]

    def prompt(
        self,
        prompt: str | None,
        messages: Sequence[ChatMessage] | None,
        tools: list[dict[str, Any]] | None = None,
        **template_args: Any,
    ) -> list[int]:
        """Token ids of a request's input; what the model wants at the beginning is added.

        A ``prompt`` is taken as it is, special tokens included. What stands in ``messages`` and
        ``tools`` is text: a special token that somebody writes into a message must not end it, or
        begin one of another role, so it is read as the characters that it consists of.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        if prompt is not None:
            return self.begun(self.read(prompt))
        return self.chat(messages or (), tools, template_args)[0]

    def chat(
        self,
        messages: Sequence[ChatMessage],
        tools: list[dict[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
    ) -> tuple[list[int], str]:
        """Token ids of a conversation, as :meth:`prompt` gives them, and how its text ends.

        Where the chat template knows no tools, or calls them in no form that is known here, they
        are told in messages. Where it leaves out the calls of a history, they are told as text.

        :param template_args: more names that the template may use.
        :param continues: the text ends within the last message, for the model to go on with it.
        :returns: the ids, and the last characters of the text, 64 at most.
        :raises ConfigurationError: the template leaves out what is to be continued.
        """
        template = self._templates.choose(tools)
        with taking_turns():
            if not self.traits.native:
                messages = tools_as_messages(messages, tools, system=template.knows_system)
                tools = None
            elif template.omits_calls:
                messages = calls_as_text(messages, self.traits.tools)
            told = dict(template_args or {})
            if continues:
                segments = self._continued(template, messages, tools, told)
            else:
                segments = self._written(template, messages, tools, told)
        tail = "".join(segments[-TAIL:])[-TAIL:]
        return self.begun_chat(self._read_segments(segments)), tail

    def _written(
        self,
        template: ChatTemplate,
        messages: Sequence[ChatMessage],
        tools: list[dict[str, Any]] | None,
        template_args: Mapping[str, Any],
    ) -> list[str]:
        """What the template makes of a conversation; see :meth:`.ControlTokens.segments`."""
        value = (template.conversation(messages), tools, template_args)
        return self._control.segments(lambda shielded: template.write(*shielded), value)

    def _continued(
        self,
        template: ChatTemplate,
        messages: Sequence[ChatMessage],
        tools: list[dict[str, Any]] | None,
        template_args: Mapping[str, Any],
    ) -> list[str]:
        """The same, up to where the last message goes on."""
        *before, last = messages
        form = self.traits.reasoning
        channels = isinstance(self.traits.tools.form, ChannelForm)
        continued, mark = continued_message(last, form, channels=channels), new_mark()
        told = {**template_args, "add_generation_prompt": False}
        for message in marked(last, continued, mark, form):
            written = self._written(template, [*before, message], tools, told)
            if (segments := cut_at(mark, written)) is not None:
                return segments
        raise ConfigurationError(
            "the model's chat template leaves out the last message, or changes it, so that it "
            "cannot be continued; end with a message of the user's instead",
            field="messages",
        )

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: list[dict[str, Any]] | None = None,
        **template_args: Any,
    ) -> str:
        """The messages as the model wants to read them.

        :raises ConfigurationError: there is no chat template, or it refuses the messages.
        """
        return self._templates.choose(tools).render(messages, tools, **template_args)

    def token_bytes(self, token: int) -> bytes:
        """A token's own bytes, the text of special ones, for log probabilities.

        :raises ConfigurationError: they are not known.
        """
        raise ConfigurationError(
            "this runtime does not tell the bytes of a model's tokens; without them no log "
            "probabilities can be had"
        )

    def token_text(self, token: int) -> str:
        """The same as text; U+FFFD stands for bytes that are no whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def model_tokens(self) -> ModelTokens:
        """The vocabulary as grammars need it. Takes a while: called once, in a thread.

        :raises ConfigurationError: the bytes of its tokens are not known.
        """
        raise ConfigurationError(
            "this runtime does not tell the bytes of a model's tokens; without them no structured "
            "output can be had"
        )

    def width_and_ends(self) -> tuple[int, frozenset[int]]:
        """How many logits there are, and which tokens end a text. Called once, in a thread.

        :raises ConfigurationError: they are not known.
        """
        tokens = self.model_tokens()
        return len(tokens.pieces), frozenset(tokens.ends)

    def whole(self, text: str) -> list[int]:
        """Token ids of a text that is not to be continued, with all that the tokenizer writes
        around it. Embedding models that pool the last token were trained to look at that.
        """
        tokens = self.begun(self.read(text))
        ended = not self._end or tokens[-len(self._end) :] == self._end
        return tokens if ended else tokens + self._end

    def pair(self, first: Sequence[int], second: Sequence[int]) -> PairTokens:
        """Two texts as the model reads them together.

        :param first: token ids of one, as :meth:`plain` gives them: no special token ends it.
        :param second: those of the other.
        :raises ConfigurationError: it is not known what the model wants between two texts.
        """
        if self.frame is None:
            raise ConfigurationError(
                "the model's tokenizer joins no two texts, as models that rank documents read them"
            )
        return PairTokens(first, second, self.frame)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text in which there are no special ones, and nothing added."""
        return self._read_segments(self._control.split(text))

    def count(self, text: str) -> int:
        """Tokens of ``text``, read as plain text, without any that the model adds.

        :raises ConfigurationError: there is half of a surrogate pair in it.
        """
        check_text("the text", text)
        segments = self._control.split(text)
        if len(segments) == 1:
            return self.count_read(text)
        return len(self._read_segments(segments))

    def begun(self, tokens: list[int]) -> list[int]:
        """The tokens after what the model wants before them, unless that stands there already."""
        return tokens if tokens[: len(self._begin)] == self._begin else self._begin + tokens

    def begun_chat(self, tokens: list[int]) -> list[int]:
        """The same for what the chat template wrote."""
        return self.begun(tokens)

    def _read_segments(self, segments: Sequence[str]) -> list[int]:
        """Token ids of texts, those at odd places read as plain.

        Each literal gets a character into it that breaks it, whose tokens are taken out again:
        so that the text is read in one piece, as spaces at its joints depend on.
        """
        if len(segments) == 1:
            return self.read(segments[0])
        parts, breaks, length = [segments[0]], [], len(segments[0])
        with taking_turns():
            for literal, part in zip(segments[1::2], segments[2::2], strict=True):
                check_stopped()
                breaks.append(length + 1)
                parts += literal[:1], _BREAK, literal[1:], part
                length += len(literal) + 1 + len(part)
        if (tokens := self.read_without("".join(parts), breaks)) is not None:
            return tokens
        # No offsets to go by, or the character has melted into its neighbours.
        joined = self.read(segments[0])
        for literal, part in zip(segments[1::2], segments[2::2], strict=True):
            check_stopped()
            expect_tokens(len(joined))
            joined += self.read_literal(literal) + self.read(part)
        return joined
