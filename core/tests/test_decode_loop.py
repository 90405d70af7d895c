"""The thread that models take turns on."""

from __future__ import annotations

import threading

from engineroom import DecodeLoop


class Counter:
    """Does so many turns, then ends; notes on which thread and in which order."""

    def __init__(self, name: str, turns: int, log: list[tuple[str, str]]) -> None:
        self.name = name
        self.turns = turns
        self.log = log
        self.may_work = True

    @property
    def has_work(self) -> bool:
        return self.may_work

    def turn(self) -> bool:
        self.log.append((self.name, threading.current_thread().name))
        self.turns -= 1
        return self.turns > 0


def test_workers_take_turns_on_one_thread_which_ends_with_the_last() -> None:
    loop, log = DecodeLoop("turns"), []
    a, b = Counter("a", 3, log), Counter("b", 3, log)
    with loop.condition:  # the thread sees both at once
        loop.add(a)
        loop.add(b)
    loop.wait_for_end(a)
    loop.wait_for_end(b)
    assert log == [("a", "turns"), ("b", "turns")] * 3
    assert "turns" not in {thread.name for thread in threading.enumerate()}


def test_an_idle_worker_sleeps_until_it_is_told() -> None:
    loop, log = DecodeLoop("idle"), []
    idle, busy = Counter("idle", 1, log), Counter("busy", 2, log)
    idle.may_work = False
    loop.add(idle)
    loop.add(busy)
    loop.wait_for_end(busy)
    assert log == [("busy", "idle")] * 2
    with loop.condition:
        idle.may_work = True
        loop.condition.notify_all()
    loop.wait_for_end(idle)
    assert log[-1] == ("idle", "idle")


def test_a_loop_whose_thread_has_ended_starts_another() -> None:
    loop, log = DecodeLoop("again"), []
    for _ in range(50):
        worker = Counter("w", 1, log)
        loop.add(worker)
        loop.wait_for_end(worker)
    assert len(log) == 50
    assert "again" not in {thread.name for thread in threading.enumerate()}


def test_waiting_for_one_does_not_wait_for_the_others() -> None:
    loop, log = DecodeLoop("others"), []
    stays, ends = Counter("stays", 1, log), Counter("ends", 1, log)
    stays.may_work = False
    loop.add(stays)
    loop.add(ends)
    loop.wait_for_end(ends)
    loop.wait_for_end(ends)  # once more is harmless
    assert [name for name, _ in log] == ["ends"]
    with loop.condition:
        stays.may_work = True
        loop.condition.notify_all()
    loop.wait_for_end(stays)
