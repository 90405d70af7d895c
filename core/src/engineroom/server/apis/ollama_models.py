"""The models, as Ollama lists them, and what its clients ask of the server itself.

Models are those of the deployment: what would add, change or remove one is refused.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar, Final

from msgspec import UNSET, UnsetType

import engineroom
from engineroom.config.model import LoadedModel
from engineroom.errors import EngineRoomError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.token_handler import TokenHandler
from engineroom.server.apis.ollama_common import OllamaError, rfc3339, served_name, status_of
from engineroom.server.apis.request_fields import ApiRequest, ModelName, parse
from engineroom.server.apis.routing import Route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.frames import Answer
from engineroom.server.model_facts import ModelFacts, facts_of
from engineroom.status import ModelStatus

__all__ = ["ROUTES", "OllamaShowRequest"]

_API_VERSION: Final = "0.14.0"
"""The Ollama whose API this is: clients ask for it in order to know what they may send."""
_FOREVER_S: Final = (2**63 - 1) / 1e9
"""How far away Ollama writes the end of what has none."""


class OllamaShowRequest(ApiRequest):
    """Which model; ``name`` is what ``model`` was called before."""

    model: ModelName | None = None
    name: ModelName | None = None
    verbose: bool | None = None

    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "system": ("",),
        "template": ("",),
        "options": ({},),
    }


class OllamaDetails(Answer, kw_only=True):
    """What kind of model it is; empty what is not known."""

    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    context_length: int | UnsetType = UNSET
    embedding_length: int | UnsetType = UNSET


class OllamaModel(Answer, kw_only=True):
    """A model, under its id or an alias.

    :param modified_at: when its file was written; absent where it is not on this machine.
    :param size: bytes of its files; absent likewise.
    :param digest: of what is said here, by which it is seen that the model was replaced.
    """

    name: str
    model: str
    modified_at: str | UnsetType = UNSET
    size: int | UnsetType = UNSET
    digest: str
    details: OllamaDetails
    capabilities: list[str]


class OllamaTags(Answer, kw_only=True):
    """The models of the deployment."""

    models: list[OllamaModel]


class OllamaLoaded(Answer, kw_only=True):
    """A model in memory.

    :param size: bytes that it takes; absent where that is not known.
    :param size_vram: those of them that are on other devices than the CPU.
    :param expires_at: when it goes if nobody asks for it.
    """

    name: str
    model: str
    size: int | UnsetType = UNSET
    digest: str
    details: OllamaDetails
    expires_at: str
    size_vram: int
    context_length: int | UnsetType = UNSET


class OllamaProcesses(Answer, kw_only=True):
    """The models in memory."""

    models: list[OllamaLoaded]


class OllamaShown(Answer, kw_only=True):
    """What is known of a model.

    :param model_info: what its file says; the context, where it is loaded, is that of here.
    """

    license: str | UnsetType = UNSET
    template: str | UnsetType = UNSET
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str | UnsetType = UNSET


class OllamaVersion(Answer, kw_only=True):
    """Whose API it is, and who answers.

    :param version: the Ollama whose API this is.
    :param engineroom: the version of engineroom.
    """

    version: str
    engineroom: str


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def running(call: Call) -> None:
    """What Ollama's clients look for at its root."""
    await call.answer(200, b"Ollama is running", ((b"content-type", b"text/plain; charset=utf-8"),))


async def version(call: Call) -> None:
    """Whose API it is."""
    await call.answer_json(OllamaVersion(version=_API_VERSION, engineroom=engineroom.__version__))


async def tags(call: Call) -> None:
    """The models of the deployment, each under its id and its aliases."""
    models: list[OllamaModel] = []
    for status in call.context.directory.models():
        facts = await facts_of(status.source)
        models += [
            OllamaModel(
                name=name,
                model=name,
                modified_at=_modified(facts),
                size=UNSET if facts.size is None else facts.size,
                digest=_digest(status, facts),
                details=_details(facts),
                capabilities=_capabilities(call, status),
            )
            for name in map(_tagged, (status.model_id, *status.aliases))
        ]
    await call.answer_json(OllamaTags(models=models))


async def processes(call: Call) -> None:
    """The models in memory; those that stay longest first."""
    shown: list[tuple[float, OllamaLoaded]] = []
    for status in call.context.directory.models():
        if status.state != "ready":
            continue
        facts = await facts_of(status.source)
        stays = _FOREVER_S if status.keep_alive_s is None else status.keep_alive_s
        left = stays - (status.idle_s or 0.0 if status.keep_alive_s is not None else 0.0)
        devices = status.memory
        size = status.memory_bytes or sum(devices.values()) or UNSET
        name = _tagged(status.model_id)
        loaded = OllamaLoaded(
            name=name,
            model=name,
            size=size,
            digest=_digest(status, facts),
            details=_details(facts),
            expires_at=rfc3339(time.time() + max(0.0, left)),
            size_vram=sum(held for device, held in devices.items() if device != "cpu"),
            context_length=status.max_context_tokens or UNSET,
        )
        shown.append((left, loaded))
    shown.sort(key=lambda each: -each[0])
    await call.answer_json(OllamaProcesses(models=[loaded for _, loaded in shown]))


