"""Who is being answered: how many of each key at a time, and what becomes of them when the keys are
read anew.

A request that is answered has a connection of its own, and so has one that waits. Each key may have
as many as are left for all others, as with the bytes of bodies (see :mod:`.bodies`): there is
always one left for a key that comes next.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from engineroom.border import get_logger
from engineroom.errors import EngineRoomError
from engineroom.server.http.errors import RETRY_AFTER_S, ApiError, key_revoked
from engineroom.server.keys import Identity, KeyChanges
from engineroom.server.settings import ServerSettings

__all__ = ["Caller", "Callers"]

logger = get_logger("engineroom.server.keys")


class Caller(Protocol):
    """One request that is being answered."""

    @property
    def identity(self) -> Identity:
        """Whose it is."""
        ...

    def revoke(self, error: ApiError) -> None:
        """End it, with this error for an answer."""


class Callers:
    """The requests that are being answered. Belongs to the event loop.

    :param settings: who may send any, and how many there may be.
    :param refused: is called when one is refused.
    """

    def __init__(
        self, settings: ServerSettings, refused: Callable[[], object] = lambda: None
    ) -> None:
        self._keys = settings.keys
        self._most = settings.max_connections
        self._refused = refused
        self._calls: set[Caller] = set()
        self._by_key: Counter[str] = Counter()
        self._reading = asyncio.Lock()

    def enter(self, call: Caller) -> None:
        """It was let in by its key.

        :raises ApiError: 429: the key has as many as it may, where there are others.
        """
        name = call.identity.name
        left = self._most - len(self._calls) - 1
        if self._by_key[name] >= left and len(self._keys.owners) > 1:
            self._refused()
            raise ApiError(
                429,
                "this key has as many connections at work as are left for all others; try again "
                "when some of them have ended",
                "key_connections",
                retry_after_s=RETRY_AFTER_S,
                headers={"connection": "close"},
            )
        self._calls.add(call)
        self._by_key[name] += 1

    def leave(self, call: Caller) -> None:
        """It is over, or was refused."""
        if call not in self._calls:
            return
        self._calls.remove(call)
        name = call.identity.name
        self._by_key[name] -= 1
        if not self._by_key[name]:
            del self._by_key[name]

    async def reload_keys(self) -> KeyChanges:
        """Read the key files anew. Requests whose key holds no more end, running ones as well.

        :raises EngineRoomError: a file has mistakes, which are in the log; the old keys go on.
        """
        async with self._reading:
            try:
                fresh = await asyncio.to_thread(self._keys.reread)
            except EngineRoomError as error:
                logger.error("the keys were not read anew, the old ones go on: %s", error.message)
                raise
            changes = self._keys.replace(fresh)
        logger.info("the keys were read anew: %s", changes)
        for call in list(self._calls):
            if call.identity.digest in changes.revoked:
                call.revoke(key_revoked())
        return changes
