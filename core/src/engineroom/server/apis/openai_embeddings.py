"""``POST /v1/embeddings``: where the model's runtime has them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from engineroom.errors import EngineRoomError
from engineroom.schemas import GenerationParams, InferenceRequest
from engineroom.server.apis.request_fields import ApiRequest, ModelName, common_fields, parse
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import admission

__all__ = ["EmbeddingsRequest", "embeddings"]

MAX_INPUTS = 2048


def _no_token_ids(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise ValueError("token ids are not supported by this server; send text")
    return value


class EmbeddingsRequest(ApiRequest):
    """Texts to be turned into vectors."""

    model: ModelName
    input: Annotated[
        str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)],
        BeforeValidator(_no_token_ids),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {"dimensions": ()}


async def embeddings(call: Call) -> None:
    """Turn texts into vectors."""
    request = parse(call, EmbeddingsRequest, await call.json())
    texts = [request.input] if isinstance(request.input, str) else request.input
    for number, text in enumerate(texts):
        if not text:
            raise ApiError(400, f"input.{number}: the text is empty", "invalid_value", "input")
    common = common_fields(call, request)
    # It takes its place among the others; nothing is generated.
    placeholder = InferenceRequest(
        model_id=request.model,
        prompt="",
        request_id=call.id,
        params=GenerationParams(max_new_tokens=1),
        timeout_s=common["timeout_s"],
        metadata=common["metadata"],
    )
    async with call.attended(), admission(call, [placeholder]) as slot:
        try:
            found = await call.context.service.embed(
                request.model, texts, timeout_s=slot.left_of(common["timeout_s"])
            )
        except EngineRoomError as error:
            raise call.context.api_error_of(error) from error
        slot.used = tokens = found.prompt_tokens
    encode = _base64 if request.encoding_format == "base64" else list
    await call.answer_json(
        {
            "object": "list",
            "model": request.model,
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(vector)}
                for index, vector in enumerate(found.vectors)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _base64(vector: Sequence[float]) -> str:
    """32-bit floats, little-endian, as OpenAI's."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
