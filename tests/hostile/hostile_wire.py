"""What clients of the corpus do with their sockets."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

LONG_S: Final = 60.0
"""A server that says nothing for so long is taken for stuck."""
GONE: Final = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


@dataclass(frozen=True)
class Answer:
    """What came back. :param status: 0: nothing did, or not a whole one."""

    status: int
    body: bytes = b""


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)


def head(method: str, path: str, length: int | None = None, *more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "connection: close", *more]
    if length is not None:
        lines += ["content-type: application/json", f"content-length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")


def read_status(raw: bytes) -> int:
    match = re.match(rb"HTTP/1\.[01] (\d{3}) ", raw)
    return int(match[1]) if match else 0


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is cut at the end, whatever state it is in."""
    reader, writer = await connect(port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def say(port: int, data: bytes, patience_s: float = LONG_S) -> Answer:
    """Send bytes and read until the server closes; leave when the patience is over."""
    with contextlib.suppress(*GONE):
        async with connection(port) as (reader, writer):
            got = bytearray()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    sending = asyncio.ensure_future(_send(writer, data))
                    try:
                        while part := await reader.read(1 << 16):
                            got += part
                    finally:
                        sending.cancel()
            return Answer(read_status(got), bytes(got.partition(b"\r\n\r\n")[2]))
    return Answer(0)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(*GONE):
        view = memoryview(data)
        for start in range(0, len(view), 1 << 18):
            writer.write(view[start : start + (1 << 18)])
            await writer.drain()


def post(
    path: str, body: bytes, *more: str, patience_s: float
) -> Callable[[int], Awaitable[list[Answer]]]:
    """A visit that sends one body."""
    data = head("POST", path, len(body), *more) + body

    async def visit(port: int) -> list[Answer]:
        return [await say(port, data, patience_s)]

    return visit


def at_once(*requests: bytes, patience_s: float) -> Callable[[int], Awaitable[list[Answer]]]:
    """A visit that sends requests on connections of their own at one time."""

    async def visit(port: int) -> list[Answer]:
        return list(await asyncio.gather(*(say(port, data, patience_s) for data in requests)))

    return visit
