"""What ``TokenHandler`` makes of one stream of tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.errors import InferenceError
from engineroom.generation.steps import TokenStep
from engineroom.handlers.base import StreamEnd
from engineroom.handlers.token_handler import TokenHandler, read_steps
from engineroom.schemas import GenerationParams, InferenceRequest, InferenceResponse, TokenLogprob
from engineroom.service import LLMInferenceService

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

MODEL = LoadedModel(model_id="m", model_object=None, config=ModelConfig(model_id="m", source="s"))


class Scripted(TokenHandler):
    """Yields the steps it is given, and notes how far it came and how it ended."""

    name = "scripted"

    def __init__(self, *steps: TokenStep | Exception) -> None:
        self.steps = steps
        self.yielded = 0
        self.closed = False
        self.ended_by: BaseException | None = None

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return True

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                self.yielded += 1
                yield step
        except BaseException as error:
            self.ended_by = error
            raise
        finally:
            self.closed = True


class Stuck(Scripted):
    """Yields its steps, then waits for a step that never comes."""

    def __init__(self, *steps: TokenStep) -> None:
        super().__init__(*steps)
        self.waiting = asyncio.Event()

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        try:
            for step in self.steps:
                assert isinstance(step, TokenStep)
                yield step
            self.waiting.set()
            await asyncio.Event().wait()
        except BaseException as error:
            self.ended_by = error
            raise
        finally:
            self.closed = True


def request(**values: Any) -> InferenceRequest:
    params = {"max_new_tokens": values.pop("max_new_tokens", None)}
    return InferenceRequest(model_id="m", prompt="Hello", params=params, **values)


def tokens(*texts: str | bytes) -> list[TokenStep]:
    return [TokenStep([number], text) for number, text in enumerate(texts)]


async def whole(steps: Sequence[TokenStep | Exception], **values: Any) -> InferenceResponse:
    return await Scripted(*steps).infer(MODEL, request(**values))


async def streamed(
    steps: Sequence[TokenStep | Exception], **values: Any
) -> tuple[list[str], InferenceResponse]:
    chunks = [chunk async for chunk in Scripted(*steps).stream_infer(MODEL, request(**values))]
    end = chunks[-1]
    assert isinstance(end, StreamEnd)
    return chunks[:-1], end.response


async def finished(handler: Scripted, mode: str) -> None:
    """Run a request to its end, in whole or as a stream."""
    if mode == "infer":
        await handler.infer(MODEL, request())
    else:
        async for _ in handler.stream_infer(MODEL, request()):
            pass


def without_times(response: InferenceResponse) -> dict[str, Any]:
    return response.model_dump(
        exclude={"inference_time_ms", "queue_time_ms", "time_to_first_token_ms", "request_id"}
    )


# ── streamed and whole are one ───────────────────────────────────────────────────────────────

STEPS = st.lists(
    st.builds(
        TokenStep,
        token_ids=st.lists(st.integers(min_value=0, max_value=9), max_size=2),
        text=st.one_of(
            st.text(alphabet="abé", max_size=3),
            st.sampled_from([b"a", b"b", b"ab", b"\xc3", b"\xa9", b"\xf0\x9f", b"\xff"]),
        ),
        finish=st.sampled_from([None, None, None, None, "eos_token", "length", "cancelled"]),
        prompt_tokens=st.none() | st.integers(min_value=0, max_value=9),
        cached_prompt_tokens=st.none() | st.integers(min_value=0, max_value=9),
    ),
    max_size=8,
)
STOPS = st.none() | st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3)


@untimed
@given(steps=STEPS, stops=STOPS, limit=st.none() | st.integers(min_value=1, max_value=5))
@example(steps=tokens("a", "b", "a"), stops=["bc"], limit=2)
@example(steps=tokens(b"a", b"\xc3"), stops=None, limit=None)
def test_the_joined_stream_is_the_whole_answer(
    steps: list[TokenStep], stops: list[str] | None, limit: int | None
) -> None:
    async def both() -> None:
        values: dict[str, Any] = {"stop_sequences": stops, "max_new_tokens": limit}
        answer = await whole(steps, **values)
        chunks, response = await streamed(steps, **values)
        assert "".join(chunks) == answer.generated_text
        assert all(chunks)
        assert without_times(response) == without_times(answer)
        assert answer.finish_reason is not None
        assert not any(stop in (answer.generated_text or "") for stop in stops or ())
        assert (answer.stop_sequence is not None) == (answer.finish_reason == "stop_sequence")

    asyncio.run(both())


async def test_the_end_of_a_stream_is_an_empty_string_with_the_response() -> None:
    chunks = [c async for c in Scripted(*tokens("a", "b")).stream_infer(MODEL, request())]
    assert chunks == ["a", "b", ""]
    assert [type(chunk) for chunk in chunks] == [str, str, StreamEnd]


async def test_a_stream_without_text_is_an_end_alone() -> None:
    chunks, response = await streamed([])
    assert chunks == []
    assert response.generated_text == ""


# ── text ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_character_split_over_tokens_is_shown_whole() -> None:
    chunks, response = await streamed(tokens(b"\xf0", b"\x9f\x98", b"\x80", "!"))
    assert chunks == ["😀", "!"]
    assert response.generated_tokens == 4


async def test_an_incomplete_character_at_the_end_is_replaced_once() -> None:
    assert (await whole(tokens("a", b"\xf0\x9f"))).generated_text == "a�"


async def test_a_stop_sequence_split_over_tokens_ends_the_text() -> None:
    chunks, response = await streamed(
        tokens("one E", "N", "D two", "three"), stop_sequences=["END"]
    )
    assert chunks == ["one "]
    assert (response.finish_reason, response.stop_sequence) == ("stop_sequence", "END")
    assert response.generated_tokens == 3


async def test_the_beginning_of_a_stop_sequence_is_shown_at_the_end() -> None:
    chunks, response = await streamed(tokens("one E", "N"), stop_sequences=["END"])
    assert chunks == ["one ", "EN"]
    assert (response.finish_reason, response.stop_sequence) == ("eos_token", None)


# ── how it ends ──────────────────────────────────────────────────────────────────────────────


async def test_a_generator_that_just_ends_has_ended_with_eos() -> None:
    assert (await whole(tokens("a"))).finish_reason == "eos_token"
    assert (await whole([])).finish_reason == "eos_token"


@pytest.mark.parametrize("reason", ["eos_token", "length", "cancelled", "timeout", "error"])
async def test_the_runtime_may_say_why_it_ends(reason: Any) -> None:
    handler = Scripted(TokenStep([1], "a"), TokenStep([], "", finish=reason), TokenStep([2], "b"))
    response = await handler.infer(MODEL, request())
    assert (response.generated_text, response.finish_reason) == ("a", reason)
    assert handler.yielded == 2


async def test_core_enforces_the_limit() -> None:
    handler = Scripted(*tokens("a", "b", "c", "d"))
    response = await handler.infer(MODEL, request(max_new_tokens=2))
    assert (response.generated_text, response.finish_reason) == ("ab", "length")
    assert response.generated_tokens == 2
    assert handler.yielded == 2
    assert handler.closed


async def test_fewer_tokens_than_the_limit_are_not_its_doing() -> None:
    response = await whole(tokens("a", "b"), max_new_tokens=3)
    assert response.finish_reason == "eos_token"


async def test_the_runtime_knows_better_why_the_last_allowed_token_was_the_last() -> None:
    steps = [TokenStep([1], "a", finish="eos_token")]
    assert (await whole(steps, max_new_tokens=1)).finish_reason == "eos_token"


@pytest.mark.parametrize("finish", ["eos_token", "length", None])
async def test_a_stop_sequence_in_the_last_step_is_the_reason(finish: Any) -> None:
    steps = [TokenStep([1], "a END", finish=finish)]
    response = await whole(steps, stop_sequences=["END"], max_new_tokens=1)
    assert (response.generated_text, response.finish_reason) == ("a ", "stop_sequence")


async def test_a_stop_sequence_that_was_still_undecided_at_the_limit_is_the_reason() -> None:
    response = await whole(tokens("xab"), stop_sequences=["abc", "b"], max_new_tokens=1)
    assert (response.generated_text, response.finish_reason) == ("xa", "stop_sequence")
    assert response.stop_sequence == "b"


async def test_the_response_says_whose_it_is() -> None:
    asked = request()
    response = await Scripted().infer(MODEL, asked)
    assert (response.request_id, response.model_id) == (asked.request_id, "m")
    assert response.handler == "scripted"


# ── counts ───────────────────────────────────────────────────────────────────────────────────


async def test_tokens_are_counted_and_not_steps() -> None:
    steps = [TokenStep([1, 2], "ab"), TokenStep([], "c"), TokenStep([3], "")]
    response = await whole(steps)
    assert (response.generated_tokens, response.generated_text) == (3, "abc")


async def test_prompt_tokens_may_be_said_in_any_step() -> None:
    steps = [
        TokenStep(prompt_tokens=7),
        TokenStep([1], "a", cached_prompt_tokens=0),
        TokenStep([2], "b", finish="eos_token"),
    ]
    response = await whole(steps)
    assert (response.prompt_tokens, response.cached_prompt_tokens) == (7, 0)
    assert (await whole([TokenStep(prompt_tokens=0)])).prompt_tokens == 0


async def test_what_was_not_said_is_not_known() -> None:
    response = await whole(tokens("a"))
    assert (response.prompt_tokens, response.cached_prompt_tokens) == (None, None)
    assert response.logprobs is None


async def test_a_first_token_has_a_time_and_none_has_none() -> None:
    assert (await whole([TokenStep(prompt_tokens=7)])).time_to_first_token_ms is None
    response = await whole(tokens(b"\xc3", b"\xa9"))  # its first token shows nothing
    assert response.time_to_first_token_ms is not None
    assert response.inference_time_ms is not None
    assert 0 <= response.time_to_first_token_ms <= response.inference_time_ms


async def test_logprobs_are_kept_in_order() -> None:
    entries = [
        TokenLogprob(token_id=n, token=str(n), logprob=-0.5, top=[(n, str(n), -0.5)])
        for n in range(3)
    ]
    steps = [
        TokenStep([0, 1], "01", logprobs=entries[:2]),
        TokenStep([2], "2", logprobs=entries[2:]),
    ]
    assert (await whole(steps)).logprobs == entries
    assert (await streamed(steps))[1].logprobs == entries


async def test_logprobs_that_were_asked_for_may_be_none_at_all() -> None:
    assert (await whole([TokenStep(logprobs=[], finish="eos_token")])).logprobs == []


# ── stopping ─────────────────────────────────────────────────────────────────────────────────


async def test_the_work_stops_in_the_step_that_completes_a_stop_sequence() -> None:
    handler = Scripted(*tokens("a", "END", "b", "c"))
    await handler.infer(MODEL, request(stop_sequences=["END"]))
    assert handler.yielded == 2
    assert isinstance(handler.ended_by, GeneratorExit)


@pytest.mark.parametrize("values", [{"max_new_tokens": 2}, {"stop_sequences": ["!"]}])
async def test_the_work_has_stopped_before_the_last_text_is_handed_on(
    values: dict[str, Any],
) -> None:
    handler = Scripted(*tokens("a", "b!", "c"))
    stream = handler.stream_infer(MODEL, request(**values))
    assert await anext(stream) == "a"
    assert not handler.closed
    assert (await anext(stream)).startswith("b")
    assert handler.closed  # a reader that stops here holds no slot
    await stream.aclose()


async def test_closing_a_stream_closes_the_steps() -> None:
    handler = Scripted(*tokens("a", "b"))
    stream = handler.stream_infer(MODEL, request())
    assert await anext(stream) == "a"
    await stream.aclose()
    assert isinstance(handler.ended_by, GeneratorExit)
    assert handler.yielded == 1
    assert [chunk async for chunk in stream] == []


async def test_closing_a_stream_that_never_began_begins_nothing() -> None:
    handler = Scripted(*tokens("a"))
    await handler.stream_infer(MODEL, request()).aclose()
    assert handler.yielded == 0


async def test_a_stream_asks_for_no_step_before_it_is_read() -> None:
    handler = Scripted(*tokens("a", "b", "c"))
    stream = handler.stream_infer(MODEL, request())
    await anext(stream)
    assert handler.yielded == 1
    await stream.aclose()


async def test_cancelling_the_task_cancels_the_step_it_waits_for() -> None:
    handler = Stuck(*tokens("a"))
    task = asyncio.create_task(handler.infer(MODEL, request()))
    await handler.waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(handler.ended_by, asyncio.CancelledError)
    assert handler.closed


async def test_cancelling_the_reader_cancels_the_step_it_waits_for() -> None:
    handler = Stuck(*tokens("a"))
    stream = handler.stream_infer(MODEL, request())
    seen: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            seen.append(chunk)  # noqa: PERF401 - it is looked at before the loop ends

    task = asyncio.create_task(read())
    await handler.waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["a"]
    assert isinstance(handler.ended_by, asyncio.CancelledError)


@pytest.mark.parametrize("mode", ["infer", "stream_infer"])
async def test_an_error_of_the_runtime_passes_as_it_is(mode: str) -> None:
    error = InferenceError("it broke")
    handler = Scripted(*tokens("a"), error)
    with pytest.raises(InferenceError) as caught:
        await finished(handler, mode)
    assert caught.value is error
    assert handler.closed


async def test_what_came_before_an_error_was_streamed() -> None:
    handler = Scripted(*tokens("a", "b"), InferenceError("it broke"))
    stream = handler.stream_infer(MODEL, request())
    assert [await anext(stream), await anext(stream)] == ["a", "b"]
    with pytest.raises(InferenceError):
        await anext(stream)


@pytest.mark.parametrize("mode", ["infer", "stream_infer"])
async def test_whoever_reads_the_steps_learns_how_far_a_failed_request_came(mode: str) -> None:
    handler = Scripted(TokenStep(prompt_tokens=7), *tokens("a", "b"), InferenceError("it broke"))
    reader = read_steps(handler, MODEL, request())

    async def read() -> None:
        if mode == "infer":
            await reader.read_all()
        while not reader.ended:
            await reader.next_chunk()

    with pytest.raises(InferenceError):
        await read()
    response = reader.response()
    assert (response.generated_text, response.generated_tokens) == ("ab", 2)
    assert (response.prompt_tokens, response.finish_reason) == (7, None)


async def test_a_reader_knows_of_its_own_steps_alone() -> None:
    reader = read_steps(Scripted(), MODEL, request())
    await whole(tokens("a"))
    assert (reader.ended, reader.response().generated_text) == (False, "")
    await reader.aclose()


async def test_requests_at_the_same_time_do_not_mix() -> None:
    handler = Scripted(*tokens("a", "b", "c"))
    streams = [handler.stream_infer(MODEL, request(max_new_tokens=n)) for n in (1, 2, 3)]
    texts = ["", "", ""]
    for _ in range(4):
        for place, stream in enumerate(streams):
            texts[place] += await anext(stream, "")
    for stream in streams:
        await stream.aclose()
    assert texts == ["a", "ab", "abc"]


# ── what the class claims ────────────────────────────────────────────────────────────────────


def test_by_default_only_what_core_does_itself_is_claimed() -> None:
    assert Scripted().capabilities().params == {"max_new_tokens"}
    assert Scripted().capabilities().stop_sequences


def test_a_subclass_that_yields_no_tokens_cannot_be_made() -> None:
    class Empty(TokenHandler):
        name = "empty"

        def can_handle(self, loaded_model: LoadedModel) -> bool:
            return True

    with pytest.raises(TypeError, match="generate_tokens"):
        Empty()  # type: ignore[abstract]


# ── the service, which reads the steps itself ────────────────────────────────────────────────


class One:
    """A source of one model."""

    @contextlib.asynccontextmanager
    async def lease(self, model_id: str) -> AsyncIterator[LoadedModel]:
        yield MODEL


async def through_the_service(handler: TokenHandler, request: InferenceRequest):
    async with LLMInferenceService(One(), handlers=[handler]) as service:
        stream = service.stream(request)
        chunks = [chunk async for chunk in stream]
    assert stream.response is not None
    return chunks, stream.response


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [TokenStep((1,), "one"), TokenStep((2,), " two")],  # it does not say why it ends
        [TokenStep((1,), "one"), TokenStep((2,), " two", finish="eos_token")],
        [TokenStep((1,), b"\xf0\x9f"), TokenStep((2,), b"\x98\x80"), TokenStep((3,), b"\xf0")],
        [TokenStep((1,), "one S"), TokenStep((2,), "T"), TokenStep((3,), "OP two")],
        [TokenStep((1,), "one S"), TokenStep((2,), "TO")],  # held back to the end
        [TokenStep(prompt_tokens=3), TokenStep(finish="length")],
        [TokenStep((n,), str(n)) for n in range(9)],  # more than the limit
    ],
)
async def test_a_stream_of_the_service_is_that_of_the_handler(steps: list[TokenStep]) -> None:
    params = GenerationParams(max_new_tokens=7)
    request = InferenceRequest(model_id="m", prompt="p", stop_sequences=["STOP"], params=params)
    *expected, end = [chunk async for chunk in Scripted(*steps).stream_infer(MODEL, request)]
    assert isinstance(end, StreamEnd)
    handler = Scripted(*steps)
    chunks, response = await through_the_service(handler, request)
    assert chunks == expected
    timeless = dict.fromkeys(("inference_time_ms", "queue_time_ms", "time_to_first_token_ms"))
    assert response.model_copy(update=timeless) == end.response.model_copy(update=timeless)
    assert handler.closed or not steps


async def test_the_slot_is_given_back_before_a_slow_reader_has_the_last_text() -> None:
    handler = Scripted(TokenStep((1,), "one"), TokenStep((2,), " two", finish="length"))
    async with LLMInferenceService(One(), handlers=[handler]) as service:
        stream = service.stream(InferenceRequest(model_id="m", prompt="p"))
        assert await anext(stream) == "one"
        assert not handler.closed
        assert await anext(stream) == " two"
        assert handler.closed
        await stream.aclose()


async def test_a_stream_infer_of_the_runtime_s_own_is_used() -> None:
    class Loud(Scripted):
        async def stream_infer(self, loaded_model: LoadedModel, request: InferenceRequest):
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk if isinstance(chunk, StreamEnd) else chunk.upper()

    handler = Loud(TokenStep((1,), "one"), TokenStep((2,), " two"))
    chunks, _ = await through_the_service(handler, InferenceRequest(model_id="m", prompt="p"))
    assert chunks == ["ONE", " TWO"]


async def test_an_infer_of_the_runtime_s_own_is_used() -> None:
    class Loud(Scripted):
        async def infer(self, loaded_model: LoadedModel, request: InferenceRequest):
            response = await super().infer(loaded_model, request)
            return response.model_copy(update={"generated_text": response.generated_text.upper()})

    async with LLMInferenceService(One(), handlers=[Loud(TokenStep((1,), "one"))]) as service:
        response = await service.infer(InferenceRequest(model_id="m", prompt="p"))
    assert (response.generated_text, response.generated_tokens) == ("ONE", 1)
