"""Limits of connections, which no ASGI application can keep: they are below it.

uvicorn's protocols, with a bound on how long headers may take and how large they may get, on how
long a reader may leave a full buffer unread, and on how many connections there are. A connection
whose time is up is aborted where closing it would wait for a peer that does not read.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import h11

from engineroom.server.http.errors import RETRY_AFTER_S, ApiError, OpenAIError
from engineroom.server.http.frames import chunker, dumps
from engineroom.server.settings import ServerSettings

if TYPE_CHECKING:

    class _Base(asyncio.Protocol):
        """What both of uvicorn's protocols have."""

        transport: asyncio.Transport
        loop: asyncio.AbstractEventLoop
        connections: set[Any]
        cycle: Any
        flow: Any
        timeout_keep_alive: float
        timeout_keep_alive_task: asyncio.TimerHandle | None

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def on_message_begin(self) -> None: ...
        def on_headers_complete(self) -> None: ...
        def on_message_complete(self) -> None: ...
        def on_response_complete(self) -> None: ...
        def timeout_keep_alive_handler(self) -> None: ...
        def shutdown(self) -> None: ...

else:
    _Base = object

__all__ = ["WRITE", "TextWriter", "guarded_protocol"]

TextWriter: TypeAlias = Callable[[str], Awaitable[None] | None]
"""Sends a text; returns what to wait for before the next one, or ``None``."""
WRITE: Final = "engineroom.write"
"""The ASGI extension, for an answer that has begun: given what makes a frame of a text, it returns
what sends a text's frame, and that returns what to wait for, or ``None``. It does what ``send``
does, without a message, a coroutine and a copy for each frame. ``None`` instead: use ``send``."""
LINGER_S: Final = 5.0
"""Seconds that a closed connection gets to take what was written."""
_UPGRADE: Final = re.compile(rb"(?i)(?<=\n)upgrade(?=[ \t]*:)")
_REASONS: Final = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


def guarded_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """Uvicorn's fastest protocol that is installed, with the settings' limits."""
    base: Any
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as base  # noqa: N813
    except ImportError:  # httptools is not installed
        from uvicorn.protocols.http.h11_impl import H11Protocol as base  # noqa: N813
    return type("GuardedProtocol", (_Guard, base), {"limits": settings})


def _writer(cycle: Any, frame_of: Callable[[str], bytes]) -> TextWriter | None:
    """How a text's frame gets on the wire of a request that is answered in chunks."""
    if not (cycle.response_started and cycle.chunked_encoding) or cycle.response_complete:
        return None
    flow, write, chunk_of = cycle.flow, cycle.transport.write, chunker(frame_of)

    def put(text: str) -> Awaitable[None] | None:
        if flow.write_paused or cycle.disconnected:
            sent: Awaitable[None] = cycle.send(
                {"type": "http.response.body", "body": frame_of(text), "more_body": True}
            )
            return sent
        write(chunk_of(text))
        return None

    return put


