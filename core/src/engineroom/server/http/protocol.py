"""Limits of connections, which no ASGI application can keep: they are below it.

How long headers may take and how large they may get, how long a reader may leave a full buffer
unread, and how many connections there are: who comes when all are taken gets the place of the one
that was answered longest ago and asks nothing. A connection whose time is up is aborted where
closing it would wait for a peer that does not read.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from http import HTTPStatus
from typing import Any, Final

from engineroom.server.http.compat_uvicorn import Connection
from engineroom.server.http.errors import RETRY_AFTER_S, ApiError, OpenAIError
from engineroom.server.http.frames import dumps
from engineroom.server.settings import ServerSettings

__all__ = ["GuardedConnection"]

LINGER_S: Final = 5.0
"""Seconds that a closed connection gets to take what was written."""


class GuardedConnection(Connection):
    """A connection that keeps the limits."""

    limits: ServerSettings
    resting: OrderedDict[GuardedConnection, None]
    """Those of the server that were answered and ask nothing now; the longest ago is the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ended = False  # the last word was said; what still comes is not read
        self._refused_body = False  # a request was answered whose body still comes
        self._early_bytes = 0  # what came of further requests while one is answered
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # ── asyncio's callbacks ──────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.crowd > self.limits.max_connections and not self._take_the_place_of_another():
            message = "the server has too many connections; try again"
            self._answer(ApiError(503, message, "too_many", retry_after_s=RETRY_AFTER_S))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._linger_timer = None
        self.resting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ended or self.transport.is_closing():
            return
        early = self.answering and not self.lacks_body
        super().data_received(data)
        if self._ended:  # it was unreadable, and told so
            return
        if self._refused_body:
            if self.reading_body:
                return  # nobody wants it
            self._refused_body = False
            self._cancel_head()
            if not self.answering:
                self.await_next_request()
                return
        if self.answering:
            self.resting.pop(self, None)
            self._head_bytes = 0
            self._cancel_head()
            if early:
                self._early_bytes += len(data)
                if self._early_bytes > self.limits.max_header_bytes:
                    self._end_after_this()
                self.read_on()  # the connection may end behind what was sent ahead of its turn
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

    # ── what the connection tells ────────────────────────────────────────────────────────────

    def unreadable(self) -> None:
        self._answer(ApiError(400, "this is no HTTP request that can be read", "invalid_http"))

    def before_answer_ends(self) -> None:
        self._head_bytes = 0
        if self.reading_body and not self.waiting and not self.transport.is_closing():
            self._refused_body = True
            self._cancel_head()
            self._head_timer = self.loop.call_later(self.limits.body_timeout_s, self._end)

    def answer_ended(self) -> None:
        if self._early_bytes and not self.waiting:
            self._early_bytes = self.unread_bytes
        if not self.answering:
            self.resting[self] = None

    def closing(self) -> None:
        """A peer that does not read must not keep the connection."""
        if self._linger_timer is None:
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    # ── ours ─────────────────────────────────────────────────────────────────────────────────

    def _take_the_place_of_another(self) -> bool:
        """Cut the connection that has rested longest; whether there is one."""
        if not self.resting:
            return False
        other, _ = self.resting.popitem(last=False)
        other.transport.abort()
        return True

    def _end_after_this(self) -> None:
        """Nothing more is read; the answer that is on its way is the last one."""
        self._ended = True
        self.make_last()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_is_late)

    def _cancel_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.answering or self.transport.is_closing():
            return
        if self._head_bytes:
            limit = self.limits.header_timeout_s
            self._answer(ApiError(408, f"the headers did not arrive within {limit:g} s", "timeout"))
        elif self.silent:
            self.transport.close()  # it connected and said nothing

    def _answer(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        self._cancel_head()
        if self.answering:
            if not self.lacks_body:  # it is wrong what comes after the request
                self._end_after_this()
                return
            self.give_up_request()
        self._ended = True
        if not self.transport.is_closing() and not self.answer_begun:
            body = dumps(OpenAIError.of(error))
            more = b"".join(b"%b: %b\r\n" % header for header in error.all_headers())
            self.transport.write(
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"x-request-id: %b\r\n%bconnection: close\r\n\r\n%b"
                % (
                    error.status,
                    HTTPStatus(error.status).phrase.encode(),
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
        self.closing()
