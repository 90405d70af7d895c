"""What a route is: its path, what answers it, who may use it, and what describes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Final, Literal

from pydantic import BaseModel

from engineroom.server.http.call import Call
from engineroom.server.http.errors import ErrorBody, OpenAIError
from engineroom.server.http.frames import Answer

__all__ = ["SSE", "Route", "work_route"]

SSE: Final = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Route:
    """A route.

    :param endpoint: does the work; its docstring is the route's description.
    :param access: who may use it; ``open`` routes are also those of load balancers.
    :param work: refused while the server drains.
    :param request: schema of the body.
    :param response: schema of the answer, if it is JSON.
    :param error: form of its errors, and of those of all paths that begin with its own.
    :param example: of the body.
    :param errors: statuses of errors, beside those that every route has.
    :param own_errors: those of ``errors`` whose body has the form of the answer.
    :param streams: type of the answer where the body's ``stream`` asks for a stream.
    :param media: type of an answer that is no stream.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    endpoint: Callable[[Call], Awaitable[None]]
    summary: str
    tag: str
    _: KW_ONLY
    access: Literal["open", "key", "admin"] = "key"
    work: bool = False
    request: type[BaseModel] | None = None
    body_needed: bool = True
    response: type[Answer | BaseModel] | None = None
    error: type[ErrorBody] = OpenAIError
    example: Mapping[str, Any] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    own_errors: tuple[int, ...] = ()
    streams: str | None = None
    media: str = "application/json"


work_route = partial(Route, "POST", work=True, errors=(400, 404, 408, 413, 415, 429, 500, 503))
"""A route on which a model works."""
