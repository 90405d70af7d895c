"""Waiting grows into priority: nobody waits for ever, whatever keeps coming."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

import engineroom.engine.batching as batching
from engineroom import BatchingEngine, DecodeLoop, EngineTask, RequestLogger, turn_of
from engineroom.turns import SECONDS_A_STEP

PRIORITY = st.integers(-100, 100)
LOG = RequestLogger(logging.getLogger("engineroom.tests"), {})


@given(PRIORITY, PRIORITY, st.floats(0, 1e6), st.floats(0, 1e4))
def test_who_comes_later_goes_first_for_a_higher_priority_and_a_while_only(
    early: int, late: int, arrived: float, later: float
) -> None:
    overtakes = turn_of(late, arrived + later) < turn_of(early, arrived)
    head_start = (late - early) * SECONDS_A_STEP
    if later < head_start - 1e-6:
        assert overtakes
    if later > head_start + 1e-6:
        assert not overtakes


@given(PRIORITY, st.floats(0, 1e6), st.floats(0, 1e4))
def test_of_equal_priority_nobody_goes_before_who_came_first(
    priority: int, arrived: float, later: float
) -> None:
    assert turn_of(priority, arrived) <= turn_of(priority, arrived + later)


def test_the_whole_range_is_less_than_a_servers_default_deadline() -> None:
    pytest.importorskip("msgspec")
    from engineroom.server import ServerSettings

    deadline = ServerSettings().request_timeout_s
    assert deadline is not None
    assert turn_of(-100, 0.0) - turn_of(100, 0.0) < deadline


@dataclass(eq=False, slots=True, kw_only=True)
class Work(EngineTask):
    came: float
    length: int
    done_steps: int = 0
    starts: int = 0


class ClockedEngine(BatchingEngine[Work]):
    """Turns when the test says so, on the test's clock. Where it has no room for what runs, the one
    whose turn is last gives way, as in llama.cpp's engine, and begins again from nothing.
    """

    def __init__(self, max_running: int, room: int) -> None:
        super().__init__("m", DecodeLoop("t"), max_running=max_running, max_queue=100_000)
        self.room = room
        self.started_order: list[Work] = []

    def started(self, task: Work) -> None:
        task.starts += 1
        self.started_order.append(task)

    def step(self) -> None:
        while len(self.running) > 1 and sum(t.done_steps + 1 for t in self.running) > self.room:
            victim = max(self.running, key=lambda t: t.rank)
            victim.done_steps = 0
            self.wait_again(victim)
        for task in list(self.running):
            task.done_steps += 1
            if task.done_steps >= task.length:
                self.leave(task)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@settings(max_examples=40, deadline=None)
@given(
    own=PRIORITY,
    length=st.integers(1, 6),
    stream=st.lists(st.tuples(PRIORITY, st.integers(1, 6)), min_size=1, max_size=8),
    each_step=st.integers(1, 2),
    seconds=st.sampled_from([1.0, 5.0, 30.0]),
    max_running=st.integers(1, 3),
    room=st.integers(6, 12),
)
def test_nobody_starves_under_a_stream_that_never_ends(
    own: int,
    length: int,
    stream: list[tuple[int, int]],
    each_step: int,
    seconds: float,
    max_running: int,
    room: int,
) -> None:
    """More comes than can be served, for ever; whoever came is done all the same."""

    async def scenario() -> None:  # mailboxes belong to a loop
        clock = Clock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batching, "time", clock)
            engine = ClockedEngine(max_running, room)

            def send(priority: int, length: int) -> Work:
                return engine.submit(
                    Work(priority=priority, came=clock.now, length=length, log=LOG)
                )

            for _ in range(max_running):
                send(100, 6)
            engine.turn()
            one = send(own, length)
            last = one.came + (100 - own) * SECONDS_A_STEP  # who comes later goes later
            sent = ahead = late_turns = 0
            while not one.done:
                for _ in range(each_step):
                    send(*stream[sent % len(stream)])
                    sent += 1
                    ahead += clock.now <= last
                engine.turn()
                late_turns += clock.now > last
                clock.now += seconds
                # Of those that run, the one whose turn is first never gives way: every six steps
                # one more of those that may go first is done.
                assert late_turns <= 6 * (ahead + 1)
            before = engine.started_order[: engine.started_order.index(one)]
            assert all(turn_of(t.priority, t.came) <= turn_of(own, one.came) for t in before)
            assert all(task.came <= last for task in before)

    asyncio.run(scenario())


async def test_who_gave_way_is_not_made_to_again_by_those_that_come_long_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(batching, "time", clock)
    engine = ClockedEngine(2, room=8)
    old = engine.submit(Work(priority=-100, came=clock.now, length=7, log=LOG))
    engine.turn()
    first = engine.submit(Work(priority=100, came=clock.now, length=7, log=LOG))
    while old in engine.running:  # until the higher priority makes it give way
        assert not old.done
        engine.turn()
    while not first.done:
        engine.turn()
    starts = old.starts
    clock.now += 201 * SECONDS_A_STEP
    for _ in range(20):
        engine.submit(Work(priority=100, came=clock.now, length=7, log=LOG))
        engine.turn()
    assert old.done
    assert old.starts <= starts + 1
