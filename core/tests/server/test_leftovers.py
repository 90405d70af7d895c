"""What a request to the server leaves behind, on every API and however it ends: nothing that the
garbage collector would have to free, and nothing that is kept."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import socket
import struct
from typing import Any, ClassVar

import psutil
import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")

from server_doubles import TalkHandler

from engineroom import ConfigurationError, InferenceRequest
from engineroom.server.keys import KeyRing
from engineroom.testing import uncollected

TEXT = "word " * 20_000
CHAT = "/v1/chat/completions"


class Forgetful(list[Any]):
    def append(self, _: Any) -> None:
        pass


class NothingSetAside:
    """A fake garbage collector, for the server alone."""

    callbacks: ClassVar[list[Any]] = []
    freeze = unfreeze = staticmethod(lambda: None)
    get_objects = staticmethod(lambda generation: [])


class ForgetfulHandler(TalkHandler):
    """Keeps no requests, as no runtime should."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Forgetful()


@pytest.fixture(autouse=True)
def _silent():
    """pytest keeps log records, and so all that they are about."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def body(path: str, text: str, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": text}]
    return {
        CHAT: {"model": "m", "messages": said},
        "/v1/completions": {"model": "m", "prompt": text},
        "/v1/responses": {"model": "m", "input": text},
        "/v1/messages": {"model": "m", "max_tokens": 9, "messages": said},
        "/v1/inference": {"model_id": "m", "prompt": text},
        "/v1/embeddings": {"model": "m", "input": [text, text]},
    }[path] | more


def post(run, path: str, data: bytes, key: str = "", kind: str = "application/json") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", run.port, timeout=20)
    try:
        headers = {"content-type": kind, "x-api-key": key}
        connection.request("POST", path, data, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def at_rest(run) -> None:
    run.until(lambda: not (run.service.num_requests or run.server.server_state.connections))
    run.until(lambda: not run.server.server_state.tasks)
    run.call(lambda: None)


def leaves_nothing(run, work, times: int = 2) -> None:
    work()  # what is made once is made
    at_rest(run)
    with uncollected() as left:
        for _ in range(times):
            work()
        at_rest(run)
        assert not left()
        assert not [o for o in gc.get_objects() if isinstance(o, InferenceRequest)]


@pytest.fixture(params=["httptools", "h11"], scope="module")
def open_server(request, start):
    with pytest.MonkeyPatch.context() as patch:
        # What the server sets aside, and takes back where a model goes, is not looked for here.
        patch.setattr("engineroom.server.long_lived.gc", NothingSetAside)
        if request.param == "h11":
            patch.setitem(__import__("sys").modules, "uvicorn.protocols.http.httptools_impl", None)
        with start(handler=ForgetfulHandler()) as run:
            yield run


PATHS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/inference"]
KINDS = {
    "answered": (200, lambda path: body(path, TEXT[:500])),
    "refused by the runtime": (400, lambda path: body(path, TEXT + "!refuse")),
    "failed": (500, lambda path: body(path, TEXT + "!fail")),
    "an engine that is dead": (503, lambda path: body(path, TEXT + "!dead")),
    "too late": (408, lambda path: body(path, TEXT + "!hang", timeout_s=0.02)),
    "an invalid field": (400, lambda path: body(path, TEXT, stream=TEXT)),
    "a field out of range": (400, lambda path: body(path, TEXT, temperature=TEXT, params=TEXT)),
    "a name out of range": (400, lambda path: body(path, TEXT, model="\n", model_id="\n")),
    "an unknown model": (404, lambda path: body(path, TEXT, model="zz", model_id="zz")),
    "no object": (400, lambda path: [body(path, TEXT)]),
    "half of a character": (None, lambda path: body(path, TEXT + "\ud800")),
}


def streams(way: str) -> dict[str, bool]:
    return {"stream": True} if way == "streamed" else {}


@pytest.mark.parametrize("way", ["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_requests_leave_nothing_however_they_end(open_server, path, way):
    for kind, (status, make) in KINDS.items():
        value = make(path)
        if isinstance(value, dict):
            value = streams(way) | value
            if path != "/v1/inference":
                value.pop("model_id", None)
                value.pop("params", None)
            elif kind == "a field out of range":
                value.pop("temperature")
            if path == "/v1/inference":
                value.pop("model", None)
        data = json.dumps(value).encode()
        if status is not None and not (path == "/v1/messages" and kind == "too late"):
            assert post(open_server, path, data) == status, kind
        leaves_nothing(open_server, lambda data=data: post(open_server, path, data))


@pytest.mark.parametrize("path", PATHS)
def test_nor_do_streams_that_fail_midway(open_server, path):
    for word in ("!break", "!die"):
        data = json.dumps(body(path, f"a b {word} {TEXT}", stream=True)).encode()
        assert post(open_server, path, data) == 200
        leaves_nothing(open_server, lambda data=data: post(open_server, path, data))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_nor_do_several_answers_to_one_request(open_server, path):
    for text, way in ((f"{TEXT}!refuse", {}), (f"a b !break {TEXT}", {"stream": True})):
        data = json.dumps(body(path, text, n=3, **way)).encode()
        leaves_nothing(open_server, lambda data=data: post(open_server, path, data))


def test_nor_do_texts_for_embeddings(open_server):
    path = "/v1/embeddings"
    for value in (body(path, TEXT), body(path, ""), body(path, TEXT, encoding_format=TEXT)):
        data = json.dumps(value).encode()
        assert post(open_server, path, data) == 400
        leaves_nothing(open_server, lambda data=data: post(open_server, path, data))


@pytest.mark.parametrize(
    ("status", "path", "data", "kind"),
    [
        (400, CHAT, b'{"model": "' + TEXT.encode(), "application/json"),
        (400, CHAT, b"[" * 100_000, "application/json"),
        (400, CHAT, b'"\xff' + TEXT.encode() + b'"', "application/json"),
        (413, CHAT, b" " * (5 << 20), "application/json"),
        (415, CHAT, TEXT.encode(), "text/plain"),
        (404, "/v1/nothing", TEXT.encode(), "application/json"),
        (405, "/healthz", TEXT.encode(), "application/json"),
        (404, "/v1/admin/models/nobody/load", TEXT.encode(), "application/json"),
    ],
    ids=["cut", "deep", "no UTF-8", "large", "text", "no route", "no method", "admin"],
)
def test_nor_do_bodies_that_are_none(open_server, status, path, data, kind):
    assert post(open_server, path, data, kind=kind) == status
    leaves_nothing(open_server, lambda: post(open_server, path, data, kind=kind))


@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_nor_do_clients_that_go_away(open_server, way):
    run = open_server
    value = json.dumps(body(CHAT, TEXT + "!hang", **streams(way))).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(value)}\r\n\r\n"
    ).encode()

    def hang_up(data: bytes, waits: bool) -> None:
        begun = run.handler.begun
        with run.connect() as connection:
            connection.sendall(data)
            if waits:
                run.until(lambda: run.handler.begun > begun)
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

    leaves_nothing(run, lambda: hang_up(head + value, waits=True))
    leaves_nothing(run, lambda: hang_up(head + value[:50_000], waits=False))
    leaves_nothing(run, lambda: hang_up(head[:100], waits=False))


class Refusing(ForgetfulHandler):
    """Refuses everything, once it has looked at it."""

    async def generate_tokens(self, loaded_model, request):
        if (asked := f"{request.prompt}{request.messages}!") != "":
            raise ConfigurationError(f"{len(asked)} characters are too many")
        yield


def test_the_process_does_not_grow_by_what_it_refuses(start):
    """Sixty bodies of 3.9 MB took 1.8 GiB, until the collector came by."""
    text = "some words " * 355_000
    process, sizes = psutil.Process(), []
    with start(handler=Refusing()) as run:
        bodies = [json.dumps(body(path, text)).encode() for path in PATHS]
        bodies.append(json.dumps(body(CHAT, text, stream=text[:9])).encode())
        gc.collect()
        gc.disable()
        try:
            for _ in range(12):
                for path, data in zip([*PATHS, CHAT], bodies, strict=True):
                    assert post(run, path, data) == 400
                sizes.append(process.memory_info().rss)
        finally:
            gc.enable()
    assert sizes[-1] - sizes[2] < 64 << 20, [size >> 20 for size in sizes]


@pytest.mark.usefixtures("each_parser")
def test_nor_does_what_the_limits_refuse(start):
    limits = {
        "max_running": 1,
        "max_queued": 0,
        "key_tokens_per_minute": 5000,
        "max_messages": 2,
        "keys": KeyRing([("ann", "ann-key-0123456789"), ("bob", "bob-key-0123456789")], []),
        "header_timeout_s": 0.3,
        "body_timeout_s": 0.3,
    }
    data = json.dumps(body(CHAT, TEXT, max_tokens=10)).encode()
    with start(handler=ForgetfulHandler(), **limits) as run:
        ann, bob = "ann-key-0123456789", "bob-key-0123456789"
        for status, value, key in (
            (401, {}, ""),
            (401, {}, "nobody's-key-0123456789"),
            (400, {"messages": [{"role": "user", "content": TEXT}] * 3}, bob),
            (400, {"n": 2}, bob),
            (404, {"model": "zz"}, bob),
            (429, {"max_tokens": 5000}, bob),
        ):
            sent = json.dumps(body(CHAT, TEXT, max_tokens=10) | value).encode()
            if status == 429:
                post(run, CHAT, data, bob)
            assert post(run, CHAT, sent, key) == status
            leaves_nothing(run, lambda sent=sent, key=key: post(run, CHAT, sent, key))
        slow = run.connect()
        try:
            asked = json.dumps(body(CHAT, "!hang", max_tokens=10)).encode()
            slow.sendall(
                b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"x-api-key: %b\r\ncontent-length: %d\r\n\r\n%b"
                % (CHAT.encode(), ann.encode(), len(asked), asked)
            )
            run.until(lambda: run.handler.running == 1)
            with uncollected() as left:
                assert post(run, CHAT, data, ann) == 429  # the queue is full
                run.until(lambda: len(run.server.server_state.connections) == 1)
                assert not left()
        finally:
            slow.close()

        def trickle() -> None:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            more = f"x-api-key: {ann}\r\ncontent-length: {len(data)}\r\n\r\n"
            with run.connect() as connection:
                connection.sendall((head + more).encode() + data[:70_000])
                assert b" 408 " in connection.recv(100)

        leaves_nothing(run, trickle)
