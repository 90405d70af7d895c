"""Loads that wait for memory, and their turns.

They are served in the order in which their first request came. One that does not fit holds up those
behind it on the devices that it needs, and on no others; who goes for it, the evictor says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engineroom.errors import EngineRoomError, ResourceNotAvailableError
from engineroom.models.entry import ModelEntry
from engineroom.models.eviction import Evictor
from engineroom.units import format_size

__all__ = ["MemoryQueue", "NobodyWaitsError"]


class NobodyWaitsError(Exception):
    """Everyone who waited for the model has gone; it is not loaded for nobody."""


@dataclass(slots=True, eq=False)
class _Ticket:
    """A load that waits for memory."""

    entry: ModelEntry
    need: Mapping[str, int]
    future: asyncio.Future[None]
    granted: bool = False

    def refuse(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class MemoryQueue:
    """Grants memory to loads, in turn. Belongs to the event loop.

    :param evictor: decides what fits and who has to go.
    :param evict: begins to unload a model; called with the entry and the reason.
    """

    def __init__(self, evictor: Evictor, evict: Callable[[ModelEntry, str], None]) -> None:
        self.evictor = evictor
        self._account = evictor.account
        self._evict = evict
        self._tickets: list[_Ticket] = []
        self._woken: asyncio.AbstractEventLoop | None = None  # one that has ended does not count
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """Whether anybody waits for memory."""
        return bool(self._tickets)

    async def acquire(self, entry: ModelEntry, need: Mapping[str, int], deadline: float) -> None:
        """Reserve ``need`` for the entry, as soon as it is its turn and there is room.

        :param deadline: on the loop's clock.
        :raises ResourceNotAvailableError: it can never fit, or did not by the deadline.
        :raises NobodyWaitsError: nobody waits for the entry any more.
        """
        ticket = _Ticket(entry, need, asyncio.get_running_loop().create_future())
        self._tickets.append(ticket)
        self.schedule()
        try:
            async with asyncio.timeout_at(deadline):
                await ticket.future
        except TimeoutError as error:
            if not ticket.granted:
                waited = f" after {entry.load_timeout_s:g} s of waiting (load_timeout_s)"
                raise self.evictor.refusal(entry, need, waited) from error
        except BaseException:
            if ticket.granted:
                self._account.release(entry)
            raise
        finally:
            entry.waits_for = ""
            self._tickets.remove(ticket)
            self.wake()

    def fits_now(self, entry: ModelEntry, need: Mapping[str, int]) -> bool:
        """Whether it would be let in at once: it fits, and nobody waits before it."""
        devices = self._account.bounded(need)
        awaited = any(devices & self._account.bounded(t.need) for t in self._tickets)
        return not awaited and self.evictor.fits_now(entry, need)

    def wake(self) -> None:
        """Something changed: look who can go on, when the loop comes to it."""
        loop = asyncio.get_running_loop()
        if self._woken is not loop:
            self._woken = loop
            loop.call_soon(self._wake_up)

    def _wake_up(self) -> None:
        self._woken = None
        self.schedule()

    def close(self, error: EngineRoomError) -> None:
        """Refuse everyone who waits."""
        if self._timer is not None:
            self._timer.cancel()
        for ticket in self._tickets:
            ticket.refuse(error)

    def schedule(self) -> None:
        """Grant whatever can be granted, and begin to make room for the first that cannot."""
        blocked: set[str] = set()
        for ticket in sorted(self._tickets, key=lambda t: t.entry.arrival):
            if ticket.future.done():
                continue
            entry, need = ticket.entry, ticket.need
            if entry.waiting_callers == 0:
                ticket.refuse(NobodyWaitsError())
                continue
            devices = self._account.bounded(need)
            if devices & blocked:
                blocked |= devices
                continue
            lacking = self._account.lacking(need)
            if not lacking:
                self._account.reserve(entry, need)
                ticket.granted = True
                ticket.future.set_result(None)
                continue
            if not self.evictor.can_ever_fit(entry, need):
                ticket.refuse(self.evictor.refusal(entry, need))
                continue
            blocked |= devices
            entry.waits_for = ", ".join(
                f"{format_size(amount)} on {device}" for device, amount in lacking.items()
            )
            self._make_room(ticket)
        self._call_off_evictions(blocked)

    def _make_room(self, ticket: _Ticket) -> None:
        victims = self.evictor.victims(ticket.entry, ticket.need)
        for victim in victims or ():
            self._evict(victim, f"to make room for {ticket.entry.config.model_id!r}")
        if victims is None and (delay := self.evictor.seconds_until_next(ticket.entry)) is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(delay + 0.001, self.wake)

    def _call_off_evictions(self, blocked: set[str]) -> None:
        """Let those go on that were asked to go for somebody who needs it no more."""
        for entry in self.evictor.models:
            if entry.retired or (eviction := entry.eviction) is None or eviction.done():
                continue
            if not blocked & self._account.bounded(self._account.holding(entry)):
                eviction.set_exception(
                    ResourceNotAvailableError("its memory is not needed any more; it goes on")
                )
