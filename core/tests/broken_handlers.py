"""The toy runtime with one defect at a time: for each rule of the kit, a handler that breaks it.

Each function below makes a class; its name, with dashes, is the rule that alone must fail, or is
followed by ``__`` and what kind of defect it is. ``ALSO`` has those that cannot but break more.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

from forms_toy import FormsToy, ThinkingToy
from toy_runtime import HONOURED, ToyHandler, ToyModel

from engineroom import (
    ConfigurationError,
    Embeddings,
    HandlerHealth,
    InferenceHandler,
    LoadedModel,
    StreamEnd,
    TextPipeline,
    TokenLogprob,
)
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.prompts.tool_messages import tools_as_messages

BROKEN: dict[str, type[InferenceHandler]] = {}
"""Name of the defect → the handler that has it."""

ALSO: dict[str, tuple[set[str], str]] = {
    "nothing-after-the-end__text": (
        {"stream-equals-infer"},
        "text after the end is text that infer does not have",
    ),
    "loop-is-free__for_good": (
        {"no-leaked-tasks"},
        "nothing can be checked on a loop that does not turn any more",
    ),
    "structured-output": (
        {"hostile-grammar-neighbour"},
        "what knows of no grammar cannot refuse one that is none",
    ),
    "structured-seeds": (
        {"hostile-grammar-neighbour"},
        "what knows of no grammar cannot refuse one that is none",
    ),
    "prompt-too-long": (
        {"prompt-token-ids-refused"},
        "token ids that are too many are a prompt that is too long",
    ),
    "can-handle__exits": (
        {"questions-are-cheap", "questions-change-nothing"},
        "they ask the same question, over and over",
    ),
    "cancel-by-task__goes_on": (
        {"*"},
        "what cannot be stopped keeps its slot, and later checks wait for it or for the next",
    ),
    "answers__blocks_the_loop": (
        {"*"},
        "nothing can be checked on a loop that does not turn any more",
    ),
}
"""Defect → the other rules that it cannot but break, and why; ``*``: every check after it."""

ENDLESS = {
    "answers__blocks_the_loop",
    "cancel-by-deadline",
    "cancel-by-task__goes_on",
    "cancel-while-queued__stays",
    "loop-is-free__for_good",
    "no-leaked-tasks",
    "slots-return",
    "stream-ends",
    "unload-in-use",
}
"""Defects for which the kit waits as long as ``timeout_s`` says, because something never comes."""


def defect(make: Callable[[], type[InferenceHandler]]) -> None:
    rule, _, kind = make.__name__.partition("__")
    name = rule.replace("_", "-") + (f"__{kind}" if kind else "")
    BROKEN[name] = make()


# ── discovery ────────────────────────────────────────────────────────────────────────────────────


@defect
def handler_is_valid():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):  # not a generator
            return "text"

    return Broken


@defect
def handler_is_valid__needs_arguments():
    class Broken(ToyHandler):
        def __init__(self, path):
            self.path = path

    return Broken


@defect
def capabilities():
    class Broken(ToyHandler):
        def capabilities(self):
            return {"params": ["temperature"]}

    return Broken


@defect
def capabilities__change():
    class Broken(ToyHandler):
        def capabilities(self):
            self.asked = getattr(self, "asked", 0) + 1
            return dataclasses.replace(super().capabilities(), tools=self.asked % 2 == 0)

    return Broken


@defect
def can_load():
    class Broken(ToyHandler):
        def can_load(self, config):
            return None if super().can_load(config) else False

    return Broken


@defect
def can_load_foreign():
    class Broken(ToyHandler):
        def can_load(self, config):
            return super().can_load(config) or Path(config.source).is_file()

        async def load_model(self, config):
            if not config.source.startswith("toy:"):
                raise ConfigurationError("no toy")
            return await super().load_model(config)

    return Broken


@defect
def can_load_foreign__raises():
    class Broken(ToyHandler):
        def can_load(self, config):
            Path(config.source).stat() if "\0" in config.source else None
            return super().can_load(config)

    return Broken


@defect
def model_loads():
    class Broken(ToyHandler):
        async def load_model(self, config):
            loaded = await super().load_model(config)
            return loaded.model_copy(update={"model_id": "another"})

    return Broken


@defect
def model_loads__raises():
    class Broken(ToyHandler):
        async def load_model(self, config):
            if config.source.startswith("toy:") and not set(config.options) - {"n_ctx"}:
                raise RuntimeError("out of luck")
            return await super().load_model(config)

    return Broken


@defect
def model_loads__exits():
    class Broken(ToyHandler):
        async def load_model(self, config):
            if config.source.startswith("toy:") and not set(config.options) - {"n_ctx"}:
                raise SystemExit(3)
            return await super().load_model(config)

    return Broken


@defect
def can_handle__exits():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            if isinstance(loaded_model.model_object, ToyModel):
                raise SystemExit(3)
            return False

    return Broken


@defect
def can_handle():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return 1 if isinstance(loaded_model.model_object, ToyModel) else False

    return Broken


@defect
def can_handle_foreign():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return loaded_model.model_object is not None

    return Broken


@defect
def can_handle_foreign__of_nobody():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return loaded_model.handler_name in (self.name, None)

    return Broken


@defect
def can_handle_foreign__raises():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return loaded_model.model_object.options.n_ctx > 0

    return Broken


@defect
def questions_are_cheap():
    class Broken(ToyHandler):
        def health(self, loaded_model):
            if not loaded_model.model_object.running:
                time.sleep(0.11)
            return super().health(loaded_model)

    return Broken


@defect
def questions_change_nothing():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            if isinstance(loaded_model.model_object, ToyModel):
                loaded_model.memory_bytes = (loaded_model.memory_bytes or 0) + 2**40
            return super().can_handle(loaded_model)

    return Broken


@defect
def questions_change_nothing__thread():
    class Broken(ToyHandler):
        def can_load(self, config):
            if not config.model_id.endswith("-own"):
                threading.Thread(target=threading.Event().wait, args=(3,), daemon=True).start()
            return super().can_load(config)

    return Broken


@defect
def estimate_memory():
    class Broken(ToyHandler):
        def estimate_memory(self, config):
            return 1024

    return Broken


@defect
def health():
    class Broken(ToyHandler):
        def health(self, loaded_model):
            return {"ok": True}

    return Broken


@defect
def health__not_ok():
    class Broken(ToyHandler):
        def health(self, loaded_model):
            busy = super().health(loaded_model)
            return dataclasses.replace(busy, ok=busy.num_requests_running > 0, kv_cache_usage=None)

    return Broken


@defect
def missing_source():
    class Broken(ToyHandler):
        async def load_model(self, config):
            if not self.can_load(config):
                raise FileNotFoundError(config.source)
            return await super().load_model(config)

    return Broken


@defect
def unknown_option():
    class Broken(ToyHandler):
        async def load_model(self, config):
            known = {k: v for k, v in config.options.items() if not k.startswith("no_such")}
            loaded = await super().load_model(config.model_copy(update={"options": known}))
            return loaded.model_copy(update={"config": config})

    return Broken


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


# ── parameters ───────────────────────────────────────────────────────────────────────────────────


def sampling(change: Callable, **always: object):
    """A handler that reads the parameters of a request otherwise."""

    class Broken(ToyHandler):
        async def generate_tokens(self, loaded_model, request):
            params = change(request.params)
            inner = super().generate_tokens(
                loaded_model, request.model_copy(update={"params": params})
            )
            try:
                async for step in inner:
                    yield step
            finally:
                await inner.aclose()

    return Broken


def without(name: str, value: object = None):
    return sampling(lambda params: params.model_copy(update={name: value}))


@defect
def none_is_neutral():
    def change(params):
        return params.model_copy(
            update={"temperature": 0.7 if params.temperature is None else params.temperature}
        )

    return sampling(change)


@defect
def none_is_neutral__top_k():
    def change(params):
        asked = "top_k" in params.model_fields_set and params.top_k is None
        return params.model_copy(update={"top_k": 4 if asked else params.top_k})

    return sampling(change)


@defect
def temperature_zero():
    class Broken(ToyHandler):
        def temperature(self, params):
            asked = params.temperature == 0 and params.do_sample is not False
            return 0.5 if asked else super().temperature(params)

    return Broken


@defect
def temperature():
    class Broken(ToyHandler):
        def temperature(self, params):
            return 1.0 if super().temperature(params) else 0.0

    return Broken


@defect
def temperature__always_greedy():
    class Broken(ToyHandler):
        def temperature(self, params):
            return 0.0 if params.seed is None else super().temperature(params)

    return Broken


@defect
def do_sample():
    class Broken(ToyHandler):
        def temperature(self, params):
            return params.temperature if params.temperature is not None else 1.0

    return Broken


@defect
def seed():
    class Broken(ToyHandler):
        def random(self, request):
            return random.Random()

    return Broken


@defect
def seed__all_the_same():
    class Broken(ToyHandler):
        def random(self, request):
            return random.Random(None if request.params.seed is None else 0)

    return Broken


@defect
def seed_beside_neighbours():
    class Broken(ToyHandler):
        """One generator for all, which a seed only sets anew."""

        shared = random.Random()

        def random(self, request):
            if request.params.seed is not None:
                self.shared.seed(request.params.seed)
            return self.shared

    return Broken


@defect
def top_k():
    return without("top_k")


@defect
def top_p():
    return without("top_p")


@defect
def min_p():
    return without("min_p")


@defect
def repetition_penalty():
    return without("repetition_penalty")


@defect
def presence_penalty():
    return without("presence_penalty")


class _CountsThePrompt(ToyHandler):
    field = ""

    def adjusted(self, params, logits, prompt, new):
        found = super().adjusted(params, logits, prompt, new)
        for token in set(prompt) | {ord(c) for c in "ABCDEFGHIJKLM"}:
            found[token] -= 8 * (getattr(params, self.field) or 0.0)
        return found


@defect
def presence_penalty__of_the_prompt():
    class Broken(_CountsThePrompt):
        field = "presence_penalty"

    return Broken


@defect
def frequency_penalty():
    return without("frequency_penalty")


@defect
def frequency_penalty__of_the_prompt():
    class Broken(_CountsThePrompt):
        field = "frequency_penalty"

    return Broken


@defect
def logit_bias():
    class Broken(ToyHandler):
        def adjusted(self, params, logits, prompt, new):
            params = params.model_copy(update={"logit_bias": None})
            return super().adjusted(params, logits, prompt, new)

    return Broken


@defect
def logprobs():
    class Broken(ToyHandler):
        async def generate_tokens(self, loaded_model, request):
            inner = super().generate_tokens(loaded_model, request)
            async for step in inner:
                if step.finish is not None:
                    step.logprobs = None
                yield step

    return Broken


@defect
def logprobs__after_temperature():
    class Broken(ToyHandler):
        def logprobs(self, params, logits, token):
            heat = self.temperature(params) or 1.0
            return super().logprobs(params, [value / heat for value in logits], token)

    return Broken


@defect
def logprobs__too_few():
    class Broken(ToyHandler):
        def logprobs(self, params, logits, token):
            found = super().logprobs(params, logits, token)
            return TokenLogprob(**{**found.model_dump(), "top": found.top[:2]})

    return Broken


@defect
def logprobs__wrong_bytes():
    class Broken(ToyHandler):
        def logprobs(self, params, logits, token):
            found = super().logprobs(params, logits, token)
            return found.model_copy(update={"bytes": [*found.token.encode(), 63]})

    return Broken


@defect
def token_counts():
    class Broken(ToyHandler):
        def count_tokens(self, loaded_model, text):
            return len(text.split())

    return Broken


@defect
def max_new_tokens():
    class Broken(ToyHandler):
        """Counts from 0."""

        async def infer(self, loaded_model, request):
            return await super().infer(loaded_model, self.one_more(request))

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, self.one_more(request)):
                yield chunk

        def one_more(self, request):
            if request.params.max_new_tokens is None:
                return request
            more = {"max_new_tokens": request.params.max_new_tokens + 1}
            return request.model_copy(update={"params": request.params.model_copy(update=more)})

    return Broken


@defect
def max_new_tokens__reason():
    class Broken(ToyHandler):
        async def generate_tokens(self, loaded_model, request):
            seen = 0
            async for step in super().generate_tokens(loaded_model, request):
                seen += len(step.token_ids)
                if step.finish == "length" and seen == 7:
                    step.finish = "cancelled"
                yield step

    return Broken


@defect
def max_new_tokens_none():
    return sampling(
        lambda params: params.model_copy(update={"max_new_tokens": params.max_new_tokens or 16})
    )


@defect
def unclaimed_parameters():
    class Broken(ToyHandler):
        def check(self, model, request, prompt):
            if (request.params.num_beams or 1) > 1:
                raise ConfigurationError("num_beams must be 1")
            super().check(model, request, prompt)

    return Broken


@defect
def unclaimed_parameters__honoured():
    class Broken(ToyHandler):
        """Honours what it does not claim, where it was to be ignored."""

        def capabilities(self):
            return dataclasses.replace(super().capabilities(), params=HONOURED - {"logit_bias"})

        def adjusted(self, params, logits, prompt, new):
            if params.num_beams == 2:
                logits = [-value for value in logits]
            return super().adjusted(params, logits, prompt, new)

    return Broken


@defect
def unknown_adapter():
    class Broken(ToyHandler):
        """Claims adapters, has none, and answers without."""

        def capabilities(self):
            return dataclasses.replace(super().capabilities(), adapters=True)

    return Broken


@defect
def prompt_token_ids():
    class Broken(ToyHandler):
        """Reads them from the end."""

        def tokens(self, loaded_model, request):
            ids = super().tokens(loaded_model, request)
            return ids if request.prompt_token_ids is None else ids[::-1]

    return Broken


@defect
def prompt_token_ids__beginning_added():
    class Broken(ToyHandler):
        """Puts a token of the beginning before them, too."""

        def tokens(self, loaded_model, request):
            ids = super().tokens(loaded_model, request)
            return ids if request.prompt_token_ids is None else [1, *ids]

    return Broken


@defect
def prompt_token_ids_refused():
    class Broken(ToyHandler):
        """Takes ids for others where there are none."""

        def tokens(self, loaded_model, request):
            return [token % 257 for token in super().tokens(loaded_model, request)]

    return Broken


@defect
def prompt_token_ids_refused__cut():
    class Broken(ToyHandler):
        """Reads the last of them where there are too many."""

        def tokens(self, loaded_model, request):
            ids = super().tokens(loaded_model, request)
            most = loaded_model.max_context_tokens - 8
            return ids if request.prompt_token_ids is None else ids[-most:]

    return Broken


class _Claims(ToyHandler):
    claims: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()

    def capabilities(self):
        found = super().capabilities()
        return dataclasses.replace(
            found, params=found.params | self.claims, structured_output=self.kinds
        )


@defect
def num_beams():
    class Broken(_Claims):
        claims = frozenset({"num_beams"})

    return Broken


@defect
def early_stopping():
    class Broken(_Claims):
        claims = frozenset({"early_stopping"})

    return Broken


@defect
def structured_output():
    class Broken(_Claims):
        claims = frozenset({"structured_output"})
        kinds = frozenset({"regex"})

    return Broken


@defect
def structured_output__no_kind():
    class Broken(_Claims):
        claims = frozenset({"structured_output"})

    return Broken


@defect
def structured_seeds():
    class Broken(_Claims):
        claims = frozenset({"structured_output"})
        kinds = frozenset({"json_schema"})

    return Broken


@defect
def tool_calls():
    class Broken(FormsToy):
        """A tool that was not offered."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            calls = [call.model_copy(update={"name": "fly"}) for call in response.tool_calls or ()]
            response.tool_calls = calls or None
            return response

    return Broken


