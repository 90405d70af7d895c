"""What a streamed request gives back: chunks of text, an ending, and a way to stop it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Final

from engineroom.errors import EngineRoomError, InferenceError
from engineroom.inference.delivery import Put, Sink
from engineroom.inference.scope import RequestScope
from engineroom.schemas import (
    InferenceRequest,
    InferenceResponse,
    PromptLogprob,
    TokenLogprob,
)

__all__ = ["STREAM_ERROR_PREFIX", "InferenceStream", "StreamError"]

STREAM_ERROR_PREFIX: Final = "STREAM_ERROR: "


class StreamError(str):
    """The last chunk of a stream that failed: ``STREAM_ERROR: <what and why>``.

    Its type tells it from a model that writes those words. ``error`` is the typed error.
    """

    __slots__ = ("error",)
    error: EngineRoomError

    def __new__(cls, error: EngineRoomError) -> StreamError:
        self = super().__new__(cls, STREAM_ERROR_PREFIX + error.describe())
        self.error = error
        return self

    def __getnewargs__(self) -> tuple[EngineRoomError]:  # type: ignore[override]
        """For copies and pickles."""
        return (self.error,)


class InferenceStream(AsyncGenerator[str, None]):
    """The chunks of one request, for one reader.

    Iterating starts the work. ``await aclose()`` stops it, from any task of the loop; so does
    letting go of the stream. :attr:`response` is the final response once it has ended.
    """

    def __init__(
        self, request: InferenceRequest, scope: RequestScope, chunks: AsyncGenerator[str, None]
    ) -> None:
        self.request = request
        self._scope = scope
        self._chunks = chunks
        scope.watch(chunks)

    @property
    def response(self) -> InferenceResponse | None:
        """What came of the request; ``None`` until the stream has ended."""
        return self._scope.response

    @property
    def warnings(self) -> list[str]:
        """What is asked for in vain, as far as it is known by now."""
        generation = self._scope.generation
        return [*self._scope.warnings, *(generation.warnings if generation is not None else ())]

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """The log probabilities so far, where the request asked for them. It grows; copy it."""
        generation = self._scope.generation
        return (generation.logprobs if generation is not None else None) or ()

    @property
    def prompt_logprobs(self) -> Sequence[PromptLogprob]:
        """The log probabilities of the prompt, where the request asked for them. They are complete
        when the first text comes.
        """
        generation = self._scope.generation
        return (generation.prompt_logprobs if generation is not None else None) or ()

    @property
    def plain(self) -> bool:
        """Whether every chunk is content; ``False`` as long as nobody can tell."""
        generation = self._scope.generation
        return generation is not None and generation.parsed is None

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt; ``None`` until the runtime has said it."""
        generation = self._scope.generation
        return generation.prompt_tokens if generation is not None else None

    async def __anext__(self) -> str:
        scope = self._scope
        if scope.cause is not None:
            await scope.closed()
        scope.begin()
        try:
            return await self._chunks.__anext__()
        except StopAsyncIteration:
            if scope.unread is None:
                raise
            chunk, scope.unread = scope.unread, None
            return chunk
        finally:
            scope.end()

    async def pump(self, put: Put) -> None:
        """Read to the end: as ``async for``, for a reader that can take chunks without waiting.

        :param put: takes a chunk; returns what to wait for before the next one, or ``None``.
            Called on the event loop, where the runtime hands steps over by mailboxes in the very
            callback that brings them: neither in the task that waits here nor in its context.
            What it raises stops the reading, not the work: close the stream.
        """
        scope = self._scope
        if scope.cause is not None:
            await scope.closed()
        scope.begin()
        sink = scope.sink = Sink(put)
        try:
            async for chunk in self._chunks:
                left = chunk
                if sink.held is None:
                    sink.held, left = put(chunk), ""
                while sink.held is not None:
                    scope.end()  # who waits for a slow reader is not read
                    await sink.wait()
                    if scope.cause is not None:
                        await scope.closed()
                    scope.begin()
                    if left:  # the end, which came before the wait could begin
                        sink.held, left = put(left), ""
        finally:
            scope.end()
            scope.sink = None
            sink.close()
        if scope.unread is not None:
            chunk, scope.unread = scope.unread, None
            sink.held = put(chunk)
            await sink.wait()

    def interrupt(self, error: EngineRoomError) -> None:
        """Stop the work from outside of the reader, which gets ``error`` as its last chunk.

        On the event loop. Does nothing to a stream that has ended or is being stopped.
        """
        self._scope.interrupt(error)

    async def asend(self, value: None) -> str:
        """As ``__anext__``; a stream takes no values."""
        return await self.__anext__()

    async def athrow(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        trace: TracebackType | None = None,
    ) -> str:
        """Raise an exception inside of the stream; it ends."""
        scope = self._scope
        await scope.closed()
        scope.begin()
        try:
            return await self._chunks.athrow(kind if isinstance(kind, BaseException) else kind())
        finally:
            scope.end()

    async def aclose(self) -> None:
        """Stop the work and give the slot back. May be called twice, and after the end."""
        scope = self._scope
        await scope.closed()
        if scope.reading:  # or being closed by another task
            done = scope.finished()
            scope.interrupt(InferenceError("the stream was closed while it was read"), quiet=True)
            await done
            return
        scope.begin()
        scope.leave()
        try:
            await self._chunks.aclose()
        finally:
            scope.end()
        scope.unread = None
        if not scope.stopped:  # never iterated
            scope.stop(
                InferenceResponse(
                    request_id=self.request.request_id,
                    model_id=self.request.model_id,
                    generated_text="",
                    finish_reason="cancelled",
                    generated_tokens=0,
                )
            )

    async def __aenter__(self) -> InferenceStream:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.aclose()
