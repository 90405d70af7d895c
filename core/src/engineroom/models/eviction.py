"""Room for models: who waits for memory, in which order, and who has to go for them.

Pure decisions over the entries and the account; the manager does what is decided. The rules:

- Those who wait are served in the order in which their first request came. One that does not fit
  holds up those behind it on the devices that it needs, and on no others.
- Idle models go first: lower priority before higher, then the least recently used, where each
  second that its load took counts as a second of use. A leased model is never unloaded.
- Where idle models are not enough, busy ones of no higher priority stop taking new requests, which
  then wait in the same order; they go when their last lease is given back. A model that was just
  loaded first serves those who waited for it, and for as long as its load took. So two models that
  alternate share the memory in turns, and neither starves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping

from engineroom.errors import EngineRoomError, ResourceNotAvailableError
from engineroom.memory.account import MemoryAccount, choose_victims
from engineroom.models.entry import ModelEntry
from engineroom.units import format_size

__all__ = ["Room", "Unwanted"]

logger = logging.getLogger("engineroom.room")


class Unwanted(Exception):  # noqa: N818 - no error: it only ends a wait
    """Everyone who waited for the model has gone; it is not loaded for nobody."""


class _Ticket:
    """A load that waits for memory."""

    __slots__ = ("entry", "future", "granted", "need")

    def __init__(self, entry: ModelEntry, need: Mapping[str, int]) -> None:
        self.entry = entry
        self.need = need
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.granted = False

    def refuse(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Room:
    """The queue for memory. Belongs to the event loop.

    :param account: who holds what.
    :param entries: every entry that may hold memory, retired ones included.
    :param evict: begins to unload a model; called with the entry and the reason.
    :param clock: what ``ready_at`` and ``last_used`` are measured with.
    """

    def __init__(
        self,
        account: MemoryAccount,
        entries: Callable[[], Iterable[ModelEntry]],
        evict: Callable[[ModelEntry, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.account = account
        self._entries = entries
        self._evict = evict
        self._clock = clock
        self._tickets: list[_Ticket] = []
        self._kicked: asyncio.AbstractEventLoop | None = None  # one that has ended does not count
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, entry: ModelEntry, need: Mapping[str, int], deadline: float) -> None:
        """Reserve ``need`` for the entry, as soon as it is its turn and there is room.

        :param deadline: on the loop's clock.
        :raises ResourceNotAvailableError: it can never fit, or did not by the deadline.
        :raises Unwanted: nobody waits for the entry any more.
        """
        ticket = _Ticket(entry, need)
        self._tickets.append(ticket)
        self.pump()
        try:
            async with asyncio.timeout_at(deadline):
                await ticket.future
        except TimeoutError as error:
            if not ticket.granted:
                waited = f" after {entry.load_timeout_s:g} s of waiting (load_timeout_s)"
                raise self.refusal(entry, need, waited) from error
        except BaseException:
            if ticket.granted:
                self.account.release(entry)
            raise
        finally:
            entry.waits_for = ""
            self._tickets.remove(ticket)
            self.kick()

    def kick(self) -> None:
        """Something changed: look who can go on, when the loop comes to it."""
        loop = asyncio.get_running_loop()
        if self._kicked is not loop:
            self._kicked = loop
            loop.call_soon(self._pump_kicked)

    @property
    def waiting(self) -> bool:
        """Whether anybody waits for memory."""
        return bool(self._tickets)

    def close(self, error: EngineRoomError) -> None:
        """Refuse everyone who waits."""
        if self._timer is not None:
            self._timer.cancel()
        for ticket in list(self._tickets):
            ticket.refuse(error)

    # ── decisions ────────────────────────────────────────────────────────────────────────────

    def fits_ever(self, entry: ModelEntry, need: Mapping[str, int]) -> bool:
        """Whether it would fit if everything went that can go."""
        movable = [e for e in self._entries() if not _stays(e) and e is not entry]
        return not self.account.lacking(need, without=movable)

    def fits_soon(self, entry: ModelEntry, need: Mapping[str, int]) -> bool:
        """Whether it fits without waiting for anybody: next to the others, or for idle ones."""
        if any(self.account.bounded(t.need) & self.account.bounded(need) for t in self._tickets):
            return False
        return not self.account.lacking(need, without=self._movable(entry, busy=False))

    def victims(
        self, entry: ModelEntry, need: Mapping[str, int], *, busy: bool = True
    ) -> list[ModelEntry] | None:
        """Who would have to go for it now; ``None``: even all who could are not enough."""
        candidates = self._movable(entry, busy=False)
        if busy:
            candidates += self._movable(entry, busy=True)
        lacking = self.account.lacking(need, without=self._going())
        return choose_victims(lacking, [(e, self.account.holding(e)) for e in candidates])

    def refusal(
        self, entry: ModelEntry, need: Mapping[str, int], waited: str = ""
    ) -> ResourceNotAvailableError:
        """Needed, free, and who holds the rest."""
        parts = []
        lacking = self.account.lacking(need)
        for report in self.account.report():
            if report.device not in need or report.budget is None:
                continue
            if report.device not in lacking and lacking:
                continue
            states = {str(e): e for e in self._entries()}
            holders = ", ".join(
                f"{name} ({format_size(amount)}, {_describe(states.get(name))})"
                for name, amount in report.holders.items()
            )
            if report.not_returned:
                kept = f"{format_size(report.not_returned)} that unloaded models did not give back"
                holders = f"{holders}, {kept}" if holders else kept
            parts.append(
                f"{format_size(need[report.device])} on {report.device}, where "
                f"{format_size(max(0, report.free or 0))} of {format_size(report.budget)}"
                f"{' (detected)' if report.detected else ''} is free"
                + (f" and the rest is held by {holders}" if holders else "")
            )
        advice = "make it smaller, or raise memory: in the deployment"
        if self.fits_ever(entry, need):
            advice = f"send it again later, unload a model, {advice}"
        elif not self.account.lacking(need, without=self._entries()):
            advice = f"unload what is pinned, {advice}"
        return ResourceNotAvailableError(
            f"there is no room for model {entry.config.model_id!r}{waited}: it needs "
            f"{'; and '.join(parts)}; {advice}",
            model_id=entry.config.model_id,
        )

    # ── turns ────────────────────────────────────────────────────────────────────────────────

    def _pump_kicked(self) -> None:
        self._kicked = None
        self.pump()

    def pump(self) -> None:
        """Grant whatever can be granted, and begin to make room for the first that cannot."""
        blocked: set[str] = set()
        for ticket in sorted(self._tickets, key=lambda t: t.entry.arrival):
            if ticket.future.done():
                continue
            entry, need = ticket.entry, ticket.need
            if entry.wanted == 0:
                ticket.refuse(Unwanted())
                continue
            devices = self.account.bounded(need)
            if devices & blocked:
                blocked |= devices
                continue
            lacking = self.account.lacking(need)
            if not lacking:
                self.account.reserve(entry, need)
                ticket.granted = True
                ticket.future.set_result(None)
                continue
            if not self.fits_ever(entry, need):
                ticket.refuse(self.refusal(entry, need))
                continue
            blocked |= devices
            entry.waits_for = ", ".join(
                f"{format_size(amount)} on {device}" for device, amount in lacking.items()
            )
            self._make_room(ticket)
        self._reopen(blocked)

    def _make_room(self, ticket: _Ticket) -> None:
        victims = self.victims(ticket.entry, ticket.need)
        if victims is None:
            self._look_again(ticket.entry)
            return
        for victim in victims:
            self._evict(victim, f"to make room for {ticket.entry.config.model_id!r}")

    def _movable(self, entry: ModelEntry, *, busy: bool) -> list[ModelEntry]:
        """Ready models that may go, the most dispensable first."""
        found = []
        for other in self._entries():
            if other is entry or _stays(other) or other.wanted or not other.usable:
                continue
            if bool(other.leases) is busy and (not busy or self._may_close(other, entry)):
                found.append(other)
        return sorted(found, key=_dispensable)

    def _may_close(self, other: ModelEntry, entry: ModelEntry) -> bool:
        return other.config.priority <= entry.config.priority and self._stay_over(other, entry) <= 0

    def _stay_over(self, other: ModelEntry, entry: ModelEntry) -> float:
        """Seconds until a model that was just loaded may be asked to go."""
        stay = min(other.load_duration_s or 0.0, entry.load_timeout_s / 2)
        return other.ready_at + stay - self._clock()

    def _look_again(self, entry: ModelEntry) -> None:
        """Come back when the next of the models that were just loaded may be asked to go."""
        waits = [
            wait
            for other in self._entries()
            if other.usable and not _stays(other) and (wait := self._stay_over(other, entry)) > 0
        ]
        if not waits:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(min(waits) + 0.001, self.kick)

    def _going(self) -> list[ModelEntry]:
        return [e for e in self._entries() if e.state == "draining"]

    def _reopen(self, blocked: set[str]) -> None:
        """Let those go on that were asked to go for somebody who needs it no more."""
        for entry in self._entries():
            if entry.retired or (drain := entry.drain) is None or drain.done():
                continue
            if not blocked & self.account.bounded(self.account.holding(entry)):
                drain.set_exception(
                    ResourceNotAvailableError("its memory is not needed any more; it goes on")
                )


def _stays(entry: ModelEntry) -> bool:
    return entry.config.pinned and not entry.retired and entry.state != "draining"


def _dispensable(entry: ModelEntry) -> tuple[int, float]:
    used = max(entry.last_used or 0.0, entry.ready_at)
    return entry.config.priority, used + (entry.load_duration_s or 0.0)


def _describe(entry: ModelEntry | None) -> str:
    if entry is None:
        return "being replaced"
    if entry.leases:
        return f"in use by {entry.leases} request{'s' if entry.leases > 1 else ''}"
    if entry.config.pinned:
        return "pinned"
    return "idle" if entry.state == "ready" else entry.state
