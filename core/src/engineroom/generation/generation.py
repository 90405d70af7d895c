"""From one stream of tokens to everything else.

A runtime that subclasses :class:`TokenHandler` writes one async generator of
:class:`TokenStep`, or of the :class:`~engineroom.generation.mailbox.Mailbox` that they come through; UTF-8,
stop sequences, counts, timing, finish reasons, ``infer``, ``stream_infer`` and cancellation are
done here, once, so that streamed and whole answers are equal by construction and alike on every
runtime.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from pydantic import ValidationError

from engineroom.errors import InferenceError
from engineroom.handlers.base import Capabilities, InferenceHandler, StreamEnd
from engineroom.generation.mailbox import Mailbox
from engineroom.schemas import (
    FinishReason,
    InferenceRequest,
    InferenceResponse,
    LoadedModel,
    TokenLogprob,
)
from engineroom.generation.text import TextPipeline

__all__ = [
    "LAST_STEP",
    "Generation",
    "TokenHandler",
    "TokenStep",
    "effective_capabilities",
    "open_stream",
]


@dataclass(slots=True)
class TokenStep:
    """What one decoding step of one request gave: usually one token.

    :param token_ids: the tokens, without the end-of-sequence token.
    :param text: their text, or their bytes where a token may end inside a character.
    :param logprobs: one entry a token, where the request asked for them.
    :param finish: why the generation ends with this step; ``None``: it goes on.
    :param prompt_tokens: tokens of the prompt; said once, in any step.
    :param cached_prompt_tokens: those whose work was reused; said once, in any step.
    """

    token_ids: Sequence[int] = ()
    text: str | bytes = b""
    logprobs: Sequence[TokenLogprob] | None = None
    finish: FinishReason | None = None
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None


LAST_STEP: Final = TokenStep(finish="eos_token")
"""What a generator of steps that ends without having said why is taken to have yielded."""


class Progress:
    """Where the service finds what a cancelled or failed request had come to."""

    __slots__ = ("generation",)

    def __init__(self) -> None:
        self.generation: _Snapshot | None = None


class _Snapshot(Protocol):
    logprobs: list[TokenLogprob] | None
    prompt_tokens: int | None

    @property
    def text(self) -> str: ...
    def response(self) -> InferenceResponse: ...


_progress: Final[ContextVar[Progress | None]] = ContextVar("engineroom_progress", default=None)


@contextmanager
def watching(progress: Progress) -> Iterator[None]:
    """Let the generation that begins inside report to ``progress``."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


class Generation:
    """The text, the counts and the clock of one request."""

    __slots__ = (
        "_first_at",
        "_limit",
        "_parts",
        "_pipeline",
        "_request",
        "_started",
        "cached_prompt_tokens",
        "finish_reason",
        "generated_tokens",
        "handler",
        "logprobs",
        "prompt_tokens",
    )

    def __init__(self, request: InferenceRequest, handler: str) -> None:
        self._request = request
        self.handler = handler
        self._pipeline = TextPipeline(request.stop_sequences)
        self._limit = request.params.max_new_tokens
        self._parts: list[str] = []
        self._started = time.perf_counter()
        self._first_at: float | None = None
        self.finish_reason: FinishReason | None = None
        self.generated_tokens = 0
        self.prompt_tokens: int | None = None
        self.cached_prompt_tokens: int | None = None
        self.logprobs: list[TokenLogprob] | None = None
        if (progress := _progress.get()) is not None:
            progress.generation = self

    def take(self, step: TokenStep) -> str:
        """Take a step; return the text that may be shown. Sets ``finish_reason`` at the end."""
        if step.prompt_tokens is not None:
            self.prompt_tokens = step.prompt_tokens
        if step.cached_prompt_tokens is not None:
            self.cached_prompt_tokens = step.cached_prompt_tokens
        if step.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(step.logprobs)
        if tokens := step.token_ids:
            if self._first_at is None:
                self._first_at = time.perf_counter()
            self.generated_tokens += len(tokens)
        pipeline = self._pipeline
        shown = pipeline.feed(text) if (text := step.text) else ""
        if pipeline.matched is not None:
            self.finish_reason = "stop_sequence"
        elif step.finish is not None:
            self.finish_reason = step.finish
        elif self._limit is not None and self.generated_tokens >= self._limit:
            self.finish_reason = "length"
        if shown:
            self._parts.append(shown)
        return shown

    def finish(self) -> str:
        """End the text; return what was still held back."""
        rest = self._pipeline.finish()
        if self._pipeline.matched is not None:
            self.finish_reason = "stop_sequence"
        elif self.finish_reason is None:
            self.finish_reason = "eos_token"
        if rest:
            self._parts.append(rest)
        return rest

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._parts)

    def response(self) -> InferenceResponse:
        """The response as far as it has come.

        :raises InferenceError: a step had a value that no response may have.
        """
        now = time.perf_counter()
        first = self._first_at
        try:
            return InferenceResponse(
                request_id=self._request.request_id,
                model_id=self._request.model_id,
                generated_text=self.text,
                finish_reason=self.finish_reason,
                stop_sequence=self._pipeline.matched,
                prompt_tokens=self.prompt_tokens,
                generated_tokens=self.generated_tokens,
                cached_prompt_tokens=self.cached_prompt_tokens,
                inference_time_ms=(now - self._started) * 1000,
                time_to_first_token_ms=None if first is None else (first - self._started) * 1000,
                logprobs=self.logprobs,
                handler=self.handler,
            )
        except ValidationError as error:
            # Without the values, which are text of the model's.
            wrong = error.errors(include_url=False, include_context=False, include_input=False)
            told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in wrong[:3])
            raise InferenceError(
                f"handler {self.handler!r} yielded steps that make no response: {told}; mend the "
                "plugin"
            ) from None


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
        :class:`~engineroom.generation.mailbox.Mailbox` instead: what is in there are the steps from then
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
                    await step.pour(take)
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