class _Forgets(FormsToy):
    """Its grammar is forgotten where ``forgets(params)`` says so."""

    def adjusted(self, params, logits, prompt, new):
        if self.forgets(params):
            return ToyHandler.adjusted(self, params, logits, prompt, new)
        return super().adjusted(params, logits, prompt, new)


@defect
def structured_output__any_json():
    class Broken(_Forgets):
        def forgets(self, params):
            return params.structured_output is not None and params.structured_output.json_object

    return Broken


@defect
def structured_output__stops():
    class Broken(FormsToy):
        """Stop sequences are forgotten beside a form."""

        async def infer(self, loaded_model, request):
            if request.params.structured_output is not None:
                request = request.model_copy(update={"stop_sequences": None})
            return await super().infer(loaded_model, request)

    return Broken


@defect
def structured_output__unknown_kind():
    class Broken(FormsToy):
        def capabilities(self):
            return dataclasses.replace(
                super().capabilities(), structured_output=frozenset({"regex", "xml"})
            )

    return Broken


@defect
def structured_seeds__penalties():
    class Broken(_Forgets):
        def forgets(self, params):
            return bool(params.presence_penalty)

    return Broken


@defect
def structured_seeds__logprobs():
    class Broken(FormsToy):
        """The first token has no log probability beside a form."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            if request.params.structured_output is not None and response.logprobs:
                response.logprobs = response.logprobs[1:]
            return response

    return Broken


@defect
def structured_seeds__draws_anew():
    class Broken(FormsToy):
        """Among what is allowed, it draws from a generator of its own."""

        def choose(self, params, logits, source):
            if params.structured_output is None or params.greedy:
                return super().choose(params, logits, source)
            allowed = [token for token, value in enumerate(logits) if value > -1e8]
            return random.choice(allowed)

    return Broken


class _OwnTools(FormsToy):
    """Tells the model of tools itself."""

    def capabilities(self):
        return dataclasses.replace(super().capabilities(), tools=True)

    def tokens(self, loaded_model, request):
        if request.messages is not None:
            messages = tools_as_messages(self.history(request), self.offered(request))
            request = request.model_copy(update={"messages": messages})
        return super().tokens(loaded_model, request)

    def history(self, request):
        return request.messages

    def offered(self, request):
        return request.offered_tools


@defect
def tool_calls__untold():
    class Broken(_OwnTools):
        def offered(self, request):
            return None

    return Broken


@defect
def tool_calls__told_in_vain():
    class Broken(_OwnTools):
        def offered(self, request):
            return request.tools

    return Broken


@defect
def tool_calls__results():
    class Broken(_OwnTools):
        def history(self, request):
            return [message for message in request.messages if message.role != "tool"]

    return Broken


@defect
def tool_calls__another_one():
    class Broken(_OwnTools):
        """Any tool will do where one is named."""

        async def compile(self, request):
            if request.requires_call:
                request = request.model_copy(update={"tool_choice": "required"})
            return await super().compile(request)

    return Broken


@defect
def tool_calls__same_id():
    class Broken(FormsToy):
        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            calls = [call.model_copy(update={"id": "call_0"}) for call in response.tool_calls or ()]
            response.tool_calls = calls or None
            return response

    return Broken


@defect
def tool_calls__at_the_end():
    class Broken(FormsToy):
        """Streams tell of calls in their response alone."""

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if not isinstance(chunk, ToolCallDelta):
                    yield chunk

    return Broken


@defect
def tool_calls__thoughts():
    class Broken(ThinkingToy):
        """Thoughts are content beside calls."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            if response.tool_calls:
                response.generated_text = response.reasoning
            return response

    return Broken


