"""What a model writes beside content: found once a model, from its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engineroom.errors import ConfigurationError
from engineroom.generation.answer_grammars import Thoughts, answer_grammar
from engineroom.generation.call_forms import ChannelForm, ReasoningFormat, ToolFormat
from engineroom.generation.continued import Continued, continued_message, open_call
from engineroom.generation.json_schemas import is_unkept, subschemas
from engineroom.generation.output_events import OutputReader
from engineroom.generation.tool_formats import GENERIC
from engineroom.generation.tool_grammars import writable
from engineroom.schemas import InferenceRequest
from engineroom.tools import callable_tools

__all__ = ["PLAIN", "ModelTraits"]

_LOOKED_AT: Final = 10_000
"""Most parts of tools' schemas that are looked through for formats."""
_TOLD: Final = 16
"""Most formats of a request of which its answer tells."""


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What a model writes beside content, and what its chat template can be told.

    :param tools: how it writes tool calls.
    :param native: its template tells the tools; else they are told in messages.
    :param reasoning: what stands around its reasoning; ``None``: it does not reason.
    :param tail: how a prompt of its template ends, where nothing is known of the prompt itself.
    :param told: the template can be told whether to reason, or how hard.
    """

    tools: ToolFormat = GENERIC
    native: bool = False
    reasoning: ReasoningFormat | None = None
    tail: str = ""
    told: bool = False

    @property
    def markers(self) -> frozenset[str]:
        """Texts that tell what of the output is what; control tokens of the model are in them."""
        markers = self.tools.markers
        if (reasoning := self.reasoning) is not None:
            markers |= {reasoning.begin, reasoning.end, *reasoning.also_ends}
        return markers

    def parses(self, request: InferenceRequest) -> bool:
        """Whether there may be something beside content in the answer to a request."""
        if request.messages is None:
            return False
        if self.reasoning is not None or isinstance(self.tools.form, ChannelForm):
            return True
        return request.offered_tools is not None

    def limits(self, request: InferenceRequest) -> bool:
        """Whether the reasoning of the answer has a bound."""
        if request.reasoning_budget is None or request.messages is None:
            return False
        return self.reasoning is not None

    def reader(self, request: InferenceRequest) -> OutputReader | None:
        """What tells content, reasoning and calls apart; ``None``: all is content."""
        if not self.parses(request):
            return None
        from engineroom.generation.outputs import OutputParser  # most requests need none

        format_ = self.written_as(request)
        parser = OutputParser(
            format_,
            request.offered_tools,
            reasoning=self.reasoning,
            only_calls=request.requires_call,
            bounded=self.limits(request),
        )
        if (continued := self.continued(request)) is None:
            return parser
        from engineroom.generation.continued_reader import ContinuedReader

        return ContinuedReader(parser, continued, format_, self.reasoning)

    def continued(self, request: InferenceRequest) -> Continued | None:
        """What the answer to a request goes on with; ``None``: it begins anew."""
        if not request.continues or request.messages is None:
            return None
        channels = isinstance(self.tools.form, ChannelForm)
        return continued_message(request.messages[-1], self.reasoning, channels=channels)

    def written_as(self, request: InferenceRequest) -> ToolFormat:
        """How calls are written in the answer: where they have to be valid, in a form for which a
        grammar can be made.
        """
        must = request.requires_call or request.has_strict_tools
        if not must:
            return self.tools
        return writable(self.tools, callable_tools(request.offered_tools or ()))

    def _has_answer_begun(self, request: InferenceRequest) -> bool:
        continued = self.continued(request)
        return continued is not None and not continued.thinking and not continued.fresh

    def grammar(self, request: InferenceRequest, tail: str | None, *, closed: bool = False) -> str:
        """The grammar of the answer to a request that must match something.

        :param tail: how its prompt ends; ``None``: nothing is known, or it is no conversation.
        :param closed: it goes on behind reasoning that was ended.
        :raises ConfigurationError: it cannot be one; names what is wrong.
        """
        thoughts, format_ = self.thoughts(request, tail), self.written_as(request)
        continued = self.continued(request) if request.offered_tools else None
        if continued is not None and open_call(continued.content, format_):
            raise ConfigurationError(
                "the last message has begun a call, which cannot be continued where calls have "
                "to be valid; leave it out, or ask with tool_choice auto and tools that are not "
                "strict",
                field="messages",
            )
        return answer_grammar(request, format_, thoughts, closed=closed)

    def warnings(self, request: InferenceRequest) -> Iterator[str]:
        """What is asked of the model in vain."""
        if request.messages is None:
            for name in ("reasoning", "reasoning_budget", "template_args"):
                if getattr(request, name) is not None:
                    yield f"{name} was ignored: a prompt is taken as it is; send messages instead"
        elif request.reasoning is not None and not self.told:
            yield "reasoning was ignored: the model's chat template cannot be told of it"
        elif request.reasoning and self._has_answer_begun(request):
            yield "reasoning was ignored: the message that is continued has its answer begun"
        if request.requires_call:
            yield from _formats_in_vain(request)

    def thoughts(self, request: InferenceRequest, tail: str | None) -> Thoughts | None:
        """What stands around the reasoning of the answer; ``None``: there is none.

        :param tail: as for :meth:`grammar`.
        """
        if (reasoning := self.reasoning) is None or request.messages is None:
            return None
        if (continued := self.continued(request)) is not None and not continued.fresh:
            return Thoughts("", reasoning.end) if continued.thinking else None
        tail = (self.tail if tail is None else tail).rstrip()
        if tail.endswith(reasoning.begin):
            return Thoughts("", reasoning.end)
        if tail.endswith(reasoning.end) or request.reasoning is False:
            return None
        return Thoughts(reasoning.begin, reasoning.end)


def _formats_in_vain(request: InferenceRequest) -> Iterator[str]:
    """The formats of tools that no grammar keeps to. The event loop waits for this."""
    left, told = _LOOKED_AT, 0
    for name, tool in callable_tools(request.offered_tools or ()).items():
        nodes = iter(()) if tool.strict else subschemas(tool.parameters)
        for path, node in nodes:
            left -= 1
            if left < 0 or told == _TOLD:
                yield f"{tool.field}: further formats may not be kept to, here and in later tools"
                return
            if is_unkept(form := node.get("format")):
                told += 1
                where = ".".join((tool.field, *path))
                yield f"{where}: the format {form!r} of tool {name!r} is not kept to"


PLAIN: Final = ModelTraits()
"""Of models of whose templates nothing is known: tools are told in messages."""
