"""Every route, who may use it, and what its documentation is made of."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.server.apis import admin, answers, native, openapi, operations
from engineroom.server.apis.anthropic_messages import MessagesRequest, messages
from engineroom.server.apis.openai_chat import ChatRequest, chat_completions
from engineroom.server.apis.openai_completions import CompletionRequest, completions
from engineroom.server.apis.openai_embeddings import EmbeddingsRequest, embeddings
from engineroom.server.apis.openai_responses import ResponsesRequest, create_response
from engineroom.server.apis.routing import WORK_ERRORS, Route

__all__ = ["all_routes", "document", "open_paths"]


def open_paths() -> frozenset[str]:
    """Paths that need no key."""
    return frozenset(route.path for route in all_routes() if route.access == "open")


_MESSAGES: Final = [{"role": "user", "content": "Why is the sky blue?"}]


@cache
def all_routes() -> tuple[Route, ...]:
    """Every route of the server."""
    return openapi.described(
        [
            Route(
                path="/v1/chat/completions",
                method="POST",
                endpoint=chat_completions,
                response=answers.ChatCompletion,
                summary="Continue a conversation (OpenAI)",
                tag="OpenAI",
                work=True,
                request=ChatRequest,
                errors=WORK_ERRORS,
                streams=True,
                example={"model": "default", "messages": _MESSAGES, "max_tokens": 20},
            ),
            Route(
                path="/v1/completions",
                method="POST",
                endpoint=completions,
                response=answers.Completion,
                summary="Continue prompts (OpenAI)",
                tag="OpenAI",
                work=True,
                request=CompletionRequest,
                errors=WORK_ERRORS,
                streams=True,
                example={"model": "default", "prompt": "Once upon a time", "max_tokens": 20},
            ),
            Route(
                path="/v1/responses",
                method="POST",
                endpoint=create_response,
                response=answers.Response,
                summary="Answer a text or a conversation (OpenAI)",
                tag="OpenAI",
                work=True,
                request=ResponsesRequest,
                errors=WORK_ERRORS,
                streams=True,
                example={
                    "model": "default",
                    "input": "Why is the sky blue?",
                    "max_output_tokens": 20,
                },
            ),
            Route(
                path="/v1/messages",
                method="POST",
                endpoint=messages,
                response=answers.Message,
                summary="Continue a conversation (Anthropic)",
                tag="Anthropic",
                work=True,
                request=MessagesRequest,
                errors=WORK_ERRORS,
                streams=True,
                example={"model": "default", "max_tokens": 20, "messages": _MESSAGES},
            ),
            Route(
                path="/v1/embeddings",
                method="POST",
                endpoint=embeddings,
                summary="Turn texts into vectors (OpenAI)",
                tag="OpenAI",
                work=True,
                request=EmbeddingsRequest,
                response=answers.EmbeddingList,
                errors=WORK_ERRORS,
                example={"model": "default", "input": ["Why is the sky blue?"]},
            ),
            Route(
                path="/v1/models",
                method="GET",
                endpoint=operations.models,
                response=answers.ModelList,
                summary="The models (OpenAI)",
                tag="OpenAI",
            ),
            Route(
                path="/v1/models/{model:path}",
                method="GET",
                endpoint=operations.model,
                response=answers.Model,
                summary="One model (OpenAI)",
                tag="OpenAI",
                errors=(404,),
            ),
            Route(
                path="/v1/inference",
                method="POST",
                endpoint=native.inference,
                summary="Answer an InferenceRequest",
                tag="engineroom",
                work=True,
                request=InferenceRequest,
                response=InferenceResponse,
                errors=WORK_ERRORS,
                streams=True,
                example={"model_id": "default", "prompt": "Once upon a time"},
            ),
            Route(
                path="/healthz",
                method="GET",
                endpoint=operations.healthz,
                response=answers.Health,
                summary="The process answers",
                tag="operations",
                access="open",
            ),
            Route(
                path="/readyz",
                method="GET",
                endpoint=operations.readyz,
                response=answers.Readiness,
                summary="Whether requests should be sent here",
                tag="operations",
                access="open",
                errors=(503,),
            ),
            Route(
                path="/version",
                method="GET",
                endpoint=operations.version,
                response=answers.Version,
                summary="Which engineroom it is",
                tag="operations",
            ),
            Route(
                path="/metrics",
                method="GET",
                endpoint=operations.metrics,
                summary="Metrics for Prometheus",
                tag="operations",
                media="text/plain",
            ),
            Route(
                path="/v1/admin/models",
                method="GET",
                endpoint=admin.admin_models,
                response=answers.AdminModels,
                summary="Every model and how it is",
                tag="admin",
                access="admin",
            ),
            Route(
                path="/v1/admin/models/{model:path}/load",
                method="POST",
                endpoint=admin.load_model,
                response=answers.AdminModel,
                summary="Load a model",
                tag="admin",
                access="admin",
                work=True,
                errors=(400, 404, 500, 501, 503),
            ),
            Route(
                path="/v1/admin/models/{model:path}/unload",
                method="POST",
                endpoint=admin.unload_model,
                response=answers.AdminModel,
                summary="Unload a model",
                tag="admin",
                access="admin",
                work=True,
                request=admin.UnloadRequest,
                body_needed=False,
                errors=(400, 404, 408, 413, 415, 500, 501, 503),
            ),
            Route(
                path="/v1/admin/plan",
                method="GET",
                endpoint=admin.plan,
                response=answers.Plan,
                summary="What is in memory and what would fit",
                tag="admin",
                access="admin",
                errors=(400, 500, 501, 503),
            ),
            Route(
                path="/v1/admin/reload",
                method="POST",
                endpoint=admin.reload,
                response=answers.Reload,
                summary="Read the deployment anew",
                tag="admin",
                access="admin",
                work=True,
                errors=(400, 500, 501, 503),
            ),
        ]
    )


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document of them all."""
    return openapi.document(all_routes())