@defect
def hostile_grammar_neighbour():
    class Broken(FormsToy):
        """What the library says of a grammar that is none goes out as it is."""

        async def compile(self, request):
            try:
                return await super().compile(request)
            except ConfigurationError as error:
                raise ValueError(error.message) from error

    return Broken


@defect
def hostile_grammar_neighbour__ends_others():
    class Broken(FormsToy):
        """A grammar that is none ends whatever runs beside it."""

        async def compile(self, request):
            try:
                return await super().compile(request)
            except ConfigurationError:
                self.failures = getattr(self, "failures", 0) + 1
                raise

        async def prefill(self, model, prompt, request):
            request.params.__dict__["failures"] = getattr(self, "failures", 0)
            await super().prefill(model, prompt, request)

        def limit(self, params):
            ended = getattr(self, "failures", 0) > params.__dict__.get("failures", 0)
            return 1 if ended else super().limit(params)

    return Broken


@defect
def reasoning_apart():
    class Broken(ThinkingToy):
        """Thoughts are content."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            thoughts, response.reasoning = response.reasoning or "", None
            response.generated_text = thoughts + (response.generated_text or "")
            return response

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, StreamEnd):
                    thoughts, chunk.response.reasoning = chunk.response.reasoning or "", None
                    chunk.response.generated_text = thoughts + chunk.response.generated_text
                    yield chunk
                else:
                    yield getattr(chunk, "text", chunk)

    return Broken


@defect
def reasoning_apart__not_streamed():
    class Broken(ThinkingToy):
        """Thoughts are told at the end alone."""

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if not isinstance(chunk, ReasoningDelta):
                    yield chunk

    return Broken


@defect
def reasoning_apart__streamed_forms():
    class Broken(ThinkingToy):
        """Thoughts are content where what has to have a form is streamed."""

        async def stream_infer(self, loaded_model, request):
            form = request.params.structured_output
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk.text if form and isinstance(chunk, ReasoningDelta) else chunk

    return Broken


@defect
def reasoning_apart__stops():
    class Broken(ThinkingToy):
        """Stop sequences end thoughts, too."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            for stop in request.stop_sequences or ():
                if stop in (response.reasoning or ""):
                    response.reasoning = response.reasoning.partition(stop)[0]
                    response.generated_text = ""
                    response.finish_reason = "stop_sequence"
            return response

    return Broken


