"""What models, loads and reloads report: plain values that can be written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = [
    "ModelState",
    "ModelStatus",
    "PreloadProgress",
    "ReloadReport",
    "VariantOutcome",
    "VariantResult",
]

ModelState: TypeAlias = Literal["unloaded", "loading", "ready", "draining", "failed"]
VariantResult: TypeAlias = Literal["used", "failed", "refused", "not tried"]


@dataclass(frozen=True, slots=True)
class VariantOutcome:
    """What became of a variant when the model was last loaded, and why.

    :param outcome: ``used``, ``failed`` (its load), ``refused`` (it cannot be loaded here, or
        does not fit), ``not tried`` (another was used).
    """

    source: str
    runtime: str | None
    outcome: VariantResult
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model as :meth:`LLMModelManager.list_models` shows it. Made of plain values: it can be
    written as JSON.

    :param leases: requests that hold it now.
    :param waiting: requests that wait for it to be loaded.
    :param waits_for: while ``loading``: what there is no room for yet; empty: it is being loaded.
    :param last_used: ``time.monotonic()`` of the last release; ``None``: never used.
    :param idle_s: seconds since then, where nobody holds it.
    :param memory_bytes: what the handler says that it takes.
    :param memory: what the account holds for it, in bytes by device; reserved while it loads.
    :param load_duration_s: seconds that its last load took.
    :param keep_alive_s: seconds that it stays without a request; ``None``: forever.
    :param error: why it failed, where ``state`` is ``failed``.
    :param variants: what became of each variant when it was last loaded.
    """

    model_id: str
    state: ModelState
    aliases: tuple[str, ...] = ()
    source: str = ""
    runtime: str | None = None
    leases: int = 0
    waiting: int = 0
    waits_for: str = ""
    last_used: float | None = None
    idle_s: float | None = None
    memory_bytes: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    max_context_tokens: int | None = None
    load_duration_s: float | None = None
    pinned: bool = False
    priority: int = 0
    keep_alive_s: float | None = None
    error: str | None = None
    variants: tuple[VariantOutcome, ...] = ()


@dataclass(frozen=True, slots=True)
class PreloadProgress:
    """A step of :meth:`LLMModelManager.load_configured_models`.

    :param number: which of the models to load it is, from 1.
    :param total: how many there are.
    :param step: ``loading`` (it begins), ``ready``, ``skipped`` (it does not fit beside those
        before it, and is loaded with its first request) or ``failed``.
    :param seconds: what it took.
    :param detail: why it was skipped or failed.
    """

    model_id: str
    number: int
    total: int
    step: Literal["loading", "ready", "skipped", "failed"]
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a reload of the deployment changed, by model id.

    :param added: models that are new; those with ``preload`` are being loaded.
    :param removed: models that are gone; their requests end first.
    :param changed: models with another source, runtime, variants, options or memory; running
        requests end on the old one, new ones get the new one.
    :param adjusted: models of which only names, priority, times and the like changed; they stay
        loaded.
    :param needs_restart: keys of the deployment that changed and count only after a restart.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    adjusted: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{label}: {', '.join(names)}"
            for label, names in (
                ("added", self.added),
                ("removed", self.removed),
                ("changed", self.changed),
                ("adjusted", self.adjusted),
                ("after a restart only", self.needs_restart),
            )
            if names
        ]
        return "; ".join(parts) or "nothing changed"
