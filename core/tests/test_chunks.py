"""Steps through a mailbox: whole, streamed and pumped, they give what yielded steps give."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any

import pytest
from core_doubles import Source, drained
from hypothesis import HealthCheck, example, given, settings, strategies as st

from engineroom import (
    EngineDeadError,
    EngineRoomError,
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LoadedModel,
    Mailbox,
    ModelConfig,
    RequestTimeoutError,
    StreamError,
    TokenHandler,
    TokenStep,
    deliver,
)
from engineroom.handlers.base import StreamEnd

MODEL = LoadedModel(model_id="m", model_object=None, config=ModelConfig(model_id="m", source="s"))
Item = TokenStep | EngineRoomError


class Yielding(TokenHandler):
    """Yields its steps."""

    name = "yielding"

    def __init__(self, steps: Sequence[TokenStep]) -> None:
        self.steps = steps

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return True

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        for step in self.steps:
            yield step


class Posting(TokenHandler):
    """Yields some steps, then a mailbox that a task fills in bursts."""

    name = "posting"

    def __init__(self, first: Sequence[TokenStep], items: Sequence[Item], burst: int = 1) -> None:
        self.first, self.items, self.burst = first, items, burst
        self.closed = 0

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return True

    async def _post(self, mailbox: Mailbox) -> None:
        for number, item in enumerate(self.items):
            if number % self.burst == 0:
                await asyncio.sleep(0)
            mailbox.put(item)

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep | Mailbox, None]:
        mailbox = Mailbox()
        engine = asyncio.create_task(self._post(mailbox))
        try:
            for step in self.first:
                yield step
            yield mailbox
            raise AssertionError("it is closed, never resumed")
        finally:
            self.closed += 1
            engine.cancel()


def service_of(handler: TokenHandler) -> LLMInferenceService:
    return LLMInferenceService(Source(MODEL), handlers=[handler])


def ask(**values: Any) -> InferenceRequest:
    params = GenerationParams(max_new_tokens=values.pop("limit", None))
    return InferenceRequest(model_id="m", prompt="Hello", params=params, **values)


def told(response: InferenceResponse | None) -> dict[str, Any]:
    assert response is not None
    times = {"inference_time_ms", "queue_time_ms", "time_to_first_token_ms"}
    return response.model_dump(exclude={*times, "request_id", "handler"})


async def pumped(
    service: LLMInferenceService, request: InferenceRequest, waits: Sequence[bool] = (False,)
) -> tuple[list[str], InferenceResponse | None]:
    """What a stream puts whose first chunk is asked for; the reader waits where ``waits`` says."""
    stream = service.stream(request)
    first = await anext(stream, None)
    chunks = [] if first is None else [first]

    def put(chunk: str) -> Awaitable[None] | None:
        chunks.append(chunk)
        return asyncio.sleep(0) if waits[len(chunks) % len(waits)] else None

    await stream.pump(put)
    return chunks, stream.response


STEP = st.builds(
    TokenStep,
    token_ids=st.lists(st.integers(min_value=0, max_value=9), max_size=2),
    text=st.one_of(
        st.text(alphabet="abé", max_size=3),
        st.sampled_from([b"a", b"b", b"ab", b"\xc3", b"\xa9", b"\xf0\x9f", b"\xff"]),
    ),
    prompt_tokens=st.none() | st.integers(min_value=0, max_value=9),
    cached_prompt_tokens=st.none() | st.integers(min_value=0, max_value=9),
)
STOPS = st.none() | st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    first=st.lists(STEP, max_size=2),
    steps=st.lists(STEP, max_size=8),
    reason=st.sampled_from(["eos_token", "length"]),
    stops=STOPS,
    limit=st.none() | st.integers(min_value=1, max_value=5),
    burst=st.integers(min_value=1, max_value=4),
    waits=st.lists(st.booleans(), min_size=1, max_size=3),
)
@example([], [TokenStep([1], "é")] * 6, "eos_token", None, None, 3, [True])
@example([], [TokenStep([1], "a"), TokenStep([2], "b")], "length", ["bé"], 2, 1, [False])
def test_every_way_of_reading_gives_what_yielded_steps_give(
    first: list[TokenStep],
    steps: list[TokenStep],
    reason: Any,
    stops: list[str] | None,
    limit: int | None,
    burst: int,
    waits: list[bool],
) -> None:
    async def all_ways() -> None:
        ending = [*steps, TokenStep(finish=reason)]
        values: dict[str, Any] = {"stop_sequences": stops, "limit": limit}
        answer = await Yielding([*first, *ending]).infer(MODEL, ask(**values))
        expected = told(answer)

        handler = Posting(first, ending, burst)
        assert told(await handler.infer(MODEL, ask(**values))) == expected
        *chunks, end = [c async for c in handler.stream_infer(MODEL, ask(**values))]
        assert isinstance(end, StreamEnd) and told(end.response) == expected
        assert "".join(chunks) == answer.generated_text

        service = service_of(handler)
        assert told(await service.infer(ask(**values))) == expected
        stream = service.stream(ask(**values))
        chunks = await drained(stream)
        assert "".join(chunks) == answer.generated_text and all(chunks)
        assert told(stream.response) == expected
        chunks, response = await pumped(service, ask(**values), waits)
        assert "".join(chunks) == answer.generated_text and all(chunks)
        assert told(response) == expected
        assert handler.closed == 5

    asyncio.run(all_ways())


@pytest.mark.parametrize("way", ["infer", "stream", "pump"])
async def test_an_engine_that_dies_keeps_what_it_gave(way: str) -> None:
    died = EngineDeadError("it died")
    handler = Posting([], [TokenStep([n], f"{n} ") for n in range(3)] + [died])
    service = service_of(handler)
    if way == "infer":
        response = await service.infer(ask())
    elif way == "stream":
        stream = service.stream(ask())
        *_, last = await drained(stream)
        assert isinstance(last, StreamError) and stream.response is not None
        response = stream.response
    else:
        chunks, found = await pumped(service, ask())
        assert chunks[:-1] == ["0 ", "1 ", "2 "] and isinstance(chunks[-1], StreamError)
        assert found is not None
        response = found
    assert (response.error_type, response.finish_reason) == ("EngineDeadError", "error")
    assert (response.generated_tokens, handler.closed) == (3, 1)
    assert way == "infer" or response.generated_text == "0 1 2 "


async def test_a_reader_that_is_pumped_to_is_not_woken_for_a_step() -> None:
    """Steps come in the loop's callbacks; the task that pumps sleeps until the last one."""
    mailboxes: list[Mailbox] = []

    class Holding(Posting):
        async def _post(self, mailbox: Mailbox) -> None:
            mailboxes.append(mailbox)

    stream = service_of(Holding([TokenStep([0], "0")], ())).stream(ask())
    assert await anext(stream) == "0"
    chunks: list[str] = []
    reader = asyncio.create_task(stream.pump(chunks.append))
    await asyncio.sleep(0)
    for number in range(1, 4):
        mailboxes[0].put(TokenStep([number], str(number)))
        assert chunks[-1] == str(number)  # the loop has not turned
    mailboxes[0].put(TokenStep([4], "4", finish="length"))
    assert chunks[-1] == "3"  # the slot is given back before the last text goes out
    await reader
    assert chunks == ["1", "2", "3", "4"]


