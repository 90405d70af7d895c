"""What ``service.rerank`` asks of a handler, and what it makes of the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from engineroom.config.model import LoadedModel
from engineroom.config.options import problems
from engineroom.errors import ConfigurationError, InferenceError
from engineroom.handlers.base import InferenceHandler, Scores
from engineroom.inference.scope import RequestScope
from engineroom.other_requests import RerankRequest
from engineroom.schemas import InferenceResponse
from engineroom.telemetry import working_for

__all__ = ["RankingWork", "rerank_request"]


class RankingWork:
    """Asks a handler for the scores of a request. Called once.

    :param request: the pairs of texts.
    """

    def __init__(self, request: RerankRequest) -> None:
        self.request = request
        self.scores: Scores | None = None
        """What came of it."""

    async def __call__(
        self, scope: RequestScope, handler: InferenceHandler, loaded_model: LoadedModel
    ) -> InferenceResponse:
        """Score the pairs."""
        request, pairs = self.request, self.request.pairs
        with working_for(request):
            made: object = await handler.rerank(loaded_model, pairs)
        scope.check()
        if not isinstance(made, Scores) or len(made.scores) != len(pairs):
            raise InferenceError(
                f"handler {handler.name!r}: rerank did not return Scores with one for each "
                "document; mend the plugin"
            )
        if not all(map(math.isfinite, made.scores)):
            raise InferenceError(
                "the model computed no number for a pair of texts; its files may be damaged"
            )
        self.scores = made
        return InferenceResponse(
            request_id=request.request_id,
            model_id=request.model_id,
            prompt_tokens=made.prompt_tokens,
        )


def rerank_request(
    model_id: object, query: object, documents: object, **fields: Any
) -> RerankRequest:
    """The request that a call of ``service.rerank`` is.

    :param fields: further ones of the request; ``None``: not said.
    :raises ConfigurationError: it is none.
    """
    if not isinstance(model_id, str):
        raise ConfigurationError(
            "rerank takes the id of a model, a query and a list of documents, not "
            f"{type(model_id).__name__}; infer and stream answer requests"
        )
    queries = [query] if isinstance(query, str) else _listed(query)
    stated = {name: value for name, value in fields.items() if value is not None}
    told = {"model_id": model_id, "queries": queries, "documents": _listed(documents), **stated}
    try:
        return RerankRequest(**told)
    except ValidationError as error:
        mistakes = problems(error, told)
    raise ConfigurationError(f"rerank: {mistakes}")  # the other one has the texts in it


def _listed(texts: object) -> list[Any]:
    return list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else []
