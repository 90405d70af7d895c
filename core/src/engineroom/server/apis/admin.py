"""``/v1/admin/*``: the models in memory."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from engineroom.errors import EngineRoomError
from engineroom.models.manager import LLMModelManager, ModelStatus
from engineroom.server.apis.request_fields import ApiRequest, Number, parse
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, without_paths

__all__ = ["UnloadRequest", "admin_models", "load_model", "plan", "reload", "unload_model"]


class UnloadRequest(ApiRequest):
    """How to unload."""

    timeout_s: Annotated[Number, Field(ge=0, le=3600)] | None = None
    """Seconds to wait for the requests that hold the model; 30 unless said."""


async def admin_models(call: Call) -> None:
    """Every model and how it is."""
    await call.answer_json(
        {"models": [_shown(status) for status in call.context.directory.models()]}
    )


async def load_model(call: Call) -> None:
    """Load a model; answers when it is ready. Going away does not stop the load."""
    manager, model_id = _target(call)
    async with call.attended():
        await _typed(call, manager.load(model_id))
    await call.answer_json(_status(call, model_id))


async def unload_model(call: Call) -> None:
    """Unload a model once nobody holds it. Its next request loads it anew."""
    manager, model_id = _target(call)
    timeout: float | None = 30.0
    if call.header(b"content-length") not in ("", "0") or call.header(b"transfer-encoding"):
        request = parse(call, UnloadRequest, await call.json())
        timeout = request.timeout_s if request.timeout_s is not None else timeout
    async with call.attended():
        await _typed(call, manager.unload(model_id, timeout))
    await call.answer_json(_status(call, model_id))


async def plan(call: Call) -> None:
    """What is in memory and what would fit, as the manager tells it."""
    found = await _typed(call, _manager(call).plan())
    await call.answer_json({"plan": _plain(found)})


async def reload(call: Call) -> None:
    """Read the deployment anew, as the manager does it."""
    report = await _typed(call, _manager(call).reload())
    await call.answer_json({"reload": _plain(report)})


def _plain(value: Any) -> Any:
    """What JSON can say of it, without paths of this machine."""
    return _redacted(TypeAdapter(Any).dump_python(value, mode="json", fallback=str))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {key: _redacted(each) for key, each in value.items()}
    return [_redacted(each) for each in value] if isinstance(value, list) else value


def _manager(call: Call) -> LLMModelManager:
    manager = call.context.directory.manager
    if manager is None:
        raise ApiError(501, "this server's models come from elsewhere", "not_implemented")
    return manager


def _target(call: Call) -> tuple[LLMModelManager, str]:
    manager = _manager(call)
    model_id: str = call.path_params["model"]
    known = call.context.directory.canonical(model_id)
    if known is None:
        raise ApiError(
            404,
            f"{model_id[:256]!r} is not a model of this deployment; GET /v1/admin/models lists "
            "them",
            "model_not_found",
            "model",
        )
    return manager, known


async def _typed(call: Call, work: Awaitable[Any]) -> Any:
    try:
        return await work
    except EngineRoomError as error:
        raise call.context.api_error_of(error) from error


def _status(call: Call, model_id: str) -> dict[str, Any]:
    return next(_shown(s) for s in call.context.directory.models() if s.model_id == model_id)


def _shown(status: ModelStatus) -> dict[str, Any]:
    return {
        "id": status.model_id,
        "state": status.state,
        "aliases": list(status.aliases),
        "runtime": status.runtime,
        "leases": status.leases,
        "memory_bytes": status.memory_bytes,
        "max_context_tokens": status.max_context_tokens,
        "failed": status.error is not None,
    }