async def test_what_comes_from_a_thread_is_pumped_in_order() -> None:
    count = 2000

    class Threaded(Posting):
        async def _post(self, mailbox: Mailbox) -> None:
            def work() -> None:
                for number in range(count):
                    deliver([(mailbox, TokenStep([number], f"{number} "))])
                deliver([(mailbox, TokenStep(finish="eos_token"))])

            self.thread = threading.Thread(target=work)
            self.thread.start()

    handler = Threaded([], ())
    chunks, response = await pumped(service_of(handler), ask(), [False] * 7 + [True])
    assert chunks == [f"{number} " for number in range(count)]
    assert response is not None and response.generated_tokens == count
    handler.thread.join()


@pytest.mark.parametrize("late", [False, True])
async def test_a_reader_that_is_stopped_as_it_asks_to_be_waited_for_leaves_nothing(
    late: bool, recwarn: pytest.WarningsRecorder
) -> None:
    handler = Posting([], [TokenStep([n], f"{n} ") for n in range(5)])
    stream = service_of(handler).stream(ask())
    assert await anext(stream) == "0 "

    async def slow() -> None:
        await asyncio.sleep(3600)

    readers: list[asyncio.Task[None]] = []

    def put(chunk: str) -> Awaitable[None]:
        if not late:
            readers[0].cancel()  # before it can begin to wait
        return slow()

    reader = asyncio.create_task(stream.pump(put))
    readers.append(reader)
    if late:
        for _ in range(20):
            await asyncio.sleep(0)
        reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled()
    await stream.aclose()
    assert stream.response is not None and stream.response.finish_reason == "cancelled"
    assert handler.closed == 1
    readers.clear()
    del reader, put, stream
    gc.collect()
    assert not [w for w in recwarn if "never awaited" in str(w.message)]


