"""How the chunks of a stream get to its reader: asked for one by one, or pushed as they come."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from engineroom.errors import InferenceError
from engineroom.generation.reader import StepReader
from engineroom.handlers.base import StreamEnd
from engineroom.schemas import InferenceResponse

__all__ = ["ChunkReader", "DeliveredChunks", "Put", "Sink"]

Put: TypeAlias = Callable[[str], Awaitable[None] | None]
"""Takes a chunk; returns what to wait for before the next one, or ``None``."""
_GAPS: Final = 256
"""Gaps between chunks that are told at once."""
_now = time.perf_counter


@dataclass(slots=True, eq=False)
class ChunkReader:
    """Reads what a handler's own ``stream_infer`` yields, as :class:`StepReader` reads steps."""

    handler: str
    chunks: AsyncGenerator[str, None]
    ended: bool = False
    _response: InferenceResponse | None = None

    def response(self) -> InferenceResponse | None:
        """What the stream's ``StreamEnd`` held; ``None``: it had none."""
        return self._response

    async def next_chunk(self) -> str:
        """The next chunk, which may be empty."""
        try:
            chunk = await self.chunks.__anext__()
        except StopAsyncIteration:
            self.ended = True
            return ""
        if isinstance(chunk, StreamEnd):
            self._response = chunk.response
            return ""
        if not isinstance(chunk, str):
            raise InferenceError(
                f"handler {self.handler!r}: stream_infer yielded {type(chunk).__name__} instead "
                "of str; mend the plugin"
            )
        return chunk

    async def push_chunks(self, put: Callable[[str], bool]) -> str:
        """The next chunk: nothing comes but when it is asked for."""
        return await self.next_chunk()

    async def aclose(self) -> None:
        """Stop the work. May be called twice, and after the end."""
        await self.chunks.aclose()


@dataclass(slots=True, eq=False)
class DeliveredChunks:
    """The chunks that a stream's reader was handed, and when."""

    first_at: float | None = None
    """When the first one was handed over, by :func:`time.perf_counter`."""
    listener: Callable[[tuple[float, ...]], None] | None = None
    """Is told the gaps between them, in seconds, some at a time."""
    _texts: list[str] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)  # of those whose gaps were not told yet

    @property
    def text(self) -> str:
        """All of them, joined."""
        return "".join(self._texts)

    def add(self, chunk: str) -> None:
        """One more is handed over."""
        self._texts.append(chunk)
        if self.listener is not None:
            times = self._times
            times.append(_now())
            if len(times) > _GAPS:
                self.tell()
            if self.first_at is None:
                self.first_at = times[0]
        elif self.first_at is None:
            self.first_at = _now()

    def tell(self) -> None:
        """Tell the gaps that were not told yet."""
        times = self._times
        if len(times) > 1 and self.listener is not None:
            self.listener(tuple(map(operator.sub, times[1:], times)))
            del times[:-1]


@dataclass(slots=True, eq=False)
class Sink:
    """A reader that takes chunks without being asked for each, and may ask to be waited for.

    :param put: takes a chunk.
    """

    put: Put
    held: Awaitable[None] | BaseException | None = None
    """What to wait for before the next chunk, or what ``put`` raised."""

    async def fill(self, reader: StepReader | ChunkReader, delivered: DeliveredChunks) -> str:
        """Put each chunk as it comes, to the last one or until the reader has to be waited for.

        :returns: text that was not put: that of the last step.
        :raises EngineRoomError: the request has failed.
        """
        add, put = delivered.add, self.put

        def put_one(chunk: str) -> bool:
            add(chunk)
            try:
                if (held := put(chunk)) is None:
                    return True
                self.held = held
            except BaseException as error:  # noqa: BLE001 - raised again in wait()
                self.held = error
            return False

        return await reader.push_chunks(put_one)

    async def wait(self) -> None:
        """Until the reader takes the next chunk; raises what it raised."""
        held, self.held = self.held, None
        if isinstance(held, BaseException):
            raise held
        if held is not None:
            await held

    def close(self) -> None:
        """Nobody will wait for the reader any more."""
        held, self.held = self.held, None
        if asyncio.iscoroutine(held):
            held.close()