@defect
def reasoning_apart__form():
    class Broken(ThinkingToy):
        """What has to have a form is not thought about."""

        async def compile(self, request):
            if request.params.structured_output is not None:
                request = request.model_copy(update={"reasoning_budget": 0})
            return await super().compile(request)

    return Broken


# ── concurrency ──────────────────────────────────────────────────────────────────────────────────


@defect
def requests_do_not_mix():
    class Broken(ToyHandler):
        """A batch of more than five takes its penalties from the request that came last."""

        def adjusted(self, params, logits, prompt, new):
            if self.model.running > 5:
                params = self.last
            return super().adjusted(params, logits, prompt, new)

        def check(self, model, request, prompt):
            super().check(model, request, prompt)
            self.model, self.last = model, request.params

    return Broken


@defect
def cache_scopes_apart():
    class Broken(ToyHandler):
        def scope(self, request):
            return ""

    return Broken


@defect
def cache_scopes_apart__of_those_without():
    class Broken(ToyHandler):
        def scope(self, request):
            return request.cache_salt or "conformance-1"

    return Broken


@defect
def short_overtakes_long():
    class Broken(ToyHandler):
        """One request at a time, and says nothing of those that wait."""

        @asynccontextmanager
        async def slot(self, model, request):
            async with super().slot(model, request):
                lock = model.notes.setdefault("lock", asyncio.Lock())
                async with lock:
                    yield

    return Broken


