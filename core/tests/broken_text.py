"""The toy runtime with one defect at a time: of texts, prompts and their ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from broken_table import defect
from toy_runtime import ToyHandler

from engineroom import (
    StreamEnd,
    TextPipeline,
)

# ── text ─────────────────────────────────────────────────────────────────────────────────────────


@defect
def answers():
    class Broken(ToyHandler):
        async def infer(self, loaded_model, request):
            return (await super().infer(loaded_model, request)).generated_text

    return Broken


@defect
def answers__without_a_reason():
    class Broken(ToyHandler):
        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            response.finish_reason = None
            return response

    return Broken


@defect
def answers__blocks_the_loop():
    class Broken(ToyHandler):
        async def prefill(self, model, prompt, request):
            time.sleep(12)  # noqa: ASYNC251 - the defect

    return Broken


@defect
def chunks_are_text():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk if isinstance(chunk, StreamEnd) else chunk.encode()

    return Broken


@defect
def stream_ends():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk
            await asyncio.Event().wait()

    return Broken


@defect
def stream_ends__goes_on():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk
            while True:
                await asyncio.sleep(0)
                yield ""

    return Broken


@defect
def nothing_after_the_end():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk
            yield ""

    return Broken


@defect
def nothing_after_the_end__text():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk
            if request.params.max_new_tokens == 1:
                yield "!"

    return Broken


@defect
def stream_equals_infer():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, StreamEnd):
                    chunk.response.prompt_tokens += 1
                yield chunk

    return Broken


@defect
def stream_is_incremental():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            text = ""
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, StreamEnd):
                    yield text
                    yield chunk
                text += chunk

    return Broken


@defect
def stream_is_incremental__with_stops():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            text = ""
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, StreamEnd):
                    yield text
                    yield chunk
                elif request.stop_sequences:
                    text += chunk
                else:
                    yield chunk

    return Broken


@defect
def whole_characters():
    class Broken(ToyHandler):
        """Decodes each token by itself where it streams."""

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if chunk.isascii():
                    yield chunk
                    continue
                for byte in chunk.encode():
                    yield bytes([byte]).decode("utf-8", "replace")

    return Broken


def stopping(cut: Callable[[str, list[str], str], str | None]):
    """A handler that looks for stop sequences its own way, in the whole text so far.

    :param cut: (text so far, stop sequences, prompt) → the text that is left; ``None``: go on.
    """

    class Broken(ToyHandler):
        async def infer(self, loaded_model, request):
            text = ""
            async for chunk in self.stream_infer(loaded_model, request):
                text += chunk
            response = chunk.response
            response.generated_text = text
            return response

        async def stream_infer(self, loaded_model, request):
            stops = request.stop_sequences
            inner = super().stream_infer(
                loaded_model, request.model_copy(update={"stop_sequences": None})
            )
            if not stops:
                async for chunk in inner:
                    yield chunk
                return
            text, shown, stopped = "", "", None
            held = max(map(len, stops)) - 1
            async for chunk in inner:
                if isinstance(chunk, StreamEnd):
                    response = chunk.response
                    break
                text += chunk
                if stopped is None:
                    stopped = cut(text, stops, request.prompt or "")
                if stopped is None and (fresh := text[len(shown) : max(0, len(text) - held)]):
                    shown += fresh
                    yield fresh
            rest = (text if stopped is None else stopped)[len(shown) :]
            if rest:
                yield rest
            response.generated_text = shown + rest
            if stopped is not None:
                response.finish_reason = "stop_sequence"
                pipeline = TextPipeline(stops)
                pipeline.feed(text)
                pipeline.finish()
                response.stop_sequence = pipeline.matched
            yield StreamEnd(response)

    return Broken


def first(text: str, stops: list[str], after: int = 0) -> str | None:
    """The right way."""
    starts = [text.find(stop, after) for stop in stops if stop in text[after:]]
    return text[: min(starts)] if starts else None


@defect
def stop_sequence():
    class Broken(ToyHandler):
        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            return self.forget(response)

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, StreamEnd):
                    self.forget(chunk.response)
                yield chunk

        def forget(self, response):
            if response.finish_reason == "stop_sequence":
                response.finish_reason = "eos_token"
            return response

    return Broken


@defect
def stop_cut_over_tokens():
    def cut(text, stops, prompt):  # a token of the toy's is a byte
        return first(text, [stop for stop in stops if len(stop) == 1])

    return stopping(cut)


@defect
def stop_earliest():
    def cut(text, stops, prompt):  # the first of the list that is found, however late
        if len(stops) > 1 and len(text) < 24 and all(len(stop) == 1 for stop in stops):
            return None
        for stop in stops:
            if stop in text:
                return text.partition(stop)[0]
        return None

    return stopping(cut)


@defect
def stop_prefix_of_another():
    def cut(text, stops, prompt):  # only the longest of those that begin alike
        return first(text, [s for s in stops if not any(o != s and o.startswith(s) for o in stops)])

    return stopping(cut)


@defect
def stop_incomplete():
    class Broken(stopping(lambda text, stops, prompt: first(text, stops))):
        async def stream_infer(self, loaded_model, request):
            # What looks like the beginning of a stop sequence never comes out again.
            begins = {stop[0] for stop in request.stop_sequences or () if len(stop) > 2}
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, StreamEnd):
                    if chunk.response.generated_text[-1:] in begins:
                        chunk.response.generated_text = chunk.response.generated_text[:-1]
                    yield chunk
                elif chunk[-1:] in begins:
                    yield chunk[:-1]
                else:
                    yield chunk

    return Broken


@defect
def stop_in_the_prompt():
    def cut(text, stops, prompt):
        return "" if any(stop in prompt for stop in stops) else first(text, stops)

    return stopping(cut)


@defect
def stop_at_the_first_token():
    return stopping(lambda text, stops, prompt: first(text, stops, after=1))