class _Guard(_Base):
    """What is added to a protocol of uvicorn's. Relies on its ``transport`` and ``cycle``."""

    limits: ServerSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ended = False  # the last word was said; what still comes is not read
        self._started: Any = None  # the cycle that is answered, where others wait behind it
        self._part: str | None = None  # of a request, "head" or "body", is to come (httptools only)
        self._refused_body = False  # a request was answered whose body still comes
        self._early_bytes = 0  # what came of further requests while one is answered
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # ── asyncio's callbacks ──────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            told = "the server has too many connections; try again"
            self._answer(ApiError(503, told, "too_many", retry_after_s=RETRY_AFTER_S))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._linger_timer = None
        super().connection_lost(exc)
        if self._started is not None and not self._started.response_complete:
            self._started.disconnected = True  # uvicorn tells the one that came last
            self._started.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._ended or self.transport.is_closing():
            return
        early = self._answering() and not self._current.more_body
        super().data_received(data if self._part == "body" else self._without_upgrade(data))
        if self._refused_body:
            if self._taking_body():
                return  # nobody wants it
            self._refused_body = False
            self._cancel_head()
            if not self._answering():
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
                return
        if self._answering():
            self._head_bytes = 0
            self._cancel_head()
            if early:
                self._read_on(len(data))
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.limits.max_header_bytes:
            limit = self.limits.max_header_bytes
            self._answer(ApiError(431, f"the headers are larger than {limit} bytes", "too_large"))
        elif self._head_timer is None:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self.limits.write_timeout_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    # ── uvicorn's ────────────────────────────────────────────────────────────────────────────

    def send_400_response(self, msg: str) -> None:
        self._answer(ApiError(400, "this is no HTTP request that can be read", "invalid_http"))

    def on_message_begin(self) -> None:
        self._part = "head"
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Offer the application a shorter way for the frames of a stream (httptools only)."""
        self._part = "body"
        waits = self._answering()
        super().on_headers_complete()
        if not waits:
            self._started = self.cycle
        if self.cycle is not None:
            self.cycle.scope["extensions"] = {WRITE: partial(_writer, self.cycle)}

    def on_message_complete(self) -> None:
        self._part = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._head_bytes = 0
        if waiting := self._waiting():
            self._started = waiting[-1][0]
        elif self._taking_body() and not self.transport.is_closing():
            self._refused_body = True
            self._cancel_head()
            self._head_timer = self.loop.call_later(self.limits.body_timeout_s, self._end)
        super().on_response_complete()
        if self._early_bytes and not self._waiting():
            self._early_bytes = 0 if self._conn is None else len(self._conn.trailing_data[0])
        if self.transport.is_closing():
            self._linger()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._linger()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._linger()

    # ── ours ─────────────────────────────────────────────────────────────────────────────────

    @property
    def _conn(self) -> h11.Connection | None:
        """The parser of h11; ``None`` with httptools."""
        conn: h11.Connection | None = getattr(self, "conn", None)
        return conn

    @property
    def _current(self) -> Any:
        """The cycle that is answered, or was last."""
        return self.cycle if self._started is None else self._started

    def _waiting(self) -> Any:
        """Requests that were read whole while another is answered, the next one last."""
        return getattr(self, "pipeline", ())

    def _answering(self) -> bool:
        """Whether a request is being answered, so that its headers were whole."""
        return self.cycle is not None and not self.cycle.response_complete

    def _taking_body(self) -> bool:
        """Whether a request's headers have come, and its body has not."""
        conn = self._conn
        return self._part == "body" if conn is None else conn.their_state is h11.SEND_BODY

    def _without_upgrade(self, data: bytes) -> bytes:
        """The data without an offer to change to another protocol, which is not taken.

        With it httptools would not read the request's body: HTTP clients of Java send one with
        every request.
        """
        if self._conn is not None:
            return data
        head, blank, rest = data.partition(b"\r\n\r\n")
        if _UPGRADE.search(head) is None:
            return data
        return _UPGRADE.sub(b"x-upgrade", head) + blank + rest

    def _read_on(self, more: int) -> None:
        """See what was sent ahead of its turn, and the end of the connection behind it."""
        self._early_bytes += more
        if self._early_bytes > self.limits.max_header_bytes:
            self._end_after_this()
        self.flow.resume_reading()

    def _end_after_this(self) -> None:
        """Nothing more is read; the answer that is on its way is the last one."""
        self._ended = True
        self._current.keep_alive = False
        if waiting := self._waiting():
            waiting.clear()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_is_late)

    def _cancel_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._answering() or self.transport.is_closing():
            return
        if self._head_bytes:
            limit = self.limits.header_timeout_s
            self._answer(ApiError(408, f"the headers did not arrive within {limit:g} s", "timeout"))
        elif self.cycle is None:
            self.transport.close()  # it connected and said nothing

    def _answer(self, refused: ApiError) -> None:
        """Answer without the application, and close."""
        self._cancel_head()
        if self._answering():
            if not self._current.more_body:  # it is wrong what comes after the request
                self._end_after_this()
                return
            self._current.disconnected = True  # nobody waits for this request's end
            self._current.message_event.set()
        self._ended = True
        if not self.transport.is_closing() and not (
            self._answering() and self._current.response_started
        ):
            body = dumps(OpenAIError.of(refused))
            more = b"".join(b"%b: %b\r\n" % header for header in refused.all_headers())
            self.transport.write(
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"x-request-id: %b\r\n%bconnection: close\r\n\r\n%b"
                % (
                    refused.status,
                    _REASONS[refused.status],
                    len(body),
                    secrets.token_hex(12).encode(),
                    more,
                    body,
                )
            )
        self._end()

    def _end(self) -> None:
        """Say no more.

        Closed under a client that still writes, the connection would be reset and the answer
        be lost: it is ended instead, and what comes is let fall until the client is done.
        """
        self._head_timer = None
        self._ended = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
        self._linger()

    def _linger(self) -> None:
        """A peer that does not read must not keep the connection."""
        if self._linger_timer is None:
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)
