"""The threads that prompts are read in: bounded, fair, and gone when nobody needs them."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from engineroom import InferenceError, QueueFullError, ResourceNotAvailableError
from engineroom.hangs import STUCK_VARIABLE
from engineroom.prompts import PromptLane, check_stopped, expect_tokens, threads as module, work
from engineroom.prompts.threads import MOST_THREADS
from engineroom.prompts.work import ReadingStoppedError, TooManyTokensError, taking_turns

NAME = "engineroom-prompts"


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


async def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


class Gate:
    """Work that runs until it is let go, and notes who runs."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.running: list[str] = []
        self.done: list[str] = []

    def pass_through(self, name: str) -> str:
        self.running.append(name)
        assert self.open.wait(20)
        self.done.append(name)
        return name


@pytest.fixture
async def lane() -> AsyncIterator[PromptLane]:
    lane = PromptLane()
    yield lane
    await asyncio.to_thread(lane.close)
    await until(lambda: not own_threads())  # one may have begun for what another one took


async def test_a_call_is_made_in_a_thread_and_its_value_comes_back(lane: PromptLane) -> None:
    assert await lane.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 // 0)
    assert 1 <= len(own_threads()) <= 2


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, BaseException, StopIteration])
async def test_what_is_no_exception_ends_its_own_call_alone(
    lane: PromptLane, kind: type[BaseException]
) -> None:
    def panic() -> None:
        raise kind("called `Option::unwrap()`")

    with pytest.raises(InferenceError, match=f"{kind.__name__}: called") as caught:
        await lane.run(panic)
    assert isinstance(caught.value.__cause__, kind)
    assert await lane.run(lambda: 1) == 1


async def test_neither_a_key_nor_a_model_has_all_threads(lane: PromptLane) -> None:
    gate, other = Gate(), PromptLane()
    slow = [
        asyncio.create_task(lane.run(partial(gate.pass_through, f"{key}{i}"), key=key))
        for key in "ab"
        for i in range(5)
    ]
    await until(lambda: len(gate.running) == 3)
    # Another key's prompt of the same model waits for none of them but in its turn.
    assert sorted(name[0] for name in gate.running) in (["a", "a", "b"], ["a", "b", "b"])
    # Another model's prompts do not wait at all.
    assert [await other.run(lambda i=i: i) for i in range(20)] == list(range(20))
    assert len(gate.running) == 3
    assert len(own_threads()) <= MOST_THREADS
    gate.open.set()
    await asyncio.gather(*slow)
    assert len(gate.done) == 10
    await asyncio.to_thread(other.close)


async def test_keys_take_turns_and_short_prompts_overtake_long_ones(lane: PromptLane) -> None:
    gate = Gate()
    first = [
        asyncio.create_task(lane.run(partial(gate.pass_through, "first"), key=key))
        for key in ("a", "b", "c")
    ]
    await until(lambda: len(gate.running) == 3)
    order: list[str] = []
    waiting = [
        asyncio.create_task(lane.run(partial(order.append, f"{key}{n}"), key=key, size=size))
        for key, count in (("a", 6), ("b", 1), ("c", 1))
        for n in range(count)
        for size in (5_000_000 if n == 0 and key == "a" else 10,)
    ]
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(*first, *waiting)
    assert order.index("a0") == max(order.index(f"a{n}") for n in range(6))  # the long one
    assert order.index("b0") < order.index("a3") and order.index("c0") < order.index("a3")


async def test_a_long_prompt_is_overtaken_so_often_and_no_more(lane: PromptLane) -> None:
    gate, order = Gate(), []
    first = [asyncio.create_task(lane.run(partial(gate.pass_through, "x"))) for _ in range(2)]
    await until(lambda: len(gate.running) == 2)
    await asyncio.sleep(0)
    names = ["long", *map(str, range(10))]
    waiting = [
        asyncio.create_task(
            lane.run(partial(order.append, name), size=5_000 if name == "long" else 0)
        )
        for name in names
    ]
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(*first, *waiting)
    assert 3 <= order.index("long") <= 7


