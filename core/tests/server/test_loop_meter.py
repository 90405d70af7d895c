"""How long the event loop stands still, and what the log says of it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("prometheus_client", reason="needs the extra engineroom[server]")

import httpx
from server_doubles import TalkHandler

from engineroom import LLMInferenceService, LLMModelManager
from engineroom.server import create_app, loop_meter
from engineroom.server.loop_meter import LoopMeter


class Named:
    """Work with a name."""

    def __init__(self, described: str) -> None:
        self.described = described


def stand_still(seconds: float) -> None:
    time.sleep(seconds)


def lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "engineroom.server.loop"]


def meter_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "engineroom-loop-meter"]


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is left out because the machine was busy a moment before."""
    monkeypatch.setattr(loop_meter, "QUIET_S", 0.0)


def test_what_stands_still_is_measured_and_forgotten():
    async def work() -> None:
        meter = LoopMeter(beat_s=0.005)
        seen: list[float] = []
        meter.observers.append(seen.append)
        with meter.running():
            await asyncio.sleep(0.03)
            meter.reset()
            stand_still(0.2)
            assert meter.largest_since_reset() >= 0.19  # that of now counts
            await asyncio.sleep(0.01)
            assert max(seen) == meter.largest_since_reset() == meter.largest_of_late() >= 0.19
            meter.reset()
            assert meter.largest_since_reset() < 0.19
            assert meter.largest_of_late() >= 0.19
            beats = len(seen)
        await asyncio.sleep(0.03)
        assert len(seen) == beats
        assert not meter_threads()
        assert meter.largest_since_reset() < 0.19

    asyncio.run(work())


def test_the_log_names_the_place_and_the_work(caplog, every_line):
    async def work() -> None:
        meter = LoopMeter()

        async def busy(work: Named, seconds: float) -> None:
            task = asyncio.current_task()
            assert task is not None
            meter.at_work[work] = task
            await asyncio.sleep(0.03)
            stand_still(seconds)
            del meter.at_work[work]

        with meter.running():
            idle = asyncio.create_task(busy(Named("another"), 0))
            meter.at_work[Named("the one that waits")] = idle
            await asyncio.create_task(busy(Named("the one that works"), 0.4))
            await asyncio.sleep(0.03)

    asyncio.run(work())
    (line,) = [line for line in lines(caplog) if "stand_still" in line]
    assert "test_loop_meter:" in line and " stand_still < " in line and " busy" in line
    assert line.endswith("at work: the one that works")
    assert caplog.records[-1].levelno == logging.WARNING


def test_the_log_is_not_flooded(caplog):
    caplog.set_level(logging.INFO, logger="engineroom.server.loop")
    now = 0.0

    async def work() -> None:
        nonlocal now
        beats: list[float] = []
        meter = LoopMeter(beat_s=0.001, clock=lambda: now)
        meter.observers.append(beats.append)
        with meter.running():
            for passed in (0.3, 0.4, 0.5, 10.0, 0.3):
                seen = len(beats)
                now += passed
                while len(beats) == seen:
                    await asyncio.sleep(0.001)

    asyncio.run(work())
    told = [line for line in lines(caplog) if line.startswith("the event loop stood still for")]
    assert len(told) == 2
    assert "for 0.30 s" in told[0] and "times more" not in told[0]
    assert "for 10.00 s" in told[1] and "(2 times more since the last such line)" in told[1]


def test_a_thread_that_does_not_let_go_of_the_interpreter_is_named(caplog, every_line):
    async def work() -> None:
        with LoopMeter().running():
            await asyncio.to_thread(hold)

    def hold() -> None:
        time.sleep(0.05)  # the loop has nothing to do by then
        # One call that keeps the interpreter, as libraries have that were not made for threads.
        sum(range(80_000_000))

    asyncio.run(work())
    assert any("nothing ran on the loop" in line and " hold" in line for line in lines(caplog))


def test_the_server_tells_its_lag(start, caplog):
    with start() as run:
        assert len(meter_threads()) == 1
        meter = run.server.context.loop_meter
        run.call(meter.reset)
        run.call(lambda: stand_still(0.4))
        run.until(lambda: lines(caplog), "the line")
        assert meter.largest_since_reset() >= 0.3
        text = httpx.get(run.url + "/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert float(values["engineroom_event_loop_lag_largest_seconds"]) >= 0.3
        assert float(values["engineroom_event_loop_lag_seconds_sum"]) >= 0.3
        beats = float(values["engineroom_event_loop_lag_seconds_count"])
        assert beats > float(values['engineroom_event_loop_lag_seconds_bucket{le="0.25"}']) > 0
    assert not meter_threads()


def test_a_request_that_holds_the_loop_is_named(start, caplog, every_line):
    class Slow(TalkHandler):
        async def _talk(self, request):
            stand_still(0.4)
            async for step in super()._talk(request):
                yield step

    with start(handler=Slow()) as run:
        answer = httpx.post(
            run.url + "/v1/chat/completions",
            json={"model": "m", "messages": [{"role": "user", "content": "secret words"}]},
            headers={"x-request-id": "mine"},
        )
        assert answer.status_code == 200
        run.until(lambda: any(" _talk" in line for line in lines(caplog)), "the line")
    line = next(line for line in lines(caplog) if " _talk" in line)
    assert f"POST /v1/chat/completions (request {answer.headers['x-request-id']!r}" in line
    assert "key 'anonymous'" in line
    assert "secret" not in line
    assert not run.server.context.loop_meter.at_work


def test_it_runs_with_the_lifespan_of_any_asgi_server():
    async def work() -> None:
        manager = LLMModelManager(config={"models": []})
        app = create_app(LLMInferenceService(manager, handlers=[TalkHandler()]))
        messages: asyncio.Queue[dict] = asyncio.Queue()
        sent: asyncio.Queue[dict] = asyncio.Queue()
        task = asyncio.create_task(app({"type": "lifespan"}, messages.get, sent.put))
        messages.put_nowait({"type": "lifespan.startup"})
        assert (await sent.get())["type"] == "lifespan.startup.complete"
        assert len(meter_threads()) == 1
        messages.put_nowait({"type": "lifespan.shutdown"})
        await task
        assert not meter_threads()

    asyncio.run(work())
