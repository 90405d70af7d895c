"""HTTP/1.0, as old proxies and benchmarks speak it: no chunks, and an end of the connection."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx

PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "one two three"}]},
    "/v1/completions": {"prompt": "one two three"},
    "/v1/responses": {"input": "one two three"},
    "/v1/messages": {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 9},
}


@pytest.fixture
def run(start, each_parser):
    with start() as run:
        yield run


def spoken(run: Any, head: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer whose end is that of the connection."""
    with run.connect() as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        data = b""
        while part := connection.recv(65536):  # for ever, where it is not closed
            data += part
    top, _, rest = data.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, rest


def asked(run: Any, path: str, body: dict[str, Any], *headers: str) -> Any:
    data = json.dumps({"model": "m", **body}).encode()
    lines = [f"POST {path} HTTP/1.0", "content-type: application/json", *headers]
    return spoken(run, "\n".join([*lines, f"content-length: {len(data)}"]), data)


def known(text: str) -> str:
    """Without what differs between two answers."""
    return re.sub(r'[0-9a-f]{24}|"created(_at)?":\d+|"[a-z_]+_s":[\d.e-]+|_ms":[\d.e-]+', "", text)


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_ends_with_the_connection_and_has_no_chunks(run, path):
    body = {**PATHS[path], "stream": True}
    status, headers, rest = asked(run, path, body)
    assert status == 200
    assert "transfer-encoding" not in headers and "content-length" not in headers
    assert headers["connection"] == "close"
    newer = httpx.post(run.url + path, json={"model": "m", **body})
    assert newer.headers["transfer-encoding"] == "chunked"
    assert known(rest.decode()) == known(newer.text)


def test_a_stream_that_fails_midway_ends_so_as_well(run):
    status, headers, rest = asked(run, "/v1/completions", {"prompt": "a b !break", "stream": True})
    assert (status, headers["connection"]) == (200, "close")
    assert rest.endswith(b"data: [DONE]\n\n") and b'"error"' in rest


@pytest.mark.parametrize("kept", ["", "connection: keep-alive"])
def test_a_whole_answer_has_its_length_and_is_the_last_one(run, kept):
    status, headers, rest = asked(
        run, "/v1/completions", {"prompt": "one two"}, *filter(None, [kept])
    )
    assert (status, int(headers["content-length"])) == (200, len(rest))
    assert headers["connection"] == "close"
    assert json.loads(rest)["choices"][0]["text"] == "one two"


def test_errors_and_answers_without_a_body_are_the_same(run):
    assert asked(run, "/v1/completions", {"prompt": 5})[0] == 400
    assert spoken(run, "GET /none HTTP/1.0")[0] == 404
    status, headers, rest = spoken(run, "HEAD /healthz HTTP/1.0")
    assert (status, rest, headers["connection"]) == (200, b"", "close")


def test_nobody_is_told_to_go_on_who_does_not_know_of_it(run):
    status, _, rest = asked(run, "/v1/completions", {"prompt": "one"}, "expect: 100-continue")
    assert status == 200 and json.loads(rest)