@defect
def queue_bound():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            options = model.options
            model.options = options.model_copy(update={"max_queue": 1000})
            try:
                async with super().slot(model, request):
                    yield
            finally:
                model.options = options

    return Broken


@defect
def queue_bound__untyped():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            if model.slots.locked() and model.waiting >= model.options.max_queue:
                raise asyncio.QueueFull
            async with super().slot(model, request):
                yield

    return Broken


# ── cancellation ─────────────────────────────────────────────────────────────────────────────────


@defect
def cancel_by_task():
    class Broken(ToyHandler):
        """Swallows the cancellation while it decodes."""

        async def decode(self, model, request):
            try:
                await super().decode(model, request)
            except asyncio.CancelledError:
                pass

    return Broken


@defect
def cancel_by_task__goes_on():
    class Broken(ToyHandler):
        """Turns in a circle once it was cancelled."""

        async def decode(self, model, request):
            stubborn = False
            while True:
                try:
                    await super().decode(model, request)
                except asyncio.CancelledError:
                    stubborn = True
                if not stubborn:
                    return

    return Broken


@defect
def cancel_by_aclose():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            inner = super().stream_infer(loaded_model, request)
            try:
                async for chunk in inner:
                    yield chunk
            except GeneratorExit:
                await inner.aclose()
                if not request.timeout_s:
                    yield "one more"

    return Broken


