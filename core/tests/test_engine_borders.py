"""Two models on one thread, of which one raises whatever there is: the other never notices."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import platform
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from raisers import RAISERS
from test_batching import CountTask, read, until

from engineroom import (
    BatchingEngine,
    DecodeLoop,
    EngineDeadError,
    InferenceRequest,
    TokenStep,
    request_logger,
    run_in_new_thread,
)
from engineroom.engine import BackgroundLoad

logger = logging.getLogger("engineroom.tests")
MENU = pytest.mark.parametrize("name", RAISERS)


class SharedEngine(BatchingEngine[CountTask]):
    """Counts; whichever of its methods is named in ``hostile`` raises. Not a runtime."""

    def __init__(self, name: str, loop: DecodeLoop) -> None:
        super().__init__(name, loop, max_running=4, max_queue=4)
        self.hostile: dict[str, Callable[[], object]] = {}
        self.shuts = 0
        self.open()

    def task(self, length: int) -> CountTask:
        request = InferenceRequest(model_id=self.name, prompt="p")
        return self.submit(CountTask(length=length, log=request_logger(logger, request)))

    def _pass(self, method: str) -> None:
        if (raiser := self.hostile.get(method)) is not None:
            raiser()

    def can_step(self) -> bool:
        self._pass("can_step")
        return True

    def may_start(self, task: CountTask) -> bool:
        self._pass("may_start")
        return True

    def started(self, task: CountTask) -> None:
        self._pass("started")

    def released(self, task: CountTask) -> None:
        self._pass("released")

    def interrupt(self, on: bool) -> None:
        self._pass("interrupt")

    def shut(self) -> None:
        self.shuts += 1
        self._pass("shut")

    def step(self) -> None:
        self._pass("step")
        parcels = []
        for task in list(self.running):
            task.given += 1
            last = task.given == task.length
            if last:
                self.leave(task)
            parcels.append(
                (task.mailbox, TokenStep((task.given,), finish="length" if last else None))
            )
        self.hand_over(parcels)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[SharedEngine, SharedEngine]]:
    loop = DecodeLoop("shared")
    engines = SharedEngine("bad", loop), SharedEngine("good", loop)
    yield engines
    for engine in engines:
        engine.hostile = {}
        await asyncio.wait_for(asyncio.to_thread(engine.close), 20)
    assert not [t.name for t in threading.enumerate() if t.name == "shared"]


@MENU
async def test_a_step_that_raises_ends_its_own_engine_alone(pair, name, caplog):
    bad, good = pair
    neighbour, victim, waiting = good.task(2000), bad.task(10**9), bad.task(10**9)
    await until(lambda: victim.given > 3 and neighbour.given > 3)
    bad.hostile["step"] = RAISERS[name]
    for task in (victim, waiting):
        with pytest.raises(EngineDeadError, match="has died"):
            await read(task)
    assert not bad.health().ok and bad.health().detail and bad.shuts == 1
    with pytest.raises(EngineDeadError) as refused:
        bad.task(3)
    assert refused.value.__cause__.__traceback__ is None  # whoever keeps it keeps no frames
    assert good.health().ok
    assert await read(neighbour) == list(range(1, 2001))
    assert await read(good.task(3)) == [1, 2, 3]
    assert f"in {name}" in caplog.text


@pytest.mark.parametrize("method", ["can_step", "may_start", "started", "released", "shut"])
@pytest.mark.parametrize("name", ["panic", "leave"])
async def test_so_does_whatever_else_an_engine_is_asked_for(pair, name, method):
    bad, good = pair
    neighbour, victim = good.task(2000), bad.task(10**9)
    await until(lambda: victim.given > 3)
    bad.hostile[method] = RAISERS[name]
    if method == "shut":
        bad.hostile["step"] = RAISERS[name]
    if method == "released":
        bad.cancel(victim)
    others = [bad.task(3)] if method in ("may_start", "started") else []
    for task in [*others, *([] if method == "released" else [victim])]:
        with pytest.raises(EngineDeadError):
            await read(task)
    await until(lambda: not bad.health().ok)
    assert await read(neighbour) == list(range(1, 2001))


@pytest.mark.parametrize("name", ["panic", "leave", "mute"])
async def test_an_abort_that_raises_stops_neither_cancelling_nor_closing(pair, name):
    bad, good = pair
    victim = bad.task(10**9)
    await until(lambda: victim.given > 3)
    bad.hostile["interrupt"] = RAISERS[name]
    bad.cancel(victim)
    await until(lambda: victim.done)
    await asyncio.wait_for(asyncio.to_thread(bad.close), 20)
    assert bad.shuts == 1 and await read(good.task(2)) == [1, 2]


def raised_from_outside() -> None:
    """As a debugger or a library would: into the thread, wherever it is."""
    (thread,) = [t for t in threading.enumerate() if t.name == "shared"]
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )


@pytest.fixture
def uncollected():
    """No collection: the strike could hit a callback of the collector's, which hypothesis has, and
    be swallowed there.
    """
    gc.disable()
    yield
    gc.enable()


async def test_a_thread_that_is_ended_between_two_turns_is_renewed(pair, uncollected):
    bad, good = pair
    tasks = bad.task(2000), good.task(2000)
    await until(lambda: all(task.given > 3 for task in tasks))
    raised_from_outside()
    outcomes = await asyncio.gather(*map(read, tasks), return_exceptions=True)
    # It strikes wherever the thread is: in a turn, whose engine is lost, or between two.
    kept = [outcome for outcome in outcomes if outcome == list(range(1, 2001))]
    assert len(kept) >= 1
    assert all(isinstance(o, EngineDeadError) for o in outcomes if o not in kept)
    for engine in pair:
        if engine.health().ok:
            assert await read(engine.task(3)) == [1, 2, 3]


CALL_TO_END_A_THREAD = {"x86_64": 60, "aarch64": 93}.get(platform.machine())


@pytest.mark.skipif(
    sys.platform != "linux" or CALL_TO_END_A_THREAD is None,
    reason="the number of the system's call that ends a thread alone",
)
def test_a_thread_that_ends_without_a_word_is_noticed_and_renewed():
    """A library may end the thread itself, of which Python is not told: it believes in that thread
    for ever, so that the test is a program of its own.
    """
    program = "import asyncio, test_engine_borders as t; asyncio.run(t.ends_without_a_word())"
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "without a word" in done.stderr


async def ends_without_a_word() -> None:
    logging.basicConfig()
    loop = DecodeLoop("shared")
    bad, good = SharedEngine("bad", loop), SharedEngine("good", loop)
    neighbour, victim, waiting = good.task(500), bad.task(10**9), bad.task(10**9)
    await until(lambda: victim.given > 3 and neighbour.given > 3)
    libc = ctypes.CDLL(None)
    bad.hostile["step"] = lambda: libc.syscall(CALL_TO_END_A_THREAD, 0)
    for task in (victim, waiting):
        with pytest.raises(EngineDeadError, match="the thread that computed it has ended"):
            await read(task)
    assert await read(neighbour) == list(range(1, 501))
    assert not bad.health().ok and good.health().ok and bad.shuts == 0
    for engine in (bad, good):
        await asyncio.wait_for(asyncio.to_thread(engine.close), 20)


class BareWorker:
    """Not a :class:`BatchingEngine`: it raises where it must not."""

    def __init__(self, where: str, raiser: Callable[[], None]) -> None:
        self.where, self.raiser = where, raiser

    @property
    def has_work(self) -> bool:
        if self.where == "has_work":
            self.raiser()
        return True

    def turn(self) -> bool:
        self.raiser()
        return True


@pytest.mark.parametrize("where", ["has_work", "turn"])
@MENU
async def test_a_worker_that_must_not_raise_and_does_is_let_go(where, name):
    loop = DecodeLoop("shared")
    good = SharedEngine("good", loop)
    neighbour = good.task(500)
    worker = BareWorker(where, RAISERS[name])
    loop.add(worker)
    await asyncio.wait_for(asyncio.to_thread(loop.wait_for_end, worker), 20)
    assert await read(neighbour) == list(range(1, 501))
    await asyncio.to_thread(good.close)


# ── loads ────────────────────────────────────────────────────────────────────────────────────────


@MENU
async def test_a_call_in_a_new_thread_always_ends_its_wait(name):
    with pytest.raises(Exception) as raised:
        await asyncio.wait_for(run_in_new_thread(RAISERS[name], "call"), 20)
    assert not isinstance(raised.value, TimeoutError)


@MENU
async def test_a_load_that_raises_is_an_error_of_the_load(name, caplog):
    load: BackgroundLoad[None] = BackgroundLoad(RAISERS[name], lambda _: None, name="some")
    with pytest.raises(Exception) as raised:
        await asyncio.wait_for(load.result(), 20)
    assert not isinstance(raised.value, TimeoutError)
    if name in ("panic", "leave", "interrupt", "end_generator", "cancel"):
        assert "the load failed" in str(raised.value) and f"in {name}" in caplog.text


@MENU
async def test_what_fails_to_be_given_back_is_logged(name, caplog):
    load: BackgroundLoad[str] = BackgroundLoad(
        lambda: "made", lambda _: RAISERS[name](), name="some"
    )
    assert await load.result() == "made"
    load.abandon()
    await until(lambda: "could not be given back" in caplog.text)
