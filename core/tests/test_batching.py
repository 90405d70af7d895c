"""What every batching engine does the same, held with an engine that counts."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

import engineroom.engine.batching as batching
from engineroom import (
    BatchingEngine,
    DecodeLoop,
    EngineDeadError,
    EngineTask,
    InferenceError,
    InferenceRequest,
    QueueFullError,
    ResourceNotAvailableError,
    TokenStep,
    request_logger,
)

logger = logging.getLogger("engineroom.tests")


@dataclass(eq=False, slots=True, kw_only=True)
class CountTask(EngineTask):
    length: int
    given: int = 0
    slot: int | None = None


class FakeEngine(BatchingEngine[CountTask]):
    """Gives every running request its next number. Not a runtime: steps can be held and fail."""

    def __init__(self, *, max_running: int = 2, max_queue: int = 4) -> None:
        super().__init__("m", DecodeLoop("count"), max_running=max_running, max_queue=max_queue)
        self.free = list(range(max_running))
        self.gate = threading.Semaphore(0)
        self.in_step = threading.Event()
        self.held = False
        self.aborted = False
        self.problem: Exception | None = None
        self.shut_problem: Exception | None = None
        self.shuts = 0
        self.together: list[tuple[int, ...]] = []
        self.preempt: CountTask | None = None
        self.open()

    def task(self, length: int = 3, priority: int = 0) -> CountTask:
        request = InferenceRequest(model_id="m", prompt="p")
        return self.submit(
            CountTask(length=length, priority=priority, log=request_logger(logger, request))
        )

    def started(self, task: CountTask) -> None:
        task.slot = self.free.pop()

    def released(self, task: CountTask) -> None:
        assert task.slot is not None
        self.free.append(task.slot)
        task.slot = None

    def interrupt(self, on: bool) -> None:
        self.aborted = on
        if on:
            self.gate.release()

    def shut(self) -> None:
        self.shuts += 1
        if self.shut_problem is not None:
            raise self.shut_problem

    def cache_usage(self) -> float:
        return len(self.running) / 10

    def step(self) -> None:
        if self.held:
            self.in_step.set()
            self.gate.acquire()
        if self.problem is not None:
            raise self.problem
        if self.preempt is not None and self.preempt in self.running:
            self.wait_again(self.preempt)
            self.preempt = None
        self.together.append(tuple(sorted(task.order for task in self.running)))
        parcels = []
        for task in list(self.running):
            task.given += 1
            last = task.given == task.length
            if last:
                self.leave(task)
            parcels.append(
                (task.mailbox, TokenStep((task.given,), finish="length" if last else None))
            )
        self.hand_over(parcels)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    made = FakeEngine()
    yield made
    made.held = False
    await asyncio.to_thread(made.close)


async def read(task: CountTask) -> list[int]:
    found: list[int] = []
    while True:
        step = await asyncio.wait_for(task.mailbox.get(), 30)
        found += step.token_ids
        if step.finish is not None:
            return found


async def until(condition: object) -> None:
    assert callable(condition)
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


async def hold(engine: FakeEngine) -> CountTask:
    """A request whose step is being computed, and goes on at ``engine.gate.release()``."""
    engine.held = True
    task = engine.task(length=10)
    await until(engine.in_step.is_set)
    return task


async def test_nobody_waits_for_what_a_request_needs_to_start(engine: FakeEngine) -> None:
    starting, go_on = threading.Event(), threading.Event()
    give = engine.started

    def started(task: CountTask) -> None:
        starting.set()
        assert go_on.wait(30)
        give(task)

    engine.started = started  # type: ignore[method-assign]
    first = engine.task()
    try:
        await until(starting.is_set)
        health = await asyncio.wait_for(asyncio.to_thread(engine.health), 10)
        assert (health.num_requests_running, health.num_requests_waiting) == (1, 0)
        second = engine.task()
        engine.cancel(first)
    finally:
        go_on.set()
    assert await read(second) == [1, 2, 3]
    assert first.given == 0
    assert sorted(engine.free) == [0, 1]


async def test_requests_run_together_and_each_gets_all_of_its_own(engine: FakeEngine) -> None:
    engine.held = True
    tasks = [engine.task(length) for length in (5, 2, 3)]
    await until(engine.in_step.is_set)
    engine.held = False
    engine.gate.release()
    assert [await read(task) for task in tasks] == [[1, 2, 3, 4, 5], [1, 2], [1, 2, 3]]
    assert max(map(len, engine.together)) == 2
    assert engine.health().num_requests_running == 0
    assert sorted(engine.free) == [0, 1]


async def test_the_queue_is_bounded(engine: FakeEngine) -> None:
    await hold(engine)
    waiting = [engine.task() for _ in range(5)]  # one takes the free slot
    with pytest.raises(QueueFullError, match="max_queue=4"):
        engine.task()
    assert engine.health().num_requests_waiting == 5
    engine.held = False
    engine.gate.release()
    assert [await read(task) for task in waiting] == [[1, 2, 3]] * 5


async def test_a_higher_priority_goes_first_then_the_first_come(engine: FakeEngine) -> None:
    await hold(engine)
    low, high, late = engine.task(1, -1), engine.task(1, 5), engine.task(1, 5)
    engine.held = False
    engine.gate.release()
    for task in (low, high, late):
        await read(task)
    first = [
        next(i for i, step in enumerate(engine.together) if t.order in step)
        for t in (high, late, low)
    ]
    assert first == sorted(first)
    assert first[0] < first[1] < first[2]


async def test_the_waiting_are_cancelled_without_having_run(engine: FakeEngine) -> None:
    await hold(engine)
    gone = engine.task()
    engine.cancel(gone)
    engine.held = False
    engine.gate.release()
    await until(lambda: gone.done)
    assert gone.given == 0
    assert all(gone.order not in step for step in engine.together)


async def test_cancelling_the_only_one_aborts_its_step(engine: FakeEngine) -> None:
    alone = await hold(engine)
    engine.cancel(alone)
    assert engine.aborted
    await until(lambda: alone.done)
    assert sorted(engine.free) == [0, 1]
    engine.cancel(alone)  # once more is harmless
    engine.held = False
    assert await read(engine.task()) == [1, 2, 3]
    assert not engine.aborted


async def test_cancelling_one_of_two_lets_the_step_be(engine: FakeEngine) -> None:
    first = engine.task(10_000_000)
    second = engine.task(10_000_000)
    await until(lambda: engine.together and len(engine.together[-1]) == 2)
    engine.cancel(first)
    assert not engine.aborted
    await until(lambda: first.done)
    engine.cancel(second)


async def test_a_request_that_gave_way_goes_on(engine: FakeEngine) -> None:
    first, second = engine.task(40), engine.task(40)
    engine.preempt = second
    assert await read(first) == await read(second) == list(range(1, 41))
    assert sorted(engine.free) == [0, 1]


async def test_a_step_that_raises_ends_the_engine_and_says_so(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    task = await hold(engine)
    waiting = engine.task()
    engine.problem = MemoryError("no more")
    engine.gate.release()
    for each in (task, waiting):
        with pytest.raises(EngineDeadError, match=r"MemoryError: no more; unload the model"):
            await read(each)
    await until(lambda: not engine.health().ok)
    assert "no more" in engine.health().detail
    assert engine.health().kv_cache_usage is None
    with pytest.raises(EngineDeadError):
        engine.task()
    assert engine.shuts == 1
    assert any(record.exc_info for record in caplog.records)


async def test_what_fails_to_free_is_logged_and_the_requests_are_told(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    task = await hold(engine)
    engine.problem, engine.shut_problem = ValueError("a"), ValueError("b")
    engine.gate.release()
    with pytest.raises(EngineDeadError, match="ValueError: a"):
        await read(task)
    assert "could not free" in caplog.text


async def test_failed_requests_leave_and_the_others_stay(engine: FakeEngine) -> None:
    bad, good = engine.task(10_000_000), engine.task(10_000_000)
    await until(lambda: engine.together and len(engine.together[-1]) == 2)
    error = InferenceError("the row is bad")

    step = engine.step

    def failing() -> None:
        if bad in engine.running:
            engine.fail([bad], error)
        step()

    engine.step = failing  # type: ignore[method-assign]
    with pytest.raises(InferenceError, match="the row is bad") as caught:
        await read(bad)
    assert caught.value is not error
    count = good.given
    await until(lambda: good.given > count)
    engine.cancel(good)


async def test_closing_tells_those_that_run_and_those_that_wait(engine: FakeEngine) -> None:
    running = await hold(engine)
    waiting = engine.task()
    engine.held = False
    await asyncio.to_thread(engine.close)
    for task in (running, waiting):
        with pytest.raises(ResourceNotAvailableError, match="was unloaded"):
            await read(task)
    with pytest.raises(ResourceNotAvailableError, match="being unloaded"):
        engine.task()
    assert engine.shuts == 1
    await asyncio.to_thread(engine.close)  # once more is harmless
    assert "count" not in {thread.name for thread in threading.enumerate()}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(-2, 2), st.booleans()), min_size=1, max_size=12
    ),
    st.integers(1, 4),
)
def test_whatever_comes_and_goes_every_slot_is_given_back(
    arrivals: list[tuple[int, int, bool]], max_running: int
) -> None:
    async def scenario() -> None:
        engine = FakeEngine(max_running=max_running, max_queue=100)
        try:
            tasks = []
            for length, priority, cancel in arrivals:
                task = engine.task(length, priority)
                if cancel:
                    engine.cancel(task)
                else:
                    tasks.append(task)
            for task in tasks:
                assert await read(task) == list(range(1, task.length + 1))
            await until(lambda: not engine.has_work)
            assert sorted(engine.free) == list(range(max_running))
            assert all(len(step) <= max_running for step in engine.together)
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(scenario())


async def test_who_waited_long_goes_before_a_higher_priority(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await hold(engine)
    now = [0.0]
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: now[0]))
    old = engine.task(1, -3)
    now[0] = 16.1  # eight steps of priority are worth 16 s
    late = engine.task(1, 5)
    engine.held = False
    engine.gate.release()
    await read(late)
    assert old.done
    order = [next(i for i, s in enumerate(engine.together) if t.order in s) for t in (old, late)]
    assert order == sorted(order)
