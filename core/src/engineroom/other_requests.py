"""Requests that generate no text: they ask for vectors, a count, tokens, scores."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, Tag, model_validator

from engineroom.field_types import Int, OrDefault, Text, TokenId, either
from engineroom.schemas import InferenceRequest, RequestKind

__all__ = [
    "CountRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "RerankRequest",
    "TokenizeRequest",
]


class EmbeddingRequest(InferenceRequest):
    """Texts to be turned into vectors, as observers see them: a request of the kind ``embed``.

    ``LLMInferenceService.embed`` makes it. Its ``prompt`` is empty; its ``params`` mean nothing.
    """

    kind: ClassVar[RequestKind] = "embed"
    prompt: Annotated[Text | None, OrDefault] = ""
    texts: Annotated[
        list[
            Annotated[
                Annotated[Text, Field(min_length=1), Tag("(text)")]
                | Annotated[list[TokenId], Field(fail_fast=True, min_length=1), Tag("(ids)")],
                either("a text or a list of token ids", {str: "(text)", list: "(ids)"}),
            ]
        ],
        Field(fail_fast=True, min_length=1),
    ]
    """Each a text, or its token ids as the model is to read them: nothing is added to those."""
    dimensions: Annotated[Int, Field(ge=1)] | None = None
    """Numbers that each vector is to have; ``None``: as many as the model makes."""


class CountRequest(InferenceRequest):
    """A request whose input is counted, not answered, as observers see it: of the kind ``count``.

    ``LLMInferenceService.count_prompt_tokens`` makes it of the request that it is given.
    """

    kind: ClassVar[RequestKind] = "count"


class TokenizeRequest(InferenceRequest):
    """A request whose input is told as token ids, as observers see it: of the kind ``tokenize``.

    ``LLMInferenceService.tokenize`` makes it of the request that it is given.
    """

    kind: ClassVar[RequestKind] = "tokenize"
    add_special_tokens: Annotated[bool, OrDefault] = True
    """Whether a ``prompt`` has around it what the model wants there."""
    special_as_text: Annotated[bool, OrDefault] = False
    """Whether the special tokens that a ``prompt`` names are read as the characters they are
    written with."""


class DetokenizeRequest(InferenceRequest):
    """Token ids whose text is told, as observers see them: a request of the kind ``detokenize``.

    ``LLMInferenceService.detokenize`` makes it. Its ``prompt`` is empty; its ``params`` mean
    nothing.
    """

    kind: ClassVar[RequestKind] = "detokenize"
    prompt: Annotated[Text | None, OrDefault] = ""
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


_RankedTexts = Annotated[
    list[Annotated[Text, Field(min_length=1)]], Field(fail_fast=True, min_length=1)
]


class RerankRequest(InferenceRequest):
    """Pairs of texts to be scored, as observers see them: a request of the kind ``rerank``.

    ``LLMInferenceService.rerank`` makes it. Its ``prompt`` is empty; its ``params`` mean nothing.
    """

    kind: ClassVar[RequestKind] = "rerank"
    prompt: Annotated[Text | None, OrDefault] = ""
    queries: _RankedTexts
    """One for all documents, or as many as there are documents."""
    documents: _RankedTexts

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """A query and a document each, in the order of the documents."""
        queries = self.queries if len(self.queries) > 1 else self.queries * len(self.documents)
        return list(zip(queries, self.documents, strict=True))

    @model_validator(mode="after")
    def _fit(self) -> RerankRequest:
        if len(self.queries) not in (1, len(self.documents)):
            raise ValueError(
                f"there are {len(self.queries)} queries and {len(self.documents)} documents; give "
                "one query, or as many as documents"
            )
        return self
