"""Servers for the tests. Modules that need the extras say so, and are skipped without them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # whatever the import mode

if TYPE_CHECKING:
    import openai
    from server_running import Running


@pytest.fixture(autouse=True)
def _machine_may_be_busy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of the loop's lag is of no test but its own: the cores have other work."""
    if not request.module.__name__.endswith("test_loop_meter"):
        monkeypatch.setattr(logging.getLogger("engineroom.server.loop"), "disabled", True)


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server without limits of note, for tests that change nothing about it."""
    from server_running import running

    with running() as run:
        yield run


@pytest.fixture(scope="session")
def start() -> Any:
    """What starts a server with settings of its own."""
    from server_running import running

    return running


@pytest.fixture(scope="module")
def run(start: Any) -> Iterator[Running]:
    """A server whose runtime says what a test has written down."""
    from tool_doubles import DeltaHandler

    with start(handler=DeltaHandler()) as run:
        yield run


@pytest.fixture(scope="module")
def openai_at() -> Iterator[Callable[[str], openai.OpenAI]]:
    """What makes a client of OpenAI's for a server's address."""
    import openai

    with ExitStack() as clients:
        yield lambda url: clients.enter_context(
            openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        )


@pytest.fixture(scope="module")
def client(run: Running, openai_at: Callable[[str], openai.OpenAI]) -> openai.OpenAI:
    """OpenAI's client of that server."""
    return openai_at(run.url)


@pytest.fixture(params=["httptools", "h11"])
def each_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server with uvicorn's fast parser, and with the one that is always there."""
    if request.param == "h11":
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    else:
        pytest.importorskip("httptools", reason="needs httptools")
    return str(request.param)
