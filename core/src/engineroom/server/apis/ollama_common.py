"""What Ollama's routes share: names, errors, times, and a model that is loaded or unloaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

from engineroom.models.manager import LLMModelManager
from engineroom.schemas import GenerationParams, InferenceRequest
from engineroom.server.apis.ollama_options import seconds_of, told_of_keep_alive
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, ErrorBody
from engineroom.server.http.exchange import admission
from engineroom.server.http.guard import check_admin
from engineroom.status import ModelStatus

__all__ = [
    "NDJSON",
    "WORK_ERRORS",
    "OllamaError",
    "load_or_unload",
    "nanoseconds",
    "refuse_images",
    "rfc3339",
    "served_name",
    "status_of",
]

NDJSON: Final = "application/x-ndjson"
WORK_ERRORS: Final = (400, 404, 408, 413, 415, 429, 500, 501, 503)
"""Of a route on which a model works, or is loaded."""
_LATEST: Final = ":latest"
"""What Ollama calls the version of a model where none is named."""
_UNLOAD_S: Final = 30.0


class OllamaError(ErrorBody, kw_only=True):
    """What went wrong."""

    error: str

    @classmethod
    def of(cls, error: ApiError, request_id: str = "") -> OllamaError:  # noqa: ARG003 - others have it
        return cls(error=error.message)


def served_name(call: Call, name: str) -> str:
    """The id or alias that a name stands for: itself, or what is before ``:latest``.

    :raises ApiError: 404: there is none.
    """
    directory = call.context.directory
    if directory.canonical(name) is not None:
        return name
    bare = name.removesuffix(_LATEST)
    if bare != name and directory.canonical(bare) is not None:
        return bare
    raise ApiError(
        404,
        f"model '{name[:256]}' not found; GET /api/tags lists those of this deployment",
        "model_not_found",
        "model",
    )


def status_of(call: Call, name: str) -> ModelStatus | None:
    """How a model is, by id or alias; ``None`` where that cannot be told."""
    model_id = call.context.directory.canonical(name)
    models = call.context.directory.models()
    return next((status for status in models if status.model_id == model_id), None)


def rfc3339(seconds: float | None = None) -> str:
    """A time as Ollama writes it. :param seconds: since 1970; ``None``: now."""
    when = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return f"{when.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def nanoseconds(seconds: float) -> int:
    """A duration as Ollama writes it."""
    return max(0, round(seconds * 1e9))


def refuse_images(images: Sequence[Any] | None, where: str) -> None:
    """:raises ApiError: 400: there are images."""
    if images:
        raise ApiError(
            400,
            f"{where}: images are not supported by this server; send text",
            "unsupported_content",
            where.partition(".")[0],
        )


async def load_or_unload(
    call: Call, name: str, keep_alive: float | str | None, timeout_s: float | None = None
) -> Literal["load", "unload"]:
    """What a request asks for that has nothing to say: the model, or with ``keep_alive`` 0 its end.

    To load it is what any request does; to unload it takes an admin key.

    :param name: an id or alias.
    :raises ApiError: 403: the key may not; 501: the models are not this server's.
    :raises EngineRoomError: it cannot be loaded, or is still held.
    """
    directory = call.context.directory
    manager = directory.manager
    if manager is None:
        raise ApiError(501, "this server's models come from elsewhere", "not_implemented")
    model_id = directory.canonical(name) or name
    if keep_alive is not None and seconds_of(keep_alive) == 0:
        check_admin(call)
        async with call.attended():
            await manager.unload(model_id, _UNLOAD_S)
        return "unload"
    status = status_of(call, name)
    told_of_keep_alive(call, keep_alive, status.keep_alive_s if status else None)
    await _load(call, manager, model_id, timeout_s)
    return "load"


async def _load(
    call: Call, manager: LLMModelManager, model_id: str, timeout_s: float | None
) -> None:
    """Take the turn that a request would have. Going away does not stop the load."""
    limits = (call.context.settings.request_timeout_s, timeout_s)
    most = min((limit for limit in limits if limit is not None), default=None)
    request = InferenceRequest(
        model_id=model_id,
        prompt="",
        request_id=call.id,
        params=GenerationParams(max_new_tokens=1),
        timeout_s=most,
        metadata={"api_key": call.identity.name},
    )
    async with call.attended(), admission(call, [request]) as slot:
        try:
            async with asyncio.timeout(slot.left_of(most)):
                await manager.load(model_id)
        except TimeoutError as error:
            raise ApiError(
                408, f"the model was not loaded within {most:g} s; ask again", "request_timeout"
            ) from error
