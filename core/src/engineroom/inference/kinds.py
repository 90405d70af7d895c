"""What is refused by the kind of a request, whatever is in it."""

from __future__ import annotations

from engineroom.errors import ConfigurationError
from engineroom.handlers.base import Capabilities
from engineroom.schemas import InferenceRequest

__all__ = ["check_claims", "check_generates"]


def check_claims(name: str, capabilities: Capabilities, request: InferenceRequest) -> None:
    """Refuse what a handler does not claim of what is no text to be read.

    :param name: the handler's.
    """
    if request.kind == "embed":
        if not capabilities.embeddings:
            raise ConfigurationError(f"handler {name!r} makes no embeddings; use another runtime")
        texts = getattr(request, "texts", ())
        if not capabilities.prompt_token_ids and not all(isinstance(t, str) for t in texts):
            raise ConfigurationError(
                f"handler {name!r} takes no token ids; send text", field="texts"
            )
    if request.kind == "rerank" and not capabilities.rerank:
        raise ConfigurationError(
            f"handler {name!r} ranks no documents; use a cross-encoder, on a runtime whose "
            "capabilities have rerank"
        )


def check_generates(request: object, method: str) -> None:
    """Refuse what asks for no text.

    :param method: of the service, which was called with it.
    """
    kind = getattr(request, "kind", None)
    if kind == "generate":
        return
    if kind == "embed":
        instead = "service.embed(model_id, texts) turns texts into vectors"
    elif kind == "rerank":
        instead = "service.rerank(model_id, query, documents) scores documents"
    else:
        instead = "build one with InferenceRequest(model_id=…, prompt=…)"
    raise ConfigurationError(
        f"{method} takes an InferenceRequest, not {type(request).__name__}; {instead}"
    )
