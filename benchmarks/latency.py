"""When the chunks of streams come while others begin, end or are cancelled.

Every method is one round: it says what it saw and leaves the engine idle.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from benchmarks.harness import DiscardError
from benchmarks.service import ServiceSide

__all__ = ["WARM", "LatencySide"]

WARM: Final = 12
"""Chunks of each decoding request before anything is measured: their gaps are the step."""
LONG: Final = 400
"""Tokens that the decoding requests may have; they are closed before."""
PHASES: Final = (0.15, 0.4, 0.65, 0.9)
"""Where in a step something happens, as shares of the step."""
_WORDS: Final = (
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see"
)


class Reader:
    """A stream that is read in a task of its own, and when its chunks came."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.times: list[float] = []
        self._arrived = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for _ in self.stream:
                self.times.append(time.perf_counter())
                self._arrived.set()
        finally:
            self._arrived.set()

    async def reach(self, count: int) -> None:
        """Wait for this many chunks.

        :raises DiscardError: it ended before.
        """
        while len(self.times) < count:
            if self._task.done():
                raise DiscardError(f"an answer ended after {len(self.times)} chunks")
            self._arrived.clear()
            await self._arrived.wait()

    def gaps(self, first: int = 1, last: int | None = None) -> list[float]:
        """Seconds between chunk ``first`` and the next one, …, up to chunk ``last``."""
        times = self.times[first - 1 : last]
        return [b - a for a, b in itertools.pairwise(times)]

    async def close(self) -> None:
        """Cancel it."""
        await self.stream.aclose()
        with suppress(Exception):
            await self._task


