"""The dispatcher: whole answers, refusals, cancellation, deadlines, closing."""

from __future__ import annotations

import asyncio
import threading

import pytest
from core_doubles import (
    Bench,
    GateHandler,
    PlainHandler,
    Source,
    drained,
    echo_bench,
    echo_config,
    gate_bench,
    plain_bench,
    until,
)

from engineroom import (
    Capabilities,
    ChatMessage,
    ConfigurationError,
    EngineDeadError,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    ModelConfig,
    ModelNotFoundError,
    NoSuitableHandlerError,
    QueueFullError,
    RequestTimeoutError,
    ResourceNotAvailableError,
    StreamEnd,
    StreamError,
)
from engineroom.testing import EchoHandler, EchoModel

pytestmark = pytest.mark.usefixtures("both_ways")
AHEAD = "an engine does not wait for the reader of the first chunk"

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


async def ask(bench: Bench, request: InferenceRequest, stream: bool) -> InferenceResponse:
    """The final response, whichever way."""
    if not stream:
        return await bench.service.infer(request)
    answer = bench.service.stream(request)
    chunks = await drained(answer)
    errors = [chunk for chunk in chunks if isinstance(chunk, StreamError)]
    response = answer.response
    assert response is not None
    if response.error_message is not None:
        assert errors == [chunks[-1]]
        assert errors[0] == f"STREAM_ERROR: {response.error_message}"
        assert type(errors[0].error).__name__ == response.error_type
    else:
        assert not errors
        assert "".join(chunks) == response.generated_text
    return response


# ── answers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("one two three", {}),
        ("one two three", {"params": GenerationParams(max_new_tokens=2)}),
        ("one two STOP three", {"stop_sequences": ["STOP"]}),
        ("naïve façade 🦉 end", {}),
        ("", {}),
        ("STREAM_ERROR: said the model", {}),
    ],
)
@pytest.mark.parametrize("split_bytes", [False, True])
async def test_the_same_request_streamed_and_whole_is_answered_alike(prompt, fields, split_bytes):
    bench = echo_bench(split_bytes=split_bytes)
    whole = await ask(bench, bench.request(prompt, **fields), stream=False)
    streamed = await ask(bench, bench.request(prompt, **fields), stream=True)
    timing = {"request_id", "inference_time_ms", "queue_time_ms", "time_to_first_token_ms"}
    assert whole.model_dump(exclude=timing) == streamed.model_dump(exclude=timing)
    assert whole.error_message is None and whole.handler == "echo"
    assert bench.at_rest()


async def test_process_inference_takes_the_way_that_the_request_says():
    bench = echo_bench()
    whole = await bench.service.process_inference(bench.request("a b"))
    assert isinstance(whole, InferenceResponse) and whole.generated_text == "a b"
    stream = await bench.service.process_inference(bench.request("a b", stream=True))
    assert await drained(stream) == ["a", " b"]


async def test_what_is_no_request_is_refused_with_what_to_build():
    bench = echo_bench()
    with pytest.raises(ConfigurationError, match="InferenceRequest"):
        await bench.service.process_inference({"model_id": "echo"})


async def test_a_chat_request_is_answered():
    bench = echo_bench()
    request = InferenceRequest(
        model_id="echo", messages=[ChatMessage(role="user", content="hello you")]
    )
    assert (await bench.service.infer(request)).generated_text == "hello you"


@BOTH
async def test_an_unknown_model_is_told_with_the_known_ones(stream):
    bench = echo_bench()
    response = await ask(bench, bench.request(model_id="ecko"), stream)
    assert response.error_message.startswith("Model not found: 'ecko'")
    assert "did you mean 'echo'" in response.error_message
    assert response.request_id in response.error_message
    assert response.finish_reason == "error"
    with pytest.raises(ModelNotFoundError) as caught:
        response.raise_for_error()
    assert caught.value.model_id == "ecko"
    assert bench.at_rest()


@BOTH
async def test_no_handler_for_the_model_is_told_with_each_ones_reason(stream):
    source = Source(LoadedModel(model_id="m", model_object=1, config=echo_config("m")))
    service = LLMInferenceService(source, handlers=[EchoHandler()])
    request = InferenceRequest(model_id="m", prompt="x", stream=stream)
    answer = await service.process_inference(request)
    if stream:
        await drained(answer)
        answer = answer.response
    with pytest.raises(NoSuitableHandlerError, match="echo: no, can_handle is False"):
        answer.raise_for_error()


