"""The one reader of steps: every answer of a :class:`~engineroom.TokenHandler` is read by it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from engineroom.generation.generation import Generation, ParsedOutput
from engineroom.generation.mailbox import Mailbox
from engineroom.generation.steps import LAST_STEP, TokenStep
from engineroom.schemas import InferenceResponse

__all__ = ["StepReader"]


@dataclass(slots=True, eq=False, repr=False)
class StepReader:
    """Makes a request's answer of its steps: whole, chunk by chunk, or pushed to a taker.

    Every way gives the same text. The steps are closed before the last text is handed on: a slow
    reader must not keep the slot. Whoever stops before the end calls :meth:`aclose`.

    :param steps: what a handler's ``generate_tokens`` gives.
    :param generation: what makes text and counts of them.
    """

    steps: AsyncGenerator[TokenStep | Mailbox, None]
    generation: Generation
    ended: bool = False
    """The last text was handed out; nothing is left to read or to close."""
    _mailbox: Mailbox | None = None
    _parsed: deque[str] = field(default_factory=deque)  # chunks that nobody has taken yet
    _advance: Callable[[], Awaitable[TokenStep | Mailbox]] = field(init=False)

    def __post_init__(self) -> None:
        self._advance = self.steps.__anext__

    def response(self) -> InferenceResponse:
        """The response as far as it has come. :raises InferenceError: the steps make none."""
        return self.generation.response()

    async def next_chunk(self) -> str:
        """The text of the next step, often empty. :raises EngineRoomError: it has failed."""
        if self._parsed:
            return self._next_parsed()
        try:
            step = await self._advance()
        except StopAsyncIteration:
            step = LAST_STEP
        if isinstance(step, Mailbox):
            self._mailbox, self._advance = step, step.get
            return ""
        generation = self.generation
        chunk = generation.take(step)
        if generation.finish_reason is not None:
            chunk += await self._end()
        if generation.parsed is None:
            return chunk
        self._parsed.extend(generation.parsed.take_chunks())
        return self._next_parsed()

    async def push_chunks(self, put: Callable[[str], bool]) -> str:
        """Hand out the text of each step in the callback that brings it, where a mailbox does.

        Goes on to the last step or until ``put`` returns ``False``; without a mailbox, it is
        :meth:`next_chunk`.

        :param put: takes the text of a step, outside of this task.
        :returns: text that was not handed out: that of the last step.
        """
        if self._mailbox is None or self._parsed:
            return await self.next_chunk()
        generation, take, last = self.generation, self.generation.take, ""
        if generation.parsed is not None:
            return await self._push_parsed(self._mailbox, generation.parsed, put)

        def receive(step: TokenStep) -> bool:
            nonlocal last
            chunk = take(step)
            if generation.finish_reason is not None:
                last = chunk
                return False
            return not chunk or put(chunk)

        await self._mailbox.push_to(receive)
        return last if generation.finish_reason is None else last + await self._end()

    async def _push_parsed(
        self, mailbox: Mailbox, parsed: ParsedOutput, put: Callable[[str], bool]
    ) -> str:
        """The same where a step may have several chunks; those that are not taken wait here."""
        generation, left = self.generation, self._parsed

        def receive(step: TokenStep) -> bool:
            generation.take(step)
            left.extend(parsed.take_chunks())
            if generation.finish_reason is not None:
                return False
            while left:
                if not put(left.popleft()):
                    return False
            return True

        await mailbox.push_to(receive)
        if generation.finish_reason is not None:
            await self._end()
            left.extend(parsed.take_chunks())
            return self._next_parsed()
        return ""

    def _next_parsed(self) -> str:
        """The next of the chunks that wait, if there is one; the last one ends the reading."""
        chunk = self._parsed.popleft() if self._parsed else ""
        self.ended = self.generation.ended and not self._parsed
        return chunk

    async def read_all(self) -> InferenceResponse:
        """Read to the end; the text is in the response."""
        try:
            while not self.ended:
                if self._mailbox is None:
                    await self.next_chunk()
                else:
                    await self.push_chunks(_keep_none)
        finally:
            await self.aclose()
        return self.generation.response()

    async def aclose(self) -> None:
        """Stop the work and give the slot back. May be called twice, and after the end."""
        await self.steps.aclose()

    async def _end(self) -> str:
        await self.steps.aclose()
        rest = self.generation.finish()
        self.ended = self.generation.parsed is None
        return rest


def _keep_none(_: str) -> bool:
    return True
