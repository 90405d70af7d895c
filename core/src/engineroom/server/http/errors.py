"""What a client is told when it does not get what it asked for.

An answer names what was asked and what to do, and tells nothing about the machine: paths are
taken out of messages, and a failure that nobody foresaw is in the log only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final

from pydantic import ValidationError

from engineroom.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    EngineDeadError,
    EngineRoomError,
    ModelNotFoundError,
    NoSuitableHandlerError,
    QueueFullError,
    RequestTimeoutError,
    ResourceNotAvailableError,
)
from engineroom.printable import printable
from engineroom.server.http.frames import Answer

__all__ = [
    "CHALLENGE",
    "RETRY_AFTER_S",
    "ApiError",
    "ErrorBody",
    "OpenAIError",
    "api_error_of",
    "invalid_fields",
    "key_revoked",
    "stopping",
    "unknown_model",
    "unsupported",
    "without_paths",
]

_PATH: Final = re.compile(
    r"(?<![\w/.:<])(?:~?/[\w.@+-]+(?:/[\w.@+~-]*)+|[A-Za-z]:[\\/][^\s'\",;]+|\\\\[^\s'\",;]+)"
)
_BRANCH: Final = re.compile(r"[\[\](]|^(str|int|float|bool)$")
_MAX_SHOWN: Final = 80
_MAX_NAME: Final = 64
"""Of a field, as it is shown: keys come from anyone."""
_MOST_PROBLEMS: Final = 1000
CHALLENGE: Final = {"www-authenticate": "Bearer"}
"""The header of a 401."""
RETRY_AFTER_S: Final = 1
"""For what is over as soon as others end: places, connections, memory."""

_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "service_unavailable_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is not what was asked for.

    :param status: the HTTP status.
    :param message: what was asked, what was found, what to do.
    :param code: a word for programs, as OpenAI's ``error.code``.
    :param param: the field that it is about.
    :param retry_after_s: when to try again.
    :param headers: further headers.
    :param too_long: how many tokens a prompt has that is too long, and how many it may have.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    too_long: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.message = printable(self.message)  # it quotes what a client has sent
        self.param = None if self.param is None else printable(self.param)

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers, the one that says when to try again among them."""
        headers = [(n.encode(), v.encode("latin-1")) for n, v in self.headers.items()]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        return headers


class ErrorBody(Answer, kw_only=True):
    """The body of an error, in the form that the clients of an API read."""

    ID_HEADERS: ClassVar[tuple[bytes, ...]] = (b"x-request-id",)
    """Headers in which they look for the request's id, whether it ends well or not."""

    @classmethod
    def of(cls, error: ApiError, request_id: str) -> ErrorBody:
        """The body of an error."""
        raise NotImplementedError