async def test_a_cancelled_call_leaves_the_queue_or_is_told_to_stop(lane: PromptLane) -> None:
    gate = Gate()
    stopped = threading.Event()

    def loop() -> None:
        gate.running.append("loop")
        try:
            while True:
                check_stopped()
                time.sleep(0.001)
        except ReadingStoppedError:
            stopped.set()
            raise

    running = asyncio.create_task(lane.run(loop))
    blocking = asyncio.create_task(lane.run(partial(gate.pass_through, "a")))
    await until(lambda: len(gate.running) == 2)
    waiting = asyncio.create_task(lane.run(partial(gate.pass_through, "never")))
    await asyncio.sleep(0.01)
    for task in (waiting, running):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(stopped.is_set)
    gate.open.set()
    assert await blocking == "a"
    assert await lane.run(lambda: 1) == 1
    assert "never" not in gate.running


async def test_what_waits_is_bounded(lane: PromptLane, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    tasks = [
        asyncio.create_task(lane.run(partial(gate.pass_through, f"{i}"), key=f"{i % 2}"))
        for i in range(4)
    ]
    await until(lambda: len(gate.running) == 3)
    tasks += [asyncio.create_task(lane.run(partial(gate.pass_through, "x"))) for _ in range(2)]
    await asyncio.sleep(0)
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    with pytest.raises(QueueFullError, match="3 prompts wait"):
        await lane.run(lambda: 1)
    gate.open.set()
    await asyncio.gather(*tasks)


async def test_nothing_is_read_once_a_lane_is_closed() -> None:
    lane, gate = PromptLane(), Gate()
    began = threading.Event()

    def loop() -> None:
        began.set()
        while True:
            check_stopped()

    loops = asyncio.create_task(lane.run(loop))
    running = asyncio.create_task(lane.run(partial(gate.pass_through, "runs")))
    await until(lambda: began.is_set() and bool(gate.running))
    waiting = asyncio.create_task(lane.run(partial(gate.pass_through, "waits")))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(lane.close))
    with pytest.raises(ReadingStoppedError):
        await loops
    assert not closing.done()  # something still reads
    gate.open.set()
    await closing
    assert gate.done == ["runs"] and await running == "runs"
    for refused in (waiting, lane.run(lambda: 1)):
        with pytest.raises(ResourceNotAvailableError, match="being unloaded"):
            await refused
    await until(lambda: not own_threads())  # one may have begun for what another one took
    lane.close()


async def test_threads_that_nobody_needs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.01)
    lane = PromptLane()
    for _ in range(3):
        assert await lane.run(lambda: 1) == 1
        await until(lambda: not own_threads())


async def test_a_refusal_leaves_nothing_behind(lane: PromptLane) -> None:
    class Text(str):
        __slots__ = ("__weakref__",)

    def refuse(text: str) -> None:
        raise ValueError("no")

    gc.disable()
    try:
        text = Text("x" * 1000)
        alive = weakref.ref(text)
        with pytest.raises(ValueError, match="no") as caught:
            await lane.run(partial(refuse, text))
        del text, caught
        await until(lambda: alive() is None)
    finally:
        gc.enable()


async def test_far_too_many_tokens_are_not_listed(lane: PromptLane) -> None:
    with pytest.raises(TooManyTokensError):
        await lane.run(partial(expect_tokens, 101_001), most=1000)
    # A refusal of some more tells the exact number, and so they are listed.
    await lane.run(partial(expect_tokens, 101_000), most=1000)
    await lane.run(partial(expect_tokens, 10**9))
    expect_tokens(10**9)
    check_stopped()


async def test_several_event_loops_share_the_threads(lane: PromptLane) -> None:
    def other_loop() -> int:
        return asyncio.run(lane.run(lambda: 7))

    values = await asyncio.gather(*(asyncio.to_thread(other_loop) for _ in range(4)))
    assert values == [7] * 4


