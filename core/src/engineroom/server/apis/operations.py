"""How the server is, and which models it has."""

from __future__ import annotations

import time
from typing import Literal

import engineroom
from engineroom.server.apis.routing import Route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.frames import Answer
from engineroom.server.metrics import CONTENT_TYPE
from engineroom.status import ModelStatus

__all__ = ["ROUTES"]

_STARTED = int(time.time())


class Health(Answer, kw_only=True):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Answer, kw_only=True):
    """Whether requests should be sent here, and why not."""

    status: Literal["ready", "not ready"]
    reasons: list[str]


class Version(Answer, kw_only=True):
    """Which engineroom it is."""

    version: str


class Model(Answer, kw_only=True):
    """A model, under its id or an alias."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "engineroom"
    root: str
    max_model_len: int | None


class ModelList(Answer, kw_only=True):
    """The models."""

    object: Literal["list"] = "list"
    data: list[Model]


async def healthz(call: Call) -> None:
    """The process answers."""
    await call.answer_json(Health())


async def version(call: Call) -> None:
    """Which engineroom it is."""
    await call.answer_json(Version(version=engineroom.__version__))


async def readyz(call: Call) -> None:
    """Whether requests should be sent here."""
    context = call.context
    reasons: list[str] = []
    if context.draining:
        reasons.append("draining")
    if context.starting:
        reasons.append("models are loading")
    reasons += [
        f"the engine of {model.model_id} is not well"
        for model, _, health in context.directory.health()
        if not health.ok
    ]
    answer = Readiness(status="not ready" if reasons else "ready", reasons=reasons)
    await call.answer_json(answer, 503 if reasons else 200)


async def metrics(call: Call) -> None:
    """The metrics as text."""
    await call.answer(200, call.context.metrics.render(), ((b"content-type", CONTENT_TYPE),))


async def models(call: Call) -> None:
    """The models of the deployment, each under its id and its aliases."""
    data = [entry for status in call.context.directory.models() for entry in _entries(status)]
    await call.answer_json(ModelList(data=data))


async def model(call: Call) -> None:
    """One model."""
    name: str = call.path_params["model"]
    for status in call.context.directory.models():
        for entry in _entries(status):
            if entry.id == name:
                await call.answer_json(entry)
                return
    raise ApiError(
        404,
        f"{name[:256]!r} is not a model of this deployment; GET /v1/models lists them",
        "model_not_found",
        "model",
    )


def _entries(status: ModelStatus) -> list[Model]:
    return [
        Model(
            id=name,
            created=_STARTED,
            root=status.model_id,
            max_model_len=status.max_context_tokens,
        )
        for name in (status.model_id, *status.aliases)
    ]


ROUTES = (
    Route("GET", "/v1/models", models, "The models (OpenAI)", "OpenAI", response=ModelList),
    Route(
        "GET",
        "/v1/models/{model:path}",
        model,
        "One model (OpenAI)",
        "OpenAI",
        response=Model,
        errors=(404,),
    ),
    Route(
        "GET",
        "/healthz",
        healthz,
        "The process answers",
        "operations",
        access="open",
        response=Health,
    ),
    Route(
        "GET",
        "/readyz",
        readyz,
        "Whether requests should be sent here",
        "operations",
        access="open",
        response=Readiness,
        errors=(503,),
        own_errors=(503,),
    ),
    Route("GET", "/version", version, "Which engineroom it is", "operations", response=Version),
    Route("GET", "/metrics", metrics, "Metrics for Prometheus", "operations", media="text/plain"),
)
