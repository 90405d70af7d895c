"""The toy runtime under grammars, and one whose model thinks. Needs the extra ``structured``."""

from __future__ import annotations

import dataclasses
from functools import cache

from toy_runtime import EOS, ToyHandler

from engineroom import STRUCTURED_KINDS
from engineroom.engine import GrammarCompiler
from engineroom.generation.tool_formats import REASONING_FORMATS
from engineroom.generation.traits import PLAIN, ModelTraits
from engineroom.prompts import ModelTokens

THINK = next(form for form in REASONING_FORMATS if form.name == "think")
NEVER = -1e9


class _Codec:
    def __init__(self, traits):
        pieces = [*(bytes([byte]) for byte in range(256)), b"<end>"]
        tokens = ModelTokens(pieces, frozenset({EOS}), [EOS], self.read)
        self.model_tokens = lambda: tokens
        self.width_and_ends = lambda: (len(pieces), frozenset({EOS}))
        self.traits = traits

    def read(self, text):
        return list(text.encode())


@cache
def _compiler(traits):
    return GrammarCompiler(_Codec(traits))


class FormsToy(ToyHandler):
    """Honours every kind of structured output."""

    model_traits: ModelTraits = PLAIN

    def __init__(self):
        super().__init__()
        self.places = {}

    def capabilities(self):
        found = super().capabilities()
        return dataclasses.replace(
            found,
            params=found.params | {"structured_output"},
            structured_output=frozenset(STRUCTURED_KINDS),
        )

    async def compile(self, request):
        return await _compiler(self.model_traits).compile(request)

    async def prefill(self, model, prompt, request):
        await super().prefill(model, prompt, request)
        self.places[id(request.params)] = await self.compile(request)

    def adjusted(self, params, logits, prompt, new):
        found = super().adjusted(params, logits, prompt, new)
        if (place := self.places[id(params)]) is None:
            return found
        if new:
            place.take(new[-1])
        allowed = place.allowed()
        return [value if allowed[token] else NEVER for token, value in enumerate(found)]


class ThinkingToy(FormsToy):
    """Its template has begun to think for it."""

    model_traits = ModelTraits(reasoning=THINK, tail="<think>\n")

    def capabilities(self):
        return dataclasses.replace(super().capabilities(), reasoning_budget=True)

    def traits(self, loaded_model):
        return self.model_traits

    def render(self, loaded_model, messages):
        return super().render(loaded_model, messages) + "<think>\n"
