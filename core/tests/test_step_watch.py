"""A step that never ends is told of: by the engine's health, and once in the log."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from engineroom import DecodeLoop
from engineroom.engine import BatchingEngine, EngineTask, StepWatch
from engineroom.hangs import STUCK_VARIABLE, stuck_after_s
from engineroom.telemetry import work_logger

LOGGER = logging.getLogger("engineroom.batching")


class Hangs(BatchingEngine[EngineTask]):
    """A fake engine whose step waits until it may go on."""

    def __init__(self, loop: DecodeLoop) -> None:
        super().__init__("hangs", loop, max_running=1, max_queue=4)
        self.goes_on = threading.Event()

    def step(self) -> None:
        self.goes_on.wait(60)
        for task in [*self.running]:
            self.leave(task)


class Idle(BatchingEngine[EngineTask]):
    """Another one, on the same thread."""

    def step(self) -> None:
        raise NotImplementedError


def until(what, seconds=20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


async def test_a_step_that_hangs_makes_its_engines_unwell_until_it_ends(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUCK_VARIABLE, "0.05")
    loop = DecodeLoop("hanging")
    engine, other = Hangs(loop), Idle("other", loop, max_running=1, max_queue=1)
    engine.open()
    other.open()
    assert engine.health().ok and not loop.stuck()
    engine.submit(EngineTask(log=work_logger(LOGGER, "m")))
    until(lambda: not engine.health().ok)
    assert "a step of model 'hangs' has been running" in engine.health().detail
    assert not other.health().ok, "it waits for the same thread"
    assert not engine.health().dead
    await asyncio.sleep(1.2)  # the thread that watches looks as well
    engine.goes_on.set()
    until(lambda: engine.health().ok and other.health().ok)
    told = [record.getMessage() for record in caplog.records if "a step of" in record.getMessage()]
    assert len(told) == 1 and STUCK_VARIABLE in told[0]
    engine.close()
    other.close()


def test_what_comes_further_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STUCK_VARIABLE, "0.02")
    watch = StepWatch(LOGGER)
    assert not watch.look()
    watch.begins("m")
    time.sleep(0.03)
    assert "'m'" in watch.look()
    watch.begins("m")
    assert not watch.look()
    time.sleep(0.03)
    assert watch.look()
    watch.ends()
    assert not watch.look()


@pytest.mark.parametrize(
    ("text", "seconds"), [("7.5", 7.5), ("", 300), ("soon", 300), ("0", float("inf"))]
)
def test_the_environment_says_after_how_long(
    text: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUCK_VARIABLE, text)
    assert stuck_after_s() == seconds
