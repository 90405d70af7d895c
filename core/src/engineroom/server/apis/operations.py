"""How the server is, and which models it has."""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

from msgspec import UNSET, UnsetType

import engineroom
from engineroom.server.apis.routing import Route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import unknown_model
from engineroom.server.http.frames import Answer
from engineroom.server.http.guard import check_metrics
from engineroom.server.metrics import CONTENT_TYPE

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
    max_model_len: int | UnsetType = UNSET
    """Absent until it is known: a model tells it when it is loaded."""


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
    reasons = ["draining"] if context.draining else []
    if context.starting:
        reasons.append("models are loading")
    named = not context.settings.keys.needed  # what models there are is told to keys alone
    reasons += [
        f"the engine of {model.model_id if named else 'a model'} is not well"
        for model, _, health in context.directory.health()
        if not health.ok
    ]
    answer = Readiness(status="not ready" if reasons else "ready", reasons=reasons)
    await call.answer_json(answer, 503 if reasons else 200)


async def metrics(call: Call) -> None:
    """The metrics as text: of the key that asks, or of all where it may read them."""
    text = await call.context.metrics.render(check_metrics(call))
    await call.answer(200, text, ((b"content-type", CONTENT_TYPE),))


async def models(call: Call) -> None:
    """The models of the deployment, each under its id and its aliases."""
    await call.answer_json(ModelList(data=_models(call)))


async def model(call: Call) -> None:
    """One model."""
    name: str = call.path_params["model"]
    for entry in _models(call):
        if entry.id == name:
            await call.answer_json(entry)
            return
    raise unknown_model(name, "/v1/models")


def _models(call: Call) -> list[Model]:
    return [
        Model(
            id=name,
            created=_STARTED,
            root=status.model_id,
            max_model_len=UNSET if status.max_context_tokens is None else status.max_context_tokens,
        )
        for status in call.context.directory.models()
        for name in (status.model_id, *status.aliases)
    ]


_get = partial(Route, "GET", tag="operations")

ROUTES = (
    _get("/v1/models", models, "The models (OpenAI)", tag="OpenAI", response=ModelList),
    _get(
        "/v1/models/{model:path}", model, "One model (OpenAI)",
        tag="OpenAI", response=Model, errors=(404,),
    ),
    _get("/healthz", healthz, "The process answers", access="open", response=Health),
    _get("/health", healthz, "The same, as routers ask", access="open", response=Health),
    _get("/ping", healthz, "The same, as routers ask", access="open", response=Health),
    _get(
        "/readyz", readyz, "Whether requests should be sent here",
        access="open", response=Readiness, errors=(503,), own_errors=(503,),
    ),
    _get("/version", version, "Which engineroom it is", response=Version),
    _get("/metrics", metrics, "Metrics for Prometheus", media="text/plain"),
)  # fmt: skip