@defect
def cancel_by_deadline():
    class Broken(ToyHandler):
        """Has a deadline of its own, and does not end before."""

        async def stream_infer(self, loaded_model, request):
            inner = super().stream_infer(loaded_model, request)
            try:
                async for chunk in inner:
                    yield chunk
            finally:
                await inner.aclose()
                if request.timeout_s:
                    await asyncio.sleep(60)

    return Broken


@defect
def cancel_in_prefill():
    class Broken(ToyHandler):
        async def prefill(self, model, prompt, request):
            try:
                await super().prefill(model, prompt, request)
            except asyncio.CancelledError:
                if len(prompt) < 150:
                    raise

    return Broken


@defect
def cancel_while_queued():
    class Broken(ToyHandler):
        """A request that leaves the queue takes the one that runs with it."""

        @asynccontextmanager
        async def slot(self, model, request):
            ready = False
            try:
                async with super().slot(model, request):
                    ready = True
                    yield
            except asyncio.CancelledError:
                if not ready and model.options.n_parallel == 1:
                    model.notes["stop"] = True
                raise

        async def generate_tokens(self, loaded_model, request):
            model = loaded_model.model_object
            async for step in super().generate_tokens(loaded_model, request):
                if model.notes.pop("stop", False):
                    step.finish = "eos_token"
                yield step

    return Broken


