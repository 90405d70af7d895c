"""What foreign code raises: what is said of it, what gets through, and what ends with it."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import signal
import sys
import threading

import pytest
from hypothesis import given, strategies as st
from raisers import RAISERS, Endless, Mute, MuteByPanic, Odd, PanicException

from engineroom import (
    ConfigurationError,
    EngineRoomError,
    QueueFullError,
    ResourceNotAvailableError,
)
from engineroom.border import (
    MOST_CHARACTERS,
    Border,
    failure,
    formatted,
    in_thread,
    is_interrupt,
    log_failure,
    own_copy,
    passes,
    run_to_end,
    without_frames,
    words,
)

logger = logging.getLogger("engineroom.test")
MENU = pytest.mark.parametrize("name", RAISERS)


def caught(call, *arguments) -> BaseException:
    try:
        call(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


# ── what is said ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no"), "ValueError: no"),
        (ValueError(), "ValueError()"),
        (SystemExit(3), "SystemExit: 3"),
        (PanicException("a\nb"), "PanicException: a\nb"),
        (Mute(), "Mute (it cannot say what happened: RuntimeError)"),
        (MuteByPanic(), "MuteByPanic (it cannot say what happened: PanicException)"),
        (Endless(), f"Endless: {'x' * MOST_CHARACTERS} …"),
        (Odd(), "Odd: odd \\ud800"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_words_are_bounded_and_always_there(error, said):
    assert words(error) == said
    words(error).encode()


# But an interrupt: in the main thread, where this runs, it is the user's.
@pytest.mark.parametrize("name", sorted(set(RAISERS) - {"interrupt"}))
def test_whatever_is_raised_is_logged_with_its_traceback_and_few_words(name, caplog):
    error = caught(RAISERS[name])
    log_failure(logger, error, "it %s", "failed")
    # asyncio may tell of a task that an earlier test has left.
    (record,) = [record for record in caplog.records if record.name == logger.name]
    assert (
        record.getMessage().startswith("it failed")
        and record.funcName == sys._getframe().f_code.co_name
    )
    assert len(caplog.text) < 50_000
    assert f"in {name}" in caplog.text and type(error).__name__ in caplog.text
    assert len(formatted(error)) < 50_000 and f"in {name}" in formatted(error)


def test_a_chain_that_goes_in_a_circle_ends(caplog):
    one, two = ValueError("one"), Mute()
    one.__cause__, two.__cause__ = two, one
    log_failure(logger, one, "failed")
    assert "ValueError: one" in caplog.text and "Mute (it cannot say" in caplog.text


def test_an_error_that_is_kept_keeps_no_frames():
    class Prompt:
        pass

    def fail(prompt):
        try:
            raise ValueError("first")
        except ValueError as error:
            raise BaseExceptionGroup("several", [caught(lambda: 1 / 0), KeyError(1)]) from error

    before = sum(isinstance(o, Prompt) for o in gc.get_objects())
    error = without_frames(caught(fail, Prompt()))
    typed = failure(error)
    assert sum(isinstance(o, Prompt) for o in gc.get_objects()) == before
    assert typed.__cause__ is error and error.exceptions[0].__traceback__ is None


def _raised(link: str, before: Exception) -> Exception:
    """Another error that came of the first one, raised through frames of its own."""
    try:
        try:
            raise before
        except Exception as error:
            if link == "cause":
                raise ValueError(link) from error
            if link == "hidden":
                raise ValueError(link) from None
            if link == "group":
                raise ExceptionGroup(link, [error, ValueError("another")]) from error.__cause__
            raise ValueError(link)  # noqa: B904 - it is to be the context
    except Exception as error:
        return error


@given(st.lists(st.sampled_from(["cause", "context", "hidden", "group"]), max_size=6))
def test_an_error_that_is_kept_has_no_frames_however_it_came_to_be(links: list[str]) -> None:
    error: Exception = ValueError("the first")
    for link in links:
        error = _raised(link, error)
    assert without_frames(error) is error
    left: list[BaseException] = [error]
    seen: set[str] = set()
    while left:
        raised = left.pop()
        seen.add(str(raised))
        assert raised.__traceback__ is None
        left += filter(None, (raised.__cause__, raised.__context__))
        left += getattr(raised, "exceptions", ())
    assert ("the first" in seen) is ("hidden" not in links), "nobody sees what was hidden"


def test_errors_that_are_each_others_causes_are_forgotten_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert without_frames(first) is first
    first.__cause__ = None


class _Own(QueueFullError):
    """A plugin's own, which is not made of a message alone."""

    def __init__(self, queue: int, limit: int) -> None:
        super().__init__(f"{queue} of {limit}")
        self.queue = queue


def test_a_copy_of_an_error_is_one_of_its_own_with_the_same_causes() -> None:
    try:
        try:
            raise KeyError("why")
        except KeyError as error:
            raise _Own(3, 4) from error
    except _Own as raised:
        error = raised
    copy = own_copy(error).with_context(request_id="mine")
    assert (type(copy), str(copy), copy.queue) == (_Own, str(error), 3)
    assert copy.__cause__ is error.__cause__ and copy.__traceback__ is None
    assert (copy.request_id, error.request_id) == ("mine", None)


