"""What is wrong below JSON: HTTP that is slow, cut, odd or crowded, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from corpus_apis import CHAT, COMPLETIONS, EMBEDDINGS, TALKS
from corpus_base import CANARY, Api, Sizes, Visit, as_json, body, quoted, rows
from hostile_wire import GONE, Answer, at_once, connect, connection, head, read_status

PATHS: Final[dict[str, str]] = {
    "of a model that there is not": "/v1/models/nobody",
    "that climbs": "/v1/models/../../../../etc/passwd",
    "that climbs in disguise": "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "of an admin that climbs": "/v1/admin/models/..%2f..%2fm/load",
    "with bidirectional characters": "/v1/models/a%E2%80%AEb",
    "with a line break": "/v1/models/a%0d%0aERROR%20engineroom",
    "that is not UTF-8": "/v1/models/%ff%fe",
    "that is half escaped": "/v1/models/%",
    "as long as fits": "/v1/models/" + "a" * 30_000,
    "of many parts": "/v1/models" + "/a" * 15_000,
    "with many parameters": "/v1/models?" + "&".join(f"a{i}=1" for i in range(4000)),
    "with one parameter over and over": "/v1/models?" + "a&" * 15_000,
    "that is a URL": "http://127.0.0.1:1/v1/models",
}


def _get(path: str, method: str = "GET", *more: str) -> Callable[[Any, Sizes], Visit]:
    return lambda _, sizes: at_once(head(method, path, None, *more), patience_s=sizes.patience_s)


CROWD: Final = 30
"""So many connect at one time, each of which costs the loop a millisecond or two."""


def _crowd(path: str) -> Callable[[Any, Sizes], Visit]:
    return lambda _, __: at_once(*[head("GET", path)] * CROWD, patience_s=10)


def _valid(api: Api, **more: Any) -> bytes:
    text = body(api.prompt, quoted(CANARY))[:-1]
    fields = "".join(f',"{name}":{as_json(value).decode()}' for name, value in more.items())
    return text + fields.encode() + b"}"


def _headed(_: Sizes, lines: Sequence[str]) -> bytes:
    return _request(CHAT, *lines)


def _request(api: Api, *lines: str, **more: Any) -> bytes:
    data = _valid(api, **more)
    return head("POST", api.path, len(data), *lines) + data


def _raw(make: Callable[[Sizes], bytes], patience_s: float = 4.0) -> Callable[[Any, Sizes], Visit]:
    return lambda _, sizes: at_once(make(sizes), patience_s=patience_s)


def _chunked(chunks: Callable[[Sizes], bytes]) -> Callable[[Any, Sizes], Visit]:
    before = head(
        "POST", CHAT.path, None, "transfer-encoding: chunked", "content-type: application/json"
    )
    return _raw(lambda sizes: before + chunks(sizes))


def _one_byte_chunks(sizes: Sizes) -> bytes:
    count = sizes.body // 6
    return b"1\r\n \r\n" * count + b"0\r\n\r\n"


def _lied(length: int | str) -> Callable[[Any, Sizes], Visit]:
    data = _valid(CHAT)
    lines = f"content-length: {length}"
    return _raw(
        lambda _: head("POST", CHAT.path, None, lines, "content-type: application/json") + data
    )


CHUNKS: Final[dict[str, Callable[[Sizes], bytes]]] = {
    "of one byte": _one_byte_chunks,
    "with long extensions": lambda s: b"1;" + b"a" * min(s.body, 60_000) + b"\r\nx\r\n0\r\n\r\n",
    "with many extensions": lambda s: b"1;a=b\r\n \r\n" * (s.body // 12) + b"0\r\n\r\n",
    "with trailers": lambda s: b"1\r\nx\r\n0\r\n" + b"a: b\r\n" * (s.body // 6) + b"\r\n",
    "of a size that is none": lambda _: b"zz\r\nx\r\n0\r\n\r\n",
    "of a negative size": lambda _: b"-1\r\nx\r\n0\r\n\r\n",
    "of a giant size": lambda _: b"f" * 400 + b"\r\nx\r\n",
    "whose end does not come": lambda _: b"5\r\nhello\r\n",
}
LENGTHS: Final = (-1, "9" * 400, "1e3", "0x10", "", "3, 3", 10**9, 2)


async def _slowly(port: int, data: bytes, pause_s: float, seconds: float) -> list[Answer]:
    """A byte at a time."""
    got = b""
    with contextlib.suppress(*GONE):
        async with connection(port) as (reader, writer):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    for byte in data:
                        writer.write(bytes([byte]))
                        await asyncio.sleep(pause_s)
                        if reader.at_eof():
                            break
                    got = await reader.read(-1)
    return [Answer(read_status(got), got)] if got else []


def _slow(data: Callable[[], bytes], pause_s: float = 0.02) -> Callable[[Any, Sizes], Visit]:
    return lambda _, sizes: lambda port: _slowly(port, data(), pause_s, 1 + sizes.patience_s)


def _often(act: Callable[[int, int], Awaitable[None]]) -> Callable[[Any, Sizes], Visit]:
    """So often, some at a time."""

    def build(_: Any, sizes: Sizes) -> Visit:
        async def visit(port: int) -> list[Answer]:
            for start in range(0, sizes.often, CROWD):
                numbers = range(start, min(start + CROWD, sizes.often))
                await asyncio.gather(*(act(port, number) for number in numbers))
            return []

        return visit

    return build


async def _come_and_go(port: int, number: int) -> None:
    _, writer = await connect(port)
    if number % 2:
        writer.transport.abort()
    else:
        writer.close()


async def _ask_and_go(port: int, number: int) -> None:
    with contextlib.suppress(*GONE):
        _, writer = await connect(port)
        api = TALKS[number % len(TALKS)]
        writer.write(_request(api, stream=bool(number % 3)))
        await asyncio.sleep(number % 4 * 0.004)
        writer.transport.abort()


async def _listen_and_go(port: int, number: int) -> None:
    """Away in the middle of a stream."""
    with contextlib.suppress(*GONE):
        async with connection(port) as (reader, writer):
            data = as_json(
                {"model": "m", "prompt": f"{CANARY} {number}", "max_tokens": 2000, "stream": True}
            )
            writer.write(head("POST", COMPLETIONS.path, len(data)) + data)
            # Who has said nothing for so long that the server closed reads no part of a stream.
            with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(5):
                    for _ in range(1 + number % 3):
                        await reader.readuntil(b"\n\n")


async def _half_a_body(port: int, number: int) -> None:
    with contextlib.suppress(*GONE):
        _, writer = await connect(port)
        data = _request(CHAT)
        writer.write(data[: len(data) - 1 - number % 20])
        await asyncio.sleep(0.01)
        writer.transport.abort()


async def _embed_and_go(port: int, number: int) -> None:
    with contextlib.suppress(*GONE):
        _, writer = await connect(port)
        data = as_json({"model": "e", "input": [f"{CANARY} {number}"] * 200})
        writer.write(head("POST", EMBEDDINGS.path, len(data)) + data)
        await asyncio.sleep(0.01)
        writer.transport.abort()


def _crowd_of_streams(_: Any, __: Sizes) -> Visit:
    """Streams that are read to the end."""
    return at_once(*[_request(COMPLETIONS, stream=True)] * CROWD, patience_s=30)


def _deaf(_: Any, sizes: Sizes) -> Visit:
    """It asks for much and reads nothing."""

    async def visit(port: int) -> list[Answer]:
        async with connection(port) as (reader, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            data = as_json({"model": "m", "prompt": CANARY, "max_tokens": 10_000, "stream": True})
            writer.write(head("POST", COMPLETIONS.path, len(data)) + data)
            await asyncio.sleep(sizes.patience_s)
            del reader
        return []

    return visit


def _crowd_of_bodies(end: bytes) -> Callable[[Any, Sizes], Visit]:
    """Prompts that are too long, all at one time. :param end: without it, the last byte lacks."""

    def build(_: Any, sizes: Sizes) -> Visit:
        data = _valid(COMPLETIONS)[:-2] + b" word" * (sizes.body // 5) + b'"}'
        cut = data if end else data[:-1]
        return at_once(
            *[head("POST", COMPLETIONS.path, len(data)) + cut] * CROWD,
            patience_s=4 + sizes.patience_s,
        )

    return build


def _unread(_: Any, __: Sizes) -> Visit:
    """Large answers, one after another, to a client that does not read them."""

    async def visit(port: int) -> list[Answer]:
        async with connection(port) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            one = head("GET", "/openapi.json").replace(b"close", b"keep-alive")
            writer.write(one * 300)
            await asyncio.sleep(1)
        return []

    return visit


def _pipelined(request: Callable[[], bytes]) -> Callable[[Any, Sizes], Visit]:
    def build(_: Any, sizes: Sizes) -> Visit:
        last = request()
        one = last.replace(b"connection: close", b"connection: keep-alive", 1)
        return at_once(one * (sizes.often - 1) + last, patience_s=sizes.patience_s)

    return build


HEADERS: Final[dict[str, tuple[str, ...]]] = {
    "one giant header": ("x-a: " + "a" * 31_000,),
    "many headers": tuple(f"x-{i}: 1" for i in range(2500)),
    "one header over and over": ("x-a: 1",) * 3000,
    "headers without end": ("x-a: " + "a" * 300_000,),
    "a giant key": ("authorization: Bearer " + "a" * 30_000,),
    "a giant request id": ("x-request-id: " + "a" * 30_000,),
    "a request id in disguise": ("x-request-id: a\u202eb\x1b[31m",),
    "a giant trace": ("traceparent: 00-" + "a" * 10_000, "tracestate: " + "a=b," * 4000),
    "a host of someone else": ("host: evil.example", "host: localhost"),
    "an origin": ("origin: http://evil.example",),
    "a giant origin": ("origin: " + "a" * 30_000,),
    "an upgrade": ("connection: upgrade", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"),
    "an expectation": ("expect: 100-continue",),
    "both lengths": ("transfer-encoding: chunked",),
    "a giant content-type": ("content-type: " + "a" * 30_000,),
    "a name that is none": ("bad header: 1",),
    "folded": ("x-a: 1", " continued"),
    "an encoding": ("content-encoding: br",),
}


async def _many_slow(port: int) -> list[Answer]:
    work = [_slowly(port, _request(CHAT), 0.05, 1.0) for _ in range(CROWD)]
    return [answer for answers in await asyncio.gather(*work) for answer in answers]


METHODS: Final = (
    "GET",
    "PUT",
    "DELETE",
    "OPTIONS",
    "HEAD",
    "PATCH",
    "TRACE",
    "CONNECT",
    "X" * 5000,
)
CROWDED: Final = (
    "/metrics", "/openapi.json", "/v1/models", "/v1/admin/plan", "/v1/admin/models", "/readyz",
    "/version",
)  # fmt: skip
_MEGABYTE: Final = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
OTHERS: Final[dict[str, Callable[[Any, Sizes], Visit]]] = {
    "a body larger than is taken": _raw(
        lambda _: head("POST", CHAT.path, 50_000_000) + b" " * 50_000_000, 10
    ),
    "a body larger than is taken, in chunks": _chunked(lambda _: _MEGABYTE * 20),
    "TLS": _raw(lambda _: bytes.fromhex("160301020001000001fc0303") + bytes(500)),
    "HTTP of another kind": _raw(lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(40)),
    "HTTP/0.9": _raw(lambda _: b"GET /v1/models\r\n"),
    "HTTP/1.0": _raw(lambda _: b"GET /v1/models HTTP/1.0\r\n\r\n"),
    "HTTP/9.9": _raw(lambda _: b"GET /v1/models HTTP/9.9\r\nhost: localhost\r\n\r\n"),
    "line breaks alone": _raw(lambda sizes: b"\r\n" * (sizes.body // 2)),
    "zeros": _raw(lambda sizes: bytes(sizes.body)),
    "a body, byte by byte": _slow(lambda: _request(CHAT), 0.005),
    "pipelined: streams": _pipelined(lambda: _request(COMPLETIONS, stream=True)),
}
CLIENTS: Final[dict[str, Callable[[Any, Sizes], Visit]]] = {
    "bytes at random": _raw(lambda sizes: bytes(i * i % 251 for i in range(sizes.body // 10))),
    "a crowd that loads a model that is there": lambda _, __: at_once(
        *[head("POST", "/v1/admin/models/m/load", 0)] * CROWD, patience_s=10
    ),
    "a crowd that has the deployment read anew": lambda _, sizes: at_once(
        *[head("POST", "/v1/admin/reload", 0)] * (sizes.often // 3), patience_s=20
    ),
    "a head, byte by byte": _slow(lambda: _request(CHAT)),
    "many heads, byte by byte": lambda _, __: _many_slow,
    "connections that come and go": _often(_come_and_go),
    "requests whose clients go at once": _often(_ask_and_go),
    "streams whose clients go": _often(_listen_and_go),
    "bodies that end too soon": _often(_half_a_body),
    "texts for vectors whose clients go": _often(_embed_and_go),
    "a crowd of streams": _crowd_of_streams,
    "a crowd of large bodies": _crowd_of_bodies(b"x"),
    "a crowd of large bodies that do not end": _crowd_of_bodies(b""),
    "answers that nobody reads": _unread,
    "a client that does not read": _deaf,
    "pipelined: the models": _pipelined(lambda: head("GET", "/v1/models")),
    "pipelined: answers": _pipelined(lambda: _request(COMPLETIONS)),
}
"""Of the small corpus, too."""

ROWS: Final = (
    *rows((), {f"a path {what}": _get(path) for what, path in PATHS.items()}, small=True),
    *rows((), {f"{method[:9]} where POST is meant": _get(CHAT.path, method) for method in METHODS}),
    *rows(
        (),
        {f"a crowd at {path}": _crowd(path) for path in CROWDED},
        small={f"a crowd at {path}" for path in CROWDED[:3]},
    ),
    *rows(
        (),
        {what: _raw(partial(_headed, lines=lines)) for what, lines in HEADERS.items()},
        small=list(HEADERS)[:6],
    ),
    *rows(
        (),
        {f"chunks {what}": _chunked(chunks) for what, chunks in CHUNKS.items()},
        small={f"chunks {what}" for what in list(CHUNKS)[:3]},
    ),
    *rows((), {f"a length of {str(length)[:20]!r}": _lied(length) for length in LENGTHS}),
    *rows((), OTHERS, small={"TLS", "a body larger than is taken"}),
    *rows((), CLIENTS, small=True),
)
