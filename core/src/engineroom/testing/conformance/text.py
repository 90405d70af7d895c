"""Checks of the text: whole and streamed, its characters, and what stops it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from engineroom.handlers.base import StreamEnd
from engineroom.testing.conformance.base import Checks, check, foundation
from engineroom.testing.conformance.bench import again, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip

__all__ = ["TextChecks", "cut"]

MANY_BYTES: Final = (
    "Answer with emoji only: 🙂🚀🎉🙂🚀🎉🙂",
    "请用中文回答:你好,世界。你好,世界。你好",
    "Привет, мир! Как дела? Всё хорошо, спасибо. Привет",
    "日本語で書いてください。こんにちは、世界",
)
_NOWHERE: Final = "\x01\x02"
"""What no model writes."""
_BROKEN_CHARACTER: Final = "\ufffd"


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the stop sequence that starts first, by the plainest means there is."""
    starts = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text


class TextChecks(Checks):
    """Text, whole and streamed."""

    test_answers = foundation("answers")
    test_chunks_are_text = foundation("chunks-are-text")
    test_stream_ends = foundation("stream-ends")

    @check()
    async def test_nothing_after_the_end(self, kit: Kit) -> None:
        for n in (1, 12):
            request = kit.likely(n=n)
            did = f"stream_infer({said(request)})"
            chunks: list[str] = []
            generator = kit.bench.direct(request)

            async def read() -> None:
                chunks.extend([chunk async for chunk in generator])  # noqa: B023 - awaited here

            await kit.within(read(), did)
            ends = [place for place, chunk in enumerate(chunks) if isinstance(chunk, StreamEnd)]
            if ends and ends != [len(chunks) - 1]:
                broken(
                    did=did,
                    expected="at most one StreamEnd, as the last item",
                    saw=f"{len(chunks)} items with a StreamEnd at {ends}",
                )

    @check()
    async def test_stream_equals_infer(self, kit: Kit) -> None:
        await kit.need_determinism()
        for prompt in kit.prompts[:3]:
            for n in (1, 20):
                await _compare(kit, prompt, n, None)
        if kit.capabilities.stop_sequences:
            prompt, text = await kit.sample_prompt()
            await _compare(kit, prompt, 24, [text[len(text) // 2]])

    @check()
    async def test_stream_is_incremental(self, kit: Kit) -> None:
        prompt, _ = await kit.sample_prompt()
        for stops in (None, [_NOWHERE]):
            if stops and not kit.capabilities.stop_sequences:
                continue
            request = kit.likely(prompt, 24, stop_sequences=stops)
            streamed = await kit.bench.stream(request)
            count = streamed.response.generated_tokens if streamed.response is not None else None
            pieces = [chunk for chunk in streamed.chunks if chunk]
            if count is None and len(streamed.text) < 40:
                skip("the answer is short and its tokens are not counted")
            if (count is None or count >= 8) and len(pieces) < 2:
                broken(
                    did=f"stream({said(request)})",
                    expected="several chunks",
                    saw=f"one chunk with all {len(streamed.text)} characters",
                )

    @check()
    async def test_whole_characters(self, kit: Kit) -> None:
        await kit.need_determinism()
        seen = False
        for prompt in (*MANY_BYTES, kit.settings.prompt):
            request = kit.likely(prompt, 40)
            whole = (await kit.bench.answer(request)).generated_text or ""
            streamed = await kit.bench.stream(kit.likely(prompt, 40))
            seen = seen or any(ord(c) > 127 and c != _BROKEN_CHARACTER for c in whole)
            for chunk in streamed.chunks:
                if any(0xD800 <= ord(c) <= 0xDFFF for c in chunk):
                    broken(
                        did=f"stream({said(request)})",
                        expected="whole characters",
                        saw=f"half of a surrogate pair in {chunk!r}",
                    )
            extra = streamed.text.count(_BROKEN_CHARACTER) - whole.count(_BROKEN_CHARACTER)
            if extra > 0:
                broken(
                    did=f"stream({said(request)})",
                    expected="the characters of infer, each whole",
                    saw=f"{extra} halves (U+FFFD) that infer does not have, in {streamed.text!r}",
                )
            if seen:
                return
        if not seen:
            skip("no prompt made the model write a character of several bytes; none was broken")

    @check()
    async def test_stop_sequence(self, kit: Kit) -> None:
        prompt, text = await _stoppable(kit)
        stop = _late(text, prompt)
        request = kit.likely(prompt, 24, stop_sequences=[stop])
        for did, response in (await kit.both(request))[: 2 if await _tells(kit) else 1]:
            if response.finish_reason != "stop_sequence" or response.stop_sequence != stop:
                broken(
                    did=did,
                    expected=f"finish_reason 'stop_sequence' and stop_sequence {stop!r}",
                    saw=f"{response.finish_reason!r} and {response.stop_sequence!r}",
                )

    @check()
    async def test_stop_cut_over_tokens(self, kit: Kit) -> None:
        prompt, _ = await _stoppable(kit)
        streamed = await kit.bench.stream(kit.likely(prompt, 24))
        pieces = [chunk for chunk in streamed.chunks if chunk]
        if len(pieces) < 4:
            skip("the text came in too few pieces to cut a stop sequence over them")
        # From the end of one piece, over all of the next, to the beginning of a third.
        stops = [
            pieces[first][-1:] + pieces[first + 1] + pieces[first + 2][:1]
            for first in range(1, len(pieces) - 2)
        ]
        stops = [stop for stop in stops if _BROKEN_CHARACTER not in stop]
        if not stops:
            skip("the text has no three pieces of whole characters")
        new = [stop for stop in stops if stop not in prompt]
        await _expect(kit, prompt, streamed.text, [(new or stops)[0]])

    @check()
    async def test_stop_earliest(self, kit: Kit) -> None:
        prompt, text = await _stoppable(kit)
        early = _late(text, prompt)
        late = next(
            (c for c in reversed(text) if text.find(c) > text.find(early) and _usable(c)), None
        )
        if late is None:
            skip("the text has no two characters that are new one after the other")
        await _expect(kit, prompt, text, [late, early])
        await _expect(kit, prompt, text, [early, late])

    @check()
    async def test_stop_prefix_of_another(self, kit: Kit) -> None:
        prompt, text = await _stoppable(kit)
        stop = _late(text, prompt)
        await _expect(kit, prompt, text, [stop + _NOWHERE, stop])
        await _expect(kit, prompt, text, [stop, stop + _NOWHERE])

    @check()
    async def test_stop_incomplete(self, kit: Kit) -> None:
        prompt, text = await _stoppable(kit)
        await _expect(kit, prompt, text, [text[-1] + _NOWHERE])
        await _expect(kit, prompt, text, [text[len(text) // 2] + _NOWHERE])

    @check()
    async def test_stop_in_the_prompt(self, kit: Kit) -> None:
        prompt, text = await _stoppable(kit)
        words = [word for word in prompt.split() if word not in text] or prompt.split()
        if not words:
            skip("the prompt has no word")
        await _expect(kit, prompt, text, [words[-1]])

    @check()
    async def test_stop_at_the_first_token(self, kit: Kit) -> None:
        prompt, text = await _stoppable(kit, lambda text: _usable(text[0]))
        await _expect(kit, prompt, text, [text[0]])


async def _compare(kit: Kit, prompt: str, n: int, stops: list[str] | None) -> None:
    request = kit.likely(prompt, n, stop_sequences=stops)
    whole = await kit.bench.answer(request)
    streamed = await kit.bench.stream(again(request))
    did = f"infer and stream, {said(request)}"
    same(did, "for the chunks, the text of infer", whole.generated_text, streamed.text)
    response = streamed.response
    if response is None or not await _tells(kit):
        return
    fields = ["finish_reason", "stop_sequence", "generated_tokens", "prompt_tokens"]
    for name in (*fields, "generated_text"):
        if getattr(response, name) != getattr(whole, name):
            broken(
                did=did,
                expected=f"{name}={getattr(whole, name)!r}, as infer says",
                saw=f"{name}={getattr(response, name)!r} at the end of the stream",
            )


async def _tells(kit: Kit) -> bool:
    """Whether streams end with a StreamEnd; without one only the text is known."""

    async def look() -> bool:
        chunks: list[str] = []

        async def read() -> None:
            request = kit.likely(n=2)
            chunks.extend([chunk async for chunk in kit.bench.direct(request)])

        await kit.within(read(), "stream_infer")
        return any(isinstance(chunk, StreamEnd) for chunk in chunks)

    return await kit.once("stream end", look)


async def _stoppable(kit: Kit, fits: Callable[[str], bool] = bool) -> tuple[str, str]:
    if not kit.capabilities.stop_sequences:
        skip("capabilities() does not claim stop_sequences; the service refuses them by name")
    return await kit.sample_prompt(fits=fits)


def _usable(char: str) -> bool:
    return char != _BROKEN_CHARACTER


def _late(text: str, prompt: str) -> str:
    """A character that is new somewhere inside of the text and, if possible, not in the prompt."""
    late = [c for place, c in enumerate(text) if place > 2 and text.find(c) == place]
    late = [c for c in late if _usable(c)]
    new = [c for c in late if c not in prompt]
    if not late:
        skip("the text has no character that is new after its beginning")
    return (new or late)[0]


async def _expect(kit: Kit, prompt: str, text: str, stops: list[str]) -> None:
    """The text that is left must be that before the first stop sequence, whole and streamed."""
    request = kit.likely(prompt, 24, stop_sequences=stops)
    texts = {"infer": await kit.text(request), "stream": (await kit.bench.stream(request)).text}
    for way, actual in texts.items():
        did = f"{way}({said(request)}), where the text would be {text!r}"
        same(did, "the text up to the stop sequence", cut(text, stops), actual)
