"""Who is being answered, and what becomes of that when the keys are read anew."""

from __future__ import annotations

import asyncio
from typing import Protocol

from engineroom.border import get_logger
from engineroom.errors import EngineRoomError
from engineroom.server.http.errors import ApiError, key_revoked
from engineroom.server.keys import Identity, KeyChanges, KeyRing

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

    :param keys: who may send any.
    """

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self._calls: set[Caller] = set()
        self._reading = asyncio.Lock()

    def enter(self, call: Caller) -> None:
        """It was let in by its key."""
        self._calls.add(call)

    def leave(self, call: Caller) -> None:
        """It is over."""
        self._calls.discard(call)

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