@BOTH
@pytest.mark.parametrize(
    ("fail", "text"), [("before", ""), ("during", "one two"), ("after", "one two three")]
)
async def test_a_handler_that_raises_keeps_what_it_had_said(stream, fail, text, caplog, both_ways):
    bench = echo_bench(fail=fail)
    response = await ask(bench, bench.request("one two three"), stream)
    assert response.finish_reason == "error"
    assert response.error_type == "InferenceError"
    assert "RuntimeError: asked to fail" in response.error_message
    assert response.request_id in response.error_message and "'echo'" in response.error_message
    assert (response.generated_text or "") == text
    with pytest.raises(InferenceError) as caught:
        response.raise_for_error()
    assert isinstance(caught.value.__cause__.__cause__, RuntimeError)
    records = [r for r in caplog.records if r.getMessage().startswith("request failed")]
    # An engine's error is typed: what there is to be logged, the engine has logged.
    assert len(records) == (both_ways == "yielded")
    assert all(r.exc_info and r.request_id == response.request_id for r in records)
    assert bench.at_rest()


async def test_raise_for_error_is_silent_about_a_good_answer():
    bench = echo_bench()
    (await bench.service.infer(bench.request())).raise_for_error()


async def test_a_model_that_writes_the_error_prefix_is_no_failure():
    bench = echo_bench()
    stream = bench.service.stream(bench.request("STREAM_ERROR: x"))
    chunks = await drained(stream)
    assert "".join(chunks).startswith("STREAM_ERROR: ")
    assert not any(isinstance(chunk, StreamError) for chunk in chunks)
    assert stream.response.error_message is None


# ── plain handlers ───────────────────────────────────────────────────────────────────────────


async def _good(request):
    return InferenceResponse(request_id="its own", model_id="its own", generated_text="fine")


async def test_a_plain_handlers_response_gets_what_the_service_knows():
    response = await ask(bench := plain_bench(_good), bench.request(), stream=False)
    assert (response.model_id, response.generated_text) == ("plain", "fine")
    assert response.request_id == bench.recorder.started[0].request_id
    assert (response.handler, response.finish_reason) == ("plain", "eos_token")
    assert response.inference_time_ms is not None
    assert 0 <= response.queue_time_ms <= response.inference_time_ms


async def test_a_plain_stream_without_an_ending_is_summed_up():
    async def chunks(request):
        for chunk in ("a", "b", ""):
            yield chunk

    response = await ask(bench := plain_bench(stream=chunks), bench.request(), stream=True)
    assert (response.generated_text, response.finish_reason) == ("ab", "eos_token")
    assert response.handler == "plain" and response.time_to_first_token_ms is not None


async def test_a_plain_streams_ending_is_the_response_and_no_chunk():
    async def chunks(request):
        yield "a"
        yield StreamEnd(
            InferenceResponse(
                request_id="?", model_id="?", generated_text="a", finish_reason="length"
            )
        )

    bench = plain_bench(stream=chunks)
    stream = bench.service.stream(bench.request())
    assert await drained(stream) == ["a"]
    assert stream.response.finish_reason == "length"
    assert stream.response.model_id == "plain"


@pytest.mark.parametrize("given", [None, "text", {"generated_text": "x"}], ids=repr)
async def test_infer_that_returns_no_response_is_named(given):
    async def infer(request):
        return given

    response = await ask(bench := plain_bench(infer), bench.request(), stream=False)
    assert "infer returned" in response.error_message and "'plain'" in response.error_message
    assert bench.at_rest()


@pytest.mark.parametrize("given", [None, b"bytes", 1], ids=repr)
async def test_stream_infer_that_yields_no_text_is_named(given):
    async def chunks(request):
        yield "a"
        yield given
        yield "b"

    response = await ask(bench := plain_bench(stream=chunks), bench.request(), stream=True)
    assert f"yielded {type(given).__name__} instead of str" in response.error_message
    assert response.generated_text == "a"
    assert bench.at_rest()


async def test_an_error_that_the_response_tells_has_a_reason():
    async def infer(request):
        return InferenceResponse(request_id="r", model_id="m", error_message="went wrong")

    response = await ask(bench := plain_bench(infer), bench.request(), stream=False)
    assert response.finish_reason == "error"
    with pytest.raises(InferenceError, match="went wrong"):
        response.raise_for_error()


