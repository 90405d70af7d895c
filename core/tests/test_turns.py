"""Waiting grows into priority: nobody waits for ever, whatever keeps coming."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

import engineroom.engine.batching as batching
from engineroom import (
    BatchingEngine,
    DecodeLoop,
    EngineTask,
    QueueFullError,
    RequestLogger,
    WaitingLine,
    turn_of,
)
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
                # one more of those that may go first is done, with those that ran before.
                assert late_turns <= 6 * (ahead + max_running + 1)
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


# ── owner by owner ───────────────────────────────────────────────────────────────────────────


@dataclass(eq=False, slots=True)
class Guest:
    owner: str
    priority: int
    rank: tuple[float, int]
    weight: int = 1


COMINGS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 3), st.sampled_from([0, 0, 0, 1])),
    max_size=60,
)


@given(COMINGS)
def test_an_owner_is_served_again_only_when_all_others_have_been(
    comings: list[tuple[str, int, int]],
) -> None:
    """However many it has waiting: between two of one owner, each that waited had its turn."""
    line: WaitingLine[Guest] = WaitingLine()
    now, orders, served = 0.0, 0, []
    waited: dict[str, set[str]] = {}  # owner → who was served since it last was
    for owner, count, serves in comings:
        for _ in range(count):
            now += 1
            line.add(Guest(owner, 0, (turn_of(0, now), orders)))
            orders += 1
        for _ in range(serves):
            now += 1
            chosen = line.heads()[0]
            line.serve(chosen, now)
            served.append(chosen.owner)
            still = {guest.owner for guest in line}
            for other in still - {chosen.owner}:
                before = waited.setdefault(other, set())
                assert chosen.owner not in before, "it overtook one that waited for its turn"
                before.add(chosen.owner)
            waited.pop(chosen.owner, None)
    assert len(line) == orders - len(served)


@given(st.lists(st.tuples(PRIORITY, st.floats(0, 1000)), min_size=1, max_size=30))
def test_one_owner_alone_goes_by_turn_and_arrival(comings: list[tuple[int, float]]) -> None:
    line: WaitingLine[Guest] = WaitingLine()
    guests = [Guest("a", p, (turn_of(p, at), n)) for n, (p, at) in enumerate(comings)]
    for guest in guests:
        line.add(guest)
    order = []
    while line:
        order.append(line.heads()[0])
        line.serve(order[-1], 5000.0)
    assert order == sorted(guests, key=lambda guest: guest.rank)
    assert not line._served


def test_priority_goes_before_owners_turns_for_a_while_only() -> None:
    line: WaitingLine[Guest] = WaitingLine()
    for number in range(50):
        line.add(Guest("high", 3, (turn_of(3, 0.0), number)))
    line.add(Guest("low", 0, (turn_of(0, 0.0), 99)))
    now, order = 0.0, []
    while len(line) > 40:
        now += 1.0
        chosen = line.heads()[0]
        line.serve(chosen, now)
        order.append(chosen.owner)
    assert order.index("low") == 3 * SECONDS_A_STEP + 1


def test_who_gave_way_goes_by_when_it_came() -> None:
    line: WaitingLine[Guest] = WaitingLine()
    first, second = (Guest("a", 0, (float(n), n)) for n in range(2))
    other = Guest("b", 0, (2.0, 2))
    for guest in (first, second, other):
        line.add(guest)
    line.serve(first, 3.0)
    line.put_back(first)
    assert line.heads() == [first, other]
    line.serve(first, 4.0)
    assert line.heads() == [other, second], "its own came again, and it is behind"


@given(
    waiting=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4)), max_size=30),
    owner=st.sampled_from("abcde"),
    weight=st.integers(1, 4),
    room=st.integers(1, 8),
)
def test_a_newcomer_pushes_out_those_of_whom_more_wait(
    waiting: list[tuple[str, int]], owner: str, weight: int, room: int
) -> None:
    line: WaitingLine[Guest] = WaitingLine(lambda guest: guest.weight)
    for number, (whose, many) in enumerate(waiting):
        line.add(Guest(whose, 0, (float(number), number), many))
    weights = {o: sum(g.weight for g in line if g.owner == o) for o in "abcde"}
    newcomer = Guest(owner, 0, (999.0, 999), weight)
    leaving = line.yield_to(newcomer, room)
    if leaving is None:
        return
    assert sum(guest.weight for guest in leaving) >= room
    mine = weights[owner] + weight
    for guest in leaving:
        assert guest.owner != owner
        assert weights[guest.owner] > mine, "it had no more than the newcomer's"
        weights[guest.owner] -= guest.weight
        lasts = [g for g in line if g.owner == guest.owner and g.rank > guest.rank]
        assert all(last in leaving for last in lasts), "the last one goes first"


async def test_a_key_with_many_requests_at_an_engine_does_not_hold_up_another() -> None:
    """Real engine, steps by hand: what others wait for is a turn each, not the whole backlog."""
    engine = ClockedEngine(1, room=10)

    def send(key: str, priority: int = 0) -> Work:
        log = RequestLogger(logging.getLogger("engineroom.tests"), {"key_name": key})
        return engine.submit(Work(priority=priority, came=0.0, length=1, log=log))

    for _ in range(10_000):
        send("greedy")
    engine.turn()
    mine = [send("mine") for _ in range(3)]
    other = send("other")
    for _ in range(8):
        engine.turn()
    owners = [task.owner for task in engine.started_order[:8]]
    assert owners.count("mine") == 3 and owners.count("other") == 1
    assert all(task.done for task in (*mine, other))


async def test_a_full_queue_of_one_key_makes_room_for_another() -> None:
    class Small(ClockedEngine):
        def __init__(self) -> None:
            BatchingEngine.__init__(self, "m", DecodeLoop("t"), max_running=1, max_queue=4)
            self.room, self.started_order = 10, []

    engine = Small()

    def send(key: str) -> Work:
        log = RequestLogger(logging.getLogger("engineroom.tests"), {"key_name": key})
        return engine.submit(Work(came=0.0, length=50, log=log))

    greedy = [send("greedy") for _ in range(5)]
    engine.turn()
    with pytest.raises(QueueFullError):
        send("greedy")
    mine = [send("mine"), send("mine")]
    for _ in range(3):
        with pytest.raises(QueueFullError):
            send("mine")  # each has two of the four
    assert [task.done for task in greedy] == [False, False, False, True, True]
    for task in greedy[3:]:
        with pytest.raises(QueueFullError, match="max_queue=4"):
            await task.mailbox.get()
    assert not any(task.done for task in mine) and len(engine.waiting) + len(engine._incoming) == 4
    other = send("other")
    assert not other.done and engine.health().num_requests_waiting == 4
