"""What relies on how uvicorn works inside: its protocols, their requests, and how it begins to end.

Nothing else in the project knows of it. :class:`Connection` names what a protocol is at and what
can be done about it, whichever of uvicorn's two parsers runs; :class:`Server` says when it listens
and when a signal comes.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import h11
import uvicorn

from engineroom.server.http.frames import chunker
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

__all__ = ["BELOW", "WRITE", "Connection", "Server", "TextWriter", "connection_class"]

BELOW: Final = "0.55"
"""The first version for which nobody has read that what is used here still works so.

The extra ``server`` has it as its upper bound. To lift it, read the new ``httptools_impl``,
``h11_impl``, ``flow_control`` and ``server`` for the names in this module, and run
``core/tests/server``.
"""
_UPGRADE: Final = re.compile(rb"(?i)(?<=\n)upgrade(?=[ \t]*:)")
TextWriter: TypeAlias = Callable[[str], Awaitable[None] | None]
"""Sends a text; returns what to wait for before the next one, or ``None``."""
WRITE: Final = "engineroom.write"
"""The ASGI extension, for an answer that has begun: given what makes a frame of a text, it returns
what sends a text's frame, and that returns what to wait for, or ``None``. It does what ``send``
does, without a message, a coroutine and a copy for each frame. ``None`` instead: use ``send``."""


def connection_class(kind: type[Connection], **attributes: Any) -> type[asyncio.Protocol]:
    """A kind of connection over uvicorn's fastest protocol that is installed.

    :param attributes: of the class.
    """
    base: Any
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as base  # noqa: N813
    except ImportError:  # httptools is not installed
        from uvicorn.protocols.http.h11_impl import H11Protocol as base  # noqa: N813
    return type(kind.__name__, (kind, base), attributes)


def _writer(reference: weakref.ref[Any], frame_of: Callable[[str], bytes]) -> TextWriter | None:
    """How a text's frame gets on the wire of a request that is answered in chunks.

    :param reference: to the cycle, which has this in its scope.
    """
    cycle = reference()
    if (
        cycle is None
        or not (cycle.response_started and cycle.chunked_encoding)
        or cycle.response_complete
    ):
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


def _delimit_by_close(cycle: Any) -> None:
    """Let an answer of unknown length end with its connection: HTTP/1.0 knows no chunks (RFC 9112,
    6.1 and 6.3). httptools only: h11 does so itself.
    """
    cycle.waiting_for_100_continue = False  # nor that it might be told to go on
    send = cycle.send

    async def delimited(message: Any) -> None:
        if message["type"] == "http.response.start":
            if not any(name.lower() == b"content-length" for name, _ in message["headers"]):
                cycle.chunked_encoding = False  # else it would say and use the coding
                cycle.delimited_by_close = True
        elif getattr(cycle, "delimited_by_close", False):
            cycle.expected_content_length = len(message.get("body", b""))  # it is as long as it is
        await send(message)

    cycle.send = delimited


class Connection(_Base):
    """A connection: what it is at, what can be done about it, and what it tells of itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._started: Any = None  # the cycle that is answered, where others wait behind it
        self._part: str | None = None  # of a request, "head" or "body", is to come (httptools only)

    # ── what it is at ────────────────────────────────────────────────────────────────────────

    @property
    def crowd(self) -> int:
        """How many connections the server has."""
        return len(self.connections)

    @property
    def silent(self) -> bool:
        """Whether no request has come yet."""
        return self.cycle is None

    @property
    def answering(self) -> bool:
        """Whether a request is being answered, so that its headers were whole."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def answer_begun(self) -> bool:
        """Whether the answer's status has been sent."""
        return self.answering and bool(self._current.response_started)

    @property
    def lacks_body(self) -> bool:
        """Whether the body of the request that is answered is still to come."""
        return bool(self._current.more_body)

    @property
    def reading_body(self) -> bool:
        """Whether a request's headers have come, and its body has not."""
        conn = self._conn
        return self._part == "body" if conn is None else conn.their_state is h11.SEND_BODY

    @property
    def waiting(self) -> Any:
        """Requests that were read whole while another is answered, the next one last."""
        return getattr(self, "pipeline", ())

    @property
    def unread_bytes(self) -> int:
        """What came behind the request, as far as the parser keeps it."""
        conn = self._conn
        return 0 if conn is None else len(conn.trailing_data[0])

    @property
    def _conn(self) -> h11.Connection | None:
        """The parser of h11; ``None`` with httptools."""
        conn: h11.Connection | None = getattr(self, "conn", None)
        return conn

    @property
    def _current(self) -> Any:
        """The cycle that is answered, or was last."""
        return self.cycle if self._started is None else self._started

    # ── what can be done ─────────────────────────────────────────────────────────────────────

    def give_up_request(self) -> None:
        """Tell the application that nobody waits for the request's end."""
        self._current.disconnected = True
        self._current.message_event.set()

    def make_last(self) -> None:
        """No further request is answered."""
        self._current.keep_alive = False
        if waiting := self.waiting:
            waiting.clear()

    def read_on(self) -> None:
        """Read what comes while a request is answered, which uvicorn does not."""
        self.flow.resume_reading()

    def await_next_request(self) -> None:
        """Close it, unless a request comes in time."""
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    # ── what it tells ────────────────────────────────────────────────────────────────────────

    def unreadable(self) -> None:
        """What came is no HTTP."""

    def before_answer_ends(self) -> None:
        """The answer was sent; the next request has not begun."""

    def answer_ended(self) -> None:
        """The answer was sent, and the next request may have begun."""

    def closing(self) -> None:
        """It is being closed."""

    # ── uvicorn's ────────────────────────────────────────────────────────────────────────────

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._started is not None and not self._started.response_complete:
            self.give_up_request()  # uvicorn tells the one that came last

    def data_received(self, data: bytes) -> None:
        super().data_received(data if self._part == "body" else self._without_upgrade(data))

    def send_400_response(self, msg: str) -> None:
        self.unreadable()

    def on_message_begin(self) -> None:
        self._part = "head"
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Offer the application a shorter way for the frames of a stream (httptools only)."""
        self._part = "body"
        waits = self.answering
        super().on_headers_complete()
        if not waits:
            self._started = self.cycle
        if self.cycle is not None:
            if self.cycle.scope["http_version"] == "1.0":
                _delimit_by_close(self.cycle)
            self.cycle.scope["extensions"] = {WRITE: partial(_writer, weakref.ref(self.cycle))}

    def on_message_complete(self) -> None:
        self._part = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.before_answer_ends()
        self._current.body = b""  # what nobody has read of it
        if waiting := self.waiting:
            self._started = waiting[-1][0]
        super().on_response_complete()
        self.answer_ended()
        if self.transport.is_closing():
            self.closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.closing()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self.closing()

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


class Server(uvicorn.Server):
    """uvicorn's server for an application and a kind of connection."""

    listening: Callable[[], None] = staticmethod(lambda: None)
    """Called once it listens."""

    def __init__(
        self,
        app: Any,
        protocol: type[asyncio.Protocol],
        settings: ServerSettings,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what is to be said, the application says
                access_log=False,
                server_header=False,
                proxy_headers=False,  # the application knows whom to believe
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]
                backlog=2048,
            )
        )

    def signalled(self, number: int) -> None:
        """A signal came that asks it to end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        self.config.ssl = self._tls
        await super().startup(sockets)
        self.listening()

    def handle_exit(self, sig: int, frame: object) -> None:
        """Say so. Uvicorn raises a signal again in the end that its own method saw."""
        self.signalled(sig)

    def end(self, within_s: int) -> None:
        """Close the connections and return from ``serve``.

        :param within_s: seconds that connections get.
        """
        self.config.timeout_graceful_shutdown = within_s
        self.should_exit = True
