"""The kit's time: who is to blame for a silence, and who is not."""

from __future__ import annotations

import asyncio
import time

import pytest
from toy_runtime import ToyHandler

from engineroom import ModelConfig
from engineroom.testing import HandlerConformance
from engineroom.testing.conformance import clock as module
from engineroom.testing.conformance.clock import Clock
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.loop import LoopThread
from engineroom.testing.conformance.outcomes import HungError, LoopLostError


class Times:
    """A fake of the two clocks of a process."""

    wall = computed = 0.0

    def monotonic(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.computed


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    found = Times()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.mark.parametrize(
    ("wall", "computed", "counted"),
    [
        (0.04, 0.0, 0.04),
        (0.1, 0.0, 0.1),
        (3600.0, 0.0, 0.1),  # the machine slept
        (3600.0, 2.0, 2.0),
        (3.0, 3.0, 3.0),  # something held the interpreter, and computed
        (3.0, 6.0, 3.0),  # on two processors
        (-1.0, 0.0, 0.0),
    ],
)
def test_a_look_counts_as_long_as_it_was_meant_or_as_was_computed(times, wall, computed, counted):
    clock = Clock(0.05)
    times.wall, times.computed = wall, computed
    assert clock.passed() == pytest.approx(counted)
    assert clock.passed() == 0.0


@pytest.fixture
def kit():
    class Suite(HandlerConformance):
        timeout_s = 0.5

    found = Kit(ToyHandler(), ModelConfig(model_id="toy", source="toy:"), Suite().settings())
    yield found
    found.loop.close()


def run(kit: Kit, work):
    return kit.loop.run(work, 60.0)


def test_what_never_ends_has_its_limit(kit):
    async def wait():
        never = asyncio.ensure_future(asyncio.Event().wait())
        assert not await kit.ended(never)
        assert not await kit.until(lambda: False)
        never.cancel()

    run(kit, wait())


def test_each_step_has_the_limit_anew_and_all_together_another(kit):
    steps = [0]

    async def step(count):
        for _ in range(count):
            await asyncio.sleep(0.1)
            steps[0] += 1

    async def wait():
        slow = asyncio.ensure_future(step(12))
        assert await kit.ended(slow, progress=lambda: steps[0])
        assert steps == [12]
        endless = asyncio.ensure_future(step(10**9))
        assert not await kit.ended(endless, limit_s=0.25, progress=lambda: steps[0])
        endless.cancel()

    run(kit, wait())


def test_what_has_ended_counts_whatever_the_limit(kit):
    async def wait():
        done = asyncio.ensure_future(asyncio.sleep(0))
        await done
        assert await kit.ended(done, limit_s=0.001)
        assert await kit.until(lambda: True)

    run(kit, wait())


def test_a_loop_that_turns_is_not_lost_and_what_hangs_on_it_is_named():
    loop = LoopThread(0.3)

    async def wait():
        await asyncio.Event().wait()

    with pytest.raises(HungError, match="in Event.wait|test_a_loop_that_turns"):
        loop.run(wait(), 0.6)
    loop.close()


def test_a_loop_that_stands_is_lost():
    loop = LoopThread(0.3)

    async def stand():
        time.sleep(3)  # noqa: ASYNC251 - what is looked for

    with pytest.raises(LoopLostError, match="stand"):
        loop.run(stand(), 60.0)
    assert loop.stall()[0] > 0.3
    loop.close()


def test_a_stall_is_measured_where_it_is_computed_and_where_it_is_waited():
    loop = LoopThread(60.0)

    async def hold(how):
        how()
        await asyncio.sleep(0.1)

    began = time.process_time()
    sum(range(10**6))
    each = (time.process_time() - began) / 10**6

    def computing():
        # One call that lets no other thread look on.
        sum(range(int(0.8 / each)))

    for how in (lambda: time.sleep(0.6), computing):
        loop.forget_stalls()
        loop.run(hold(how), 60.0)
        assert loop.stall()[0] > 0.3
    loop.forget_stalls()
    loop.run(asyncio.sleep(0), 60.0)
    loop.close()
