"""The server of the corpus as its tests see it: what it is asked and tells, and who is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from corpus_apis import COMPLETIONS
from corpus_base import CANARY, Visit, as_json
from hostile_wire import LONG_S, Answer, connection, head

HERE: Final = Path(__file__).parent
TOKENS: Final = 120
"""Of a neighbour's answer."""


@dataclass(frozen=True)
class Measured:
    """What came of a visit.

    :param told: what the server told after it.
    :param left: what was still held long after.
    """

    told: dict[str, Any]
    answers: list[Answer]
    left: dict[str, int]

    @property
    def gap_s(self) -> float:
        """The longest time for which the loop did nothing else, and not for the machine's sake."""
        longest: float = self.told["longest"]
        return longest

    def __str__(self) -> str:
        told = self.told
        statuses = Counter(answer.status for answer in self.answers)
        return (
            f"{self.gap_s * 1000:.0f} ms ({told['in_all'] * 1000:.0f} in all, "
            f"{told['collected'] * 1000:.0f} of collecting); {dict(statuses)}; {told['where']}"
        )


class Room:
    """A server with models on one runtime, in a process of its own."""

    def __init__(self, server: Any, port: int, log: Path) -> None:
        self._server = server
        self.port = port
        self.log = log

    async def _ask(self, line: str) -> Any:
        self.tell(line)
        async with asyncio.timeout(3 * LONG_S):
            told = await self._server.stdout.readline()
        assert told, f"the server has ended:\n{self.log.read_text(errors='replace')[-4000:]}"
        return json.loads(told)

    def tell(self, line: str) -> None:
        """Have the server do something; nothing is answered."""
        self._server.stdin.write(line.encode() + b"\n")

    async def settled(self, most: int = 0) -> dict[str, Any]:
        """What it tells once at most so many requests are there."""
        told: dict[str, Any] = await self._ask(f"settle {most}")
        return told

    async def measure(self, visit: Visit, neighbours: int) -> Measured:
        """What a visit does to the loop.

        :param neighbours: how many requests are there beside it.
        """
        self.tell("mark")
        answers = await visit(self.port)
        told = await self.settled(neighbours)
        held = {what: count for what, count in told["held"].items() if count > neighbours}
        return Measured(told, answers, held)


@contextlib.asynccontextmanager
async def opened(deployment: Path, folder: Path, patience_s: float) -> AsyncIterator[Room]:
    """Start a server; end it in the end, in order. :param patience_s: that it has with clients."""
    log = folder / "log"
    with log.open("wb") as written:
        server = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HERE / "hostile_server.py"),
            str(deployment),
            str(patience_s),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=written,
        )
    try:
        assert server.stdin is not None and server.stdout is not None
        port = await server.stdout.readline()
        assert port, log.read_text(errors="replace")[-4000:]
        yield Room(server, int(port), log)
        server.stdin.close()
        async with asyncio.timeout(LONG_S):
            assert await server.wait() == 0, log.read_text(errors="replace")[-4000:]
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


# ── neighbours ───────────────────────────────────────────────────────────────────────────────


@dataclass
class Neighbours:
    """Clients that mind their own business: streams, one after another, whose text is known.

    :param texts: of each prompt, what it is answered when nobody else is there.
    :param patience_s: after so many seconds the server closes a connection that says nothing.
    :ivar late: how often it did, since this process was too busy to say something.
    """

    port: int
    texts: dict[str, str]
    patience_s: float
    done: int = 0
    late: int = 0
    wrong: list[str] = field(default_factory=list)

    async def one(self, number: int) -> None:
        """Ask and compare, for ever."""
        prompts = list(self.texts)
        while True:
            prompt = prompts[number % len(prompts)]
            number += 1
            try:
                text = await streamed(self.port, prompt, self.patience_s)
            except LateError:
                self.late += 1
                continue
            except Exception as error:  # told to the test, with what it was
                self.wrong.append(f"{prompt!r}: {error!r}"[:500])
                await asyncio.sleep(0.1)
                continue
            self.done += 1
            if text != self.texts[prompt]:
                self.wrong.append(f"{prompt!r}: {text!r} instead of {self.texts[prompt]!r}")

    @contextlib.asynccontextmanager
    async def about(self, count: int) -> AsyncIterator[None]:
        """So many of them, as long as the block lasts."""
        tasks = [asyncio.create_task(self.one(number)) for number in range(count)]
        try:
            yield
            before, end = self.done, asyncio.get_running_loop().time() + LONG_S
            while self.done < before + count and asyncio.get_running_loop().time() < end:
                await asyncio.sleep(0.02)  # what was there to the end is compared, too
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def neighbours_of(port: int, prompts: int, patience_s: float) -> Neighbours:
    """Ask for the texts while nobody else is there."""
    asked = [f"{CANARY} {number}, one of the neighbours" for number in range(prompts)]
    texts = {prompt: await streamed(port, prompt, patience_s) for prompt in asked}
    return Neighbours(port, texts, patience_s)


class LateError(Exception):
    """The connection was there, and this process did not come to send its request in time."""


async def streamed(port: int, prompt: str, patience_s: float) -> str:
    """The text of a streamed answer.

    :raises LateError: the server closed the connection without a word, as it should.
    """
    data = as_json(
        {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    )
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with connection(port) as (reader, writer):
        late = loop.time() - began >= 0.9 * patience_s
        writer.write(head("POST", COMPLETIONS.path, len(data)) + data)
        async with asyncio.timeout(2 * LONG_S):
            raw = await reader.read(-1)
    if late and not raw:
        raise LateError
    return text_of(raw)


def text_of(raw: bytes) -> str:
    """The text out of a stream's HTTP chunks."""
    first, _, rest = raw.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 "), raw[:300]
    whole = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        whole, rest = whole + rest[:count], rest[count + 2 :]
    assert whole.endswith(b"data: [DONE]\n\n"), whole[-300:]
    events = [json.loads(event[6:]) for event in whole.split(b"\n\n")[:-2] if event[:1] != b":"]
    assert not any("error" in event for event in events), events
    assert len({event["id"] for event in events}) == 1
    return "".join(choice["text"] for event in events for choice in event["choices"])
