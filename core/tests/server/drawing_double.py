"""A fake runtime that draws what it says: any token that its grammar allows, all equally likely.

It stands in for a model that follows nothing but the grammar. What the last message says is what it
likes to say: it does so token by token, as long as that is allowed, and draws from there on. A
text that has become long is ended as soon as the grammar lets it.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from functools import cache
from typing import Any

import numpy as np
from server_doubles import TalkHandler

from engineroom import Capabilities, GenerationParams, InferenceRequest, LoadedModel, TokenStep
from engineroom.engine import Constraint, GrammarCompiler
from engineroom.generation.traits import PLAIN, ModelTraits
from engineroom.prompts import ModelTokens

KINDS = frozenset({"json_schema", "json_object", "regex", "choice", "grammar"})
END = 256
PIECES = [bytes([byte]) for byte in range(256)] + [
    b"<end>",
    b'":',
    b'",',
    "é🌸".encode(),
    b"12",
    b"[{",
]
LONG = 60
CLOSING = (END, *b'"}],:')


class _Codec:
    def __init__(self, traits: ModelTraits) -> None:
        tokens = ModelTokens(PIECES, frozenset({END}), [END], lambda text: list(text.encode()))
        self.model_tokens = lambda: tokens
        self.traits = traits


@cache
def compiler(traits: ModelTraits) -> GrammarCompiler:
    return GrammarCompiler(_Codec(traits))


class DrawingHandler(TalkHandler):
    """A fake runtime, see above. :param traits: what its model writes beside content."""

    name = "drawing"

    def __init__(self, traits: ModelTraits = PLAIN) -> None:
        super().__init__()
        self._traits = traits

    def traits(self, loaded_model: LoadedModel) -> ModelTraits:
        return self._traits

    def capabilities(self) -> Capabilities:
        params = frozenset(GenerationParams.model_fields)
        return Capabilities(params=params, chat=True, structured_output=KINDS)

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        place = await compiler(self._traits).compile(request)
        assert place is not None
        assert request.messages is not None
        liked = list((request.messages[-1].content or "").encode())
        draws = random.Random(request.params.seed)
        yield TokenStep(prompt_tokens=1)
        for number in range(request.params.max_new_tokens or 400):
            likes = liked[number] if number < len(liked) else END if liked else None
            token = _next(place, likes, draws, number > LONG)
            if token != likes:
                liked = []
            if token == END:
                yield TokenStep(finish="eos_token")
                return
            place.take(token)
            yield TokenStep((token,), PIECES[token])


def _next(place: Constraint, likes: int | None, draws: random.Random, long: bool) -> Any:
    if likes is not None and place.allows(likes):
        return likes
    allowed = [int(token) for token in np.flatnonzero(place.allowed())]
    if long and (closing := [token for token in CLOSING if token in allowed]):
        return closing[0]
    return draws.choice(allowed)
