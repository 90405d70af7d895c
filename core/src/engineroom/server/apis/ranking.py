"""``POST /v1/rerank`` and ``/v1/score``: how well documents answer a query.

The first has the form that Jina's and Cohere's clients send, the second that of vLLM. Both have the
further paths that vLLM and llama.cpp's server answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field, Tag, ValidationError

from engineroom.field_types import either
from engineroom.handlers.base import Scores
from engineroom.other_requests import RerankRequest
from engineroom.schemas import GenerationParams
from engineroom.server.apis.request_fields import (
    ApiRequest,
    ModelName,
    Priority,
    SubSchema,
    TimeoutS,
    common_fields,
    parse,
)
from engineroom.server.apis.routing import Route, work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, invalid_fields
from engineroom.server.http.exchange import admission
from engineroom.server.http.frames import Answer, Pieces, slices

__all__ = ["ROUTES", "RankRequest", "ScoreRequest"]

MAX_DOCUMENTS: Final = 2048
_AT_A_TIME: Final = 256
"""So many documents are written at a time."""

_Documents = Field(fail_fast=True, min_length=1, max_length=MAX_DOCUMENTS)


class RankDocument(SubSchema):
    """A document as an object."""

    text: _NotEmpty


_NotEmpty = Annotated[str, Field(json_schema_extra={"minLength": 1})]
"""One that is empty is refused by its place."""
_REFUSED: Final[dict[str, tuple[Any, ...]]] = {
    "truncate_prompt_tokens": (),
    "truncation": (False,),
    "max_tokens_per_query": (0,),
    "max_tokens_per_doc": (0,),
    "max_chunks_per_doc": (),
    "use_activation": (True,),
    "activation": (True,),
    "softmax": (True,),
    "instruction": ("",),
    "chat_template_kwargs": ({},),
}
_NOT_CUT: Final = "leave it out, and send texts that the model can read: none is cut here"
_ITS_OWN: Final = "leave it out: scores are what the model's own files make of its numbers"
_INSTEAD: Final = {
    "truncate_prompt_tokens": _NOT_CUT,
    "truncation": _NOT_CUT,
    "max_tokens_per_query": _NOT_CUT,
    "max_tokens_per_doc": _NOT_CUT,
    "max_chunks_per_doc": _NOT_CUT,
    "use_activation": _ITS_OWN,
    "activation": _ITS_OWN,
    "softmax": _ITS_OWN,
    "instruction": "leave it out, and write it into the query",
    "chat_template_kwargs": "leave it out: no chat template is used",
}


_Document = Annotated[
    Annotated[_NotEmpty, Tag("(text)")] | Annotated[RankDocument, Tag("(document)")],
    either("a text or an object with a text", {str: "(text)", dict: "(document)"}),
]
_Texts = Annotated[
    Annotated[_NotEmpty, Tag("(text)")] | Annotated[list[_NotEmpty], _Documents, Tag("(texts)")],
    either("a text or a list of texts", {str: "(text)", list: "(texts)"}),
]


_FORMS: Final = (("text_1", "text_2"), ("queries", "documents"))
"""What a request for scores calls the two texts of a pair."""
_GIVEN: Final[dict[str, Any]] = {"not": {"type": "null"}}
_ONE_FORM: Final[list[Any]] = [
    {
        "required": list(form),
        "properties": {
            **dict.fromkeys(form, _GIVEN),
            **{name: {"type": "null"} for other in _FORMS if other != form for name in other},
        },
    }
    for form in _FORMS
]


class RankRequest(ApiRequest):
    """A query, and documents to be put in the order in which they answer it."""

    REFUSED: ClassVar = {**_REFUSED, "rank_fields": (["text"],), "return_embeddings": (False,)}
    INSTEAD: ClassVar = {
        **_INSTEAD,
        "rank_fields": "leave it out: the text of a document is ranked",
        "return_embeddings": "leave it out, and ask /v1/embeddings",
    }
    model: ModelName
    query: _NotEmpty
    documents: Annotated[list[_Document], _Documents]
    top_n: Annotated[int, Field(ge=0)] | None = None
    """So many of the best are answered; without it, or 0: all."""
    return_documents: bool | None = None
    """Tell the documents with their scores; ``true`` unless said."""
    user: str | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority | None = None


class ScoreRequest(ApiRequest):
    """Texts to be scored for one text, or as many pairs as there are.

    They are ``text_1`` and ``text_2``, or ``queries`` and ``documents``.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_FORM})
    REFUSED: ClassVar = _REFUSED
    INSTEAD: ClassVar = _INSTEAD
    model: ModelName
    text_1: _Texts | None = None
    text_2: _Texts | None = None
    queries: _Texts | None = None
    documents: _Texts | None = None
    user: str | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority | None = None


class RankUsage(Answer, kw_only=True):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class RankedText(Answer, kw_only=True):
    """A document that was ranked."""

    text: str


