"""What comes on a connection out of its turn: ahead of it, behind an answer, or broken."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

pytest.importorskip("uvicorn")

pytestmark = pytest.mark.usefixtures("each_parser")

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def asked(prompt: str, **fields: Any) -> bytes:
    body = {"model": "default", "prompt": prompt, **fields}
    return post(json.dumps(body).encode(), "content-type: application/json")


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def send_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"a: b\r\n")


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """One answer with a length, and nothing of what follows it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        assert byte, head
        head += byte
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return int(head.split()[1]), body


# ── behind an answer ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [10, 100_000])
def test_the_body_of_a_request_that_was_refused_is_no_further_request(start, size):
    with start() as run, run.connect() as connection:
        head, body = post(b"x" * size, "content-type: text/plain").split(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert read_answer(connection)[0] == 415
        for place in range(0, size, 10_000):
            connection.sendall(body[place : place + 10_000])
        connection.sendall(HEALTH)
        assert read_answer(connection)[0] == 200


def test_a_connection_whose_refused_body_has_come_is_closed_without_a_word(start):
    with start(header_timeout_s=0.1, keep_alive_s=0.4) as run, run.connect() as connection:
        connection.sendall(post(b"", "content-type: text/plain").replace(b": 0\r\n", b": 4\r\n"))
        assert read_answer(connection)[0] == 415
        connection.sendall(b"body")
        assert read_all(connection) == b""


def test_a_refused_body_that_does_not_end_is_not_waited_for(start):
    with start(body_timeout_s=0.2) as run, run.connect() as connection:
        connection.sendall(post(b"", "content-type: text/plain").replace(b": 0\r\n", b": 9\r\n"))
        assert read_answer(connection)[0] == 415
        connection.sendall(b"body")
        assert read_all(connection) == b""


# ── ahead of its turn ────────────────────────────────────────────────────────────────────────


def test_requests_that_are_sent_at_once_are_answered_in_order(start):
    with start() as run, run.connect() as connection:
        words = ["one", "two", "three"]
        connection.sendall(b"".join(map(asked, words)) + HEALTH)
        for word in words:
            status, body = read_answer(connection)
            assert status == 200 and json.loads(body)["choices"][0]["text"] == word
        assert read_answer(connection) == (200, b'{"status":"ok"}')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_who_sends_a_second_request_and_goes_away_stops_the_first(start, caplog, stream, apart):
    with start() as run:
        with run.connect() as connection:
            first, second = asked("!drip drop", stream=stream, max_tokens=10**6), asked("two")
            connection.sendall(first if apart else first + second)
            run.until(lambda: run.handler.running == 1)
            if apart:
                connection.sendall(second)
        run.until(lambda: run.handler.running == 0, "the first request has stopped")
        run.until(lambda: not run.server.server_state.connections)
        assert run.handler.begun == 1
    assert not caplog.records


@pytest.mark.parametrize("ahead", [HEALTH, b"GET /healthz HTTP/1.1\r\n"], ids=["whole", "endless"])
def test_no_more_is_sent_ahead_than_headers_may_be_large(start, ahead):
    with start(max_header_bytes=8000) as run, run.connect() as connection:
        connection.sendall(asked("!wait"))
        run.until(lambda: run.handler.running == 1)
        connection.sendall(ahead)
        for _ in range(100):
            connection.sendall(HEALTH * 200 if ahead == HEALTH else b"a: b\r\n" * 1600)
        (protocol,) = run.server.server_state.connections
        run.until(lambda: protocol._ended)
        assert not getattr(protocol, "pipeline", ())
        run.call(run.handler.gate.set)
        assert read_answer(connection)[0] == 200
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for_ever(connection)  # it is closed under a client that writes


# ── broken ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_garbage_behind_a_request_does_not_harm_its_answer(start, caplog, stream):
    with start() as run, run.connect() as connection:
        connection.sendall(asked("!wait for it", stream=stream))
        run.until(lambda: run.handler.running == 1)
        connection.sendall(b"\x00\x01 garbage\r\n\r\n")
        connection.sendall(HEALTH)
        run.until(lambda: run.server.server_state.connections)
        run.call(run.handler.gate.set)
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200 ") and b" it" in answer
        assert not stream or b"data: [DONE]\n\n\r\n0\r\n\r\n" in answer
        assert b"healthz" not in answer and b'"ok"' not in answer
    assert not caplog.records


def test_garbage_that_is_larger_than_headers_may_be_is_told_so_once(start):
    broken: list[object] = []
    with start() as run, run.connect() as connection:
        run.call(lambda: run.loop.set_exception_handler(lambda _, context: broken.append(context)))
        connection.sendall(b"\x00" * (run.server.context.settings.max_header_bytes * 2))
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert not broken


def test_a_body_that_breaks_off_in_garbage_is_a_bad_request(start, caplog):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with start() as run, run.connect() as connection:
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n3\r\n{  \r\n")
        run.until(lambda: [p for p in run.server.server_state.connections if p.answering])
        connection.sendall(b"no number\r\n")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'"invalid_http"' in answer
        run.until(lambda: not run.server.server_state.tasks)
    assert not caplog.records


# ── another protocol ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cut", [0, 60], ids=["at once", "in pieces"])
def test_an_offer_of_another_protocol_is_not_taken_and_does_no_harm(start, cut):
    """HTTP clients of Java offer HTTP/2 with each request that is not encrypted."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "UPGRADE: h2c")
    prompt = json.dumps({"model": "default", "prompt": "\r\nupgrade: me"}).encode()
    request = post(prompt, "content-type: application/json", "HTTP2-Settings: AAMAAABk", *offer)
    with start() as run, run.connect() as connection:
        for _ in range(2):  # the connection can be used again
            connection.sendall(request[:cut])
            if cut:
                time.sleep(0.05)  # so that it arrives apart; right in any case
            connection.sendall(request[cut:])
            status, body = read_answer(connection)
            assert (status, json.loads(body)["choices"][0]["text"]) == (200, "\r\nupgrade: me")


# ── a reader that does not read ──────────────────────────────────────────────────────────────


def test_a_stream_waits_for_a_reader_that_does_not_read(start):
    with start() as run, run.connect() as connection:
        connection.sendall(asked("!drip " + "x" * 100_000, stream=True, max_tokens=10**6))
        connections = run.server.server_state.connections
        run.until(lambda: any(p.flow is not None and p.flow.write_paused for p in connections))
        (protocol,) = connections
        steps = run.handler.steps
        time.sleep(0.3)  # for what must not happen
        assert run.handler.steps <= steps + 4
        assert protocol.transport.get_write_buffer_size() < 1_000_000