# ── what gets through ────────────────────────────────────────────────────────────────────────────


@MENU
def test_the_border_lets_nothing_out_that_is_not_typed(name, caplog):
    def cross():
        with Border(logger, "handler 'x': capabilities", "m"):
            RAISERS[name]()

    if name == "interrupt":
        with pytest.raises(KeyboardInterrupt):  # the main thread's own
            cross()
        outcome: list[BaseException] = []
        thread = threading.Thread(target=lambda: outcome.append(caught(cross)))
        thread.start()
        thread.join()
        (error,) = outcome
    else:
        error = caught(cross)
    kind = ResourceNotAvailableError if name == "no_memory" else EngineRoomError
    assert isinstance(error, kind) and error.model_id == "m"
    assert error.message.startswith("handler 'x': capabilities failed: ")
    assert len(error.message) < MOST_CHARACTERS + 200
    assert error.__cause__ is not None and error.__cause__.__traceback__ is None
    assert "capabilities failed for model 'm'" in caplog.text and f"in {name}" in caplog.text


def test_typed_errors_pass_the_border_as_they_are(caplog):
    with pytest.raises(ConfigurationError, match=r"^no$"), Border(logger, "x"):
        raise ConfigurationError("no")
    assert not caplog.records


async def test_a_cancellation_passes_where_it_is_our_own():
    async def foreign(forever):
        if forever:
            await asyncio.Event().wait()
        raise asyncio.CancelledError

    async def cross(forever):
        with Border(logger, "x"):
            await foreign(forever)

    task = asyncio.create_task(cross(True))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    with pytest.raises(EngineRoomError, match="CancelledError"):
        await cross(False)


async def test_a_coroutine_that_is_closed_is_no_failure_and_a_foreign_generator_exit_is():
    seen: list[bool] = []

    async def foreign(own):
        if own:
            raise GeneratorExit
        await asyncio.sleep(60)

    async def cross(own):
        try:
            await foreign(own)
        except BaseException as error:
            seen.append(passes(error))
            raise

    for own in (False, True):
        coroutine = cross(own)
        if own:
            with pytest.raises(GeneratorExit):
                coroutine.send(None)
        else:
            coroutine.send(None)
            coroutine.close()
    assert seen == [True, False]


class Handler:
    """Handles a signal, as a method and as an object."""

    def method(self, *_: object) -> None:
        raise SystemExit(7)

    def __call__(self, *_: object) -> None:
        raise KeyboardInterrupt


def function(error: BaseException, *_: object) -> None:
    raise error


@pytest.mark.skipif(sys.platform == "win32", reason="signals to oneself")
@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (signal.default_int_handler, KeyboardInterrupt),
        (Handler().method, SystemExit),
        (Handler(), KeyboardInterrupt),
        (functools.partial(function, PanicException()), PanicException),
    ],
    ids=["default", "method", "object", "partial"],
)
def test_what_a_signals_handler_raises_is_the_programs_own(handler, kind):
    before = signal.signal(signal.SIGINT, handler)
    try:
        error = caught(lambda: os.kill(os.getpid(), signal.SIGINT) or sum(range(10**6)))
        group = BaseExceptionGroup("with others", [error, ValueError()])
        theirs = caught(RAISERS["interrupt"]), caught(RAISERS["leave"])
        own = [is_interrupt(e) for e in (error, group, *theirs)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(error, kind)
    # With Python's own handler nobody could tell one from the other.
    assert own == [True, True, handler is signal.default_int_handler, False]


# ── threads and loops ────────────────────────────────────────────────────────────────────────────


@MENU
async def test_a_call_in_a_thread_always_ends_its_wait(name):
    with pytest.raises(Exception) as raised:
        await asyncio.wait_for(in_thread(RAISERS[name]), 10)
    assert not isinstance(raised.value, TimeoutError)


@pytest.mark.parametrize("name", ["leave", "interrupt"])
@pytest.mark.parametrize("where", ["task", "callback"])
def test_a_loop_goes_on_where_a_librarys_task_would_end_it(name, where, caplog):
    outcome: list[object] = []

    async def library():
        RAISERS[name]()

    async def work():
        loop = asyncio.get_running_loop()
        for _ in range(2):
            if where == "task":
                other = loop.create_task(library())
                await asyncio.wait([other])
                assert other.exception() is not None
            else:
                loop.call_soon(RAISERS[name])
                await asyncio.sleep(0.001)
        return "done"

    def run():
        with asyncio.Runner() as runner:
            outcome.append(run_to_end(runner, work()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert outcome == ["done"]
    assert caplog.text.count("would have ended the program") == 2 and f"in {name}" in caplog.text


def test_what_the_work_itself_raises_ends_it():
    async def work():
        raise SystemExit(5)

    with asyncio.Runner() as runner, pytest.raises(SystemExit) as raised:
        run_to_end(runner, work())
    assert raised.value.code == 5


@pytest.mark.skipif(sys.platform == "win32", reason="signals to oneself")
def test_ctrl_c_ends_the_work():
    ended: list[str] = []

    async def work():
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    with asyncio.Runner() as runner, pytest.raises(KeyboardInterrupt):
        run_to_end(runner, work())
    assert ended == ["work"]
