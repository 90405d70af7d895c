"""From one stream of tokens to a whole handler: the base class that most runtimes use.

A runtime that subclasses :class:`TokenHandler` writes one async generator of
:class:`~engineroom.TokenStep`, or of the :class:`~engineroom.Mailbox` that they come through;
UTF-8, stop sequences, counts, timing, finish reasons, ``infer``, ``stream_infer`` and cancellation
are done here, once, so that streamed and whole answers are equal by construction and alike on
every runtime.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Literal, TypeGuard

from engineroom.border import Border, get_logger
from engineroom.config.model import LoadedModel
from engineroom.errors import InferenceError
from engineroom.generation.answer_grammars import WholeAnswer
from engineroom.generation.generation import Generation
from engineroom.generation.mailbox import Mailbox
from engineroom.generation.reader import StepReader
from engineroom.generation.steps import TokenStep
from engineroom.generation.traits import PLAIN, ModelTraits
from engineroom.handlers.base import Capabilities, InferenceHandler, StreamEnd
from engineroom.prompts.codec import PromptCodec
from engineroom.prompts.tool_messages import tools_as_messages
from engineroom.schemas import InferenceRequest, InferenceResponse

__all__ = [
    "TokenHandler",
    "answers_by_steps",
    "as_handler_gets_it",
    "effective_capabilities",
    "read_steps",
    "unsupported_by",
]

logger = get_logger("engineroom.registry")


def effective_capabilities(handler: InferenceHandler) -> Capabilities:
    """What a handler can do, with what :class:`TokenHandler` does for it.

    :raises InferenceError: ``capabilities`` fails, or does not return :class:`Capabilities`.
    """
    with Border(logger, f"handler {handler.name!r}: capabilities"):
        capabilities = handler.capabilities()
    if not isinstance(capabilities, Capabilities):
        raise InferenceError(
            f"handler {handler.name!r}: capabilities returned {type(capabilities).__name__} "
            "instead of Capabilities; mend the plugin"
        )
    if isinstance(handler, TokenHandler):
        honoured = capabilities.params | {"max_new_tokens"}
        tools = capabilities.tools or capabilities.chat
        return replace(capabilities, params=honoured, stop_sequences=True, tools=tools)
    return capabilities


def unsupported_by(
    handler: InferenceHandler,
    loaded_model: LoadedModel,
    capabilities: Capabilities,
    request: InferenceRequest,
) -> list[str]:
    """Names of what a request asks for in vain. What a model never does needs no bound."""
    names = capabilities.unsupported(request)
    if "reasoning_budget" in names and isinstance(handler, TokenHandler):
        with Border(logger, f"handler {handler.name!r}: traits"):
            if not handler.traits(loaded_model).limits(request):
                names.remove("reasoning_budget")
    return names


class TokenHandler(InferenceHandler):
    """Base class of a runtime that can yield tokens. Write ``generate_tokens``; that is all.

    ``max_new_tokens`` and ``stop_sequences`` are honoured here whatever the runtime does, and
    whatever ``capabilities`` says of them; a runtime that knows the limit itself saves the step
    that would be thrown away. ``generate_tokens`` is never asked for no token at all.
    """

    @abstractmethod
    def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep | Mailbox, None]:
        """Generate: an ``async def`` that yields a :class:`TokenStep` a decoding step.

        Where an engine's thread makes the steps, it yields the request's
        :class:`~engineroom.Mailbox` instead: what is in there are the steps from then
        on, and the generator is not resumed but closed. That costs less, for nothing has to be
        woken for a step.

        It is closed (``GeneratorExit``) or cancelled (``CancelledError``) at a ``yield`` or an
        ``await`` when a stop sequence matched, the limit is reached, or nobody wants the answer
        any more: stop the work in ``finally``. A generator that ends without having said
        ``finish`` has ended with ``eos_token``.

        :raises EngineRoomError: typed, where the cause is known.
        """

    def traits(self, loaded_model: LoadedModel) -> ModelTraits:
        """What the model writes beside content; asked for each conversation, and quick.

        By default as its ``tokenizer`` says, if that is a
        :class:`~engineroom.prompts.PromptCodec`; else nothing is known.
        """
        codec = loaded_model.tokenizer
        return codec.traits if isinstance(codec, PromptCodec) else PLAIN

    def capabilities(self) -> Capabilities:
        """By default only what this class does itself."""
        return Capabilities(params=frozenset({"max_new_tokens"}), stop_sequences=True)

    async def infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> InferenceResponse:
        """The whole answer; see :meth:`generate_tokens`."""
        return await read_steps(self, loaded_model, request).read_all()

    async def stream_infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[str, None]:
        """The answer piece by piece, then a ``StreamEnd``; see :meth:`generate_tokens`."""
        reader = read_steps(self, loaded_model, request)
        try:
            while not reader.ended:
                if chunk := await reader.next_chunk():
                    yield chunk
        finally:
            await reader.aclose()
        yield StreamEnd(reader.response())


def read_steps(
    handler: TokenHandler, loaded_model: LoadedModel, request: InferenceRequest
) -> StepReader:
    """What reads the steps of a request, for the handler itself and for the service."""
    if request.messages is None:
        steps = handler.generate_tokens(loaded_model, _with_a_token(request))
        return StepReader(steps, Generation(request, handler.name))
    with Border(logger, f"handler {handler.name!r}: traits"):
        traits = handler.traits(loaded_model)
    begins_anew = request.continues and not handler.capabilities().continue_final_message
    if begins_anew:
        request = request.model_copy(update={"continue_final_message": False})
    generation = Generation(request, handler.name, traits.reader(request), traits.tail)
    generation.warnings.extend(traits.warnings(request))
    if begins_anew:
        generation.warnings.append(
            f"the last message was not continued, which handler {handler.name!r} cannot; the "
            "answer is a new one"
        )
    for_handler = _with_a_token(_for_handler(handler, traits, request))
    return StepReader(handler.generate_tokens(loaded_model, for_handler), generation)


def _with_a_token(request: InferenceRequest) -> InferenceRequest:
    """The request as a handler gets it that is to read the prompt alone: runtimes know how to
    generate, and the first token tells that the prompt was read. It is not shown.
    """
    if request.params.max_new_tokens != 0:
        return request
    params = request.params.model_copy(update={"max_new_tokens": 1})
    return request.model_copy(update={"params": params})


def as_handler_gets_it(
    handler: InferenceHandler, loaded_model: LoadedModel, request: InferenceRequest
) -> InferenceRequest:
    """The request as it is handed to ``generate_tokens`` of the handler, if it has that."""
    if request.messages is None or not isinstance(handler, TokenHandler):
        return request
    with Border(logger, f"handler {handler.name!r}: traits"):
        traits = handler.traits(loaded_model)
    return _for_handler(handler, traits, request)


def _for_handler(
    handler: TokenHandler, traits: ModelTraits, request: InferenceRequest
) -> InferenceRequest:
    """The request as a handler gets it that hands no tools to a template: they are told in
    messages, and what calls have to match is a grammar.
    """
    messages = request.messages or ()
    if not request.tools and not any(m.tool_calls or m.role == "tool" for m in messages):
        return request
    if handler.capabilities().tools:
        return request
    changes: dict[str, Any] = {
        "messages": tools_as_messages(messages, request.offered_tools),
        "tools": None,
        "tool_choice": None,
    }
    if request.offered_tools is not None and request.constrained:
        grammar = WholeAnswer.model_construct(grammar=traits.grammar(request, None), asked=request)
        changes["params"] = request.params.model_copy(update={"structured_output": grammar})
    return request.model_copy(update=changes)


def answers_by_steps(
    handler: InferenceHandler, method: Literal["infer", "stream_infer"]
) -> TypeGuard[TokenHandler]:
    """Whether ``method`` of the handler is that of :class:`TokenHandler`.

    Then the service reads the steps itself: with a generator less for each step, and with the
    knowledge of how far a request had come that was stopped or failed.
    """
    own = getattr(getattr(handler, method), "__func__", None)
    return own is getattr(TokenHandler, method) and isinstance(handler, TokenHandler)
