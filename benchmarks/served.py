"""Servers of both sides in processes of their own, and what clients see of their streams.

A client notes when each chunk came, and what the server says it read and had already. What a
server spent of the processor, and the memory that it has, is asked of the system.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.foreign_servers import ServerProcess
from benchmarks.harness import DiscardError, UnavailableError

__all__ = [
    "Answer",
    "Engineroom",
    "LlamaServer",
    "Served",
    "median_first",
    "seconds",
    "stream",
    "words",
]

ENDS: Final = (0, 1, 2)
"""SmolLM2's tokens that end an answer."""
_STARTING: Final = 60.0
_WORDS: Final = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team "
    "minute idea body information back"
)
_EACH: Final = _WORDS.split()


def words(count: int, seed: int) -> str:
    """So many words of a token each, other ones for each seed."""
    chance = random.Random(seed)
    return "".join(f" {chance.choice(_EACH)}" for _ in range(count))


@dataclass(frozen=True, slots=True)
class Answer:
    """A stream as its client saw it.

    :param began: when it was asked for.
    :param times: when chunks with text came.
    :param prompt: tokens of the prompt.
    :param cached: how many of them were not computed.
    :param tokens: tokens of the answer.
    """

    began: float
    times: Sequence[float]
    text: str
    prompt: int
    cached: int
    tokens: int
    ended: float

    @property
    def first(self) -> float:
        """Seconds until the first chunk; until the end, where none had a text."""
        return (self.times[0] if self.times else self.ended) - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [b - a for a, b in itertools.pairwise(self.times)]

    @property
    def read(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.prompt - self.cached


async def stream(port: int, asked: Mapping[str, Any]) -> Answer:
    """A streamed answer of ``/v1/completions``.

    :raises UnavailableError: the server refuses, or fails.
    """
    usual = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(usual | dict(asked)).encode()
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] = {}
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        status = await reader.readline()
        if b" 200 " not in status:
            rest = (await reader.read(2000)).decode(errors="replace")
            raise UnavailableError(f"the server answered {status.decode().strip()}: {rest}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise UnavailableError(f"the server failed: {event['error']}")
            if text := "".join(choice.get("text") or "" for choice in event["choices"]):
                times.append(time.perf_counter())
                texts.append(text)
            usage = event.get("usage") or usage
    finally:
        writer.close()
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        began,
        times,
        "".join(texts),
        int(usage.get("prompt_tokens", 0)),
        int(details.get("cached_tokens", 0)),
        int(usage.get("completion_tokens", 0)),
        time.perf_counter(),
    )


class Served(ServerProcess):
    """A server, and clients that ask it. Use in a ``with``."""

    asking: Mapping[str, Any]
    """What its requests have beside prompt and length."""

    def ask(self, prompt: str | list[int], count: int) -> Answer:
        """One answer."""
        return asyncio.run(self.answer(prompt, count))

    def at_once(self, prompts: Sequence[str], count: int) -> list[Answer]:
        """Answers to all of them at one time."""
        return asyncio.run(gather([self.answer(prompt, count) for prompt in prompts]))

    async def answer(self, prompt: str | list[int], count: int) -> Answer:
        """One answer, of ``count`` tokens.

        :raises DiscardError: it has fewer.
        """
        body = {"prompt": prompt, "max_tokens": count, **self.asking}
        answer = await stream(self.port, body)
        if answer.tokens != count:
            raise DiscardError(f"{self.who}: an answer of {answer.tokens} tokens, not {count}")
        return answer

    def fill(self, prompts: int, seed: int, length: int = 1489) -> None:
        """Ask so many long prompts, one after another, which come never again."""
        for number in range(prompts):
            self.ask(words(length, seed + number), 1)

    @property
    def cpu(self) -> float:
        """Seconds of the processor that it and its children have spent."""
        process = self._system()
        every = [p.cpu_times() for p in (process, *process.children(recursive=True))]
        return float(sum(times.user + times.system for times in every))

    @property
    def mib(self) -> float:
        """Memory that it has."""
        return float(self._system().memory_info().rss) / 2**20

    def _system(self) -> Any:
        import psutil

        return psutil.Process(self._process.pid)


class Engineroom(Served):
    """``engineroom serve`` with one model.

    :param runtime: what loads it.
    :param options: the model's.
    """

    asking = {"model": "default", "logit_bias": {str(token): -100 for token in ENDS}}  # noqa: RUF012

    def __init__(self, path: Path, runtime: str = "llamacpp", **options: Any) -> None:
        chosen = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        super().__init__(
            "engineroom",
            [
                sys.executable,
                "-m",
                "engineroom",
                "serve",
                "--model",
                str(path),
                "--runtime",
                runtime,
                *chosen,
            ],
            {},
            ready="/readyz",
            starting_s=_STARTING if runtime == "llamacpp" else 5 * _STARTING,
        )


class LlamaServer(Served):
    """llama.cpp's ``llama-server``, whose path is in ``LLAMA_SERVER`` or which ``PATH`` has.

    Its slots have a stream of the cache each, and idle prompts wait in host memory: its defaults.
    Compile it with the flags of llama-cpp-python (``GGML_NATIVE`` is on in both).
    """

    asking = {"ignore_eos": True, "top_k": 1, "samplers": ["top_k"], "cache_prompt": True}  # noqa: RUF012

    def __init__(self, path: Path, n_ctx: int, n_parallel: int) -> None:
        from engineroom import default_threads

        command = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
        if not command:
            raise UnavailableError(
                "there is no llama-server; compile llama.cpp's, and give its path in LLAMA_SERVER"
            )
        threads = str(default_threads())
        super().__init__(
            "llama-server",
            [command, "-m", str(path), "-c", str(n_ctx), "-np", str(n_parallel), "-t", threads,
             "-tb", threads, "-ngl", "0"],
            {},
            ready="/health",
            starting_s=_STARTING,
        )  # fmt: skip


async def gather(work: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All of them at one time."""
    return await asyncio.gather(*work)


def seconds(answers: Sequence[Answer]) -> float:
    """From the first question to the end of the last answer."""
    return max(answer.ended for answer in answers) - min(answer.began for answer in answers)


def median_first(answers: Sequence[Answer]) -> float:
    """The median of the seconds until the first chunk."""
    return statistics.median(answer.first for answer in answers)
