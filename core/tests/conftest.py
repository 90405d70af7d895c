"""Shared by the tests of core: no hang outlives its test, no environment leaks in."""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import inspect
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no defect.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


# Else pytest-asyncio asks for the current event loop, which makes one that nobody closes.
asyncio.set_event_loop(None)

# A shell without job control starts what runs in the background with interrupts ignored, and the
# processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent))  # for core_doubles.py, whatever the import mode

HANG_S = 20
LOST_S = 120  # a thread or a loop's own end that hangs: nothing but the process can be stopped


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    faulthandler.dump_traceback_later(LOST_S, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        function = getattr(item, "obj", None)
        if here in item.path.parents and inspect.iscoroutinefunction(function):
            item.obj = _bounded(function)


def _bounded(function):
    @functools.wraps(function)
    async def bounded(*args, **kwargs):
        async with asyncio.timeout(HANG_S):
            await function(*args, **kwargs)

    return bounded


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENGINEROOM_HANDLERS", "ENGINEROOM_DISABLED_HANDLERS", "ENGINEROOM_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["yielded", "mailbox"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the doubles hand over their steps: themselves, or as engines with a thread do.

    The marker ``yielded`` says why a test is about the first alone.
    """
    if request.param == "mailbox" and (mark := request.node.get_closest_marker("yielded")):
        pytest.skip(f"steps that are yielded only: {mark.args[0]}")
    if request.param == "mailbox":
        from core_doubles import GateHandler, through_mailboxes

        from engineroom.testing import EchoHandler

        for handler in (GateHandler, EchoHandler):
            monkeypatch.setattr(handler, "generate_tokens", through_mailboxes(handler))
    return request.param