async def show(call: Call) -> None:
    """What is known of a model."""
    request = parse(call, OllamaShowRequest, await call.json())
    asked = request.model or request.name
    if asked is None:
        raise ApiError(400, "model is required", "invalid_value", "model")
    status = status_of(call, served_name(call, asked))
    if status is None:
        raise ApiError(501, "this server's models come from elsewhere", "not_implemented")
    facts = await facts_of(status.source)
    info = dict(facts.info)
    if facts.family:
        sizes = {
            "context_length": status.max_context_tokens or facts.context_tokens,
            "embedding_length": facts.embedding_length,
        }
        info |= {f"{facts.family}.{name}": n for name, n in sizes.items() if n is not None}
    await call.answer_json(
        OllamaShown(
            license=facts.license or UNSET,
            template=facts.template or UNSET,
            details=_details(facts, status),
            model_info=info,
            capabilities=_capabilities(call, status),
            modified_at=_modified(facts),
        )
    )


async def refuse(call: Call) -> None:
    """Refused: the models of this server are those of its deployment."""
    raise ApiError(
        501,
        f"{call.route} is not to be had here: models are those of the server's deployment, and "
        "requests add, change and remove none; GET /api/tags lists them",
        "not_implemented",
    )


def _modified(facts: ModelFacts) -> str | UnsetType:
    return UNSET if facts.modified is None else rfc3339(facts.modified)


def _tagged(name: str) -> str:
    """Ollama's names say a version; clients look for it."""
    return name if ":" in name else f"{name}:latest"


def _details(facts: ModelFacts, status: ModelStatus | None = None) -> OllamaDetails:
    context = facts.context_tokens
    if status is not None:
        context = status.max_context_tokens or context
    return OllamaDetails(
        format=facts.format,
        family=facts.family,
        families=[facts.family] if facts.family else [],
        parameter_size=facts.parameter_size,
        quantization_level=facts.quantization,
        context_length=UNSET if context is None else context,
        embedding_length=UNSET if facts.embedding_length is None else facts.embedding_length,
    )


def _digest(status: ModelStatus, facts: ModelFacts) -> str:
    said = (status.model_id, status.runtime, facts.size, facts.modified, facts.family)
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _capabilities(call: Call, status: ModelStatus) -> list[str]:
    """What the model can do, as far as its runtime tells; of one that is not loaded, less."""
    directory = call.context.directory
    manager, service = directory.manager, directory.service
    assert manager is not None
    try:
        loaded = manager.get_loaded_model(status.model_id)
        if loaded is not None:
            handler = service.registry.select(loaded)
        else:
            choices = manager.get_config(status.model_id).choices()
            handler = service.registry.select_loader(choices[0])
        able = service.capabilities_of(handler)
        if loaded is not None and able.embeddings and loaded.vector_sizes is not None:
            return ["embedding"]  # what a model is made for, as Ollama tells it
        can = ["completion"]
        if able.chat and able.tools:
            can.append("tools")
        if loaded is not None and _thinks(handler, loaded):
            can.append("thinking")
    except EngineRoomError:
        return []  # a request is told why
    return can


def _thinks(handler: InferenceHandler, loaded: LoadedModel) -> bool:
    return isinstance(handler, TokenHandler) and handler.traits(loaded).reasoning is not None


_get = partial(Route, "GET", tag="Ollama", error=OllamaError)
_refused = partial(
    Route, endpoint=refuse, tag="Ollama", error=OllamaError, errors=(501,), response=OllamaTags
)

ROUTES = (
    Route(
        "GET", "/", running, "Ollama's clients look whether it runs", "Ollama",
        access="open", media="text/plain",
    ),
    _get("/api/version", version, "Whose API it is", response=OllamaVersion),
    _get("/api/tags", tags, "The models (Ollama)", response=OllamaTags),
    _get("/api/ps", processes, "The models in memory (Ollama)", response=OllamaProcesses),
    Route(
        "POST", "/api/show", show, "One model (Ollama)", "Ollama", request=OllamaShowRequest,
        response=OllamaShown, error=OllamaError, errors=(400, 404, 408, 413, 415, 501, 503),
        example={"model": "default"},
    ),
    _refused("POST", "/api/pull", summary="Refused: get a model (Ollama)"),
    _refused("POST", "/api/push", summary="Refused: give a model away (Ollama)"),
    _refused("POST", "/api/create", summary="Refused: make a model (Ollama)"),
    _refused("POST", "/api/copy", summary="Refused: copy a model (Ollama)"),
    _refused("DELETE", "/api/delete", summary="Refused: remove a model (Ollama)"),
)  # fmt: skip
