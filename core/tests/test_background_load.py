"""A load that can be given up: nothing that it makes is kept by nobody."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from engineroom import ConfigurationError, InferenceError, ResourceNotAvailableError
from engineroom.engine import BackgroundLoad


class Bench:
    """A load whose end the test decides on, and what became of what it made."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.freed: list[object] = []
        self.free_threads: list[str] = []
        self.was_freed = threading.Event()
        self.stopped = threading.Event()
        self.load_thread: threading.Thread | None = None
        self.error = error
        self.load = BackgroundLoad(self.make, self.free, name="some", stop=self.stopped.set)

    def make(self) -> str:
        self.load_thread = threading.current_thread()
        self.began.set()
        assert self.go_on.wait(20)
        if self.error is not None:
            raise self.error
        return "engine"

    def free(self, engine: str) -> None:
        self.freed.append(engine)
        self.free_threads.append(threading.current_thread().name)
        self.was_freed.set()


async def test_a_load_gives_what_it_makes_and_its_thread_ends():
    bench = Bench()
    bench.go_on.set()
    assert await bench.load.result() == "engine"
    assert bench.freed == []
    assert bench.load_thread.name == "some-load"
    bench.load_thread.join(20)
    assert not bench.load_thread.is_alive()


async def test_a_cancelled_wait_ends_at_once_and_what_comes_later_is_given_back():
    bench = Bench()
    task = asyncio.create_task(bench.load.result())
    assert await asyncio.to_thread(bench.began.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(bench.stopped.wait, 20)
    assert bench.freed == []
    bench.go_on.set()
    assert await asyncio.to_thread(bench.was_freed.wait, 20)
    assert bench.freed == ["engine"]
    assert bench.free_threads == ["some-load"]


async def test_what_has_come_is_given_back_once_and_in_a_thread():
    bench = Bench()
    bench.go_on.set()
    await bench.load.result()
    bench.load.abandon()
    bench.load.abandon()
    assert await asyncio.to_thread(bench.was_freed.wait, 20)
    assert bench.freed == ["engine"]
    assert bench.free_threads == ["some-unload"]
    assert not bench.stopped.is_set()  # there was nothing to be stopped


def test_a_load_that_is_given_up_before_it_begins_keeps_nothing():
    bench = Bench()
    bench.load.abandon()
    assert bench.stopped.wait(20)
    bench.go_on.set()
    assert bench.load.run() == "engine"
    assert bench.freed == ["engine"]


async def test_errors_come_as_they_are_and_there_is_nothing_to_give_back():
    for error in (ConfigurationError("no"), ValueError("foreign")):
        bench = Bench(error)
        bench.go_on.set()
        with pytest.raises(type(error)) as caught:
            await bench.load.result()
        assert caught.value is error
        bench.load.abandon()
        assert bench.freed == []
        assert not bench.stopped.is_set()


class PanicException(BaseException):
    """As pyo3 raises it."""


async def test_what_a_load_that_failed_has_left_is_freed_at_once():
    class Weights:
        pass

    seen = []

    def make():
        weights = Weights()
        seen.append(weakref.ref(weights))
        raise ValueError("no")

    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            await BackgroundLoad(make, print, name="some").result()
        for _ in range(100):  # the thread is about to end
            if seen[0]() is None:
                break
            await asyncio.sleep(0.01)
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("error", "typed"),
    [
        (MemoryError(), ResourceNotAvailableError),
        (PanicException("index out of bounds"), InferenceError),
        (SystemExit(1), InferenceError),
    ],
)
async def test_what_would_end_more_than_the_load_comes_typed(error, typed):
    bench = Bench(error)
    bench.go_on.set()
    with pytest.raises(typed) as caught:
        await bench.load.result()
    assert caught.value.__cause__ is error
