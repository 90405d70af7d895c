"""What would be loaded, where, with what memory, and what would have to go for it. Pure.

The plan plays the deployment through on a copy of the account, with the very rules by which
:mod:`engineroom.models.eviction` decides, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Literal

from engineroom.memory.account import DeviceMemory, MemoryAccount
from engineroom.models.candidates import Candidate, NeedFrom
from engineroom.models.entry import ModelEntry
from engineroom.models.eviction import Evictor
from engineroom.units import format_size

__all__ = ["Plan", "PlannedModel", "PlannedVariant", "make_plan"]


@dataclass(frozen=True, slots=True)
class PlannedVariant:
    """A variant of a model and whether it would be used.

    :param memory: bytes by device; empty where nobody can tell.
    :param memory_from: ``deployment``, ``measured`` (when it was loaded before), ``estimate`` (its
        handler's) or ``unknown``.
    :param verdict: ``chosen``, ``possible`` (one before it is chosen) or ``refused``.
    """

    source: str
    runtime: str | None
    memory: Mapping[str, int]
    memory_from: NeedFrom
    verdict: Literal["chosen", "possible", "refused"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """What would become of a model.

    :param action: ``loaded`` (it is), ``preload`` (at start), ``on demand`` (with its first
        request) or ``impossible``.
    :param evicts: models that would be unloaded to make room for it, after the preloading.
    :param reason: why so.
    """

    model_id: str
    action: Literal["loaded", "preload", "on demand", "impossible"]
    runtime: str | None = None
    source: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)
    evicts: tuple[str, ...] = ()
    reason: str = ""
    variants: tuple[PlannedVariant, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What the deployment comes to on this machine.

    :param models: in the order of the deployment.
    :param devices: the account after the preloading.
    """

    models: tuple[PlannedModel, ...]
    devices: tuple[DeviceMemory, ...]

    def __str__(self) -> str:
        lines = []
        for model in self.models:
            memory = sizes(model.memory)
            line = f"{model.model_id}: {model.action}"
            if model.action != "impossible":
                line += f", {model.runtime} with {memory}"
            if model.evicts:
                line += f", after unloading {', '.join(model.evicts)}"
            lines.append(f"{line} ({model.reason})" if model.reason else line)
        for device in self.devices:
            free = "no bound" if device.free is None else f"{format_size(device.free)} free"
            line = (
                f"{device.device}: {format_size(device.held + device.reserved)} of "
                f"{'unlimited' if device.budget is None else format_size(device.budget)}, {free}"
            )
            if device.not_returned:
                line += f", {format_size(device.not_returned)} not given back"
            lines.append(line)
        return "\n".join(lines)


def sizes(memory: Mapping[str, int]) -> str:
    """Bytes by device, in words."""
    return ", ".join(f"{format_size(n)} on {d}" for d, n in memory.items()) or "unknown memory"


def make_plan(
    entries: Iterable[ModelEntry],
    candidates: Mapping[str, Sequence[Candidate]],
    account: MemoryAccount,
) -> Plan:
    """Play the deployment through.

    :param entries: the models as they are now, retired ones included; they are not touched.
    :param candidates: the variants of each model, by id.
    :param account: the account as it is now; it is not touched.
    """
    played = {entry: copy(entry) for entry in entries}
    for model in played.values():
        model.waiting_callers = 0  # the play begins when nobody asks for anything
    ledger = account.copy(played)
    play = _Play(Evictor(ledger, played.values()), candidates)
    models = [model for model in played.values() if not model.retired]
    actions = {model: play.at_start(model, number) for number, model in enumerate(models)}
    return Plan(tuple(actions[model] or play.on_demand(model) for model in models), ledger.report())


@dataclass(frozen=True, slots=True)
class _Play:
    evictor: Evictor
    candidates: Mapping[str, Sequence[Candidate]]

    def at_start(self, model: ModelEntry, number: int) -> PlannedModel | None:
        """Keep it, or load it if it fits beside those before it; ``None``: it waits."""
        account, model_id = self.evictor.account, model.config.model_id
        if model.state in ("ready", "loading"):
            model.state = "ready"
            memory = account.holding(model)
            return PlannedModel(model_id, "loaded", model.runtime, model.source, memory)
        for candidate in self.candidates[model_id] if model.config.preload else ():
            if candidate.error is None and not account.lacking(candidate.need):
                account.reserve(model, candidate.need)
                account.settle(model, candidate.need)
                model.state, model.ready_at = "ready", float(number)
                return self._planned(model, "preload", candidate)
        return None

    def on_demand(self, model: ModelEntry) -> PlannedModel:
        """What its first request would do, after the start."""
        candidates, evictor = self.candidates[model.config.model_id], self.evictor
        possible = [
            c for c in candidates if c.error is None and evictor.can_ever_fit(model, c.need)
        ]
        if not possible:
            return PlannedModel(
                model.config.model_id,
                "impossible",
                reason="; ".join(self._refusal(model, c) for c in candidates),
                variants=self._variants(model, None),
            )
        chosen = next((c for c in possible if evictor.fits_now(model, c.need)), possible[0])
        victims = evictor.victims(model, chosen.need)
        reason = "it does not fit beside the others" if model.config.preload else ""
        if victims is None:
            reason = "it waits until models that were just loaded may go"
        elif any(victim.leases for victim in victims):
            reason = "it waits until their requests end"
        evicts = tuple(victim.config.model_id for victim in victims or ())
        return self._planned(model, "on demand", chosen, evicts, reason)

    def _planned(
        self,
        model: ModelEntry,
        action: Literal["preload", "on demand"],
        chosen: Candidate,
        evicts: tuple[str, ...] = (),
        reason: str = "",
    ) -> PlannedModel:
        return PlannedModel(
            model.config.model_id,
            action,
            chosen.runtime,
            chosen.source,
            dict(chosen.need),
            evicts,
            reason,
            self._variants(model, chosen),
        )

    def _variants(self, model: ModelEntry, chosen: Candidate | None) -> tuple[PlannedVariant, ...]:
        variants = []
        for candidate in self.candidates[model.config.model_id]:
            refusal = "" if candidate is chosen else self._refusal(model, candidate)
            variants.append(
                PlannedVariant(
                    candidate.source,
                    candidate.runtime,
                    dict(candidate.need),
                    candidate.need_from,
                    "chosen" if candidate is chosen else "refused" if refusal else "possible",
                    refusal,
                )
            )
        return tuple(variants)

    def _refusal(self, model: ModelEntry, candidate: Candidate) -> str:
        if candidate.error is not None:
            return candidate.error.message
        if not self.evictor.can_ever_fit(model, candidate.need):
            return self.evictor.refusal(model, candidate.need).message
        return ""
