"""The application: what every request passes, and which route it takes.

Start reading here. :class:`Front` is the border: it gives each request an id, asks for the key,
turns errors into answers, and lets nothing else out. Behind it Starlette's router finds the
:class:`Endpoint`, a coroutine that is given a :class:`~engineroom.server.http.call.Call`. All of it
is pure ASGI, so that a client that goes away is noticed wherever its request is.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from starlette import routing
from starlette.exceptions import HTTPException

from engineroom.border import get_logger, log_failure, passes, without_frames
from engineroom.errors import EngineRoomError
from engineroom.server import routes
from engineroom.server.apis.routing import Route
from engineroom.server.http.call import Call, ClientGoneError
from engineroom.server.http.context import ServerContext
from engineroom.server.http.errors import ApiError, ErrorBody, OpenAIError, stopping
from engineroom.server.http.guard import check_admin, check_front, identify
from engineroom.server.proxies import TrustedProxies
from engineroom.server.settings import ServerSettings
from engineroom.service import LLMInferenceService

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Front", "ServerContext", "create_app"]

logger = get_logger("engineroom.server.app")

_CALL: Final = "engineroom.call"
_LAST_WORD_S: Final = 1.0
"""Seconds that a request gets to be told that the server has stopped."""


class Endpoint:
    """A route's ASGI application."""

    def __init__(self, route: Route) -> None:
        self.route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope[_CALL]
        call.path_params = scope.get("path_params", {})
        route = self.route
        call.route = route.path
        if route.access == "admin":
            check_admin(call)
        if route.work and call.context.draining:
            raise stopping()
        await route.endpoint(call)


class Front:
    """The outermost ASGI application of the project.

    :param context: what the routes share.
    """

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self._proxies = TrustedProxies(context.settings.forwarded_allow_ips)
        every_route = routes.all_routes()
        self.router = routing.Router(
            [
                routing.Route(route.path, Endpoint(route), methods=[route.method])
                for route in every_route
            ],
            redirect_slashes=False,
        )
        self._open = frozenset(route.path for route in every_route if route.access == "open")
        self._error_bodies = [
            (route.path, route.error) for route in every_route if route.error is not OpenAIError
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            with self.context.loop_meter.running():
                await _lifespan(receive, send)
        if scope["type"] != "http":
            return
        scope = self._seen(scope)
        call = Call(scope, receive, send, self.context, self._error_body(scope["path"]))
        scope[_CALL] = call
        scope["app"] = self  # so that the router raises what it does not find
        task = asyncio.current_task()
        assert task is not None
        at_work = self.context.loop_meter.at_work
        at_work[call] = task
        try:
            refusal = await self._answer(call)
            del scope[_CALL]  # the two would keep each other alive
            call.release_body()
            if refusal is not None:
                await self._refuse(call, refusal)
        finally:
            refusal = None  # what a validator raised knows this frame, and the refusal knows that
            del at_work[call]
            call.release_body()
            self.context.callers.leave(call)

    def _seen(self, scope: Scope) -> Scope:
        """The request as it would be without the proxy that it came through."""
        prefix, path = self.context.settings.root_path, scope["path"]
        if self._proxies:
            scope = {**scope, "client": self._proxies.client_of(scope)}
        if prefix and (path == prefix or path.startswith(f"{prefix}/")):
            scope = {**scope, "path": path[len(prefix) :] or "/"}
        return scope

    async def _answer(self, call: Call) -> ApiError | None:
        """Answer, or tell what is answered instead, by when all that came with it is let go."""
        scope = call.scope
        try:
            check_front(call)
            if scope["path"] not in self._open:
                call.identity = identify(call)
                self.context.callers.enter(call)
            await self.router(scope, call.receive, call.send)
        except ClientGoneError as error:
            without_frames(error)
            if not call.logged:
                call.log(logger).info("%s: the client went away before its turn", call.described)
        except ApiError as error:
            return without_frames(error)
        except EngineRoomError as error:
            refusal = call.api_error_of(error)
            without_frames(error)
            return refusal
        except HTTPException as error:
            return _from_router(call, error)
        except BaseException as error:
            if passes(error):
                if self.context.draining and not call.started:  # say, its body had not come yet
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LAST_WORD_S):
                            await self._refuse(call, stopping())
                raise
            log_failure(call.log(logger), error, "%s failed", call.described)
            call.logged = True
            without_frames(error)
            return ApiError(
                500,
                f"the server failed; its log says why (request {call.id!r})",
                "internal_error",
                headers={"connection": "close"},
            )
        return None

    def _error_body(self, path: str) -> type[ErrorBody]:
        bodies = (body for prefix, body in self._error_bodies if path.startswith(prefix))
        return next(bodies, OpenAIError)

    async def _refuse(self, call: Call, error: ApiError) -> None:
        _tell(call, error)
        if call.started:
            raise ConnectionAbortedError("the answer had begun; the connection is closed")
        if call.scope["method"] == "HEAD":
            await call.answer(error.status, b"", error.all_headers())
            return
        await call.refuse(error)


def _tell(call: Call, error: ApiError) -> None:
    """Say in the log why a request was refused that never came to the service, and by whose
    mistake; nothing of what its body says.
    """
    if call.logged:
        return
    call.logged = True
    about = error.param or ""
    call.log(logger).warning(
        "%s was refused: %d %s%s, the %s's mistake",
        call.described,
        error.status,
        error.code,
        f" ({about})" if about.isidentifier() and len(about) <= 40 else "",
        "client" if error.status < 500 else "server",
    )


def create_app(service: LLMInferenceService, settings: ServerSettings | None = None) -> ASGIApp:
    """The server as an ASGI application, for any ASGI server.

    ``engineroom serve`` adds what only the server itself can do: limits of connections and
    times, and an orderly end.

    :param service: answers the requests; the caller closes it.
    :param settings: by default those of a server that only this machine reaches.
    """
    settings = settings or ServerSettings()
    return with_cors(Front(ServerContext(service, settings)), settings)


def with_cors(front: Front, settings: ServerSettings) -> ASGIApp:
    """Let pages of the settings' origins use the server."""
    if not settings.cors_origins:
        return front
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        front,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[
            "x-request-id",
            "request-id",
            "retry-after",
            "traceresponse",
            "x-engineroom-warning",
        ],
    )


async def _lifespan(receive: Receive, send: Send) -> None:
    """As Starlette's, but silent where a server that is killed cancels it."""
    with contextlib.suppress(asyncio.CancelledError):
        for _ in range(2):  # startup, shutdown
            await send({"type": f"{(await receive())['type']}.complete"})


def _from_router(call: Call, error: HTTPException) -> ApiError:
    method, path = call.scope["method"], call.scope["path"]
    shown = path if len(path) <= 200 else f"{path[:200]}…"
    if error.status_code == 405:
        allowed = dict(error.headers or {}).get("Allow", "")
        return ApiError(
            405,
            f"{shown} does not take {method}; use {allowed}",
            "method_not_allowed",
            headers={"allow": allowed},
        )
    return ApiError(
        404, f"there is no {method} {shown}; GET /openapi.json lists the routes", "not_found"
    )