@defect
def cancel_while_queued__stays():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            ready = False
            try:
                async with super().slot(model, request):
                    ready = True
                    yield
            except asyncio.CancelledError:
                if not ready:
                    model.waiting += 1
                raise

    return Broken


@defect
def slots_return():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            try:
                async with super().slot(model, request):
                    yield
            except (asyncio.CancelledError, GeneratorExit):
                model.notes["lost"] = model.notes.get("lost", 0) + 1
                raise

        def health(self, loaded_model):
            found = super().health(loaded_model)
            lost = loaded_model.model_object.notes.get("lost", 0)
            return HandlerHealth(
                ok=found.ok,
                num_requests_running=found.num_requests_running + lost,
                num_requests_waiting=found.num_requests_waiting,
            )

    return Broken


@defect
def neighbours_go_on():
    class Broken(ToyHandler):
        """A request that is stopped takes along those that run beside it."""

        async def generate_tokens(self, loaded_model, request):
            notes = loaded_model.model_object.notes
            begun = notes.setdefault("epoch", 0)
            last = False
            try:
                async for step in super().generate_tokens(loaded_model, request):
                    last = step.finish is not None or bool(request.stop_sequences)
                    if notes["epoch"] != begun:
                        step.finish = "eos_token"
                    yield step
            except (GeneratorExit, asyncio.CancelledError):
                if loaded_model.model_object.running > 1 and not last:
                    notes["epoch"] += 1
                raise

    return Broken


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


@defect
def prompt_too_long():
    class Broken(ToyHandler):
        """Cuts the prompt."""

        def tokens(self, loaded_model, request):
            return super().tokens(loaded_model, request)[-loaded_model.max_context_tokens + 8 :]

    return Broken


@defect
def failing_request():
    class Broken(ToyHandler):
        """One that is refused ends the batch."""

        def check(self, model, request, prompt):
            try:
                super().check(model, request, prompt)
            except ConfigurationError:
                model.notes["failed"] = model.running > 0
                raise

        async def generate_tokens(self, loaded_model, request):
            notes = loaded_model.model_object.notes
            async for step in super().generate_tokens(loaded_model, request):
                if notes.pop("failed", False):
                    step.finish = "eos_token"
                yield step

    return Broken


@defect
def unload_in_use():
    class Broken(ToyHandler):
        async def decode(self, model, request):
            await asyncio.sleep(0)
            if model.unloaded:
                await asyncio.Event().wait()

    return Broken


@defect
def unload_in_use__untyped():
    class Broken(ToyHandler):
        async def decode(self, model, request):
            await asyncio.sleep(0)
            if model.unloaded:
                raise AttributeError("'NoneType' object has no attribute 'decode'")

    return Broken