async def test_of_those_that_render_one_does_at_a_time_and_each_goes_on(
    lane: PromptLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_SLICE_S", 0.0005)
    at_once = most = 0
    order: list[str] = []

    def render(name: str) -> None:
        nonlocal at_once, most
        with taking_turns(), taking_turns():
            for _ in range(20):
                at_once += 1
                most = max(most, at_once)
                order.append(name)
                time.sleep(0.0002)
                at_once -= 1
                check_stopped()

    await asyncio.gather(*(lane.run(partial(render, name), key=name) for name in "abc"))
    assert most == 1 and len(order) == 60
    assert order != sorted(order)  # nobody waited for another's end


async def test_a_turn_is_given_back_whatever_ends_it(lane: PromptLane) -> None:
    def stopped() -> None:
        with taking_turns():
            while True:
                check_stopped()

    def fails() -> None:
        with taking_turns():
            raise ZeroDivisionError

    for _ in range(2):
        task = asyncio.create_task(lane.run(stopped))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(ZeroDivisionError):
            await lane.run(fails)
    with taking_turns():  # nor does anybody take one elsewhere
        assert await lane.run(lambda: 1) == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STUCK_VARIABLE, "0.1")
    monkeypatch.setattr(module, "_LOOK_S", 0.02)


@pytest.mark.usefixtures("impatient")
async def test_a_prompt_that_never_ends_is_given_up_and_the_others_are_read(
    lane: PromptLane, caplog: pytest.LogCaptureFixture
) -> None:
    gate, other = Gate(), PromptLane()

    def hang(name: str) -> str:  # and has the turn of those that render
        with taking_turns():
            return gate.pass_through(name)

    def render() -> int:
        with taking_turns():
            return 7

    for count in range(1, 4):
        with pytest.raises(InferenceError, match=r"not come to an end after 0\.1 s") as caught:
            await lane.run(partial(hang, f"{count}"))
        assert type(caught.value) is InferenceError
        assert f"in {count} of 3 threads" in lane.stuck()
        # The place of the key and the turn are free again, for this model as well.
        assert await other.run(render) == 7 and not other.stuck()
        if count < 3:
            assert await asyncio.gather(*(lane.run(render) for _ in range(20))) == [7] * 20
    with pytest.raises(ResourceNotAvailableError, match="3 do not come to an end"):
        await lane.run(render)
    assert len(own_threads()) <= 3 + MOST_THREADS
    gate.open.set()
    await until(lambda: not lane.stuck())
    assert await asyncio.gather(*(lane.run(render) for _ in range(20))) == [7] * 20
    await asyncio.to_thread(other.close)
    told = [r.getMessage() for r in caplog.records if r.name == "engineroom.prompts"]
    assert sum(STUCK_VARIABLE in line for line in told) == 3
    await until(lambda: caplog.text.count("given up has come to an end") == 3)


@pytest.mark.usefixtures("impatient")
async def test_those_that_wait_behind_threads_that_are_all_stuck_are_told(lane: PromptLane) -> None:
    gate = Gate()
    stuck = [
        asyncio.create_task(lane.run(partial(gate.pass_through, f"{i}"), key=f"{i}"))
        for i in range(3)
    ]
    await until(lambda: len(gate.running) == 3)
    waiting = [asyncio.create_task(lane.run(lambda: 1, key=f"{i % 2}")) for i in range(6)]
    ended = await asyncio.gather(*stuck, *waiting, return_exceptions=True)
    assert [type(error) for error in ended[:3]] == [InferenceError] * 3
    assert {type(error) for error in ended[3:]} == {ResourceNotAvailableError}
    gate.open.set()
    await until(lambda: not lane.stuck())
    assert await lane.run(lambda: 1, key="0") == 1


@pytest.mark.usefixtures("impatient")
async def test_nothing_that_a_stuck_prompt_reads_with_is_freed_under_it() -> None:
    lane, gate = PromptLane(), Gate()
    with pytest.raises(InferenceError):
        await lane.run(partial(gate.pass_through, "x"))
    closing = asyncio.create_task(asyncio.to_thread(lane.close))
    await asyncio.sleep(0.05)
    assert not closing.done()
    gate.open.set()
    await closing
    await until(lambda: not own_threads())


async def test_what_takes_long_and_ends_in_time_is_not_given_up(
    lane: PromptLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STUCK_VARIABLE, "0")
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    assert await lane.run(lambda: time.sleep(0.1)) is None
    assert not lane.stuck()
