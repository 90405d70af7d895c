"""What the reader of a stream is given: by whom it is asked for, or at once, step by step."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from engineroom.generation.generation import Generation
from engineroom.generation.mailbox import Mailbox
from engineroom.generation.steps import TokenStep

__all__ = ["DeliveredChunks", "Put", "Sink", "push_to"]

Put: TypeAlias = Callable[[str], Awaitable[None] | None]
"""Takes a chunk; returns what to wait for before the next one, or ``None``."""
_GAPS: Final = 256
"""Gaps between chunks that are told at once."""
_now = time.perf_counter


class DeliveredChunks:
    """The chunks that a stream's reader was given, and when."""

    __slots__ = ("_times", "first_at", "listener", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.first_at: float | None = None
        """When the first one was given, by :func:`time.perf_counter`."""
        self.listener: Callable[[tuple[float, ...]], None] | None = None
        """Is told the gaps between them, in seconds, some at a time."""
        self._times: list[float] = []  # of those whose gaps were not told yet

    def add(self, chunk: str) -> None:
        """One more is given."""
        self.texts.append(chunk)
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


class Sink:
    """A reader that takes chunks without being asked for each, and may ask to be waited for.

    :param put: takes a chunk.
    """

    __slots__ = ("held", "put")

    def __init__(self, put: Put) -> None:
        self.put = put
        self.held: Awaitable[None] | BaseException | None = None
        """What to wait for before the next chunk, or what ``put`` raised."""

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


async def push_to(
    mailbox: Mailbox, generation: Generation, given: DeliveredChunks, sink: Sink
) -> str:
    """Give the sink the text of each step as it comes, in the callback that brings the step.

    Goes on to the last step, which sets the generation's ``finish_reason``, or until the sink
    has to be waited for.

    :returns: the text of the last step, which the sink was not given.
    :raises EngineRoomError: the request has failed.
    """
    last = ""
    take, add, put = generation.take, given.add, sink.put

    def give(step: TokenStep) -> bool:
        nonlocal last
        text = take(step)
        if generation.finish_reason is not None:
            last = text
            return False
        if not text:
            return True
        add(text)
        try:
            sink.held = put(text)
        except BaseException as error:  # noqa: BLE001 - raised again in wait()
            sink.held = error
        return sink.held is None

    await mailbox.push_to(give)
    return last
