"""From one stream of tokens to a whole handler: the base class that most runtimes use.

A runtime that subclasses :class:`TokenHandler` writes one async generator of
:class:`~engineroom.TokenStep`, or of the :class:`~engineroom.Mailbox` that they come through;
UTF-8, stop sequences, counts, timing, finish reasons, ``infer``, ``stream_infer`` and cancellation
are done here, once, so that streamed and whole answers are equal by construction and alike on
every runtime.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from engineroom.config.model import LoadedModel
from engineroom.errors import InferenceError
from engineroom.generation.generation import Generation, Progress
from engineroom.generation.mailbox import Mailbox
from engineroom.generation.steps import TokenStep
from engineroom.handlers.base import Capabilities, InferenceHandler, StreamEnd
from engineroom.schemas import InferenceRequest, InferenceResponse

__all__ = ["TokenHandler", "effective_capabilities", "open_stream"]


def effective_capabilities(handler: InferenceHandler) -> Capabilities:
    """What a handler can do, with what :class:`TokenHandler` does for it.

    :raises InferenceError: ``capabilities`` does not return :class:`Capabilities`.
    """
    capabilities = handler.capabilities()
    if not isinstance(capabilities, Capabilities):
        raise InferenceError(
            f"handler {handler.name!r}: capabilities returned {type(capabilities).__name__} "
            "instead of Capabilities; mend the plugin"
        )
    if isinstance(handler, TokenHandler):
        honoured = capabilities.params | {"max_new_tokens"}
        return replace(capabilities, params=honoured, stop_sequences=True)
    return capabilities


class TokenHandler(InferenceHandler):
    """Base class of a runtime that can yield tokens. Write ``generate_tokens``; that is all.

    ``max_new_tokens`` and ``stop_sequences`` are honoured here whatever the runtime does, and
    whatever ``capabilities`` says of them; a runtime that knows the limit itself saves the step
    that would be thrown away.
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

    def capabilities(self) -> Capabilities:
        """By default only what this class does itself."""
        return Capabilities(params=frozenset({"max_new_tokens"}), stop_sequences=True)

    async def infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> InferenceResponse:
        """The whole answer; see :meth:`generate_tokens`."""
        generation = Generation(request, self.name)
        steps = self.generate_tokens(loaded_model, request)

        def take(step: TokenStep) -> bool:
            generation.take(step)
            return generation.finish_reason is None

        try:
            async for step in steps:
                if isinstance(step, Mailbox):
                    await step.push_to(take)
                    break
                if not take(step):
                    break
        finally:
            await steps.aclose()
        generation.finish()
        return generation.response()

    async def stream_infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[str, None]:
        """The answer piece by piece, then a ``StreamEnd``; see :meth:`generate_tokens`."""
        generation = Generation(request, self.name)
        steps = self.generate_tokens(loaded_model, request)
        advance: Callable[[], Awaitable[TokenStep | Mailbox]] = steps.__anext__
        text = ""
        try:
            while generation.finish_reason is None:
                if text:
                    yield text
                    text = ""
                try:
                    step = await advance()
                except StopAsyncIteration:
                    break
                if isinstance(step, Mailbox):
                    advance = step.get
                else:
                    text = generation.take(step)
        finally:
            # Before the last text is handed on: a slow reader must not keep the slot.
            await steps.aclose()
        text += generation.finish()
        if text:
            yield text
        yield StreamEnd(generation.response())


def open_stream(
    handler: InferenceHandler,
    loaded_model: LoadedModel,
    request: InferenceRequest,
    progress: Progress,
) -> tuple[AsyncGenerator[Any, None], Generation | None]:
    """What a streamed request is read from: one generator less for each step, where that can be.

    :returns: what ``stream_infer`` gives, and ``None``; or the steps of a :class:`TokenHandler`,
        and what makes text of them, as its ``stream_infer`` would.
    """
    streams = getattr(handler.stream_infer, "__func__", None)
    if isinstance(handler, TokenHandler) and streams is TokenHandler.stream_infer:
        generation = progress.generation = Generation(request, handler.name)
        return handler.generate_tokens(loaded_model, request), generation
    return handler.stream_infer(loaded_model, request), None
