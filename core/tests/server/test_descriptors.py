"""Open files: as many as connections need, and a word where there are none left."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("resource", reason="a limit of POSIX")

import resource

from engineroom.server import descriptors
from engineroom.server.descriptors import OTHERS, raise_limit
from engineroom.server.settings import ServerSettings

SERVER = """
import logging, sys
from engineroom import LLMInferenceService, LLMModelManager
from engineroom.server import ServerSettings, serve
from engineroom.server import descriptors
from engineroom.testing import EchoHandler

descriptors._LOOK_S = 0.05
logging.basicConfig(level=logging.WARNING, format="%(message)s")
manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "echo:"}]})
serve(
    LLMInferenceService(manager, handlers=[EchoHandler()]),
    ServerSettings(port=0, max_connections=200, header_timeout_s=60),
    preload=False,
    started=lambda url: print(url, flush=True),
)
"""


@pytest.fixture
def limits(monkeypatch):
    """Stands for the system's: soft and hard, and what was set."""
    state = {"soft": 1024, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (state["soft"], state["hard"]))
    monkeypatch.setattr(
        resource, "setrlimit", lambda _, both: state.update(soft=both[0], hard=both[1])
    )
    return state


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "then", "told"),
    [
        (1024, 4096, 2048, 2048 + OTHERS, False),
        (1024, -1, 100_000, 100_000 + OTHERS, False),
        (4096, 8192, 2048, 4096, False),
        (-1, -1, 2048, -1, False),
        (1024, 2048, 2048, 2048, True),
        (1024, 1024, 2048, 1024, True),
        (256, 1024, 100, 100 + OTHERS, False),
    ],
)
def test_the_limit_is_raised_as_far_as_connections_need(
    limits, caplog, soft, hard, connections, then, told
):
    limits |= {"soft": soft, "hard": hard}
    raise_limit(ServerSettings(max_connections=connections))
    assert (limits["soft"], limits["hard"]) == (then, hard)
    assert ("too few" in caplog.text) is told


def test_a_system_that_refuses_is_told_of(limits, caplog, monkeypatch):
    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_limit(ServerSettings())
    assert "may have 1024 files open, which is too few for 2048 connections" in caplog.text


async def test_that_there_are_none_left_is_told_once_in_a_while(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    clock = [1000.0]
    monkeypatch.setattr(descriptors.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        descriptors.os, "open", lambda *_: (_ for _ in ()).throw(OSError(24, os.strerror(24)))
    )
    watch = descriptors.DescriptorWatch()
    with watch:
        for _ in range(5):
            watch._look()
        assert caplog.text.count("as many files open as it may") == 1
        clock[0] += 61
        watch._look()
        assert caplog.text.count("as many files open as it may") == 2


def test_a_server_raises_its_limit_and_tells_when_it_is_reached(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as written:
        command = f"ulimit -Sn 40; ulimit -Hn 90; exec {sys.executable} -c '{SERVER}'"
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdout=subprocess.PIPE, stderr=written
        )
    connections = []

    def status(connection: socket.socket) -> bytes:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}") and (part := connection.recv(65536)):
            answer += part
        return answer.split(b"\r\n")[0]

    try:
        port = int(process.stdout.readline().rsplit(b":", 1)[1])
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (90, 90)
        assert "too few for 200 connections" in log.read_text()
        for _ in range(20):
            connections += [socket.create_connection(("127.0.0.1", port), timeout=10)]
        early = connections[5]
        assert status(early) == b"HTTP/1.1 200 OK"
        for _ in range(100):
            connections += [socket.create_connection(("127.0.0.1", port), timeout=10)]
        for _ in range(400):
            if "as many files open as it may" in log.read_text():
                break
            time.sleep(0.05)
        else:
            raise AssertionError(log.read_text())
        # Who has a connection is answered on it as before, and whoever comes later once others go.
        assert [status(early) for _ in range(3)] == [b"HTTP/1.1 200 OK"] * 3
        for connection in connections:
            connection.close()
        for _ in range(400):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                try:
                    if status(connection) == b"HTTP/1.1 200 OK":
                        break
                except OSError:
                    pass
            time.sleep(0.05)
        else:
            raise AssertionError("it does not answer any more")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
        assert log.read_text().count("as many files open as it may") == 1
    finally:
        process.kill()
        process.communicate()
        for connection in connections:
            connection.close()
