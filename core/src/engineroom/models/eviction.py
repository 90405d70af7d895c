"""What fits, and who has to go for it: decisions over models and their account. Pure.

- Idle models go first: lower priority before higher, then the least recently used, where each
  second that its load took counts as a second of use. A leased model is never unloaded.
- Where idle models are not enough, busy ones of no higher priority stop taking new requests, and go
  when their last lease is given back. A model that was just loaded first serves those who waited
  for it, and for as long as its load took. So two models that alternate share the memory in turns,
  and neither starves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engineroom.errors import ResourceNotAvailableError
from engineroom.memory.account import MemoryAccount, choose_victims
from engineroom.models.entry import ModelEntry
from engineroom.units import format_size

__all__ = ["Evictor"]


@dataclass(slots=True, eq=False)
class Evictor:
    """Says who would have to go; somebody else unloads them.

    :param account: who holds what.
    :param models: every model that may hold memory; iterated anew for each decision.
    :param clock: what ``ready_at`` and ``last_used`` are measured with.
    """

    account: MemoryAccount
    models: Iterable[ModelEntry]
    clock: Callable[[], float] = time.monotonic

    def can_ever_fit(self, model: ModelEntry, need: Mapping[str, int]) -> bool:
        """Whether it would fit if everything went that can go."""
        others = [m for m in self.models if not _stays(m) and m is not model]
        return not self.account.lacking(need, without=others)

    def fits_now(self, model: ModelEntry, need: Mapping[str, int]) -> bool:
        """Whether it fits without waiting for any request: next to the others, or for idle ones."""
        return not self.account.lacking(need, without=self._evictable(model, busy=False))

    def victims(self, model: ModelEntry, need: Mapping[str, int]) -> list[ModelEntry] | None:
        """Who would have to go for it now; ``None``: even all who may are not enough."""
        candidates = [*self._evictable(model, busy=False), *self._evictable(model, busy=True)]
        going = [m for m in self.models if m.state == "draining"]
        lacking = self.account.lacking(need, without=going)
        return choose_victims(lacking, [(m, self.account.holding(m)) for m in candidates])

    def seconds_until_next(self, model: ModelEntry) -> float | None:
        """When the next of the models that were just loaded may be asked to go for this one."""
        waits = [
            self._protected_s(other, model)
            for other in self.models
            if other.state == "ready" and not _stays(other)
        ]
        return min((wait for wait in waits if wait > 0), default=None)

    def refusal(
        self, model: ModelEntry, need: Mapping[str, int], waited: str = ""
    ) -> ResourceNotAvailableError:
        """Needed, free, and who holds the rest."""
        parts = []
        lacking = self.account.lacking(need)
        by_name = {str(m): m for m in self.models}
        for report in self.account.report():
            if report.device not in need or report.budget is None:
                continue
            if report.device not in lacking and lacking:
                continue
            holders = [
                f"{name} ({format_size(amount)}, {_describe(by_name.get(name))})"
                for name, amount in report.holders.items()
            ]
            if kept := report.not_returned:
                holders.append(f"{format_size(kept)} that unloaded models did not give back")
            parts.append(
                f"{format_size(need[report.device])} on {report.device}, where "
                f"{format_size(max(0, report.free or 0))} of {format_size(report.budget)}"
                f"{' (detected)' if report.detected else ''} is free"
                + (f" and the rest is held by {', '.join(holders)}" if holders else "")
            )
        advice = "make it smaller, or raise memory: in the deployment"
        if self.can_ever_fit(model, need):
            advice = f"send it again later, unload a model, {advice}"
        elif not self.account.lacking(need, without=self.models):
            advice = f"unload what is pinned, {advice}"
        return ResourceNotAvailableError(
            f"there is no room for model {model.config.model_id!r}{waited}: it needs "
            f"{'; and '.join(parts)}; {advice}",
            model_id=model.config.model_id,
        )

    def _evictable(self, model: ModelEntry, *, busy: bool) -> list[ModelEntry]:
        """Ready models that may go for this one, the most dispensable first."""
        return sorted((m for m in self.models if self._may_go(m, model, busy)), key=_last_use)

    def _may_go(self, other: ModelEntry, model: ModelEntry, busy: bool) -> bool:
        if other is model or other.state != "ready" or other.waiting_callers or _stays(other):
            return False
        if bool(other.leases) is not busy:
            return False
        lower = other.config.priority <= model.config.priority
        return not busy or (lower and self._protected_s(other, model) <= 0)

    def _protected_s(self, other: ModelEntry, model: ModelEntry) -> float:
        """For how long yet a model that was just loaded is not asked to go."""
        stay = min(other.load_duration_s or 0.0, model.load_timeout_s / 2)
        return other.ready_at + stay - self.clock()


def _stays(model: ModelEntry) -> bool:
    return model.config.pinned and not model.retired and model.state != "draining"


def _last_use(model: ModelEntry) -> tuple[int, float]:
    used = max(model.last_used or 0.0, model.ready_at)
    return model.config.priority, used + (model.load_duration_s or 0.0)


def _describe(model: ModelEntry | None) -> str:
    if model is None:
        return "being replaced"
    if model.leases:
        return f"in use by {model.leases} request{'s' if model.leases > 1 else ''}"
    if model.config.pinned:
        return "pinned"
    return "idle" if model.state == "ready" else model.state
