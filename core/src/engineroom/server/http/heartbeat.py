"""A sign of life on streams that have nothing to say: proxies cut what is silent for long."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from engineroom.server.http.call import SSE_HEADERS, Call, Headers

__all__ = ["Heartbeat"]

PING: Final = b": ping\n\n"
"""A comment, which every reader of server-sent events skips."""
_TICKS: Final = 4


class Heartbeat:
    """Sends a comment after each ``heartbeat_s`` of silence, from the beginning of the work on.

    The first one sends the status, too: what fails after it is told in the stream.

    :param call: whose answer it is.
    :param headers: what the status is sent with.
    :param ping: what readers skip.
    """

    def __init__(self, call: Call, headers: Headers = SSE_HEADERS, ping: bytes = PING) -> None:
        self._call = call
        self._headers = headers
        self._ping = ping
        self._loop = asyncio.get_running_loop()
        self._tick_s = call.context.settings.heartbeat_s / _TICKS
        self._silent = 0
        self._sending: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.spoke = False
        """Set where something was sent: cheaper for each frame than a clock."""
        if self._tick_s > 0:
            self._timer = self._loop.call_later(self._tick_s, self._tick)

    async def stop(self) -> None:
        """No more of them; what is being sent is sent. Before the last part of the answer."""
        self._cancel_timer()
        if self._sending is not None:
            await self._sending

    def cut(self) -> None:
        """No more of them, and nobody waits for the answer."""
        self._cancel_timer()
        if self._sending is not None:
            self._sending.cancel()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._tick_s, self._tick)
        if self.spoke:
            self.spoke = False
            self._silent = 0
            return
        self._silent += 1
        # One tick less: the silence may have begun just after one.
        if self._silent >= _TICKS - 1 and (self._sending is None or self._sending.done()):
            self._silent = 0
            self._sending = self._loop.create_task(self._send())

    async def _send(self) -> None:
        call = self._call
        with contextlib.suppress(OSError):  # the client is gone, which others notice as well
            if not call.started:
                await call.start(200, self._headers)
            await call.send({"type": "http.response.body", "body": self._ping, "more_body": True})