class LatencySide(ServiceSide):
    """The service, with an eye on when things come."""

    # ── what a runner runs ───────────────────────────────────────────────────────────────────

    def ninth(self, prompts: Sequence[str], short: str) -> tuple[float, float, float]:
        """A short request under decoding ones: its first chunk, their step, the same alone.

        :returns: seconds, each a median.
        """

        async def work() -> tuple[float, float, float]:
            alone = statistics.median([await self._first(short) for _ in PHASES])
            async with self._decoding(prompts) as readers:
                step = _step(readers)
                found = []
                for phase in PHASES:
                    await readers[0].reach(len(readers[0].times) + 1)
                    await asyncio.sleep(phase * step)
                    found.append(await self._first(short))
            return statistics.median(found), step, alone

        return self._runner.run(work())

    def gap(self, prompts: Sequence[str], long: str) -> tuple[float, float, float]:
        """A long prompt beside decoding requests: their longest gap, their step, it alone."""

        async def work() -> tuple[float, float, float]:
            alone = await self._first(long)
            async with self._decoding(prompts) as readers:
                step = _step(readers)
                before = [len(reader.times) for reader in readers]
                await self._first(long)
                for reader in readers:
                    await reader.reach(len(reader.times) + 1)
                longest = max(
                    gap
                    for reader, seen in zip(readers, before, strict=True)
                    for gap in reader.gaps(seen)
                )
            return longest, step, alone

        return self._runner.run(work())

    def shared_prefix(self, size: int, seed: int) -> tuple[float, float]:
        """First chunk of a prompt whose first ``size`` tokens were computed, and were not."""
        prefix = self.text(size, seed)

        async def work() -> tuple[float, float]:
            cold = await self._first(f"{prefix}. What is the capital of France?")
            stream = self._stream(f"{prefix}. Who wrote the play about the prince?", 1)
            began = time.perf_counter()
            first = 0.0
            async for _ in stream:
                first = first or time.perf_counter() - began
            reused = (stream.response and stream.response.cached_prompt_tokens) or 0
            if reused < size or not first:
                raise DiscardError(f"{reused} of {size} tokens were reused")
            return first, cold

        return self._runner.run(work())

    def freed(self, prompts: Sequence[str]) -> float:
        """Milliseconds from cancelling to a free slot, less the step that was being computed.

        Several of the decoding requests are cancelled, one after another; the longest counts.
        """

        async def work() -> float:
            async with self._decoding(prompts) as readers:
                step = _step(readers)
                witness, *others = readers
                found = []
                for phase, reader in zip(PHASES, others, strict=False):
                    await witness.reach(len(witness.times) + 1)
                    await asyncio.sleep(phase * step)
                    cancelled, ended = await self._cancel(reader)
                    await witness.reach(len(witness.times) + 2)
                    ends = [t for t in witness.times if t > cancelled]
                    starts = [t for t in witness.times if t <= cancelled]
                    found.append(ended - cancelled - (ends[0] - starts[-1]))
            return 1000 * max(found)

        return self._runner.run(work())

    def freed_prefill(self, long: str, alone: float) -> float:
        """Milliseconds from cancelling a lone prompt while it is read to a free slot.

        :param alone: seconds that it takes until its first chunk.
        """

        async def work() -> float:
            found = []
            for phase in PHASES[:3]:
                reader = Reader(self._stream(long, 1))
                await asyncio.sleep(phase * alone)
                cancelled, ended = await self._cancel(reader)
                if reader.times:
                    raise DiscardError("the prompt was read before it was cancelled")
                found.append(ended - cancelled)
            return 1000 * max(found)

        return self._runner.run(work())

    def first(self, prompt: str) -> float:
        """Seconds until the first chunk."""
        return self._runner.run(self._first(prompt))

    def survivor(self, prompts: Sequence[str], length: int) -> tuple[float, float]:
        """Seconds of ``length`` tokens from the third step after the others were cancelled.

        :returns: those, and of the same tokens when nobody else was there.
        """

        async def work() -> tuple[float, float]:
            async with self._decoding(prompts) as readers:
                *others, last = readers
                await asyncio.gather(*(reader.close() for reader in others))
                first = len(last.times) + 3
                await last.reach(first + length)
                survived = sum(last.gaps(first, first + length))
            alone = Reader(self._stream(prompts[-1], LONG))
            await alone.reach(first + length)
            await alone.close()
            await self._idle()
            return survived, sum(alone.gaps(first, first + length))

        return self._runner.run(work())

    def text(self, tokens: int, seed: int) -> str:
        """Words that are at least ``tokens`` tokens, other ones for each seed."""
        loaded = self._manager.get_loaded_model("smollm2")
        assert loaded is not None
        chance = random.Random(seed)
        known = _WORDS.split()
        words = [chance.choice(known) for _ in range(tokens // 2)]
        while len(loaded.tokenizer.tokenize(" ".join(words))) < tokens:
            words.append(chance.choice(known))
        return " ".join(words)

    # ── on the loop ──────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _decoding(self, prompts: Sequence[str]) -> AsyncIterator[list[Reader]]:
        readers = [Reader(self._stream(prompt, LONG)) for prompt in prompts]
        try:
            for reader in readers:
                await reader.reach(WARM)
            yield readers
        finally:
            for reader in readers:
                await reader.close()
            await self._idle()

    async def _first(self, prompt: str) -> float:
        """Seconds until the only token."""
        began = time.perf_counter()
        async for _ in (stream := self._stream(prompt, 1)):
            break
        took = time.perf_counter() - began
        await stream.aclose()
        return took

    async def _cancel(self, reader: Reader) -> tuple[float, float]:
        """Cancel it; when that was, and when its slot was free."""
        running = self._running()
        began = time.perf_counter()
        closing = asyncio.create_task(reader.close())
        while self._running() >= running:  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(0.0005)
        ended = time.perf_counter()
        await closing
        return began, ended

    async def _idle(self) -> None:
        while self._running():  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(0.001)

    def _running(self) -> int:
        loaded = self._manager.get_loaded_model("smollm2")
        assert loaded is not None
        return int(loaded.model_object.health().num_requests_running)


def _step(readers: Sequence[Reader]) -> float:
    """The median of what the last steps took, the first two left out."""
    return statistics.median(gap for reader in readers for gap in reader.gaps(3))
