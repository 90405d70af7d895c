"""``POST /api/embed``, and the older ``POST /api/embeddings``: Ollama's texts into vectors."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Sequence
from typing import Annotated, Final

from msgspec import UNSET, UnsetType
from pydantic import Field, Tag

from engineroom.field_types import either
from engineroom.handlers.base import Embeddings
from engineroom.server.apis.ollama_common import (
    WORK_ERRORS,
    OllamaError,
    load_or_unload,
    nanoseconds,
    served_name,
    status_of,
)
from engineroom.server.apis.ollama_options import (
    KeepAlive,
    OllamaOptions,
    told_in_vain,
    told_of_keep_alive,
)
from engineroom.server.apis.openai_embeddings import MAX_INPUTS, vectors_of
from engineroom.server.apis.request_fields import (
    ApiRequest,
    ModelName,
    Priority,
    TimeoutS,
    parse,
)
from engineroom.server.apis.routing import work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.frames import Answer, Pieces, slices

__all__ = ["ROUTES", "OllamaEmbedRequest", "OllamaEmbeddingsRequest"]

_NUMBERS: Final = 8192
"""So many numbers are brought to length 1 and encoded at a time."""


class OllamaEmbedding(ApiRequest):
    """What both have."""

    model: ModelName
    options: OllamaOptions | None = None
    keep_alive: KeepAlive | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority | None = None


class OllamaEmbedRequest(OllamaEmbedding):
    """Texts to be turned into vectors; without any, a model to be loaded."""

    input: (
        Annotated[
            Annotated[str, Tag("(text)")]
            | Annotated[list[str], Field(fail_fast=True, max_length=MAX_INPUTS), Tag("(texts)")],
            either("a text or a list of texts", {str: "(text)", list: "(texts)"}),
        ]
        | None
    ) = None
    truncate: bool | None = None
    """A text that is too long is refused, not truncated."""
    dimensions: Annotated[int, Field(ge=0)] | None = None
    """Numbers of a vector, where the model is made for vectors that are cut; 0: its own."""


class OllamaEmbeddingsRequest(OllamaEmbedding):
    """A text to be turned into a vector; without it, a model to be loaded."""

    prompt: str | None = None


class OllamaEmbedded(Answer, kw_only=True):
    """Vectors of length 1, in the order of the texts.

    :param total_duration: nanoseconds; absent where there was only a model to be loaded.
    """

    model: str
    embeddings: list[list[float]]
    total_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET


class OllamaVector(Answer, kw_only=True):
    """A text's vector, as the model gives it."""

    embedding: list[float]


async def embed(call: Call) -> None:
    """Turn texts into vectors of length 1."""
    started = time.perf_counter()
    request = parse(call, OllamaEmbedRequest, await call.json())
    if request.truncate:
        call.warn(["truncate changed nothing: a text that is too long is refused"])
    texts = [request.input] if isinstance(request.input, str) else request.input or []
    if texts == [""]:
        texts = []
    made = await _embedded(call, request, texts, "input", request.dimensions or None)
    if made is None:
        await call.answer_json(OllamaEmbedded(model=request.model, embeddings=[]))
        return
    pieces = Pieces[OllamaEmbedded]()
    at_a_time = max(1, _NUMBERS // max(1, len(made.vectors[0])))
    for some in slices(made.vectors, at_a_time):
        await call.context.rounds.next()
        pieces.add(
            OllamaEmbedded(
                model=request.model,
                embeddings=[_of_length_one(vector) for vector in some],
                total_duration=nanoseconds(time.perf_counter() - started),
                prompt_eval_count=made.prompt_tokens,
            )
        )
    await call.answer_json(pieces.whole())


async def embeddings(call: Call) -> None:
    """Turn a text into a vector."""
    request = parse(call, OllamaEmbeddingsRequest, await call.json())
    texts = [request.prompt] if request.prompt else []
    made = await _embedded(call, request, texts, "prompt")
    vector = [] if made is None else list(made.vectors[0])
    await call.answer_json(OllamaVector(embedding=vector))


async def _embedded(
    call: Call,
    request: OllamaEmbedding,
    texts: Sequence[str],
    field: str,
    dimensions: int | None = None,
) -> Embeddings | None:
    """The vectors; ``None``: there is no text, and the model was loaded or unloaded.

    :param field: where the texts are.
    """
    name = served_name(call, request.model)
    if not texts:
        await load_or_unload(call, name, request.keep_alive, request.timeout_s)
        return None
    for number, text in enumerate(texts):
        if not text:
            raise ApiError(400, f"{field}.{number}: the text is empty", "invalid_value", field)
    status = status_of(call, name)
    context = status.max_context_tokens if status else None
    told_in_vain(call, request.options or OllamaOptions(), context)
    told_of_keep_alive(call, request.keep_alive, status.keep_alive_s if status else None)
    return await vectors_of(call, request, name, texts, dimensions, field)


def _of_length_one(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(map(operator.mul, vector, vector)))
    return [number / length for number in vector] if length else list(vector)


ROUTES = (
    work_route(
        "/api/embed",
        embed,
        "Turn texts into vectors (Ollama)",
        "Ollama",
        request=OllamaEmbedRequest,
        response=OllamaEmbedded,
        error=OllamaError,
        errors=WORK_ERRORS,
        example={"model": "default", "input": ["Why is the sky blue?"]},
    ),
    work_route(
        "/api/embeddings",
        embeddings,
        "Turn a text into a vector (Ollama, older)",
        "Ollama",
        request=OllamaEmbeddingsRequest,
        response=OllamaVector,
        error=OllamaError,
        errors=WORK_ERRORS,
        example={"model": "default", "prompt": "Why is the sky blue?"},
    ),
)
