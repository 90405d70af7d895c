"""From requests to answers: whole, or frame by frame, and over when the client is gone.

Everything about one HTTP request happens in its own task: waiting for a place, the answer, and
sending it. :meth:`~engineroom.server.http.call.Call.attended` cancels that task when the client
goes away, and the service stops the work within a step, wherever it is.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import ClassVar

from engineroom.errors import ResourceNotAvailableError
from engineroom.inference.scope import WAITED_S
from engineroom.inference.streams import InferenceStream, StreamError
from engineroom.schemas import (
    InferenceRequest,
    InferenceResponse,
    PromptLogprob,
    TokenLogprob,
)
from engineroom.server.http.call import SSE_HEADERS, Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.heartbeat import PING, Heartbeat
from engineroom.server.http.limits import Slot
from engineroom.server.keys import ANONYMOUS

__all__ = ["Writer", "admission", "respond", "stream_all"]

_QUEUED_CHUNKS = 64
"""Chunks of several streams that wait to be sent; a slow reader slows them all down."""
_UNKNOWN_LIMIT = 256


class Writer(ABC):
    """Writes answers in the form of one API. Made for each request."""

    HEADERS: ClassVar = SSE_HEADERS
    """Headers that say what kind of stream it is."""
    ping: bytes = PING
    """What readers of such a stream skip; sent where it is silent for long."""
    wants_logprobs = False
    """Whether texts are written with their log probabilities."""
    prompts = 1
    """How many prompts the answers have, each as many answers."""
    plain = False
    """Whether every chunk of the streams is content. Set before :meth:`begin`."""

    def whole(self, responses: Sequence[InferenceResponse]) -> bytes:
        """The answers where no stream was asked for."""
        raise NotImplementedError

    async def prepare(
        self,
        index: int,
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[PromptLogprob] | None,
    ) -> None:
        """Encode what is long of an answer, a piece in each round of the loop; called before its
        end, and before :meth:`whole`.

        :param logprobs: those of all its tokens, to be taken out of the list.
        :param prompt_logprobs: those of the prompt's tokens, likewise.
        """

    async def opening(self, index: int, prompt_logprobs: list[PromptLogprob]) -> bytes:
        """What comes before an answer's first text in a stream.

        :param prompt_logprobs: those of the prompt, to be taken out of the list.
        """
        return b""

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """What comes before the first text; the prompt was read by then."""
        return b""

    @abstractmethod
    def framer(self, index: int) -> Callable[[str], bytes]:
        """What makes a frame of a chunk of one answer: of text, and unless ``plain`` is true, of
        reasoning and calls (:class:`~engineroom.generation.deltas.StreamDelta`). It is quick.
        """

    def text_with_logprobs(self, index: int, chunk: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The same where ``wants_logprobs`` is true; the chunk may be empty."""
        raise NotImplementedError

    @abstractmethod
    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The end of one answer."""

    def end(self, responses: Sequence[InferenceResponse]) -> bytes:
        """The end of the stream."""
        return b""

    @abstractmethod
    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """The end of a stream that failed midway: usage, the error, the end."""


async def respond(call: Call, requests: Sequence[InferenceRequest], writer: Writer) -> None:
    """Answer in the form of one API: in a stream where one was asked for, or whole."""
    for request in requests[:: len(requests) // writer.prompts]:
        call.context.log_prompt(request)
    if call.identity is ANONYMOUS:  # it has no key by which to be kept apart from others
        requests = [request.over_all_keys() for request in requests]
    if requests[0].stream:
        await stream_all(call, requests, writer)
    else:
        responses = await answer_all(call, requests)
        for index in range(len(responses)):
            logprobs, of_prompt = _logprobs_of(responses[index])
            # Nothing else may hold them when they are taken: to let go of all at once takes long.
            without = {"logprobs": None, "prompt_logprobs": None}
            responses[index] = responses[index].model_copy(update=without)
            await writer.prepare(index, logprobs, of_prompt)
        body = writer.whole(responses)
        call.warn(warning for response in responses for warning in response.warnings)
        await call.answer(200, body)


def _logprobs_of(
    response: InferenceResponse,
) -> tuple[list[TokenLogprob] | None, list[PromptLogprob] | None]:
    answer, prompt = response.logprobs, response.prompt_logprobs
    return None if answer is None else list(answer), None if prompt is None else list(prompt)


async def answer_all(call: Call, requests: Sequence[InferenceRequest]) -> list[InferenceResponse]:
    """The answers in order.

    :raises EngineRoomError: one of them failed.
    :raises ClientGoneError: nobody waits for them any more.
    """
    service = call.context.service

    async def infer(request: InferenceRequest) -> InferenceResponse:
        await call.context.rounds.next()  # each is checked, and together they may be heavy
        return await service.infer(request)

    async with call.attended(), admission(call, requests) as slot:
        requests = [_after(slot, request) for request in requests]
        if len(requests) == 1:
            responses = [await service.infer(requests[0])]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(infer(request)) for request in requests]
            responses = [task.result() for task in tasks]
        slot.used = _used(responses)
    for response in responses:
        response.raise_for_error()
    return responses


async def stream_all(call: Call, requests: Sequence[InferenceRequest], writer: Writer) -> None:
    """Stream the answers. The status is sent with the first text, so that it is the right one, or
    with the first heartbeat.

    :raises ApiError: one of them failed before anything was sent.
    :raises ClientGoneError: nobody reads any more.
    """
    async with call.attended(), admission(call, requests) as slot:
        streams = [call.context.service.stream(_after(slot, request)) for request in requests]
        call.on_refused = partial(_interrupt, streams)  # so that they end as streams do
        heartbeat = Heartbeat(call, writer.HEADERS, writer.ping)
        try:
            if len(streams) == 1:
                await _stream_one(call, streams[0], writer, heartbeat)
            else:
                await _stream_many(call, streams, writer, heartbeat)
        finally:
            heartbeat.cut()
            for stream in streams:
                await stream.aclose()
            slot.used = _used([s.response for s in streams if s.response is not None])


@asynccontextmanager
async def admission(call: Call, requests: Sequence[InferenceRequest]) -> AsyncIterator[Slot]:
    """Admit the requests among those that run, as the server's limits allow.

    :raises ApiError: 429: there is none; 408: none became free within the requests' ``timeout_s``.
    """
    first, service = requests[0], call.context.service
    limits = (r.params.max_new_tokens for r in requests)
    tokens = sum(_UNKNOWN_LIMIT if limit is None else limit for limit in limits)
    waiting = True
    try:
        async with call.context.limiter.slot(
            call.identity.name, len(requests), tokens, first.timeout_s, first.priority
        ) as slot:
            waiting = False
            call.logged = True  # by the service, from here on
            WAITED_S.set(slot.waited_s)
            service.registry.notify(
                "engineroom_request_waited", request=first, waited_s=slot.waited_s
            )
            yield slot
    except ApiError as error:
        if waiting and error.status in (408, 429):
            call.logged = True
            service.turn_away(first, error.code or "limit")
        raise


async def _stream_one(
    call: Call, stream: InferenceStream, writer: Writer, heartbeat: Heartbeat
) -> None:
    chunk = await anext(stream, None)
    heartbeat.spoke = True
    if not call.started:
        if isinstance(chunk, StreamError):
            raise call.api_error_of(chunk.error)
        call.warn(stream.warnings)
        await call.start(200, writer.HEADERS)
    send = call.send
    writer.plain = stream.plain
    head = writer.begin([stream]) + await writer.opening(0, list(stream.prompt_logprobs))
    if writer.wants_logprobs:
        seen = 0
        while chunk is not None and not isinstance(chunk, StreamError):
            entries = stream.logprobs
            frame = writer.text_with_logprobs(0, chunk, entries[seen:])
            seen = len(entries)
            await send({"type": "http.response.body", "body": head + frame, "more_body": True})
            head = b""
            heartbeat.spoke = True
            chunk = await anext(stream, None)
        if (entries := stream.logprobs[seen:]) and not isinstance(chunk, StreamError):
            head += writer.text_with_logprobs(0, "", entries)
    elif chunk is not None and not isinstance(chunk, StreamError):
        frame_of = writer.framer(0)
        first = head + frame_of(chunk)
        await send({"type": "http.response.body", "body": first, "more_body": True})
        head = b""
        write = call.writer(frame_of)
        failed: StreamError | None = None

        def put(chunk: str) -> Awaitable[None] | None:
            nonlocal failed
            if chunk.__class__ is StreamError:
                failed = chunk
                return None
            heartbeat.spoke = True
            return write(chunk)

        # In a task of its own: it wakes for each step, and each coroutine above it would, too.
        await asyncio.create_task(stream.pump(put))
        chunk = failed
    response = stream.response
    assert response is not None
    await writer.prepare(0, *_logprobs_of(response))
    if isinstance(chunk, StreamError):
        tail = writer.fail(call.api_error_of(chunk.error), [response])
    else:
        tail = writer.finish(0, response) + writer.end([response])
    await heartbeat.stop()
    await call.finish(head + tail)


async def _stream_many(
    call: Call, streams: Sequence[InferenceStream], writer: Writer, heartbeat: Heartbeat
) -> None:
    """Several streams in one: each is read by a task, and they are sent as they come."""
    queue: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue(_QUEUED_CHUNKS)

    async def read(index: int, stream: InferenceStream) -> None:
        await call.context.rounds.next()  # each is checked, and together they may be heavy
        async for chunk in stream:
            await queue.put((index, chunk))
        await queue.put((index, None))

    left = len(streams)
    frames: list[Callable[[str], bytes]] = []
    tasks = [asyncio.create_task(read(i, stream)) for i, stream in enumerate(streams)]
    try:
        seen = [0] * left
        opened = [False] * left
        head = b""
        while left:
            index, chunk = await queue.get()
            heartbeat.spoke = True
            if isinstance(chunk, StreamError):
                error = call.api_error_of(chunk.error)
                if not call.started:
                    raise error
                for stream in streams:  # their counts are wanted before the end
                    await stream.aclose()
                responses = [s.response for s in streams if s.response is not None]
                tail = head + writer.fail(error, responses)
                break
            if not frames:
                writer.plain = streams[index].plain
                frames = [writer.framer(place) for place in range(left)]
                if not call.started:
                    call.warn(warning for stream in streams for warning in stream.warnings)
                    await call.start(200, writer.HEADERS)
                head = writer.begin(streams)
            frame = b""
            if not opened[index]:
                opened[index] = True
                frame = await writer.opening(index, list(streams[index].prompt_logprobs))
            if writer.wants_logprobs:
                entries = streams[index].logprobs
                if chunk is not None or len(entries) > seen[index]:
                    text = "" if chunk is None else chunk
                    frame += writer.text_with_logprobs(index, text, entries[seen[index] :])
                    seen[index] = len(entries)
            elif chunk is not None:
                frame += frames[index](chunk)
            if chunk is None:
                left -= 1
                response = streams[index].response
                assert response is not None
                await writer.prepare(index, *_logprobs_of(response))
                frame += writer.finish(index, response)
            await call.send({"type": "http.response.body", "body": head + frame, "more_body": True})
            head = b""
        else:
            tail = writer.end([s.response for s in streams if s.response is not None])
        await heartbeat.stop()
        await call.finish(tail)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _interrupt(streams: Sequence[InferenceStream]) -> None:
    for stream in streams:
        stream.interrupt(ResourceNotAvailableError("its key was taken away while it ran"))


def _after(slot: Slot, request: InferenceRequest) -> InferenceRequest:
    """The request with the time that the wait for its place has left it."""
    if request.timeout_s is None or slot.waited_s == 0:
        return request
    return request.model_copy(update={"timeout_s": slot.left_of(request.timeout_s)})


def _used(responses: Sequence[InferenceResponse]) -> int:
    return sum((r.prompt_tokens or 0) + (r.generated_tokens or 0) for r in responses)