@pytest.mark.parametrize("kind", [ValueError, StopIteration, SystemExit])
async def test_what_the_taker_raises_comes_out_of_pump_and_the_stream_can_be_read_on(
    kind: type[BaseException],
) -> None:
    steps = [TokenStep([n], f"{n} ") for n in range(4)]
    handler = Posting([], [*steps, TokenStep(finish="eos_token")])
    stream = service_of(handler).stream(ask())
    assert await anext(stream) == "0 "

    def put(chunk: str) -> None:
        raise kind(chunk)

    with pytest.raises(RuntimeError if kind is StopIteration else kind):
        await stream.pump(put)
    assert await drained(stream) == ["2 ", "3 "]
    assert stream.response is not None and stream.response.finish_reason == "eos_token"


@pytest.mark.parametrize("way", ["infer", "stream", "pump"])
@pytest.mark.parametrize("nonsense", [None, TokenStep([1], 7)])  # type: ignore[arg-type]
async def test_nonsense_in_a_mailbox_fails_its_request_alone(
    way: str, nonsense: Any, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Posting([], [TokenStep([n], f"{n} ") for n in range(3)] + [nonsense])
    service = service_of(handler)
    if way == "infer":
        response: InferenceResponse | None = await service.infer(ask())
    elif way == "stream":
        stream = service.stream(ask())
        assert isinstance((await drained(stream))[-1], StreamError)
        response = stream.response
    else:
        chunks, response = await pumped(service, ask())
        assert isinstance(chunks[-1], StreamError)
    assert response is not None and response.error_type == "InferenceError"
    assert "request failed" in caplog.text and handler.closed == 1


# ── at the same time ─────────────────────────────────────────────────────────────────────────


class Manual(Posting):
    """A step, then a mailbox that the test fills."""

    def __init__(self) -> None:
        super().__init__([TokenStep([0], "0 ")], ())
        self.mailboxes: list[Mailbox] = []
        self.may_close = asyncio.Event()
        self.may_close.set()

    async def _post(self, mailbox: Mailbox) -> None:
        self.mailboxes.append(mailbox)

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep | Mailbox, None]:
        try:
            async for item in super().generate_tokens(loaded_model, request):
                yield item
        finally:
            await self.may_close.wait()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("how", ["deadline", "aclose"])
async def test_what_stops_a_stream_before_its_reader_is_waited_for_waits_for_it(how: str) -> None:
    handler = Manual()
    stream = service_of(handler).stream(ask())
    assert await anext(stream) == "0 "
    sent: list[str] = []

    async def send(chunk: str) -> None:
        await asyncio.sleep(0)
        sent.append(chunk)

    reader = asyncio.create_task(stream.pump(send))
    await turns()
    handler.mailboxes[0].put(TokenStep([1], "1 "))  # and before the reader's task wakes
    if how == "deadline":
        stream._scope.interrupt(RequestTimeoutError("late"))
    else:
        await stream.aclose()
    await reader
    assert stream.response is not None
    if how == "deadline":
        assert sent[0] == "1 " and isinstance(sent[1], str) and "late" in sent[1] and len(sent) == 2
        assert stream.response.finish_reason == "timeout"
    else:
        assert not sent and stream.response.finish_reason == "cancelled"