@BOTH
async def test_a_typed_error_of_a_handler_keeps_its_type(stream):
    async def infer(request):
        raise EngineDeadError("the engine died")

    async def chunks(request):
        raise EngineDeadError("the engine died")
        yield

    response = await ask(bench := plain_bench(infer, chunks), bench.request(), stream)
    assert response.error_type == "EngineDeadError"
    assert response.error_message.startswith("Engine dead: the engine died")


@BOTH
async def test_requests_that_share_an_error_are_each_named_in_their_own(stream):
    shared = EngineDeadError("the engine died")
    here = asyncio.Barrier(2)

    async def infer(request):
        await here.wait()
        raise shared

    async def chunks(request):
        await here.wait()
        raise shared
        yield

    bench = plain_bench(infer, chunks)
    responses = await asyncio.gather(
        *(ask(bench, bench.request(request_id=name), stream) for name in ("first", "second"))
    )
    for response, name, other in zip(
        responses, ("first", "second"), ("second", "first"), strict=True
    ):
        assert name in response.error_message and other not in response.error_message
    assert shared.request_id is None


@BOTH
async def test_cancellation_inside_the_runtime_is_a_failure_and_not_the_callers(stream):
    async def infer(request):
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async def chunks(request):
        await infer(request)
        yield "never"

    response = await ask(bench := plain_bench(infer, chunks), bench.request(), stream)
    assert response.error_type == "InferenceError" and response.finish_reason == "error"
    assert asyncio.current_task().cancelling() == 0
    assert bench.at_rest()


# ── what a handler does not honour ───────────────────────────────────────────────────────────


@BOTH
async def test_what_a_handler_does_not_honour_is_refused_by_name(stream):
    bench = echo_bench()
    request = bench.request(params=GenerationParams(top_k=5, seed=1))
    response = await ask(bench, request, stream)
    assert response.error_type == "ConfigurationError"
    for word in ("'echo'", "seed", "top_k", "on_unsupported"):
        assert word in response.error_message
    assert bench.at_rest()


@BOTH
@pytest.mark.parametrize("where", ["request", "service", "deployment"])
async def test_what_a_handler_does_not_honour_can_be_a_warning(stream, where):
    bench = echo_bench()
    if where == "service":
        bench = echo_bench(service={"on_unsupported": "warn"})
    if where == "deployment":
        config = {"models": [{"model_id": "echo", "source": "echo:"}], "on_unsupported": "warn"}
        bench.manager = LLMModelManager(config=config)
        bench.service = LLMInferenceService(bench.manager, handlers=[EchoHandler()])
    fields = {"on_unsupported": "warn"} if where == "request" else {}
    request = bench.request("a b", params=GenerationParams(top_k=5), **fields)
    response = await ask(bench, request, stream)
    assert response.generated_text == "a b"
    assert response.warnings == ["top_k was ignored: handler 'echo' does not honour it"]


async def test_the_request_overrules_the_service_about_warnings():
    bench = echo_bench(service={"on_unsupported": "warn"})
    request = bench.request(params=GenerationParams(top_k=5), on_unsupported="error")
    assert (await bench.service.infer(request)).error_type == "ConfigurationError"


async def test_messages_are_never_only_warned_about():
    bench = plain_bench(_good, capabilities=Capabilities(chat=False))
    request = InferenceRequest(
        model_id="plain",
        messages=[ChatMessage(role="user", content="x")],
        on_unsupported="warn",
    )
    assert "messages" in (await bench.service.infer(request)).error_message


async def test_token_ids_are_never_only_warned_about():
    bench = plain_bench(_good)
    request = InferenceRequest(model_id="plain", prompt_token_ids=[1], on_unsupported="warn")
    refused = await bench.service.infer(request)
    assert refused.error_type == "ConfigurationError"
    assert "prompt_token_ids" in refused.error_message
    assert "on_unsupported" not in refused.error_message


async def test_an_adapter_is_refused_where_the_handler_knows_none():
    bench = echo_bench()
    response = await bench.service.infer(bench.request("a b", adapter="legal"))
    assert response.error_type == "ConfigurationError"
    assert "handler 'echo' does not honour adapter" in response.error_message
    warned = await bench.service.infer(bench.request("a b", adapter="legal", on_unsupported="warn"))
    assert warned.generated_text == "a b"
    assert warned.warnings == ["adapter was ignored: handler 'echo' does not honour it"]


async def test_capabilities_of_the_wrong_type_are_a_failure_that_names_the_handler():
    bench = plain_bench(_good, capabilities={"params": []})
    response = await bench.service.infer(bench.request())
    assert "'plain': capabilities returned dict" in response.error_message


