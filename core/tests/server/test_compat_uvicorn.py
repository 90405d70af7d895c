"""What :mod:`engineroom.server.http.compat_uvicorn` uses of uvicorn's insides is there."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")

import uvicorn
from uvicorn.server import ServerState

from engineroom.server.http.compat_uvicorn import Connection, Server, connection_class
from engineroom.server.settings import ServerSettings

PROTOCOL = {
    "connections", "cycle", "flow", "loop", "on_response_complete", "send_400_response", "shutdown",
    "timeout_keep_alive", "timeout_keep_alive_handler", "timeout_keep_alive_task", "transport",
}  # fmt: skip
OF_HTTPTOOLS = {"on_headers_complete", "on_message_begin", "on_message_complete", "pipeline"}
CYCLE_OF_HTTPTOOLS = {
    "chunked_encoding", "expected_content_length", "waiting_for_100_continue",
}  # fmt: skip
CYCLE = {
    "disconnected", "flow", "keep_alive", "message_event", "more_body",
    "response_complete", "response_started", "scope", "send", "transport",
}  # fmt: skip
FLOW = {"resume_reading", "write_paused"}
SERVER = {"handle_exit", "server_state", "should_exit", "startup"}


class Wire(asyncio.Transport):
    """A transport that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data):
        self.written += bytes(data)

    def is_closing(self):
        return False

    def close(self):
        pass

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def test_the_names_are_there_once_a_request_has_come(each_parser):
    asked = asyncio.Event()

    async def app(scope, receive, send):
        asked.set()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    class Watched(Connection):
        ends: ClassVar[list[str]] = []

        def before_answer_ends(self):
            self.ends.append("before")

        def answer_ended(self):
            self.ends.append("after")

    config = uvicorn.Config(app, http="h11", log_config=None, lifespan="off", ws="none")
    config.load()
    protocol = connection_class(Watched, mark="here")(config, ServerState(), {})
    assert protocol.mark == "here" and protocol.silent
    wire = Wire()
    protocol.connection_made(wire)
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    fast = each_parser == "httptools"
    names = PROTOCOL | (OF_HTTPTOOLS if fast else {"conn"})
    of_cycle = CYCLE | (CYCLE_OF_HTTPTOOLS if fast else set())
    assert {name for name in names if not hasattr(protocol, name)} == set()
    assert {name for name in of_cycle if not hasattr(protocol.cycle, name)} == set()
    assert {name for name in FLOW if not hasattr(protocol.flow, name)} == set()
    assert protocol.answering and not protocol.answer_begun and not protocol.reading_body
    await asked.wait()
    await asyncio.sleep(0.01)
    assert wire.written.startswith(b"HTTP/1.1 204")
    assert protocol.ends == ["before", "after"] and not protocol.answering
    protocol.connection_lost(None)


def test_the_servers_names_are_there():
    server = Server(None, asyncio.Protocol, ServerSettings(keep_alive_s=0.5))
    assert {name for name in SERVER if not hasattr(uvicorn.Server, name)
            and not hasattr(server, name)} == set()  # fmt: skip
    assert server.config.timeout_keep_alive == 0.5
    server.end(3)
    assert server.should_exit and server.config.timeout_graceful_shutdown == 3
