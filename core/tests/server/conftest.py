"""Servers for the tests. Modules that need the extras say so, and are skipped without them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # whatever the import mode

if TYPE_CHECKING:
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


@pytest.fixture(params=["httptools", "h11"])
def each_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server with uvicorn's fast parser, and with the one that is always there."""
    if request.param == "h11":
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    else:
        pytest.importorskip("httptools", reason="needs httptools")
    return str(request.param)
