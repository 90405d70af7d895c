"""The stream's own life: its reader, its closing, its abandonment."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest
from core_doubles import Bench, PlainHandler, drained, echo_bench, gate_bench, until

from engineroom import InferenceError, ModelConfig, RequestTimeoutError, StreamError

pytestmark = pytest.mark.usefixtures("both_ways")


async def begun(bench, prompt="one two three", **fields):
    """A stream whose first chunk was read."""
    request = bench.request(prompt, **fields)
    stream = bench.service.stream(request)
    bench.handler.permit(request.request_id)
    assert await anext(stream) == "one"
    return request, stream


# ── the chunks and the response ──────────────────────────────────────────────────────────────


async def test_there_is_a_response_only_after_the_end():
    bench = echo_bench()
    stream = bench.service.stream(bench.request("a b"))
    assert stream.response is None
    await anext(stream)
    assert stream.response is None
    await drained(stream)
    assert stream.response.generated_text == "a b"
    assert stream.response.inference_time_ms >= stream.response.time_to_first_token_ms


async def test_an_ended_stream_stays_ended():
    bench = echo_bench()
    stream = bench.service.stream(bench.request("a"))
    assert await drained(stream) == ["a"]
    assert await drained(stream) == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await stream.aclose()
    assert stream.response.finish_reason == "eos_token"
    assert len(bench.recorder.finished) == 1


async def test_making_a_stream_begins_nothing():
    bench = gate_bench()
    stream = bench.service.stream(bench.request())
    assert not bench.recorder.started and bench.handler.loads == 0
    await stream.aclose()


async def test_the_chunks_of_a_failed_stream_end_with_a_typed_error():
    bench = echo_bench(fail="during")
    stream = bench.service.stream(bench.request("one two three"))
    chunks = await drained(stream)
    assert chunks[:-1] == ["one", " two"] and type(chunks[-1]) is StreamError
    assert isinstance(chunks[-1], str) and isinstance(chunks[-1].error, InferenceError)
    assert stream.response.generated_text == "one two"
    assert await drained(stream) == []


async def test_asend_reads_and_athrow_ends():
    bench = gate_bench()
    request, stream = await begun(bench)
    bench.handler.permit(request.request_id)
    assert await stream.asend(None) == " two"
    last = await stream.athrow(ValueError("the reader's own"))
    assert isinstance(last, StreamError) and "the reader's own" in last
    assert bench.at_rest() and bench.handler.ended == [request.request_id]
    assert await drained(stream) == []


async def test_two_readers_are_refused_and_the_first_is_not_harmed():
    bench = gate_bench()
    request, stream = await begun(bench)
    reader = asyncio.create_task(drained(stream))
    await until(lambda: bench.handler.decoding(request, after=1))
    with pytest.raises(RuntimeError, match="one reader"):
        await anext(stream)
    bench.handler.permit(request.request_id, 2)
    assert await reader == [" two", " three"]


async def test_each_chunk_may_be_read_by_a_task_of_its_own():
    bench = echo_bench()
    stream = bench.service.stream(bench.request("a b"))
    chunks = [await asyncio.wait_for(anext(stream), 60) for _ in range(2)]
    assert chunks == ["a", " b"]
    assert await drained(stream) == []


# ── closing ──────────────────────────────────────────────────────────────────────────────────


async def test_the_reader_closes():
    bench = gate_bench()
    request, stream = await begun(bench)
    await stream.aclose()
    assert bench.handler.ended == [request.request_id]
    assert stream.response.finish_reason == "cancelled"
    assert stream.response.error_message is None
    assert stream.response.generated_text == "one"
    assert await drained(stream) == []
    assert bench.at_rest()


async def test_closing_twice_is_once():
    bench = gate_bench()
    _, stream = await begun(bench)
    await stream.aclose()
    await stream.aclose()
    assert bench.recorder.reasons == ["cancelled"] and bench.at_rest()


async def test_closing_before_the_start_computes_nothing():
    bench = gate_bench()
    stream = bench.service.stream(bench.request(timeout_s=3600))
    await stream.aclose()
    assert stream.response.finish_reason == "cancelled"
    assert stream.response.generated_tokens == 0
    assert await drained(stream) == []
    assert not bench.recorder.started and bench.at_rest()


async def test_leaving_the_context_closes():
    bench = gate_bench()
    async with bench.service.stream(bench.request(request_id="r")) as stream:
        bench.handler.permit("r")
        async for _ in stream:
            break
    assert bench.handler.ended == ["r"] and bench.at_rest()
    async with contextlib.aclosing(bench.service.stream(bench.request())) as stream:
        pass
    assert stream.response.finish_reason == "cancelled"


@pytest.mark.parametrize("after", [0, 1])
async def test_another_task_closes_while_it_is_read(after):
    bench = gate_bench()
    request = bench.request("one two")
    stream = bench.service.stream(request)
    bench.handler.permit(request.request_id, after)

    async def read():
        return await drained(stream), asyncio.current_task().cancelling()

    reader = asyncio.create_task(read())
    await until(lambda: bench.handler.decoding(request, after=after))
    await stream.aclose()
    assert bench.at_rest()
    chunks, cancelling = await reader
    assert chunks == ["one"][:after] and cancelling == 0
    assert stream.response.finish_reason == "cancelled"
    assert stream.response.error_message is None


@pytest.mark.yielded("an engine does not wait for the reader of the first chunk")
async def test_another_task_closes_while_it_is_queued():
    bench = echo_bench(n_parallel=1)
    holder = bench.service.stream(bench.request("hold the slot"))
    await anext(holder)
    stream = bench.service.stream(bench.request())
    reader = asyncio.create_task(drained(stream))
    model = bench.manager.get_loaded_model("echo").model_object
    await until(lambda: model.waiting == 1)
    await stream.aclose()
    assert (await reader, model.waiting, model.running) == ([], 0, 1)
    await holder.aclose()
    assert bench.at_rest()


async def test_a_deadline_and_a_closing_by_another_task_are_one_end():
    bench = gate_bench()
    request = bench.request(timeout_s=3600)
    stream = bench.service.stream(request)
    reader = asyncio.create_task(drained(stream))
    await until(lambda: bench.handler.decoding(request))
    bench.expire(request)
    await stream.aclose()
    (chunk,) = await reader
    assert isinstance(chunk.error, RequestTimeoutError)
    assert bench.recorder.reasons == ["timeout"] and bench.at_rest()


async def test_two_tasks_close_at_once_while_the_handler_cleans_up():
    bench = gate_bench()
    release = asyncio.get_running_loop().create_future()
    bench.handler.cleanup = lambda: release
    request, stream = await begun(bench)
    first = asyncio.create_task(stream.aclose())
    await until(lambda: bench.handler.ended == [request.request_id])
    second = asyncio.create_task(stream.aclose())
    await asyncio.sleep(0)
    assert not first.done() and not second.done()
    release.set_result(None)
    await asyncio.gather(first, second)
    assert bench.recorder.reasons == ["cancelled"] and bench.at_rest()


async def test_a_deadline_does_not_disturb_the_cleaning_up_of_a_closed_stream():
    bench = gate_bench()
    release = asyncio.get_running_loop().create_future()
    bench.handler.cleanup = lambda: release
    request, stream = await begun(bench, timeout_s=3600)
    closing = asyncio.create_task(stream.aclose())
    await until(lambda: bench.handler.ended == [request.request_id])
    bench.expire(request)
    await asyncio.sleep(0)
    assert not release.cancelled()
    release.set_result(None)
    await closing
    assert bench.recorder.reasons == ["cancelled"] and bench.at_rest()


async def test_the_reader_comes_back_while_the_deadline_cleans_up():
    bench = gate_bench()
    release = asyncio.get_running_loop().create_future()
    bench.handler.cleanup = lambda: release
    request, stream = await begun(bench, timeout_s=3600)
    bench.expire(request)
    await until(lambda: bench.handler.ended == [request.request_id])
    reader, closer = asyncio.create_task(drained(stream)), asyncio.create_task(stream.aclose())
    await asyncio.sleep(0)
    assert not reader.done() and not closer.done()
    release.set_result(None)
    (chunk,) = await reader
    await closer
    assert isinstance(chunk.error, RequestTimeoutError)
    assert bench.recorder.reasons == ["timeout"] and bench.at_rest()


@pytest.mark.parametrize("pumps", [False, True])
async def test_the_reader_comes_back_while_another_task_closes(pumps):
    bench = gate_bench()
    release = asyncio.get_running_loop().create_future()
    bench.handler.cleanup = lambda: release
    request, stream = await begun(bench)
    closer = asyncio.create_task(stream.aclose())
    await until(lambda: bench.handler.ended == [request.request_id])
    chunks = []
    reader = asyncio.create_task(stream.pump(chunks.append) if pumps else drained(stream))
    await asyncio.sleep(0)
    assert not reader.done() and not closer.done()
    release.set_result(None)
    assert not await reader and not chunks
    await closer
    assert bench.recorder.reasons == ["cancelled"] and bench.at_rest()


async def test_a_cancelled_closing_is_cancelled_and_gives_everything_back():
    bench = gate_bench()
    bench.handler.cleanup = lambda: asyncio.get_running_loop().create_future()
    request, stream = await begun(bench)
    closing = asyncio.create_task(stream.aclose())
    await until(lambda: bench.handler.ended == [request.request_id])
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    assert bench.recorder.reasons == ["cancelled"] and bench.at_rest()


async def test_a_handler_that_fails_in_cleaning_up_harms_no_closing(caplog):
    bench = gate_bench()

    def fail():
        raise OSError("cannot clean up")

    bench.handler.cleanup = fail
    _, stream = await begun(bench)
    await stream.aclose()
    assert stream.response.finish_reason == "cancelled"
    assert "cannot clean up" in caplog.text
    assert await drained(stream) == []
    assert bench.recorder.balanced() and bench.at_rest()


async def test_a_handler_that_yields_while_it_is_closed_harms_no_closing(caplog):
    class Stubborn(PlainHandler):
        async def stream_infer(self, loaded_model, request):
            try:
                yield "one"
            finally:
                yield "two"

    bench = Bench(Stubborn(), ModelConfig(model_id="plain", source="plain:"))
    stream = bench.service.stream(bench.request())
    await anext(stream)
    await stream.aclose()
    assert stream.response.finish_reason == "cancelled" and bench.at_rest()
    assert "ignored GeneratorExit" in caplog.text


# ── pumping ──────────────────────────────────────────────────────────────────────────────────


async def pumped(stream, wait=None, into=None):
    """What a stream puts, read to the end; ``wait`` makes what is waited for after each."""
    chunks = [] if into is None else into

    def put(chunk):
        chunks.append(chunk)
        return wait() if wait is not None else None

    await stream.pump(put)
    return chunks


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("fields", [{}, {"fail": "during"}, {"fail": "before"}])
async def test_pumping_gives_what_iterating_gives(waits, fields):
    bench = echo_bench(**fields)
    expected = await drained(bench.service.stream(bench.request("one two three")))
    stream = bench.service.stream(bench.request("one two three"))
    chunks = await pumped(stream, (lambda: asyncio.sleep(0)) if waits else None)
    assert [type(chunk) for chunk in chunks] == [type(chunk) for chunk in expected]
    assert [c for c in chunks if type(c) is str] == [c for c in expected if type(c) is str]
    assert stream.response.finish_reason == ("error" if fields else "eos_token")
    assert await pumped(stream) == [] and bench.at_rest()


async def test_a_stream_that_was_begun_is_pumped_to_its_end():
    bench = echo_bench()
    stream = bench.service.stream(bench.request("a b c"))
    assert await anext(stream) == "a"
    assert await pumped(stream) == [" b", " c"]


async def test_a_stream_that_is_pumped_has_no_second_reader():
    bench = gate_bench()
    request, stream = await begun(bench)
    reader = asyncio.create_task(pumped(stream))
    await until(lambda: bench.handler.decoding(request, after=1))
    for read in (drained(stream), pumped(stream)):
        with pytest.raises(RuntimeError, match="one reader"):
            await read
    bench.handler.permit(request.request_id, 2)
    assert await reader == [" two", " three"]


@pytest.mark.parametrize("how", ["deadline", "aclose", "cancel"])
async def test_a_pumped_stream_is_stopped_while_it_waits_for_the_runtime(how):
    bench = gate_bench()
    request, stream = await begun(bench, timeout_s=3600)
    reader = asyncio.create_task(pumped(stream))
    await until(lambda: bench.handler.decoding(request, after=1))
    if how == "deadline":
        bench.expire(request)
        (chunk,) = await reader
        assert isinstance(chunk.error, RequestTimeoutError)
    elif how == "aclose":
        await stream.aclose()
        assert await reader == []
    else:
        reader.cancel()
        await asyncio.wait([reader])
        assert reader.cancelled()
    assert bench.handler.ended == [request.request_id] and bench.at_rest()


@pytest.mark.parametrize("how", ["deadline", "aclose", "cancel"])
async def test_a_pumped_stream_is_stopped_while_its_reader_is_slow(how):
    bench = gate_bench()
    request, stream = await begun(bench, timeout_s=3600)
    slow = asyncio.get_running_loop().create_future()
    bench.handler.permit(request.request_id)
    chunks = []
    reader = asyncio.create_task(pumped(stream, lambda: slow, chunks))
    await until(lambda: chunks == [" two"])
    if how == "deadline":
        bench.expire(request)
        await until(lambda: bench.handler.ended)  # it does not wait for the reader
        assert not reader.done() and not slow.done()
        slow.set_result(None)
        first, last = await reader
        assert first == " two" and isinstance(last.error, RequestTimeoutError)
    elif how == "aclose":
        await stream.aclose()
        assert bench.handler.ended
        slow.set_result(None)
        assert await reader == [" two"]
    else:
        reader.cancel()
        await asyncio.wait([reader])
        assert reader.cancelled() and slow.cancelled()
        await stream.aclose()
    assert bench.handler.ended == [request.request_id] and bench.at_rest()


async def test_what_the_taker_raises_stops_the_pumping_and_closing_the_work():
    bench = gate_bench()
    request, stream = await begun(bench)
    bench.handler.permit(request.request_id)

    def put(chunk):
        raise ValueError(chunk)

    with pytest.raises(ValueError, match="two"):
        await stream.pump(put)
    await stream.aclose()
    assert bench.handler.ended == [request.request_id] and bench.at_rest()


# ── abandonment ──────────────────────────────────────────────────────────────────────────────


async def settle(bench):
    gc.collect()
    await until(bench.at_rest, "everything given back")


async def test_letting_go_of_a_stream_stops_the_work():
    bench = gate_bench()
    request, stream = await begun(bench, timeout_s=3600)
    del stream
    await settle(bench)
    assert bench.handler.ended == [request.request_id]
    assert bench.recorder.reasons == ["cancelled"]
    assert bench.recorder.finished[0][1].generated_text == "one"


async def test_breaking_out_of_a_loop_stops_the_work():
    bench = gate_bench()
    bench.handler.permit("r", 2)
    async for _ in bench.service.stream(bench.request(request_id="r")):
        break
    await settle(bench)
    assert bench.recorder.reasons == ["cancelled"]


@pytest.mark.yielded("what an engine does afterwards concerns no stream")
async def test_letting_go_of_a_stream_that_fails_in_cleaning_up_ends_it_once(caplog):
    bench = gate_bench()

    def fail():
        raise OSError("cannot clean up")

    bench.handler.cleanup = fail
    _, stream = await begun(bench)
    del stream
    await settle(bench)
    assert bench.recorder.reasons == ["error"]


async def test_letting_go_of_a_stream_before_it_began_leaves_no_trace():
    bench = gate_bench()
    stream = bench.service.stream(bench.request(timeout_s=3600))
    del stream
    await settle(bench)
    assert not bench.recorder.started


async def test_letting_go_after_the_error_chunk_ends_it_once():
    bench = echo_bench(fail="before")
    stream = bench.service.stream(bench.request())
    assert isinstance(await anext(stream), StreamError)
    del stream
    await settle(bench)
    assert bench.recorder.reasons == ["error"]


async def test_a_reader_that_stops_reading_keeps_its_chunks_and_hinders_nobody():
    bench = echo_bench(n_parallel=2)
    slow = bench.service.stream(bench.request("a b c"))
    await anext(slow)
    for _ in range(3):
        answer = await bench.service.infer(bench.request("quick"))
        assert answer.generated_text == "quick"
    assert await drained(slow) == [" b", " c"]
    assert bench.at_rest()


@pytest.mark.yielded("the engine's stand-in is a task, which ends with its loop")
def test_a_stream_that_is_open_when_its_loop_ends_is_cancelled_without_a_noise(caplog):
    bench = gate_bench()

    async def main():
        return await begun(bench)

    request, stream = asyncio.run(main())
    assert bench.handler.ended == [request.request_id]
    assert stream.response.finish_reason == "cancelled"
    assert bench.at_rest() and not caplog.records
