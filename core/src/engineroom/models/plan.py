"""What would be loaded, where, with what memory, and what would have to go for it. Pure.

The plan plays the deployment through on a copy of the account, with the very rules by which
:mod:`engineroom.models.eviction` decides, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engineroom.config.deployment import DeploymentConfig
from engineroom.memory.account import DeviceMemory, MemoryAccount
from engineroom.models.candidates import Candidate, NeedFrom
from engineroom.models.entry import ModelEntry
from engineroom.models.eviction import Room
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
    deployment: DeploymentConfig,
    entries: Sequence[ModelEntry],
    surveys: Mapping[str, Sequence[Candidate]],
    account: MemoryAccount,
) -> Plan:
    """Play the deployment through.

    :param entries: the models as they are now; they are not touched.
    :param surveys: the variants of each model, by id.
    :param account: the account as it is now; it is not touched.
    """
    shadows = {entry: _shadow(entry, deployment) for entry in entries}
    ledger = account.copy(lambda owner: shadows.get(owner, owner))  # type: ignore[call-overload]
    room = Room(ledger, shadows.values, lambda *_: None)
    models = [shadow for shadow in shadows.values() if not shadow.retired]
    actions: dict[str, PlannedModel] = {}
    for place, model in enumerate(models):
        if model.usable or model.state == "loading":
            model.state = "ready"
            actions[model.config.model_id] = _loaded(model, ledger)
        elif model.config.preload:
            _preload(model, surveys[model.config.model_id], room, place, actions)
    for model in models:
        if model.config.model_id not in actions:
            planned = _on_demand(model, surveys[model.config.model_id], room)
            actions[model.config.model_id] = planned
    return Plan(tuple(actions[model.config.model_id] for model in models), ledger.report())


class _Shadow(ModelEntry):
    """A model in the play; it is ready without having been loaded."""

    __slots__ = ()

    @property
    def usable(self) -> bool:
        return self.state == "ready"


def _shadow(entry: ModelEntry, deployment: DeploymentConfig) -> _Shadow:
    shadow = _Shadow(entry.config, deployment)
    shadow.state, shadow.leases = entry.state, entry.leases
    shadow.loaded, shadow.outcomes = entry.loaded, entry.outcomes
    shadow.last_used, shadow.ready_at = entry.last_used, entry.ready_at
    shadow.load_duration_s = entry.load_duration_s
    shadow.retired = entry.retired
    return shadow


def _loaded(model: ModelEntry, ledger: MemoryAccount) -> PlannedModel:
    loaded = model.loaded
    return PlannedModel(
        model.config.model_id,
        "loaded",
        loaded.handler_name if loaded else model.config.runtime,
        (loaded.config if loaded else model.config.choices()[0]).source or "",
        ledger.holding(model),
    )


def _preload(
    model: ModelEntry,
    candidates: Sequence[Candidate],
    room: Room,
    place: int,
    actions: dict[str, PlannedModel],
) -> None:
    """Load it in the play, if it fits beside those before it."""
    for candidate in candidates:
        if candidate.error is None and not room.account.lacking(candidate.need):
            room.account.reserve(model, candidate.need)
            room.account.settle(model, candidate.need)
            model.state, model.ready_at = "ready", float(place)
            actions[model.config.model_id] = _planned(model, "preload", candidate, candidates, room)
            return


def _on_demand(model: ModelEntry, candidates: Sequence[Candidate], room: Room) -> PlannedModel:
    possible = [c for c in candidates if c.error is None and room.fits_ever(model, c.need)]
    if not possible:
        refusals = [_refusal(model, c, room) for c in candidates]
        return PlannedModel(
            model.config.model_id,
            "impossible",
            reason="; ".join(refusals),
            variants=_variants(model, None, candidates, room),
        )
    chosen = next((c for c in possible if room.fits_soon(model, c.need)), possible[0])
    victims = room.victims(model, chosen.need)
    reason = "it does not fit beside the others" if model.config.preload else ""
    if victims is None:
        reason = "it waits until models that were just loaded may go"
    planned = _planned(model, "on demand", chosen, candidates, room, reason)
    if victims and any(victim.leases for victim in victims):
        planned = _planned(
            model, "on demand", chosen, candidates, room, "it waits until their requests end"
        )
    evicts = tuple(victim.config.model_id for victim in victims or ())
    return PlannedModel(
        planned.model_id,
        planned.action,
        planned.runtime,
        planned.source,
        planned.memory,
        evicts,
        planned.reason,
        planned.variants,
    )


def _planned(
    model: ModelEntry,
    action: Literal["preload", "on demand"],
    chosen: Candidate,
    candidates: Sequence[Candidate],
    room: Room,
    reason: str = "",
) -> PlannedModel:
    assert chosen.handler is not None
    return PlannedModel(
        model.config.model_id,
        action,
        chosen.handler.name,
        chosen.config.source or "",
        dict(chosen.need),
        reason=reason,
        variants=_variants(model, chosen, candidates, room),
    )


def _variants(
    model: ModelEntry, chosen: Candidate | None, candidates: Sequence[Candidate], room: Room
) -> tuple[PlannedVariant, ...]:
    found = []
    for candidate in candidates:
        verdict: Literal["chosen", "possible", "refused"] = "possible"
        reason = ""
        if candidate is chosen:
            verdict = "chosen"
        elif refusal := _refusal(model, candidate, room):
            verdict, reason = "refused", refusal
        found.append(
            PlannedVariant(
                candidate.config.source or "",
                candidate.handler.name if candidate.handler else candidate.config.runtime,
                dict(candidate.need),
                candidate.need_from,
                verdict,
                reason,
            )
        )
    return tuple(found)


def _refusal(model: ModelEntry, candidate: Candidate, room: Room) -> str:
    if candidate.error is not None:
        return candidate.error.message
    if not room.fits_ever(model, candidate.need):
        return room.refusal(model, candidate.need).message
    return ""