@defect
def load_cycles():
    class Broken(ToyHandler):
        def __init__(self):
            self.models: list[LoadedModel] = []

        async def load_model(self, config):
            loaded = await super().load_model(config)
            self.models.append(loaded)
            return loaded

    return Broken


@defect
def load_cycles__thread():
    class Broken(ToyHandler):
        async def load_model(self, config):
            threading.Thread(target=threading.Event().wait, args=(3,), daemon=True).start()
            return await super().load_model(config)

    return Broken


@defect
def load_cycles__memory():
    class Broken(ToyHandler):
        kept: ClassVar[list[bytes]] = []

        async def load_model(self, config):
            if config.model_id.endswith("-own"):
                self.kept.append(b"\x01" * (16 << 20))
            return await super().load_model(config)

    return Broken


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────


@defect
def chat_template():
    class Broken(ToyHandler):
        def render(self, loaded_model, messages):
            return super().render(loaded_model, [m for m in messages if m.role != "system"]) + " "

    return Broken


@defect
def chat_roles():
    class Broken(ToyHandler):
        def render(self, loaded_model, messages):
            wanted = {"system": "S", "user": "U", "assistant": "A"}
            [wanted[message.role] for message in messages]
            return super().render(loaded_model, messages)

    return Broken


@defect
def chat_roles__unclear():
    class Broken(ToyHandler):
        def render(self, loaded_model, messages):
            try:
                return super().render(loaded_model, messages)
            except ConfigurationError:
                raise ConfigurationError("this cannot be done") from None

    return Broken


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────


@defect
def embeddings_fit():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            found = await super().embed(loaded_model, texts)
            return Embeddings(found.vectors, 0)

    return Broken


@defect
def embeddings_fit__infinite():
    class Broken(ToyHandler):
        def vector(self, data):
            return [*super().vector(data), float("nan")]

    return Broken


@defect
def embeddings_alone():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            found = await super().embed(loaded_model, texts)
            first = found.vectors[0]
            mixed = [[a + b for a, b in zip(v, first, strict=True)] for v in found.vectors]
            return Embeddings(mixed, found.prompt_tokens)

    return Broken


@defect
def embeddings_alone__all_the_same():
    class Broken(ToyHandler):
        def vector(self, data):
            return [1.0, 2.0]

    return Broken


@defect
def embeddings_cancelled():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            try:
                return await super().embed(loaded_model, texts)
            except asyncio.CancelledError:
                raise ValueError("somebody cancelled it") from None

    return Broken


@defect
def embeddings_refused():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            return await super().embed(loaded_model, [text[:100] for text in texts])

    return Broken


@defect
def embeddings_refused__unclaimed():
    class Broken(ToyHandler):
        def capabilities(self):
            return dataclasses.replace(super().capabilities(), embeddings=False)

    return Broken


# ── hygiene ──────────────────────────────────────────────────────────────────────────────────────


@defect
def loop_is_free():
    class Broken(ToyHandler):
        async def prefill(self, model, prompt, request):
            if len(prompt) > 150 and request.model_id.endswith("-own"):
                time.sleep(1.6)  # noqa: ASYNC251 - the defect
            await super().prefill(model, prompt, request)

    return Broken


@defect
def loop_is_free__for_good():
    class Broken(ToyHandler):
        async def prefill(self, model, prompt, request):
            if len(prompt) > 150 and request.model_id.endswith("-own"):
                time.sleep(12)  # noqa: ASYNC251 - the defect
            await super().prefill(model, prompt, request)

    return Broken


@defect
def no_leaked_tasks():
    class Broken(ToyHandler):
        async def generate_tokens(self, loaded_model, request):
            kept = loaded_model.model_object.notes.setdefault("tasks", [])
            kept.append(asyncio.create_task(asyncio.sleep(60)))
            async for step in super().generate_tokens(loaded_model, request):
                yield step

    return Broken


# What never fails in a run of the whole kit over a handler: needs an installation, or a suite.
ELSEWHERE = frozenset({"entry-point", "import-is-light", "overrides"})