async def test_a_handler_that_cannot_be_hashed_serves():
    class Unhashable(PlainHandler):
        __hash__ = None

        def __eq__(self, other):
            return self is other

    bench = Bench(Unhashable(_good), ModelConfig(model_id="plain", source="plain:"))
    assert (await bench.service.infer(bench.request())).generated_text == "fine"


# ── many at once, and the bound ──────────────────────────────────────────────────────────────


async def test_eight_requests_at_once_do_not_mix():
    bench = echo_bench(n_parallel=3, split_bytes=True)
    prompts = [f"request {number} says {chr(0x1F600 + number)} and ends" for number in range(8)]
    answers = await asyncio.gather(
        *(ask(bench, bench.request(p, request_id=p), i % 2 == 0) for i, p in enumerate(prompts))
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (answer.generated_text, answer.request_id) == (prompt, prompt)
        assert answer.generated_tokens == len(prompt.encode())
    assert bench.handler.loads == 1
    assert bench.at_rest()


async def test_one_request_too_many_is_refused_at_once_and_harms_nobody():
    bench = gate_bench(max_requests=2)
    requests = [bench.request("one two", request_id=name) for name in "ab"]
    running = [asyncio.create_task(bench.service.infer(request)) for request in requests]
    await until(lambda: len(bench.handler.waiting) == 2)
    for stream in (False, True):
        refused = await ask(bench, bench.request(), stream)
        with pytest.raises(QueueFullError, match="max_requests"):
            refused.raise_for_error()
    assert bench.service.num_requests == 2
    for name in "ab":
        bench.handler.permit(name, 2)
    assert [r.generated_text for r in await asyncio.gather(*running)] == ["one two"] * 2
    assert len(bench.recorder.started) == 2  # what was refused never began
    assert bench.at_rest()


def test_a_bound_below_one_is_refused():
    with pytest.raises(ConfigurationError, match="max_requests"):
        echo_bench(service={"max_requests": 0})


# ── deadlines ────────────────────────────────────────────────────────────────────────────────

LONG = 3600.0  # deadlines that a test lets come with Bench.expire


@BOTH
async def test_a_deadline_comes_by_itself(stream):
    bench = gate_bench()
    response = await ask(bench, bench.request(timeout_s=0.01), stream)
    assert response.finish_reason == "timeout" and response.error_type == "RequestTimeoutError"
    assert "timeout_s=0.01" in response.error_message
    assert bench.at_rest()


@BOTH
async def test_a_deadline_while_decoding_ends_with_what_there_was(stream):
    bench = gate_bench()
    request = bench.request("one two three", timeout_s=LONG)

    async def work():
        return await ask(bench, request, stream), asyncio.current_task().cancelling()

    task = asyncio.create_task(work())
    bench.handler.permit(request.request_id, 2)
    await until(lambda: bench.handler.decoding(request, after=2))
    bench.expire(request)
    response, cancelling = await task
    assert cancelling == 0
    assert response.finish_reason == "timeout" and response.error_type == "RequestTimeoutError"
    assert response.generated_text == "one two" and response.generated_tokens == 2
    assert f"timeout_s={LONG}" in response.error_message
    assert bench.handler.ended == [request.request_id]
    assert bench.at_rest()


@pytest.mark.yielded(AHEAD)
@BOTH
async def test_a_deadline_while_queued_leaves_the_queue(stream):
    bench = echo_bench(n_parallel=1)
    holder = bench.service.stream(bench.request("hold the slot"))
    assert await anext(holder) == "hold"
    model = bench.manager.get_loaded_model("echo").model_object
    request = bench.request(timeout_s=LONG)
    task = asyncio.create_task(ask(bench, request, stream))
    await until(lambda: model.waiting == 1)
    bench.expire(request)
    assert (await task).finish_reason == "timeout"
    assert (model.running, model.waiting) == (1, 0)
    assert await drained(holder) == [" the", " slot"]
    assert bench.at_rest()


@BOTH
async def test_a_deadline_during_the_load_leaves_the_load_to_the_others(stream):
    bench = gate_bench(GateHandler(gated=frozenset({"load"})))
    request = bench.request(timeout_s=LONG)
    hasty = asyncio.create_task(ask(bench, request, stream))  # the load began with this one
    await until(lambda: bench.handler.loading == 1)
    patient = asyncio.create_task(bench.service.infer(bench.request("x", request_id="patient")))
    await until(lambda: bench.service.num_requests == 2)
    bench.expire(request)
    assert (await hasty).finish_reason == "timeout"
    bench.handler.permit("patient")
    bench.handler.gates["load"][0].set_result(None)
    assert (await patient).generated_text == "x"
    assert bench.handler.loads == 1
    assert bench.at_rest()


async def test_a_deadline_while_the_reader_is_busy_elsewhere_frees_everything():
    bench = gate_bench()
    request = bench.request("one two three", timeout_s=LONG)
    stream = bench.service.stream(request)
    bench.handler.permit(request.request_id)
    assert await anext(stream) == "one"
    bench.expire(request)
    await bench.recorder.ended.wait()  # nobody reads
    assert bench.recorder.reasons == ["timeout"]
    assert bench.at_rest() and bench.handler.ended == [request.request_id]
    last = await drained(stream)
    assert [type(chunk) for chunk in last] == [StreamError]
    assert isinstance(last[0].error, RequestTimeoutError)
    assert stream.response.finish_reason == "timeout"
    assert stream.response.generated_text == "one"
    assert await drained(stream) == []
    assert len(bench.recorder.finished) == 1


async def test_a_deadline_that_was_over_before_the_start_computes_nothing():
    bench = gate_bench()
    stream = bench.service.stream(bench.request(timeout_s=1e-9))
    loop = asyncio.get_running_loop()
    await until(lambda: loop.time() >= stream._scope.deadline)
    (chunk,) = await drained(stream)
    assert isinstance(chunk.error, RequestTimeoutError)
    assert not bench.handler.seen and bench.handler.loads == 0
    assert bench.at_rest()


@BOTH
async def test_a_deadline_that_is_not_reached_leaves_no_timer(stream):
    bench = echo_bench()
    response = await ask(bench, bench.request(timeout_s=LONG), stream)
    assert response.error_message is None
    timers = [t for t in asyncio.get_running_loop()._scheduled if not t.cancelled()]
    assert not [t for t in timers if "RequestScope" in repr(t)]


@BOTH
async def test_a_handler_that_swallows_its_cancellation_is_stopped_all_the_same(stream):
    bench = gate_bench()
    bench.handler.swallow = True
    request = bench.request("one two", timeout_s=LONG)

    async def work():
        return await ask(bench, request, stream), asyncio.current_task().cancelling()

    task = asyncio.create_task(work())
    bench.handler.permit(request.request_id)
    await until(lambda: bench.handler.decoding(request, after=1))
    bench.expire(request)
    response, cancelling = await task
    assert response.finish_reason == "timeout" and cancelling == 0
    assert bench.at_rest()


@BOTH
async def test_a_handler_that_renames_its_cancellation_is_still_a_timeout(stream):
    started = asyncio.Event()

    async def infer(request):
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError as error:
            raise RuntimeError("aborted by somebody") from error

    async def chunks(request):
        await infer(request)
        yield "never"

    bench = plain_bench(infer, chunks)
    request = bench.request(timeout_s=LONG)

    async def work():
        return await ask(bench, request, stream), asyncio.current_task().cancelling()

    task = asyncio.create_task(work())
    await started.wait()
    bench.expire(request)
    response, cancelling = await task
    assert response.finish_reason == "timeout" and response.error_type == "RequestTimeoutError"
    assert cancelling == 0
    assert bench.at_rest()


@BOTH
async def test_a_deadline_inside_an_outer_timeout_is_not_mistaken_for_it(stream):
    bench = gate_bench()
    async with asyncio.timeout(LONG) as outer:
        response = await ask(bench, bench.request(timeout_s=0.01), stream)
    assert response.finish_reason == "timeout" and not outer.expired()
    assert asyncio.current_task().cancelling() == 0


@BOTH
async def test_an_outer_timeout_stops_the_work_and_is_not_swallowed(stream):
    bench = gate_bench()
    request = bench.request(timeout_s=LONG)
    outer = asyncio.timeout(LONG)

    async def work():
        with pytest.raises(TimeoutError):
            async with outer:
                await ask(bench, request, stream)
        return asyncio.current_task().cancelling()

    task = asyncio.create_task(work())
    await until(lambda: bench.handler.decoding(request))
    outer.reschedule(0)
    assert await task == 0
    assert bench.recorder.reasons == ["cancelled"]
    assert bench.at_rest()


@BOTH
@pytest.mark.parametrize("outer_first", [True, False])
async def test_a_deadline_and_a_cancellation_at_once_end_in_the_cancellation(stream, outer_first):
    bench = gate_bench()
    request = bench.request(timeout_s=LONG)
    task = asyncio.create_task(ask(bench, request, stream))
    await until(lambda: bench.handler.decoding(request))
    stops = [task.cancel, lambda: bench.expire(request)]
    for stop in stops if outer_first else reversed(stops):
        stop()
    await asyncio.wait([task])
    assert task.cancelled()
    assert bench.recorder.reasons == ["cancelled"]
    assert bench.at_rest()


# ── cancellation ─────────────────────────────────────────────────────────────────────────────


@BOTH
@pytest.mark.parametrize("stage", ["load", "queue", "first token", "decoding"])
async def test_a_cancelled_task_gives_everything_back_and_is_cancelled(stream, stage):
    gated = frozenset({"load"}) if stage == "load" else frozenset()
    bench = gate_bench(GateHandler(gated=gated))
    if stage == "queue":
        bench = echo_bench(n_parallel=1)
        holder = bench.service.stream(bench.request("hold the slot"))
        await anext(holder)
    request = bench.request("one two three")
    task = asyncio.create_task(ask(bench, request, stream))
    if stage == "load":
        await until(lambda: bench.handler.loading == 1)
    elif stage == "queue":
        model = bench.manager.get_loaded_model("echo").model_object
        await until(lambda: model.waiting == 1)
    else:
        await until(lambda: bool(bench.handler.waiting))
        if stage == "decoding":
            bench.handler.permit(request.request_id)
            await until(lambda: bench.handler.decoding(request, after=1))
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    if stage == "load":
        bench.handler.gates["load"][0].set_result(None)
        await until(lambda: bench.manager.list_models()[0].state == "ready")
    elif stage == "queue":
        assert model.waiting == 0
        await holder.aclose()
        assert model.running == 0
    else:
        assert bench.handler.ended == [request.request_id]
    assert set(bench.recorder.reasons) == {"cancelled"}
    assert bench.at_rest()


@BOTH
async def test_a_cancelled_neighbour_is_not_noticed(stream):
    bench = gate_bench()
    tasks = {
        name: asyncio.create_task(ask(bench, bench.request("a b", request_id=name), stream))
        for name in ("stays", "goes")
    }
    await until(lambda: len(bench.handler.waiting) == 2)
    tasks["goes"].cancel()
    bench.handler.permit("stays", 2)
    assert (await tasks["stays"]).generated_text == "a b"
    assert tasks["goes"].cancelled()
    assert bench.at_rest()


@BOTH
async def test_a_cancellation_that_a_handler_swallows_still_cancels_the_task(stream):
    bench = gate_bench()
    bench.handler.swallow = True
    task = asyncio.create_task(ask(bench, bench.request("one"), stream))
    await until(lambda: bool(bench.handler.waiting))
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert bench.recorder.reasons == ["cancelled"] and bench.at_rest()


@BOTH
async def test_a_task_that_cancels_itself_on_the_way_in_is_cancelled(stream):
    bench = gate_bench()

    async def work():
        asyncio.current_task().cancel()
        await ask(bench, bench.request(), stream)

    task = asyncio.create_task(work())
    await asyncio.wait([task])
    assert task.cancelled() and bench.at_rest()


async def test_what_is_no_exception_fails_its_request_like_any_other(caplog):
    class Stop(BaseException):
        pass

    async def infer(request):
        raise Stop("halt")

    bench = plain_bench(infer)
    response = await bench.service.infer(bench.request())
    assert response.error_type == "InferenceError" and "Stop: halt" in response.error_message
    assert "raise Stop" in caplog.text
    assert bench.at_rest()


# ── closing ──────────────────────────────────────────────────────────────────────────────────


async def test_close_lets_running_requests_end_and_refuses_new_ones_then_unloads():
    bench = gate_bench()
    request = bench.request("one two")
    running = asyncio.create_task(bench.service.infer(request))
    await until(lambda: bool(bench.handler.waiting))
    closing = asyncio.create_task(bench.service.close())
    await asyncio.sleep(0)
    for stream in (False, True):
        refused = await ask(bench, bench.request(), stream)
        assert refused.error_type == "ResourceNotAvailableError"
        assert "closed" in refused.error_message
    assert not closing.done() and bench.handler.unloads == 0
    bench.handler.permit(request.request_id, 2)
    await closing
    assert (await running).generated_text == "one two"
    assert bench.handler.unloads == 1
    assert bench.manager.list_models()[0].state == "unloaded"
    assert bench.recorder.order == ["started", "loaded", "finished", "unloaded"]


@BOTH
async def test_close_interrupts_what_does_not_end_in_time(stream):
    bench = gate_bench()
    running = asyncio.create_task(ask(bench, bench.request("one two"), stream))
    await until(lambda: bool(bench.handler.waiting))
    await bench.service.close(drain_timeout_s=0)
    response = await running
    assert response.finish_reason == "cancelled"
    with pytest.raises(ResourceNotAvailableError, match="closed"):
        response.raise_for_error()
    assert bench.handler.unloads == 1 and bench.at_rest()


async def test_close_does_not_wait_for_a_reader_that_has_stopped_reading():
    bench = gate_bench()
    request = bench.request("one two")
    stream = bench.service.stream(request)
    bench.handler.permit(request.request_id)
    await anext(stream)
    await bench.service.close(drain_timeout_s=0)
    assert bench.handler.unloads == 1 and bench.at_rest()
    (chunk,) = await drained(stream)
    assert isinstance(chunk.error, ResourceNotAvailableError)


async def test_close_may_be_called_twice_and_at_once():
    bench = echo_bench()
    await bench.service.infer(bench.request())
    await asyncio.gather(bench.service.close(), bench.service.close())
    await bench.service.close()
    assert bench.handler.unloads == 1


async def test_the_service_closes_on_leaving_its_context():
    bench = echo_bench()
    async with bench.service as service:
        await service.infer(bench.request())
    assert bench.handler.unloads == 1


async def test_closing_tells_the_first_failure_and_unloads_the_rest():
    handler = EchoHandler()
    bench = Bench(handler, echo_config("bad", fail="unload"), echo_config("good"))
    await bench.manager.load_configured_models()
    good = bench.manager.get_loaded_model("good").model_object
    with pytest.raises(InferenceError, match="asked to fail in unloading"):
        await bench.service.close()
    assert good.unloaded


# ── a source of one's own ────────────────────────────────────────────────────────────────────


@BOTH
async def test_anything_with_a_lease_is_a_source(stream):
    handler = EchoHandler()
    source = Source(await handler.load_model(echo_config("mine")))
    service = LLMInferenceService(source, handlers=[handler])
    request = InferenceRequest(model_id="mine", prompt="a b", stream=stream)
    answer = await service.process_inference(request)
    if stream:
        assert source.leases == 0
        assert await anext(answer) == "a"
        assert source.leases == 1
        await drained(answer)
        answer = answer.response
    assert answer.generated_text == "a b"
    assert source.leases == 0
    with pytest.raises(ConfigurationError, match="no explain"):
        service.explain("mine")
    await service.close()
    assert isinstance(source.loaded_model.model_object, EchoModel)


@BOTH
async def test_a_source_whose_lease_raises_is_told(stream):
    class Broken(Source):
        def lease(self, model_id):
            raise OSError("disk on fire")

    service = LLMInferenceService(Broken(None), handlers=[EchoHandler()])
    answer = await service.process_inference(
        InferenceRequest(model_id="m", prompt="x", stream=stream)
    )
    if stream:
        await drained(answer)
        answer = answer.response
    assert "OSError: disk on fire" in answer.error_message
    assert service.num_requests == 0


async def test_explain_names_every_handler_before_and_after_the_load():
    bench = echo_bench()
    bench.service.register_handler(GateHandler(), before="echo")
    report = bench.service.explain("echo")
    assert (report.question, report.chosen) == ("can_load", "echo")
    assert [v.handler for v in report.verdicts][:2] == ["gate", "echo"]
    await bench.service.infer(bench.request())
    assert bench.service.explain("echo").question == "can_handle"
    with pytest.raises(ModelNotFoundError):
        bench.service.explain("nothing")


async def test_names_and_instances_of_handlers_together_make_the_order(monkeypatch):
    monkeypatch.setenv("ENGINEROOM_HANDLERS", "ignored")
    service = LLMInferenceService(
        LLMModelManager(config=[echo_config()]), handlers=[GateHandler(), EchoHandler()]
    )
    assert [h.name for h in service.registry.handlers] == ["gate", "echo"]


def test_handlers_are_given_in_one_place():
    manager = LLMModelManager(config=[echo_config()])
    assert manager.registry is not None
    with pytest.raises(ConfigurationError, match="one place"):
        LLMInferenceService(manager, handlers=[EchoHandler()])


async def test_an_allow_list_that_names_nothing_installed_refuses_requests(monkeypatch):
    monkeypatch.setenv("ENGINEROOM_HANDLERS", "no_such_runtime")
    service = LLMInferenceService(LLMModelManager(config=[echo_config()]))
    response = await service.infer(InferenceRequest(model_id="echo", prompt="x"))
    assert response.error_type == "ConfigurationError"
    assert "no_such_runtime" in response.error_message
    assert service.num_requests == 0


# ── what blocks ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_neither_finding_plugins_nor_estimating_holds_up_the_loop(stream, monkeypatch):
    mine, seen = threading.get_ident(), {}

    def installed():
        seen["plugins"] = threading.get_ident()
        return []

    class Estimating(EchoHandler):
        def estimate_memory(self, config):
            seen["estimate"] = threading.get_ident()

        def can_load(self, config):
            seen["can_load"] = threading.get_ident()
            return super().can_load(config)

    monkeypatch.setattr("engineroom.handlers.registry.installed_plugins", installed)
    bench = Bench(Estimating(), echo_config())
    if stream:
        assert await drained(bench.service.stream(bench.request("a b"))) == ["a", " b"]
    else:
        assert (await bench.service.infer(bench.request("a b"))).generated_text == "a b"
    assert set(seen) == {"plugins", "estimate", "can_load"}
    assert mine not in seen.values()


async def test_requests_that_come_while_plugins_are_found_wait_for_them(monkeypatch):
    found, entered = threading.Event(), threading.Event()

    def installed():
        entered.set()
        assert found.wait(10)
        return []

    monkeypatch.setattr("engineroom.handlers.registry.installed_plugins", installed)
    bench = Bench(EchoHandler(), echo_config())
    tasks = [asyncio.create_task(bench.service.infer(bench.request("a"))) for _ in range(3)]
    await until(entered.is_set)
    assert bench.service.num_requests == 0 and not bench.recorder.started
    found.set()
    assert [r.generated_text for r in await asyncio.gather(*tasks)] == ["a"] * 3
    assert len(bench.recorder.started) == 3


# ── no key has all places ────────────────────────────────────────────────────────────────────────


@BOTH
async def test_a_service_full_of_one_keys_waiting_requests_makes_room_for_another(stream):
    bench = gate_bench(GateHandler(gated=frozenset({"load"})), max_requests=3)

    def send(key):
        request = bench.request("a", metadata={"api_key": key})
        bench.handler.permit(request.request_id)
        return asyncio.create_task(ask(bench, request, stream))

    greedy = []
    for count in range(1, 4):  # one after another: the first waits for the plugins
        greedy.append(send("greedy"))
        await until(lambda count=count: bench.service.num_requests == count)
    await until(lambda: bench.handler.gates["load"])
    greedy.append(send("greedy"))
    await until(greedy[3].done)  # no more than three
    mine = [send("mine")]
    await until(greedy[2].done)
    refused = [task.result() for task in greedy[2:]]
    assert [answer.error_type for answer in refused] == ["QueueFullError"] * 2
    mine.append(send("mine"))  # two against one: it would have as many as the other is left with
    await until(mine[1].done)
    assert mine[1].result().error_type == "QueueFullError"
    for gate in bench.handler.gates["load"]:
        gate.set_result(None)
    answers = await asyncio.gather(*greedy[:2], mine[0])
    assert [answer.generated_text for answer in answers] == ["a"] * 3
    await until(bench.at_rest)
    assert not bench.service._running._by_key


async def test_what_has_begun_is_not_pushed_out():
    bench = gate_bench(max_requests=2)
    requests = [bench.request("a b", metadata={"api_key": "greedy"}) for _ in range(2)]
    tasks = [asyncio.create_task(bench.service.infer(request)) for request in requests]
    await until(lambda: all(bench.handler.decoding(request) for request in requests))
    for request in requests:
        bench.handler.permit(request.request_id)
    await until(lambda: all(bench.handler.decoding(request, 1) for request in requests))
    for scope in bench.service._running:
        scope.generation.prompt_tokens = 1  # as an engine tells with the first step
    answer = await bench.service.infer(bench.request(metadata={"api_key": "mine"}))
    assert answer.error_type == "QueueFullError"
    for request in requests:
        bench.handler.permit(request.request_id)
    assert {task.finish_reason for task in await asyncio.gather(*tasks)} == {"eos_token"}
