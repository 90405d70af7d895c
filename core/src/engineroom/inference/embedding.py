"""What ``service.embed`` asks of a handler, and what it makes of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from engineroom.border import in_thread
from engineroom.config.model import LoadedModel
from engineroom.config.options import problems
from engineroom.errors import ConfigurationError, InferenceError
from engineroom.handlers.base import Embeddings, InferenceHandler
from engineroom.inference.scope import RequestScope
from engineroom.other_requests import EmbeddingRequest
from engineroom.schemas import InferenceResponse
from engineroom.sources.vectors import VectorSizes, cut_vectors
from engineroom.telemetry import working_for

__all__ = ["EmbeddingWork", "embedding_request"]


class EmbeddingWork:
    """Asks a handler for the vectors of a request. Called once.

    :param request: the texts, and how long their vectors are to be.
    """

    def __init__(self, request: EmbeddingRequest) -> None:
        self.request = request
        self.embeddings: Embeddings | None = None
        """What came of it."""

    async def __call__(
        self, scope: RequestScope, handler: InferenceHandler, loaded_model: LoadedModel
    ) -> InferenceResponse:
        """Make the vectors, and cut them if that is asked for."""
        request, sizes = self.request, loaded_model.vector_sizes
        if request.dimensions is not None and sizes is not None:
            sizes.check(request.dimensions)
        with working_for(request):
            made: object = await handler.embed(loaded_model, request.texts)
        scope.check()
        if not isinstance(made, Embeddings) or len(made.vectors) != len(request.texts):
            raise InferenceError(
                f"handler {handler.name!r}: embed did not return Embeddings with a vector "
                "for each text; mend the plugin"
            )
        if request.dimensions is not None:
            made = await _of_size(made, request.dimensions, sizes)
            scope.check()
        self.embeddings = made
        return InferenceResponse(
            request_id=request.request_id,
            model_id=request.model_id,
            prompt_tokens=made.prompt_tokens,
        )


async def _of_size(made: Embeddings, size: int, sizes: VectorSizes | None) -> Embeddings:
    length = len(made.vectors[0])
    if sizes is None or length != sizes.size:  # what the handler does not say, its vectors show
        VectorSizes(length, frozenset() if sizes is None else sizes.smaller).check(size)
    if length == size:
        return made
    vectors = await in_thread(lambda: cut_vectors(made.vectors, size))
    return Embeddings(vectors, made.prompt_tokens)


def embedding_request(model_id: object, texts: object, **fields: Any) -> EmbeddingRequest:
    """The request that a call of ``service.embed`` is.

    :param fields: further ones of the request; ``None``: not said.
    :raises ConfigurationError: it is none.
    """
    if not isinstance(model_id, str):
        raise ConfigurationError(
            f"embed takes the id of a model and a list of texts, not {type(model_id).__name__}; "
            "infer and stream answer requests"
        )
    listed = list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else []
    if not listed or not all(isinstance(text, str | list | tuple) and text for text in listed):
        raise ConfigurationError(
            "embed takes a list of texts or of their token ids, of which none is empty",
            model_id=model_id,
        )
    listed = [list(text) if isinstance(text, tuple) else text for text in listed]
    stated = {name: value for name, value in fields.items() if value is not None}
    try:
        return EmbeddingRequest(model_id=model_id, texts=listed, **stated)
    except ValidationError as error:
        mistakes = problems(error, {"model_id": model_id, "texts": listed, **stated})
    raise ConfigurationError(f"embed: {mistakes}")  # the other one has the texts in it
