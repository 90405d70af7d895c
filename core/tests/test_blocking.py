"""Callers without an event loop of their own."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time

import pytest
from core_doubles import echo_bench, gate_bench, plain_bench
from raisers import RAISERS

from engineroom import (
    ConfigurationError,
    InferenceResponse,
    ModelNotFoundError,
    QueueFullError,
    StreamError,
)

JOIN_S = 20


def portal_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "engineroom-blocking"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not portal_threads()


class InThread(threading.Thread):
    """Runs a function elsewhere; ``result()`` gives what came of it."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self._work, self._result, self._error = work, None, None
        self.start()

    def run(self):
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def result(self):
        self.join(JOIN_S)
        assert not self.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._result


def test_run_answers_in_whole_whatever_the_request_says():
    bench = echo_bench()
    with bench.service as service:
        assert service.run(bench.request("a b")).generated_text == "a b"
        assert service.run(bench.request("a b", stream=True)).generated_text == "a b"
        assert len(portal_threads()) == 1
    assert bench.handler.unloads == 1


def test_run_tells_failures_in_the_response():
    bench = echo_bench()
    with bench.service as service:
        response = service.run(bench.request(model_id="nothing"))
        with pytest.raises(ModelNotFoundError):
            response.raise_for_error()


def test_stream_sync_gives_the_chunks_and_then_the_response():
    bench = echo_bench()
    with bench.service as service:
        stream = service.stream_sync(bench.request("a b"))
        assert stream.response is None
        assert list(stream) == ["a", " b"]
        assert stream.response.generated_text == "a b"
        assert list(stream) == []
        stream.close()
    assert bench.at_rest()


def test_a_failure_is_the_last_chunk():
    bench = echo_bench(fail="during")
    with bench.service as service:
        *chunks, last = service.stream_sync(bench.request("one two three"))
        assert chunks == ["one", " two"] and isinstance(last, StreamError)


@pytest.mark.parametrize("way", ["close", "context", "drop"])
def test_an_early_end_frees_the_slot(way):
    bench = echo_bench(n_parallel=1, max_queue=0)
    with bench.service as service:
        stream = service.stream_sync(bench.request("one two three"))
        assert next(stream) == "one"
        with pytest.raises(QueueFullError):
            service.run(bench.request()).raise_for_error()
        if way == "close":
            stream.close()
            stream.close()
            assert list(stream) == [] and stream.response.finish_reason == "cancelled"
        elif way == "context":
            with stream:
                pass
        else:
            del stream
            gc.collect()

            async def ended():
                while not bench.at_rest():
                    await asyncio.sleep(0)

            service._portal.run(ended)
        assert bench.at_rest()
        assert service.run(bench.request("x")).generated_text == "x"


def test_closing_before_the_start_computes_nothing():
    bench = echo_bench()
    with bench.service as service:
        stream = service.stream_sync(bench.request())
        stream.close()
        assert stream.response.finish_reason == "cancelled"
    assert not bench.recorder.started


async def test_on_the_services_own_loop_it_is_refused_with_what_to_write():
    bench = echo_bench()
    await bench.service.infer(bench.request())
    for ask in (
        lambda: bench.service.run(bench.request()),
        lambda: next(bench.service.stream_sync(bench.request())),
        bench.service.close_sync,
    ):
        with pytest.raises(ConfigurationError, match="await service.process_inference"):
            ask()
    assert bench.at_rest()


async def test_another_thread_uses_the_loop_that_runs():
    bench = echo_bench()
    await bench.service.infer(bench.request())

    def work():
        stream = bench.service.stream_sync(bench.request("c d"))
        return bench.service.run(bench.request("a b")).generated_text, list(stream)

    thread = InThread(work)
    while thread.is_alive():
        await asyncio.sleep(0.001)
    assert thread.result() == ("a b", ["c", " d"])
    assert not portal_threads()
    assert bench.handler.loads == 1


def test_many_threads_share_one_service():
    bench = echo_bench()
    with bench.service as service:
        threads = [
            InThread(lambda n=n: service.run(bench.request(f"number {n}")).generated_text)
            for n in range(8)
        ]
        assert [t.result() for t in threads] == [f"number {n}" for n in range(8)]
        assert len(portal_threads()) == 1
    assert bench.handler.loads == 1


