"""``/v1/admin/*``: the models in memory."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final

from msgspec import Meta
from pydantic import Field, TypeAdapter

from engineroom.models.manager import LLMModelManager
from engineroom.server.apis.request_fields import ApiRequest, Number, parse
from engineroom.server.apis.routing import Route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, unknown_model, without_paths
from engineroom.server.http.frames import Answer
from engineroom.status import ModelStatus

__all__ = ["ROUTES", "UnloadRequest"]

_ANYTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)


class UnloadRequest(ApiRequest):
    """How to unload."""

    timeout_s: Annotated[Number, Field(ge=0, le=3600)] | None = None
    """Seconds to wait for the requests that hold the model; 30 unless said."""


class AdminModel(Answer, kw_only=True):
    """A model and how it is."""

    id: str
    state: Annotated[str, Meta(examples=["ready"])]
    aliases: list[str]
    runtime: str | None
    leases: int
    memory_bytes: int | None
    max_context_tokens: int | None
    failed: bool


class AdminModels(Answer, kw_only=True):
    """Every model and how it is."""

    models: list[AdminModel]


class Plan(Answer, kw_only=True):
    """What the model manager's plan says."""

    plan: Any


class ChangedKeys(Answer, kw_only=True):
    """Names of keys, by what has become of them."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


class Reload(Answer, kw_only=True):
    """What the model manager's reload says, and what has become of keys that are in files."""

    reload: Any
    keys: ChangedKeys | None


async def admin_models(call: Call) -> None:
    """Every model and how it is."""
    models = [_shown(status) for status in call.context.directory.models()]
    await call.answer_json(AdminModels(models=models))


async def load_model(call: Call) -> None:
    """Load a model; answers when it is ready. Going away does not stop the load."""
    manager, model_id = _target(call)
    async with call.attended():
        await manager.load(model_id)
    await _answer_status(call, model_id)


async def unload_model(call: Call) -> None:
    """Unload a model once nobody holds it. Its next request loads it anew."""
    manager, model_id = _target(call)
    timeout_s: float | None = None
    if call.header(b"content-length") not in ("", "0") or call.header(b"transfer-encoding"):
        timeout_s = parse(call, UnloadRequest, await call.json()).timeout_s
    async with call.attended():
        await manager.unload(model_id, 30.0 if timeout_s is None else timeout_s)
    await _answer_status(call, model_id)


async def plan(call: Call) -> None:
    """What is in memory and what would fit, as the manager tells it."""
    await call.answer_json(Plan(plan=_plain(await _manager(call).plan())))


async def reload(call: Call) -> None:
    """Read the key files anew, if there are any, and the deployment, as the manager does it."""
    manager = _manager(call)
    keys: ChangedKeys | None = None
    if call.context.settings.keys.from_files:
        read = await call.context.callers.reload_keys()
        keys = ChangedKeys(added=read.added, removed=read.removed, changed=read.changed)
    report: Any = None
    if keys is None or call.context.directory.has_file:
        report = _plain(await manager.reload())
    await call.answer_json(Reload(reload=report, keys=keys))


def _plain(value: Any) -> Any:
    """What JSON can say of it, without paths of this machine."""
    return _redacted(_ANYTHING.dump_python(value, mode="json", fallback=str))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, list) else value


def _manager(call: Call) -> LLMModelManager:
    manager = call.context.directory.manager
    if manager is None:
        raise ApiError(501, "this server's models come from elsewhere", "not_implemented")
    return manager


def _target(call: Call) -> tuple[LLMModelManager, str]:
    manager = _manager(call)
    name: str = call.path_params["model"]
    model_id = call.context.directory.canonical(name)
    if model_id is None:
        raise unknown_model(name, "/v1/admin/models")
    return manager, model_id


async def _answer_status(call: Call, model_id: str) -> None:
    models = call.context.directory.models()
    await call.answer_json(next(_shown(model) for model in models if model.model_id == model_id))


def _shown(status: ModelStatus) -> AdminModel:
    return AdminModel(
        id=status.model_id,
        state=status.state,
        aliases=list(status.aliases),
        runtime=status.runtime,
        leases=status.leases,
        memory_bytes=status.memory_bytes,
        max_context_tokens=status.max_context_tokens,
        failed=status.error is not None,
    )


_admin = partial(Route, tag="admin", access="admin")

ROUTES = (
    _admin(
        "GET", "/v1/admin/models", admin_models, "Every model and how it is", response=AdminModels
    ),
    _admin(
        "POST", "/v1/admin/models/{model:path}/load", load_model, "Load a model",
        work=True, response=AdminModel, errors=(400, 404, 500, 501, 503),
    ),
    _admin(
        "POST", "/v1/admin/models/{model:path}/unload", unload_model, "Unload a model",
        work=True, request=UnloadRequest, body_needed=False, response=AdminModel,
        errors=(400, 404, 408, 413, 415, 500, 501, 503),
    ),
    _admin(
        "GET", "/v1/admin/plan", plan, "What is in memory and what would fit",
        response=Plan, errors=(400, 500, 501, 503),
    ),
    _admin(
        "POST", "/v1/admin/reload", reload, "Read keys and deployment anew",
        work=True, response=Reload, errors=(400, 500, 501, 503),
    ),
)  # fmt: skip