@pytest.mark.parametrize("raises", [False, True])
async def test_a_taker_that_cancels_its_reader_harms_no_neighbour(raises: bool) -> None:
    handler = Manual()
    service = service_of(handler)
    streams = [service.stream(ask()) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    readers: list[asyncio.Task[None]] = []

    def cancels(chunk: str) -> None:
        readers[0].cancel()
        if raises:
            raise ValueError(chunk)

    got: list[str] = []
    readers += [
        asyncio.create_task(streams[0].pump(cancels)),
        asyncio.create_task(streams[1].pump(got.append)),
    ]
    await turns()
    deliver([(mailbox, TokenStep([1], "1 ")) for mailbox in handler.mailboxes])
    deliver([(mailbox, TokenStep([2], "2 ", finish="length")) for mailbox in handler.mailboxes])
    async with asyncio.timeout(10):
        await asyncio.wait(readers)
    assert readers[0].cancelled() and readers[1].result() is None
    assert got == ["1 ", "2 "]
    await streams[0].aclose()
    assert handler.closed == 2


@pytest.mark.parametrize("way", ["iterated", "pumped"])
async def test_who_reads_a_stream_that_is_being_closed_finds_its_end(way: str) -> None:
    handler = Manual()
    stream = service_of(handler).stream(ask())
    assert await anext(stream) == "0 "
    handler.may_close.clear()
    slow = asyncio.Event()
    if way == "pumped":
        reader: asyncio.Task[Any] = asyncio.create_task(stream.pump(lambda _: slow.wait()))
        await turns()
        handler.mailboxes[0].put(TokenStep([1], "1 "))
        await turns()
    closing = asyncio.create_task(stream.aclose())
    await turns()
    if way == "iterated":
        reader = asyncio.create_task(drained(stream))
    slow.set()
    await turns()
    assert not reader.done() and not closing.done()
    handler.may_close.set()
    async with asyncio.timeout(10):
        await closing
        assert not await reader


async def test_text_that_is_no_step_fails_its_request() -> None:
    class Text(Posting):
        async def generate_tokens(
            self, loaded_model: LoadedModel, request: InferenceRequest
        ) -> AsyncGenerator[Any, None]:
            yield TokenStep([0], "0 ")
            yield "text"

    stream = service_of(Text([], ())).stream(ask())
    first, last = await drained(stream)
    assert first == "0 " and isinstance(last, StreamError)


@pytest.mark.parametrize("way", ["infer", "stream", "pump"])
@pytest.mark.parametrize(
    "wrong",
    [
        TokenStep([1], "1 ", logprobs=("no",)),  # type: ignore[arg-type]
        TokenStep([1], "1 ", prompt_tokens="many"),  # type: ignore[arg-type]
        TokenStep([1], "1 ", finish="tired"),  # type: ignore[arg-type]
    ],
)
async def test_a_step_that_no_response_can_tell_of_fails_its_request(
    way: str, wrong: TokenStep, caplog: pytest.LogCaptureFixture
) -> None:
    service = service_of(Posting([], [TokenStep([0], "0 "), wrong, TokenStep(finish="length")]))
    if way == "infer":
        response: InferenceResponse | None = await service.infer(ask())
    elif way == "stream":
        stream = service.stream(ask())
        assert isinstance((await drained(stream))[-1], StreamError)
        response = stream.response
    else:
        response = (await pumped(service, ask()))[1]
    assert response is not None and response.error_type == "InferenceError"
    assert response.error_message is not None and response.generated_text in {"0 ", "0 1 "}
    assert "handler 'posting' yielded steps that make no response" in response.error_message
    assert "'no'" not in response.error_message and "mend the plugin" in caplog.text
    assert service.num_requests == 0
