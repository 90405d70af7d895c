"""Waking an event loop: nothing lost, nothing out of order, nothing left, the GIL kept."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engineroom.generation import waker as waker_module
from engineroom.generation.waker import LoopWaker

KINDS = ["eventfd", "without eventfd", "uvloop"]


@pytest.fixture(params=KINDS)
def loop(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[asyncio.AbstractEventLoop]:
    made: asyncio.AbstractEventLoop
    if request.param == "uvloop":
        made = pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop()
    else:
        made = asyncio.new_event_loop()
    if request.param == "eventfd" and waker_module._eventfd_writer() is None:
        pytest.skip("this system has no eventfd")
    if request.param == "without eventfd":
        monkeypatch.setattr(waker_module, "_eventfd_writer", lambda: None)
    yield made
    made.close()


@pytest.fixture
def own_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One that has a descriptor for its waker."""
    if waker_module._eventfd_writer() is None:
        pytest.skip("this system has no eventfd")
    made = asyncio.new_event_loop()
    yield made
    made.close()


async def _waker() -> LoopWaker:
    return LoopWaker.of(asyncio.get_running_loop())


async def rung_by(ringers: Sequence[Callable[[], None]], done: asyncio.Event) -> None:
    """Let each ring in a thread of its own, until ``done`` is set."""
    threads = [threading.Thread(target=ring) for ring in ringers]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(60):
        await done.wait()
    for thread in threads:
        thread.join()


def test_a_loop_has_one(loop: asyncio.AbstractEventLoop) -> None:
    assert loop.run_until_complete(_waker()) is loop.run_until_complete(_waker())


def test_every_call_of_every_thread_comes_in_its_order(loop: asyncio.AbstractEventLoop) -> None:
    threads, calls = 4, 500
    seen: list[tuple[int, int]] = []

    async def main() -> None:
        waker = await _waker()
        done = asyncio.Event()

        def take(item: tuple[int, int]) -> None:
            seen.append(item)
            if len(seen) == threads * calls:
                done.set()

        def ring(number: int) -> None:
            for place in range(calls):
                waker.call(take, (number, place))

        await rung_by([partial(ring, number) for number in range(threads)], done)

    loop.run_until_complete(main())
    for number in range(threads):
        assert [place for who, place in seen if who == number] == list(range(calls))


def test_no_ring_is_lost_between_two_sleeps_of_the_loop(loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        waker = await _waker()
        done = asyncio.Event()

        def ring() -> None:
            for _ in range(300):
                answered = threading.Event()
                waker.call(lambda event: event.set(), answered)
                if not answered.wait(10):
                    return
            waker.call(lambda _: done.set(), None)

        await rung_by([ring], done)

    loop.run_until_complete(main())


def test_a_call_that_raises_is_reported_and_keeps_no_other_back(
    loop: asyncio.AbstractEventLoop,
) -> None:
    reported: list[dict[str, Any]] = []

    def broken(_: object) -> None:
        raise ValueError("broken")

    async def main() -> None:
        loop.set_exception_handler(lambda _, context: reported.append(context))
        waker, done = await _waker(), asyncio.Event()
        waker.call(broken, None)
        waker.call(lambda event: event.set(), done)
        async with asyncio.timeout(10):
            await done.wait()

    loop.run_until_complete(main())
    assert [str(context["exception"]) for context in reported] == ["broken"]


def test_a_closed_loop_says_so(loop: asyncio.AbstractEventLoop) -> None:
    waker = loop.run_until_complete(_waker())
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        waker.call(print, "never")


def test_loops_that_are_gone_leave_no_file_open() -> None:
    def descriptors() -> int:
        gc.collect()
        return len(list(files.iterdir()))

    files = Path("/proc/self/fd")
    if not files.is_dir():
        pytest.skip("only Linux lists a process's files here")
    asyncio.run(_waker())
    before = descriptors()
    for _ in range(20):
        asyncio.run(_waker())
    assert descriptors() <= before


def test_it_keeps_nothing_of_the_request_that_came_first(
    own_loop: asyncio.AbstractEventLoop,
) -> None:
    class Held:
        pass

    variable: contextvars.ContextVar[Held] = contextvars.ContextVar("held")

    async def first() -> weakref.ref[Held]:
        held = Held()
        variable.set(held)
        await _waker()
        return weakref.ref(held)

    gone = own_loop.run_until_complete(first())
    gc.collect()
    assert gone() is None


def test_who_rings_keeps_the_interpreter(own_loop: asyncio.AbstractEventLoop) -> None:
    """With no forced switches the loop can run only when the ringing thread lets it."""
    early: list[int] = []

    async def main() -> None:
        waker, done = await _waker(), asyncio.Event()

        def ring() -> None:
            for number in range(100):
                answered, on = threading.Event(), [False]
                time.sleep(0.002)  # the loop is to be asleep: waking it takes longest
                waker.call(_noting(on, early, number, answered), None)
                on[0] = True  # nothing since the ring lets the interpreter go
                answered.wait(10)
            waker.call(lambda _: done.set(), None)

        await rung_by([ring], done)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        own_loop.run_until_complete(main())
    finally:
        sys.setswitchinterval(interval)
    assert not early


def _noting(
    on: list[bool], early: list[int], number: int, answered: threading.Event
) -> Callable[[object], None]:
    def note(_: object) -> None:
        if not on[0]:
            early.append(number)
        answered.set()

    return note
