"""The toy runtime with one defect at a time: of what parameters ask for."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from broken_table import defect
from toy_runtime import HONOURED, ToyHandler

from engineroom import (
    ConfigurationError,
    TokenLogprob,
)

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
def seed__hot():
    class Broken(ToyHandler):
        """Seeds are forgotten where it is hot."""

        def random(self, request):
            hot = self.temperature(request.params) > 1
            return random.Random(None if hot else request.params.seed)

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
def min_tokens():
    return without("min_tokens")


@defect
def min_tokens__stops():
    class Broken(ToyHandler):
        """Lets the core look for stop sequences from the first token on."""

        async def infer(self, loaded_model, request):
            params = request.params.model_copy(update={"min_tokens": None})
            if request.stop_sequences:
                request = request.model_copy(update={"params": params})
            return await super().infer(loaded_model, request)

    return Broken


@defect
def ignore_eos():
    return without("ignore_eos")


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
def prompt_logprobs():
    class Broken(ToyHandler):
        """What was computed before has no logits any more."""

        def prompt_logprobs(self, model, params, prompt, cached):
            return super().prompt_logprobs(model, params, prompt, cached)[cached:]

    return Broken


@defect
def prompt_logprobs__of_the_next():
    class Broken(ToyHandler):
        """The logits behind a token, for that token."""

        def prompt_logprobs(self, model, params, prompt, cached):
            told = params.model_copy(update={"logprobs": params.prompt_logprobs})
            first, *_ = super().prompt_logprobs(model, params, prompt, cached)
            return [first] + [
                self.logprobs(told, self.logits(model, tuple(prompt[max(0, i - 2) : i + 1])), token)
                for i, token in enumerate(prompt)
                if i
            ]

    return Broken


@defect
def prompt_logprobs__of_the_first():
    class Broken(ToyHandler):
        def prompt_logprobs(self, model, params, prompt, cached):
            told = params.model_copy(update={"logprobs": params.prompt_logprobs})
            _, *others = super().prompt_logprobs(model, params, prompt, cached)
            return [self.logprobs(told, self.logits(model, ()), prompt[0]), *others]

    return Broken


@defect
def token_counts():
    class Broken(ToyHandler):
        def count_tokens(self, loaded_model, text):
            return len(text.split())

    return Broken


@defect
def token_counts__told():
    class Broken(ToyHandler):
        async def tokenize(self, loaded_model, request):
            return (await super().tokenize(loaded_model, request))[1:]

    return Broken


@defect
def token_counts__bytes():
    class Broken(ToyHandler):
        async def token_bytes(self, loaded_model, tokens):
            return [b"x" for _ in tokens]

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
