"""Many clients at once, of which some are rude: nobody gets wrong bytes, and nothing is left.

The number of requests is fixed, not the time. ``benchmarks/server_load.py`` does the same for as
long as it is told, and reports times.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("psutil", reason="needs psutil")

import psutil

pytestmark = pytest.mark.long

CLIENTS = 40
ROUNDS = 4


async def raw(port: int, data: bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


def request(text: str, **more) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    data = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)
    )


def said(raw_answer: bytes) -> str:
    """The text of a streamed answer, out of its HTTP chunks."""
    _, _, body = raw_answer.partition(b"\r\n\r\n")
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        whole, body = whole + body[:count], body[count + 2 :]
    assert whole.endswith(b"data: [DONE]\n\n")
    events = [json.loads(e[6:]) for e in whole.split(b"\n\n")[:-2]]
    return "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])


async def polite(port: int, name: str) -> None:
    text = f"{name} äöü 🦜 " * 30
    reader, writer = await raw(port, request(text, stream=True))
    assert said(await reader.read(-1)) == text
    writer.close()


async def slow(port: int, name: str) -> None:
    text = f"{name} " * 60
    reader, writer = await raw(port, request(text, stream=True))
    got = b""
    while part := await reader.read(2000):
        got += part
        await asyncio.sleep(0)
    assert said(got) == text
    writer.close()


async def leaving(port: int, name: str) -> None:
    reader, writer = await raw(port, request(f"{name} !drip", stream=True))
    for _ in range(random.Random(name).randrange(4)):
        await reader.read(300)
    writer.transport.abort()


async def hanging(port: int, name: str) -> None:
    _, writer = await raw(port, request(f"{name} !hang"))
    await asyncio.sleep(0.01)
    writer.transport.abort()


async def half_open(port: int, name: str) -> None:
    _, writer = await raw(port, b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc")
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def huge(port: int, name: str) -> None:
    reader, writer = await raw(port, request("x" * 5_000_000))
    assert (await reader.read(-1)).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def garbage(port: int, name: str) -> None:
    reader, writer = await raw(port, random.Random(name).randbytes(3000) + b"\r\n\r\n")
    answer = await reader.read(-1)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:80]
    writer.close()


async def whole(port: int, name: str) -> None:
    reader, writer = await raw(port, request(f"only {name}"))
    answer = await reader.read(-1)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == (
        f"only {name}"
    )
    writer.close()


KINDS = [polite, polite, slow, leaving, leaving, hanging, half_open, huge, garbage, whole]


@pytest.mark.parametrize("max_running", [None, 8])
async def test_nothing_is_left_of_a_crowd(start, max_running):
    with start(max_running=max_running, max_queued=1000) as run:
        me = psutil.Process()

        async def crowd(round_: int) -> None:
            work = [KINDS[i % len(KINDS)](run.port, f"c{round_}x{i}") for i in range(CLIENTS)]
            await asyncio.gather(*work)

        def calm() -> bool:
            server = run.server
            return not (
                server.server_state.connections
                or server.server_state.tasks
                or server.context.limiter.running
                or server.context.limiter.queued
                or run.handler.running
                or run.service.num_requests
            )

        async def settled() -> tuple[int, int]:
            await asyncio.to_thread(run.until, calm, "all is calm")
            gc.collect()
            tasks = await asyncio.to_thread(run.call, lambda: len(asyncio.all_tasks()))
            return me.num_fds() if hasattr(me, "num_fds") else me.num_handles(), tasks

        await crowd(0)  # what is made once is made now
        before = await settled()
        for round_ in range(1, ROUNDS):
            await crowd(round_)
        assert await settled() == before
        state = await asyncio.to_thread(run.call, lambda: run.manager.list_models()[0].leases)
        assert state == 0
