"""How the server is: ``/healthz``, ``/readyz``, ``/v1/models``, ``/openapi.json``."""

from __future__ import annotations

import time
from typing import Any

import engineroom
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.metrics import CONTENT_TYPE
from engineroom.status import ModelStatus

__all__ = ["healthz", "metrics", "model", "models", "readyz", "version"]

_STARTED = int(time.time())


async def healthz(call: Call) -> None:
    """The process answers."""
    await call.answer_json({"status": "ok"})


async def version(call: Call) -> None:
    """Which engineroom it is."""
    await call.answer_json({"version": engineroom.__version__})


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
    status = "not ready" if reasons else "ready"
    await call.answer_json({"status": status, "reasons": reasons}, 503 if reasons else 200)


async def metrics(call: Call) -> None:
    """The metrics as text."""
    await call.answer(200, call.context.metrics.render(), ((b"content-type", CONTENT_TYPE),))


async def models(call: Call) -> None:
    """The models of the deployment, each under its id and its aliases."""
    data = [entry for status in call.context.directory.models() for entry in _entries(status)]
    await call.answer_json({"object": "list", "data": data})


async def model(call: Call) -> None:
    """One model."""
    wanted: str = call.path_params["model"]
    for status in call.context.directory.models():
        for entry in _entries(status):
            if entry["id"] == wanted:
                await call.answer_json(entry)
                return
    raise ApiError(
        404,
        f"{wanted[:256]!r} is not a model of this deployment; GET /v1/models lists them",
        "model_not_found",
        "model",
    )


def _entries(status: ModelStatus) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "object": "model",
            "created": _STARTED,
            "owned_by": "engineroom",
            "root": status.model_id,
            "max_model_len": status.max_context_tokens,
        }
        for name in (status.model_id, *status.aliases)
    ]
