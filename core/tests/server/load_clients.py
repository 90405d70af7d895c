"""Clients of every kind, polite and rude, against a server of the tests; raw sockets throughout.

As a program it keeps so many of them busy for so many seconds, and prints what came of it::

    python load_clients.py PORT CLIENTS SECONDS SEED
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
import time
from collections import Counter

PATIENCE_S = 120.0
"""Longest that a client waits for anything; a server that takes longer is taken for stuck."""


async def raw(port: int, data: bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


def request(text: str, connection: str = "close", **more) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    data = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: %b\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (connection.encode(), len(data), data)
    )


def said(raw_answer: bytes) -> str:
    """The text of a streamed answer, out of its HTTP chunks."""
    head, _, body = raw_answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), raw_answer[:200]
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        assert body[count : count + 2] == b"\r\n", body[:200]
        whole, body = whole + body[:count], body[count + 2 :]
    assert whole.endswith(b"data: [DONE]\n\n"), whole[-200:]
    events = [json.loads(e[6:]) for e in whole.split(b"\n\n")[:-2]]
    assert len({event["id"] for event in events}) == 1
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


async def silent(port: int, name: str) -> None:
    """Half a request, and then nothing: it is the server that must end it."""
    kind = random.Random(name).randrange(3)
    data = (b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc", request(name)[:-7])[kind]
    reader, writer = await raw(port, data)
    answer = await reader.read(-1)
    assert not answer or answer.startswith(b"HTTP/1.1 408 "), answer[:200]
    writer.close()


async def deaf(port: int, name: str) -> None:
    """It asks for much and reads nothing, until it is cut off."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    _, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.transport.pause_reading()
    writer.write(request(" ".join([name * 500] * 100), stream=True))
    await asyncio.sleep(random.Random(name).random() * 4)
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


async def failing(port: int, name: str) -> None:
    """The runtime breaks after the second token: an error event, and the stream ends."""
    reader, writer = await raw(port, request(f"{name} two !break four", stream=True))
    answer = await reader.read(-1)
    assert name.encode() in answer and b'"error":{' in answer and answer.endswith(b"0\r\n\r\n")
    writer.close()


async def whole(port: int, name: str) -> None:
    reader, writer = await raw(port, request(f"only {name}"))
    answer = await reader.read(-1)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == (
        f"only {name}"
    )
    writer.close()


async def returning(port: int, name: str) -> None:
    """Several requests on one connection, one after another."""
    reader, writer = await raw(port, b"")
    for number in range(3):
        writer.write(request(f"{name} {number}", connection="keep-alive"))
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        answer = json.loads(await reader.readexactly(length))
        assert answer["choices"][0]["message"]["content"] == f"{name} {number}"
    writer.close()


KINDS = [polite, polite, slow, leaving, leaving, hanging, half_open, huge, garbage, whole]
"""Those that need nothing of the server's settings."""
EVERY_KIND = [
    *[polite] * 40, *[slow] * 20, *[leaving] * 20, *[hanging] * 10, *[whole] * 10, *[returning] * 8,
    *[failing] * 8, *[half_open] * 5, *[silent] * 3, *[garbage] * 5, *[deaf] * 2, huge,
]  # fmt: skip
"""As they are drawn from where the server's times are short."""
_RESET = (ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError)
MAY_BE_RESET = {silent, huge, garbage, deaf}
"""Rude ones, whose answer may be lost with the connection."""


async def crowd(port: int, clients: int, seconds: float, seed: int) -> dict:
    """So many at one time, each one kind after another; what came of it."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + seconds

    async def one(place: int) -> None:
        number = 0
        while time.monotonic() < end and len(wrong) < 10:
            name = f"c{seed}x{place}x{number}"
            kind = random.Random(name).choice(EVERY_KIND)
            number += 1
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await kind(port, name)
                done[kind.__name__] += 1
            except _RESET as error:
                if kind not in MAY_BE_RESET:
                    wrong.append(f"{kind.__name__} {name}: {error!r}")
                done[f"{kind.__name__} (reset)"] += 1
            except Exception as error:  # told to the test, with what it was
                wrong.append(f"{kind.__name__} {name}: {error!r}"[:600])

    await asyncio.gather(*(one(place) for place in range(clients)))
    return {"done": dict(done), "wrong": wrong}


if __name__ == "__main__":
    port, clients, seconds, seed = sys.argv[1:]
    print(json.dumps(asyncio.run(crowd(int(port), int(clients), float(seconds), int(seed)))))
