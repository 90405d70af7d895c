"""An engine whose runtime computes in threads of its own: turns are taken only when it calls."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque

import pytest

from engineroom import (
    BatchingEngine,
    DecodeLoop,
    EngineTask,
    GenerationParams,
    InferenceRequest,
    QueueFullError,
    TokenStep,
    request_logger,
)


class ThreadedEngine(BatchingEngine[EngineTask]):
    """Ends those that the test has said to end."""

    def __init__(self) -> None:
        super().__init__("m", DecodeLoop("threaded"), max_running=1, max_queue=1)
        self.ended: deque[EngineTask] = deque()
        self.steps = 0
        self.open()

    def can_step(self) -> bool:
        return bool(self.ended)

    def step(self) -> None:
        self.steps += 1
        ended = [self.ended.popleft() for _ in range(len(self.ended))]
        for task in ended:
            self.leave(task)
        self.hand_over((task.mailbox, TokenStep(finish="eos_token")) for task in ended)


@pytest.fixture
async def engine():
    engine = ThreadedEngine()
    async with asyncio.timeout(30):
        yield engine
        await asyncio.to_thread(engine.close)


def submit(engine: ThreadedEngine) -> EngineTask:
    request = InferenceRequest(model_id="m", prompt="x", params=GenerationParams())
    return engine.submit(EngineTask(log=request_logger(logging.getLogger("engineroom"), request)))


async def until(engine: ThreadedEngine, running: int, waiting: int) -> None:
    health = engine.health()
    while (health.num_requests_running, health.num_requests_waiting) != (running, waiting):
        await asyncio.sleep(0.001)
        health = engine.health()


async def test_its_turns_wait_until_it_is_woken(engine: ThreadedEngine) -> None:
    first = submit(engine)
    await until(engine, 1, 0)
    second = submit(engine)
    await until(engine, 1, 1)
    with pytest.raises(QueueFullError):
        submit(engine)
    await asyncio.sleep(0.05)
    assert engine.steps == 0  # no turn was taken for those that run
    engine.ended.append(first)
    threading.Thread(target=engine.wake).start()
    assert (await first.mailbox.get()).finish == "eos_token"
    await until(engine, 1, 0)
    assert engine.steps == 1
    engine.ended.append(second)
    engine.wake()
    assert (await second.mailbox.get()).finish == "eos_token"


@pytest.mark.parametrize("running", [True, False])
async def test_cancelling_needs_no_step(engine: ThreadedEngine, running: bool) -> None:
    tasks = [submit(engine)]
    await until(engine, 1, 0)
    tasks.append(submit(engine))
    engine.cancel(tasks[0 if running else 1])
    await until(engine, 1, 0)
    assert engine.steps == 0
    assert tasks[0].done is running


async def test_closing_needs_no_step(engine: ThreadedEngine) -> None:
    task = submit(engine)
    await until(engine, 1, 0)
    await asyncio.to_thread(engine.close)
    assert task.done and engine.steps == 0


async def test_a_cancelled_request_leaves_the_queue_at_once(engine: ThreadedEngine) -> None:
    submit(engine)
    await until(engine, 1, 0)
    waiting = submit(engine)
    engine.cancel(waiting)
    assert waiting.done and engine.health().num_requests_waiting == 0
    engine.cancel(submit(engine))  # there is room for another