class RankResult(Answer, kw_only=True):
    """A document's place, by its number among the documents of the request."""

    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class Ranking(Answer, kw_only=True):
    """Documents, the best first."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RankResult]
    usage: RankUsage


class Score(Answer, kw_only=True):
    """How well a pair of texts fits."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(Answer, kw_only=True):
    """Scores in the order of the pairs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: RankUsage


async def rerank(call: Call) -> None:
    """Put documents in the order in which they answer a query."""
    request = parse(call, RankRequest, await call.json())
    texts = [each if isinstance(each, str) else each.text for each in request.documents]
    names = {"queries": "query", "documents": "documents"}
    made = await _scores(call, request, [request.query], texts, names)
    order = sorted(range(len(texts)), key=lambda index: (-made.scores[index], index))
    told = request.return_documents is not False
    pieces = Pieces[Ranking]()
    for some in slices(order[: request.top_n or None], _AT_A_TIME):
        await call.context.rounds.next()
        results = [
            RankResult(
                index=index,
                relevance_score=made.scores[index],
                document=RankedText(text=texts[index]) if told else UNSET,
            )
            for index in some
        ]
        usage = RankUsage(prompt_tokens=made.prompt_tokens, total_tokens=made.prompt_tokens)
        pieces.add(Ranking(id=call.id, model=request.model, results=results, usage=usage))
    await call.answer_json(pieces.whole())


async def score(call: Call) -> None:
    """Score pairs of texts."""
    request = parse(call, ScoreRequest, await call.json())
    one, other = _form_of(request)
    first, second = [
        [texts] if isinstance(texts, str) else texts
        for texts in (getattr(request, one), getattr(request, other))
    ]
    if len(first) not in (1, len(second)):
        raise ApiError(
            400,
            f"{one} has {len(first)} texts and {other} {len(second)}; give one of {one}, or as "
            f"many as {other} has",
            "invalid_value",
            one,
        )
    made = await _scores(call, request, first, second, {"queries": one, "documents": other})
    data = [Score(index=index, score=number) for index, number in enumerate(made.scores)]
    usage = RankUsage(prompt_tokens=made.prompt_tokens, total_tokens=made.prompt_tokens)
    answer = ScoreList(
        id=call.id, created=int(time.time()), model=request.model, data=data, usage=usage
    )
    pieces = Pieces[ScoreList]()
    pieces.add(answer)
    await call.answer_json(pieces.whole())


def _form_of(request: ScoreRequest) -> tuple[str, str]:
    """What the request calls its texts. :raises ApiError: 400: neither, or both, or a half."""
    given = {name for form in _FORMS for name in form if getattr(request, name) is not None}
    for form in _FORMS:
        if given == set(form):
            return form
    missing = next(
        (n for form in _FORMS if given & set(form) for n in form if n not in given), None
    )
    raise ApiError(
        400,
        "give text_1 and text_2, or queries and documents; "
        f"found {' and '.join(sorted(given)) or 'neither'}",
        "invalid_value",
        missing or "text_1",
    )


async def _scores(
    call: Call,
    request: RankRequest | ScoreRequest,
    queries: Sequence[str],
    documents: Sequence[str],
    names: dict[str, str],
) -> Scores:
    """:param names: what the API calls queries and documents."""
    common = common_fields(call, request)
    await call.context.rounds.next()  # texts by the megabyte are looked at once more
    fields: dict[str, Any] = {
        "timeout_s": common["timeout_s"],
        "priority": common["priority"],
        "metadata": common["metadata"],
    }
    try:
        asked = RerankRequest(
            model_id=request.model,
            queries=list(queries),
            documents=list(documents),
            request_id=call.id,
            params=GenerationParams(max_new_tokens=1),  # nothing is generated
            **fields,
        )
    except ValidationError as error:
        raise invalid_fields(error, names) from error
    async with call.attended(), admission(call, [asked]) as slot:
        await call.context.rounds.next()  # and once more
        fields["timeout_s"] = slot.left_of(asked.timeout_s)
        made = await call.context.service.rerank(
            asked.model_id,
            asked.queries,
            asked.documents,
            request_id=asked.request_id,
            **fields,
        )
        slot.used = made.prompt_tokens
    return made


def _routes(paths: Sequence[str], endpoint: Any, summary: str, **fields: Any) -> Iterator[Route]:
    for path in paths:
        yield work_route(path, endpoint, summary, "Ranking", **fields)


ROUTES = (
    *_routes(
        ("/v1/rerank", "/rerank", "/v2/rerank", "/v1/reranking", "/reranking"),
        rerank,
        "Rank documents by a query (Jina, Cohere)",
        request=RankRequest,
        response=Ranking,
        example={"model": "default", "query": "Why is the sky blue?", "documents": ["Because."]},
    ),
    *_routes(
        ("/v1/score", "/score"),
        score,
        "Score pairs of texts (vLLM)",
        request=ScoreRequest,
        response=ScoreList,
        example={"model": "default", "text_1": "Why is the sky blue?", "text_2": ["Because."]},
    ),
)
