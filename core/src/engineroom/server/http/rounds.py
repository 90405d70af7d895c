"""Heavy pieces of work, one in each round of the event loop."""

from __future__ import annotations

import asyncio

__all__ = ["Rounds"]


class Rounds:
    """Keeps what takes milliseconds apart, so that everything else comes in between.

    However many requests have such work, a round of the loop has one piece of it.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def next(self) -> None:
        """Wait for a round without such work. It is the task's until it waits for something."""
        await self._lock.acquire()
        asyncio.get_running_loop().call_soon(self._lock.release)