class ErrorDetail(Answer, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(ErrorBody, kw_only=True):
    """OpenAI's error object."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: ApiError, request_id: str = "") -> OpenAIError:  # noqa: ARG003 - others have it
        detail = ErrorDetail(
            message=error.message,
            type=_TYPES.get(error.status, "invalid_request_error"),
            param=error.param,
            code=error.code,
        )
        return cls(error=detail)


def api_error_of(
    error: EngineRoomError,
    *,
    load_failed: bool = False,
    places: Mapping[str, str] = MappingProxyType({}),
) -> ApiError:
    """What a client is told of an error of the service.

    :param load_failed: the model could not be loaded, which is no fault of the request.
    :param places: fields of the service's request → what the API calls them.
    """
    if isinstance(error, ConfigurationError) and error.field and not load_failed:
        # It quotes the client, whose regular expressions may look like paths.
        where = _place(error.field, places)
        message = _of_request(error).replace(error.field, where, 1)
        return ApiError(400, message, "invalid_request", where.partition(".")[0])
    message = without_paths(error.describe())
    if isinstance(error, ModelNotFoundError) and not load_failed:
        return ApiError(404, message, "model_not_found", "model")
    if isinstance(error, QueueFullError):
        return ApiError(429, message, "queue_full", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, RequestTimeoutError):
        return ApiError(408, message, "request_timeout")
    if isinstance(error, EngineDeadError):
        # The next request has the model loaded anew.
        message = _hidden("the model's engine has ended", error)
        return ApiError(503, message, "engine_dead", retry_after_s=RETRY_AFTER_S)
    if load_failed or isinstance(error, NoSuitableHandlerError):
        return ApiError(503, _hidden("the model could not be loaded", error), "model_not_loaded")
    if isinstance(error, ResourceNotAvailableError):
        return ApiError(503, message, "unavailable", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, ContextLengthExceededError):
        known = error.tokens is not None and error.most is not None
        return ApiError(
            400,
            without_paths(_of_request(error)),
            "context_length_exceeded",
            too_long=(error.tokens or 0, error.most or 0) if known else None,
        )
    if isinstance(error, ConfigurationError):
        return ApiError(400, without_paths(_of_request(error)), "invalid_request")
    return ApiError(
        500, _hidden("the model failed while it worked on the request", error), "failed"
    )


def _of_request(error: ConfigurationError) -> str:
    """What is wrong with a request, which its client has made and no configuration."""
    return error.describe().removeprefix(f"{error.label}: ")


def stopping() -> ApiError:
    """What a client is told while the server stops."""
    return ApiError(
        503,
        "the server is stopping; send the request to another, or again later",
        "draining",
        retry_after_s=5,
        headers={"connection": "close"},
    )


def key_revoked() -> ApiError:
    """What a client is told whose key was taken away while it waited or was answered."""
    return ApiError(
        401,
        "the key holds no more; it was taken away while the request was worked on",
        "api_key_revoked",
        headers=CHALLENGE,
    )


def unknown_model(name: str, listed_at: str) -> ApiError:
    """What a client is told of a name that no model has."""
    return ApiError(
        404,
        f"{name[:256]!r} is not a model of this deployment; GET {listed_at} lists them",
        "model_not_found",
        "model",
    )


def unsupported(what: str, param: str, instead: str = "leave it out") -> ApiError:
    """What a client is told of something that no runtime here is given."""
    message = f"{what} is not supported by this server; {instead}"
    return ApiError(400, message, "unsupported_parameter", param)


def invalid_fields(error: ValidationError, names: Mapping[str, str] | None = None) -> ApiError:
    """What a client is told of fields that are not as they should be; the first by name.

    :param names: what the API calls a field of the schema.
    """
    problems: list[str] = []
    first: str | None = None
    if (count := error.error_count()) > _MOST_PROBLEMS:  # to format them would take seconds
        return ApiError(400, f"{count} mistakes in {error.title}", "invalid_value")
    for problem in error.errors(include_url=False, include_context=False):
        loc = [str(part)[:_MAX_NAME] for part in problem["loc"] if not _is_branch(part)]
        if loc and names:
            loc[0] = names.get(loc[0], loc[0])  # may have several steps
        where = ".".join(loc) or "the request"
        first = first or (loc[0].partition(".")[0] if loc else None)
        shown = _shown(problem.get("input"))
        problems.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}{shown}")
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return ApiError(400, "; ".join(problems[:5]) + more, "invalid_value", first)


def _place(field: str, places: Mapping[str, str]) -> str:
    """What an API calls a field of the service's request, or a part of it."""
    for name, own in places.items():
        if field == name or field.startswith(f"{name}."):
            return own + field[len(name) :]
    return field


def _is_branch(part: object) -> bool:
    """Whether a step of a location names a branch of a union rather than a field."""
    return isinstance(part, str) and bool(_BRANCH.search(part[:_MAX_SHOWN]))


def _shown(value: object) -> str:
    if not isinstance(value, str | int | float | bool):
        return ""
    if isinstance(value, str) and len(value) > _MAX_SHOWN:
        return ""
    text = repr(value)
    return f" (it is {text})" if len(text) <= _MAX_SHOWN else ""


def _hidden(what: str, error: EngineRoomError) -> str:
    of = f" (request {error.request_id!r})" if error.request_id else ""
    return f"{what}; the server's log says why{of}"


def without_paths(text: str) -> str:
    """The text with ``<path>`` for each path of this machine."""
    return _PATH.sub("<path>", text)
