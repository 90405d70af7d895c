"""``POST /v1/embeddings``: where the model's runtime has them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from engineroom.field_types import TokenId
from engineroom.handlers.base import Embeddings
from engineroom.other_requests import EmbeddingRequest
from engineroom.schemas import GenerationParams
from engineroom.server.apis.request_fields import (
    ApiRequest,
    ModelName,
    Priority,
    TimeoutS,
    common_fields,
    parse,
)
from engineroom.server.apis.routing import work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, invalid_fields
from engineroom.server.http.exchange import admission
from engineroom.server.http.frames import Answer, Pieces, slices

__all__ = ["MAX_INPUTS", "ROUTES", "EmbeddingsRequest", "vectors_of"]

MAX_INPUTS = 2048
_NUMBERS: Final = 32_768
"""So many numbers are encoded at a time."""


_TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
_MANY: Final = Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)
_INPUTS: Final[Mapping[type, str]] = {int: "(ids)", list: "(lists of ids)"}


def _kind_of_input(value: Any) -> str | None:
    """Which of its forms an input has: mistakes are told of that one alone."""
    if not isinstance(value, list):
        return "(text)" if isinstance(value, str) else None
    return _INPUTS.get(type(value[0]), "(texts)") if value else "(texts)"


_NotEmpty = Annotated[str, Field(json_schema_extra={"minLength": 1})]
"""One that is empty is refused by its place."""


class EmbeddingsRequest(ApiRequest):
    """Texts to be turned into vectors."""

    model: ModelName
    input: Annotated[
        Annotated[_NotEmpty, Tag("(text)")]
        | Annotated[list[_NotEmpty], _MANY, Tag("(texts)")]
        | Annotated[_TokenIds, Tag("(ids)")]
        | Annotated[list[_TokenIds], _MANY, Tag("(lists of ids)")],
        Discriminator(
            _kind_of_input,
            custom_error_type="input",
            custom_error_message="must be a text, a list of texts, a list of token ids, or a list "
            "of lists of token ids",
        ),
    ]
    """A text or several, or their token ids, which are read as they are: nothing is added."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Numbers of a vector, where the model is made for vectors that are cut."""
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority | None = None


class Embedding(Answer, kw_only=True):
    """A text's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer, kw_only=True):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer, kw_only=True):
    """Vectors in the order of the texts."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


async def embeddings(call: Call) -> None:
    """Turn texts into vectors."""
    request = parse(call, EmbeddingsRequest, await call.json())
    given: Any = request.input
    texts = [given] if _kind_of_input(given) in ("(text)", "(ids)") else given
    for number, text in enumerate(texts):
        if not text:
            raise ApiError(400, f"input.{number}: the text is empty", "invalid_value", "input")
    made = await vectors_of(call, request, request.model, texts, request.dimensions)
    tokens = made.prompt_tokens
    encode = _base64 if request.encoding_format == "base64" else list
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    pieces = Pieces[EmbeddingList]()
    at_a_time = max(1, _NUMBERS // max(1, len(made.vectors[0])))
    for some in slices(list(enumerate(made.vectors)), at_a_time):
        await call.context.rounds.next()
        data = [Embedding(index=index, embedding=encode(vector)) for index, vector in some]
        pieces.add(EmbeddingList(model=request.model, data=data, usage=usage))
    await call.answer_json(pieces.whole())


async def vectors_of(
    call: Call,
    request: ApiRequest,
    model_id: str,
    texts: Any,
    dimensions: int | None,
    field: str = "input",
) -> Embeddings:
    """Vectors as the service makes them, when the request's turn has come.

    :param request: has ``timeout_s`` and ``priority``.
    :param field: what the API calls the texts.
    :raises ApiError: 400, or the server's limits are reached.
    """
    common = common_fields(call, request)
    await call.context.rounds.next()  # token ids by the hundred thousand are looked at once more
    try:
        asked = EmbeddingRequest(
            model_id=model_id,
            texts=texts,
            dimensions=dimensions,
            request_id=call.id,
            params=GenerationParams(max_new_tokens=1),  # nothing is generated
            timeout_s=common["timeout_s"],
            priority=common["priority"],
            metadata=common["metadata"],
        )
    except ValidationError as error:
        raise invalid_fields(error, {"texts": field}) from error
    async with call.attended(), admission(call, [asked]) as slot:
        await call.context.rounds.next()  # and once more
        made = await call.context.service.embed(
            asked.model_id,
            asked.texts,
            dimensions=asked.dimensions,
            timeout_s=slot.left_of(asked.timeout_s),
            request_id=asked.request_id,
            priority=asked.priority,
            metadata=asked.metadata,
        )
        slot.used = made.prompt_tokens
    return made


def _base64(vector: Sequence[float]) -> str:
    """32-bit floats, little-endian, as OpenAI's."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


ROUTES = (
    work_route(
        "/v1/embeddings",
        embeddings,
        "Turn texts into vectors (OpenAI)",
        "OpenAI",
        request=EmbeddingsRequest,
        response=EmbeddingList,
        example={"model": "default", "input": ["Why is the sky blue?"]},
    ),
)
