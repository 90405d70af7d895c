"""Every route of the server. A new API is a module in ``apis``, named here."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from engineroom.server.apis import (
    admin,
    anthropic_messages,
    native,
    ollama_chat,
    ollama_embed,
    ollama_models,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    openapi,
    operations,
    ranking,
    tokenizing,
)
from engineroom.server.apis.routing import Route

__all__ = ["APIS", "all_routes", "document"]

APIS: Final = (
    openai_chat,
    openai_completions,
    openai_responses,
    anthropic_messages,
    openai_embeddings,
    ollama_chat,
    ollama_embed,
    ollama_models,
    ranking,
    tokenizing,
    native,
    operations,
    admin,
)
"""Modules with ``ROUTES``."""


@cache
def all_routes() -> tuple[Route, ...]:
    """Every route, the one that describes them all included."""
    return openapi.described([route for api in APIS for route in api.ROUTES])


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document of them all."""
    return openapi.document(all_routes())