def test_a_second_loop_is_refused_while_the_first_runs():
    bench = echo_bench()
    with bench.service as service:
        service.run(bench.request())
        response = asyncio.run(service.infer(bench.request()))
        assert "another event loop" in response.error_message
        assert response.error_type == "ConfigurationError"


def test_one_loop_after_another_may_use_a_service():
    bench = echo_bench()
    for _ in range(2):
        response = asyncio.run(bench.service.infer(bench.request("a b")))
        assert response.generated_text == "a b"
    assert bench.service.run(bench.request("c")).generated_text == "c"
    bench.service.close_sync()
    assert bench.handler.unloads == 1


def test_close_sync_ends_the_thread_and_may_be_called_twice():
    bench = echo_bench()
    bench.service.run(bench.request())
    (thread,) = portal_threads()
    bench.service.close_sync()
    assert not thread.is_alive()
    bench.service.close_sync()


def test_a_failing_unload_does_not_keep_the_thread():
    bench = echo_bench(fail="unload")
    bench.service.run(bench.request())
    with pytest.raises(Exception, match="asked to fail in unloading"):
        bench.service.close_sync()


def test_a_closed_service_says_so_and_starts_no_thread_that_stays():
    bench = echo_bench()
    bench.service.run(bench.request())
    bench.service.close_sync()
    assert "closed" in bench.service.run(bench.request()).error_message
    (chunk,) = bench.service.stream_sync(bench.request())
    assert isinstance(chunk, StreamError) and "closed" in chunk


def test_a_stream_that_was_not_read_to_its_end_is_told_of_the_close():
    bench = gate_bench()
    request = bench.request("one two")
    bench.handler.permit(request.request_id)
    stream = bench.service.stream_sync(request)
    assert next(stream) == "one"
    bench.service.close_sync(drain_timeout_s=0)
    (chunk,) = stream
    assert isinstance(chunk, StreamError) and "closed" in chunk
    assert bench.at_rest() and bench.handler.unloads == 1


def test_an_interrupt_of_the_caller_stops_the_work(monkeypatch):
    bench = gate_bench()
    request = bench.request("one two")
    with bench.service as service:
        submit = asyncio.run_coroutine_threadsafe

        class Interrupted:
            def __init__(self, future):
                self.cancel, self.done = future.cancel, lambda: True

            def result(self):
                async def decoding():
                    while not bench.handler.decoding(request):
                        await asyncio.sleep(0)

                submit(decoding(), service._portal._own).result(JOIN_S)
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "run_coroutine_threadsafe", lambda *a: Interrupted(submit(*a)))
            with pytest.raises(KeyboardInterrupt):
                service.run(request)

        async def ended():
            await bench.recorder.ended.wait()

        service._portal.run(ended)
        assert bench.recorder.reasons == ["cancelled"]
        assert bench.handler.ended == [request.request_id]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_that_another_thread_is_given_is_not_waited_for():
    """The main thread sleeps in a wait, which a signal of another thread does not end."""
    bench = gate_bench()
    request = bench.request("one two")

    def strike():
        while not bench.handler.decoding(request):
            time.sleep(0.01)
        time.sleep(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        if not ended.wait(5):
            late.append("it was waited for")
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    ended, late = threading.Event(), []
    with bench.service as service:
        striking = InThread(strike)
        with pytest.raises(KeyboardInterrupt):
            service.run(request)
        ended.set()
        striking.result()
    assert not late
    assert bench.recorder.reasons == ["cancelled"]


@pytest.mark.parametrize("name", ["leave", "interrupt", "panic"])
@pytest.mark.parametrize("where", ["here", "task", "callback"])
def test_the_loop_outlives_what_libraries_raise_on_it(where, name, caplog):
    async def library():
        RAISERS[name]()

    async def infer(request):
        if where == "here":
            RAISERS[name]()
        elif where == "task":
            await asyncio.wait([asyncio.create_task(library())])
        else:
            asyncio.get_running_loop().call_soon(RAISERS[name])
            await asyncio.sleep(0.001)
        return InferenceResponse(request_id="r", model_id="plain", generated_text="done")

    bench = plain_bench(infer)
    with bench.service as service:
        for _ in range(2):
            response = InThread(lambda: service.run(bench.request())).result()
            if where == "here":
                assert response.error_type == "InferenceError"
            else:
                assert response.generated_text == "done"
    assert f"in {name}" in caplog.text or where != "here"
