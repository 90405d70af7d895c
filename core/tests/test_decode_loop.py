"""The thread that models take turns on."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

from engineroom import DecodeLoop, run_in_new_thread


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


# ── beside the loop ──────────────────────────────────────────────────────────────────────────────

WHERE: contextvars.ContextVar[str] = contextvars.ContextVar("WHERE", default="nowhere")


async def test_a_call_has_a_thread_of_its_own_which_ends_with_it() -> None:
    WHERE.set("here")
    threads = [
        await run_in_new_thread(lambda: (threading.current_thread(), WHERE.get()), "once")
        for _ in range(2)
    ]
    assert [(thread.name, where) for thread, where in threads] == [("once", "here")] * 2
    for thread, _ in threads:
        thread.join(60)
        assert not thread.is_alive()


async def test_what_a_call_raises_is_raised_where_it_is_awaited() -> None:
    def fail() -> None:
        raise LookupError("not there")

    with pytest.raises(LookupError, match="not there"):
        await run_in_new_thread(fail, "fail")


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_is_told_of_a_call_that_nobody_waits_for(
    fails: bool, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """Neither after a cancellation nor after the end of the loop."""
    go, threads = threading.Event(), []

    def work() -> None:
        threads.append(threading.current_thread())
        assert go.wait(60)
        if fails:
            raise LookupError("not there")

    async def leave() -> None:
        for count in (1, 2):
            task = asyncio.create_task(run_in_new_thread(work, "left"))
            while len(threads) < count:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        go.set()
        threads[0].join(60)
        await asyncio.sleep(0.01)
        go.clear()

    asyncio.run(leave())
    go.set()
    threads[1].join(60)
    assert not threads[1].is_alive()
    assert not caplog.records and not recwarn.list
