"""Megabytes of refused prompts, over HTTP: memory comes back, and only so much is in flight.

The server is a process of its own, which nobody else uses, with the settings that it has by
default; what is counted is its resident memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("psutil", reason="needs psutil")
pytest.importorskip("numpy", reason="the models are made with numpy")

from corpus_base import CANARY, as_json
from hostile_models import deployment
from hostile_room import Room, opened, streamed
from hostile_wire import GONE, LONG_S, connection, head, say
from test_hostile_requests import NEEDED

from engineroom.server.http.bodies import FREE_BYTES
from engineroom.server.settings import ServerSettings

CONTEXT: Final = 512
BODY: Final = 3_900_000
PROMPT: Final = f"{CANARY}, a long text of no use, "
FIRST, ROUNDS, AT_ONCE = 20, 60, 8
MORE_BYTES: Final = 48 << 20
"""What the server may have grown by since the first twenty, of which each thread's allocator keeps
its part. Sixty prompts that are kept are 230 MB, and five times that with what is made of them; one
in four of them is seen."""
MANY: Final = 40
LIMIT: Final = ServerSettings().max_body_total_bytes
PATIENT_S: Final = 30.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in NEEDED if n != "vllm"],
)
async def room(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Room]:
    for module in NEEDED[request.param]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    folder = tmp_path_factory.mktemp(request.param)
    file = folder / "deployment.json"
    file.write_text(json.dumps(deployment(folder, request.param, CONTEXT)), encoding="utf-8")
    async with opened(file, folder, PATIENT_S) as made:
        yield made


def asked(number: int) -> bytes:
    """A request that is too long, in turn a prompt, a conversation and a text for vectors."""
    text = PROMPT * (BODY // len(PROMPT))
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"model": "m", "prompt": text}),
        ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"model": "m", "prompt": text, "stream": True}),
        ("/v1/embeddings", {"model": "e", "input": text}),
    ]
    path, fields = bodies[number % len(bodies)]
    data = as_json(fields)
    return head("POST", path, len(data)) + data


async def size(room: Room) -> int:
    """Bytes of the server once nothing runs there."""
    told = await room.settled()
    assert told["held"] == {} and told["healthy"]
    return int(told["rss"])


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
async def test_refused_prompts_leave_nothing_in_memory(
    room: Room, at_once: int, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [asked(number) for number in range(4)]
    statuses = Counter[int]()

    async def send(count: int) -> None:
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                answer = await say(room.port, requests[number % 4])
                statuses[answer.status] += 1
                assert len(answer.body) < 4000

        await asyncio.gather(*(client() for _ in range(at_once)))

    sizes = []
    for count in (FIRST, FIRST, ROUNDS - 2 * FIRST):
        await send(count)
        sizes.append(await size(room))
    with capsys.disabled():
        print(f"\n{at_once} at once: {dict(statuses)}; MiB:", *(one >> 20 for one in sizes))
    assert statuses[400] >= (FIRST if at_once > 1 else statuses.total())
    assert statuses.keys() <= {400, 503}
    assert max(sizes[1:]) < sizes[0] + MORE_BYTES


class Sender:
    """A client of whose body the last byte is missing. :param reading: what is answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.reading = asyncio.ensure_future(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        got = bytearray()
        with contextlib.suppress(*GONE):
            while part := await reader.read(1 << 16):
                got += part
        return bytes(got)

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(*GONE):
            self._writer.write(data)
            await self._writer.drain()

    def refusal(self) -> tuple[str, dict[str, Any]] | None:
        """Head and error of what has been answered by now; ``None``: nothing has."""
        if not self.reading.done():
            return None
        lines, _, body = self.reading.result().decode().partition("\r\n\r\n")
        return lines.lower(), json.loads(body)["error"]


async def in_flight(room: Room) -> int:
    """Bytes of bodies, as the server tells."""
    answer = await say(room.port, head("GET", "/metrics"))
    (line,) = re.findall(rb"^engineroom_server_body_bytes (.*)$", answer.body, re.MULTILINE)
    return int(float(line))


async def test_only_so_many_bytes_are_in_flight_and_others_are_told_to_come_again(
    room: Room,
) -> None:
    """One caller alone may have half of them; whoever sends little gets through meanwhile."""
    data = asked(0)
    before = await size(room)
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(LONG_S):
        senders = [
            Sender(*await stack.enter_async_context(connection(room.port))) for _ in range(MANY)
        ]
        await asyncio.gather(*(sender.send(data[:-1]) for sender in senders))
        while True:
            refused = [refusal for sender in senders if (refusal := sender.refusal())]
            held = await in_flight(room)
            if held > (MANY - len(refused)) * (BODY - 2 * FREE_BYTES):
                break
            await asyncio.sleep(0.05)
        assert 0 < len(refused) < MANY and held <= LIMIT // 2
        for lines, error in refused:
            assert lines.startswith("http/1.1 503 ") and "\r\nretry-after: 1" in lines
            assert error["code"] == "too_many_bytes"
        assert await streamed(room.port, f"{CANARY}, a small one beside them", PATIENT_S)
        answered = [sender for sender in senders if sender.refusal() is None]
        for sender in answered:
            await sender.send(data[-1:])
            lines, _, _ = (await sender.reading).partition(b"\r\n")
            assert lines.startswith(b"HTTP/1.1 400 ")
        await asyncio.gather(*(sender.reading for sender in senders))
    assert await in_flight(room) == 0
    assert await size(room) < before + LIMIT // 2 + MORE_BYTES
