"""One HTTP request at work: what came, who sent it, and the ways to answer."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from engineroom.errors import EngineRoomError
from engineroom.json_shape import SMALL_BODY, excess
from engineroom.printable import printable
from engineroom.server.http.bodies import BodyShare
from engineroom.server.http.compat_uvicorn import WRITE, TextWriter
from engineroom.server.http.context import ServerContext
from engineroom.server.http.errors import ApiError, ErrorBody, OpenAIError
from engineroom.server.http.frames import dumps
from engineroom.server.keys import ANONYMOUS, Identity
from engineroom.telemetry import RequestLogger

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["SSE_HEADERS", "Call", "ClientGoneError", "Headers"]

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]
JSON_HEADERS: Final = ((b"content-type", b"application/json"),)
SSE_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies would hold frames back
)
WARNING_HEADER: Final = b"x-engineroom-warning"
_MAX_WARNING: Final = 1000
"""Characters of it; clients and proxies bound what they take."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_decoder: Final = msgspec.json.Decoder()
_MAX_DISCARDED: Final = 512 << 20
_DISCARD_S: Final = 10.0
_PIECE: Final = 256 << 10


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False, slots=True, repr=False)
class Call:
    """One HTTP request.

    :param scope: ASGI's description of it.
    :param context: the server that it came to.
    :param error_body: form of its errors.
    """

    scope: Scope
    receive: Receive
    send: Send
    context: ServerContext
    error_body: type[ErrorBody] = OpenAIError
    headers: dict[bytes, bytes] = field(init=False)
    identity: Identity = ANONYMOUS
    path_params: MutableMapping[str, Any] = field(default_factory=dict)
    route: str = ""
    """The path of its route; empty until the route is known."""
    started: bool = False
    refused: ApiError | None = None
    """Why it is answered no more, though its key was let in."""
    on_refused: Callable[[], object] | None = None
    """Stops what is being done for it."""
    logged: bool = False
    """The service tells the log how it ends."""
    warnings: list[str] = field(default_factory=list)
    """What the client is told beside its answer."""
    places: dict[str, str] = field(default_factory=dict)
    """Fields of the service's request → what its API calls them, with dots."""
    body_share: BodyShare | None = None
    """What its body takes of the server's memory."""
    _id: str = ""

    def __post_init__(self) -> None:
        self.headers = dict(reversed(list(self.scope["headers"])))  # of several, the first

    def __repr__(self) -> str:
        return f"<{self.described}>"  # its headers have the key

    @property
    def id(self) -> str:
        """The request's id: unique, and beginning with what the client calls it."""
        if not self._id:
            asked = self.header(b"x-request-id")
            known = _REQUEST_ID.fullmatch(asked)
            self._id = f"{asked}-{secrets.token_hex(4)}" if known else secrets.token_hex(12)
        return self._id

    @property
    def described(self) -> str:
        """Route, id and key, for the log."""
        route = self.route or "a request"
        return f"{self.scope['method']} {route} (request {self.id!r}, key {self.identity.name!r})"

    def log(self, logger: logging.Logger) -> RequestLogger:
        """A logger for what happens to it outside of the service."""
        return RequestLogger(logger, self.log_facts)

    @property
    def log_facts(self) -> dict[str, str]:
        """What each log record about it has, as ``extra``."""
        return {"request_id": self.id, "model_id": "-", "key_name": self.identity.name}

    def header(self, name: bytes) -> str:
        """A header's value; empty where there is none."""
        return self.headers.get(name, b"").decode("latin-1")

    # ── what came ────────────────────────────────────────────────────────────────────────────

    async def body(self) -> bytes:
        """The whole body.

        :raises ApiError: it is too large (413), does not come in time (408), or there are too many
            others (503).
        """
        settings = self.context.settings
        limit = settings.max_body_bytes
        share = self.body_share = self.context.bodies.share(self._body_owner())
        announced = self.header(b"content-length")
        if announced.isdigit():
            if int(announced) > limit:
                raise _too_large(limit)
            share.announce(int(announced))
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part: bytes = message.get("body", b"")
                    if share.size + len(part) > limit:
                        raise _too_large(limit)
                    share.add(len(part))
                    parts.append(part)
                    if not message.get("more_body", False):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the body did not arrive within {settings.body_timeout_s:g} s",
                "body_timeout",
                headers={"connection": "close"},
            ) from error

    def _body_owner(self) -> str:
        """Among whom the server's memory for bodies is shared: keys, or else addresses."""
        if self.context.settings.keys.needed:
            return self.identity.name
        host, _ = self.scope.get("client") or ("", 0)
        return str(host)

    def release_body(self) -> None:
        """The body, and all that was made of it, is let go."""
        if self.body_share is not None:
            self.body_share.release()

    async def json(self) -> Any:
        """The body, read as JSON.

        What a large body is used for until the next ``await`` has a round of the loop of its own.

        :raises ApiError: it is something else (415), no JSON, or too much of it (400).
        """
        kind = self.header(b"content-type").partition(";")[0].strip().lower()
        if kind != "application/json":
            shown = f"not {kind[:80]!r}" if kind else "and it has no content-type"
            raise ApiError(
                415, f"the body must be application/json, {shown}", "unsupported_media_type"
            )
        encoding = self.header(b"content-encoding").strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError(
                415, "the body must not be compressed; send it as it is", "unsupported_encoding"
            )
        data = await self.body()
        if len(data) > SMALL_BODY:
            await self.context.rounds.next()
            if (too_much := excess(data, self.context.settings.max_json_values)) is not None:
                raise ApiError(400, f"the body's JSON is too much: {too_much}", "json_too_large")
        try:
            return _decode(data)
        except (RecursionError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            why = (
                "it is nested too deeply; make it flatter"
                if isinstance(error, RecursionError)
                else str(error)
            )
            raise ApiError(400, f"the body is no valid JSON: {why}", "invalid_json") from error

    # ── what is refused ──────────────────────────────────────────────────────────────────────

    def revoke(self, error: ApiError) -> None:
        """End it, with this error for an answer; in a stream that has begun, for its end."""
        if self.refused is None:
            self.refused = error
            if self.on_refused is not None:
                self.on_refused()

    def api_error_of(self, error: EngineRoomError) -> ApiError:
        """What the client is told of an error."""
        return self.refused or self.context.api_error_of(
            error, logged=self.logged, places=self.places
        )

    # ── what is answered ─────────────────────────────────────────────────────────────────────

    def warn(self, warnings: Iterable[str]) -> None:
        """Tell the client beside its answer; of several answers, once."""
        self.warnings += [text for text in dict.fromkeys(warnings) if text not in self.warnings]

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers."""
        self.started = True
        name = self.id.encode("latin-1")
        sent = [*((header, name) for header in self.error_body.ID_HEADERS), *headers]
        if self.warnings:
            sent.append((WARNING_HEADER, _header_of(self.warnings)))
        if (trace := self.context.traceparent_of(self.id)) is not None:
            sent.append((b"traceresponse", trace.encode("latin-1")))
        await self.send({"type": "http.response.start", "status": status, "headers": sent})

    def writer(self, frame_of: Callable[[str], bytes]) -> TextWriter:
        """What sends texts of an answer that has begun.

        :param frame_of: makes a part of the body of a text.
        """
        shorter = self.scope.get("extensions", {}).get(WRITE)
        writer: TextWriter | None = None if shorter is None else shorter(frame_of)
        if writer is not None:
            return writer

        def write(text: str) -> Awaitable[None]:
            body = frame_of(text)
            return self.send({"type": "http.response.body", "body": body, "more_body": True})

        return write

    async def answer(self, status: int, body: bytes, headers: Headers = JSON_HEADERS) -> None:
        """Send a whole answer."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, (*headers, length))
        await self.finish(body)

    async def finish(self, body: bytes) -> None:
        """Send the last of the body; what is long in pieces, since each is copied on its way."""
        last = max(0, len(body) - 1) // _PIECE * _PIECE
        for start in range(0, last, _PIECE):
            await self.context.rounds.next()
            piece = body[start : start + _PIECE]
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})
        await self.send({"type": "http.response.body", "body": body[last:]})

    async def answer_json(self, value: Any, status: int = 200) -> None:
        """Send a value as JSON."""
        await self.answer(status, dumps(value))

    async def refuse(self, error: ApiError) -> None:
        """Send an error; after a body that was not read, in a way that the client can read it."""
        body = dumps(self.error_body.of(error, self.id))
        headers = [*JSON_HEADERS, (b"content-length", str(len(body)).encode())]
        await self.start(error.status, [*headers, *error.all_headers()])
        # To close under a client that is still writing would throw the answer away: the error
        # goes out whole, and what still comes is read and forgotten before the end.
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        if error.status == 413 and not self.headers.get(b"expect"):
            await self._discard()
        await self.send({"type": "http.response.body", "body": b""})

    async def _discard(self) -> None:
        left = _MAX_DISCARDED
        try:
            async with asyncio.timeout(_DISCARD_S):
                while left > 0:
                    message = await self.receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    @asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """Stop what is done inside the ``async with`` as soon as the client goes away, or its key
        is taken away.

        The cancellation is taken back at the end of the block and becomes ``ClientGoneError`` or
        the refusal, as :func:`asyncio.timeout` does with its own.

        :raises ClientGoneError: nobody waits for the answer.
        :raises ApiError: it is refused.
        """
        if self.refused is not None:
            raise self.refused
        task = asyncio.current_task()
        assert task is not None
        baseline = task.cancelling()
        gone = struck = False

        def strike() -> None:
            nonlocal struck
            if not struck:
                struck = True
                task.cancel()

        def why() -> Exception:
            return ClientGoneError() if gone or self.refused is None else self.refused

        async def watch() -> None:
            nonlocal gone
            while (await self.receive())["type"] != "http.disconnect":
                pass
            gone = True
            strike()

        self.on_refused = strike
        watcher = asyncio.create_task(watch())
        try:
            yield
            if struck:
                await asyncio.sleep(0)  # the cancellation is on its way and strikes here
                raise asyncio.CancelledError
        except BaseException as error:
            if struck and task.uncancel() <= baseline and isinstance(error, asyncio.CancelledError):
                raise why() from error
            raise
        finally:
            watcher.cancel()
            self.on_refused = None


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes; send less",
        "body_too_large",
        headers={"connection": "close"},
    )


def _header_of(warnings: Iterable[str]) -> bytes:
    """They may quote names that came from a client or a model."""
    text = printable("; ".join(warnings)).encode("ascii", "backslashreplace")
    return text if len(text) <= _MAX_WARNING else text[: _MAX_WARNING - 3] + b"..."


def _decode(data: bytes) -> Any:
    """The value, without a search for garbage among all that comes to be."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return _decoder.decode(data)
    finally:
        if collects:
            gc.enable()
