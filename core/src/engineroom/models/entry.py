"""A model of the deployment as the manager keeps it, and the table of all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from engineroom.config.deployment import DeploymentConfig
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import EngineRoomError, ModelNotFoundError
from engineroom.handlers.base import InferenceHandler
from engineroom.memory.account import Footprint
from engineroom.models.files import FileWatch
from engineroom.status import ModelState, ModelStatus, VariantOutcome

__all__ = ["EntryTable", "ModelEntry"]


@dataclass(slots=True, eq=False, repr=False)
class ModelEntry:
    """One model: its configuration and everything about it that changes.

    It owns the model's memory in the account. When a reload of the deployment changes the model, a
    new entry takes its place, and this one is ``retired`` until its requests end.
    """

    config: ModelConfig
    deployment: InitVar[DeploymentConfig]
    keep_alive_s: float | None = field(init=False)
    load_timeout_s: float = field(init=False)
    fallback: bool = field(init=False)

    state: ModelState = "unloaded"
    error: EngineRoomError | None = None
    retired: bool = False
    task: asyncio.Task[Any] | None = None  # its load or its unload

    leases: int = 0
    last_used: float | None = None
    idle_timer: asyncio.TimerHandle | None = None
    drained: list[asyncio.Future[None]] = field(default_factory=list)  # done at the last release
    eviction: asyncio.Future[None] | None = (
        None  # an eviction's one; it fails if that is called off
    )
    waiting_callers: int = 0  # for the model to be ready
    arrival: int = 0  # when the first of them came
    waits_for: str = ""

    loaded: LoadedModel | None = None
    handler: InferenceHandler | None = None
    variant: int | None = None
    ready_at: float = 0.0
    load_duration_s: float | None = None
    files: FileWatch | None = None

    # Of its variants, by place.
    outcomes: list[VariantOutcome] = field(default_factory=list)
    known: dict[int, dict[str, int]] = field(default_factory=dict)  # what each was seen to hold
    footprints: dict[int, Footprint] = field(default_factory=dict)

    def __post_init__(self, deployment: DeploymentConfig) -> None:
        self.configure(self.config, deployment)

    def __str__(self) -> str:
        return f"{self.config.model_id} (being replaced)" if self.retired else self.config.model_id

    def configure(self, config: ModelConfig, deployment: DeploymentConfig) -> None:
        """Take over what can be changed while the model is loaded."""
        self.config = config
        keep_alive = deployment.keep_alive if config.keep_alive is None else config.keep_alive
        self.keep_alive_s = None if keep_alive == float("inf") else keep_alive
        timeout = config.load_timeout_s
        self.load_timeout_s = deployment.load_timeout_s if timeout is None else timeout
        self.fallback = deployment.fallback if config.fallback is None else config.fallback

    @property
    def usable(self) -> bool:
        """Whether it can be leased right now."""
        return self.state == "ready"

    @property
    def source(self) -> str:
        """What is loaded, or the first that would be tried."""
        return (self.loaded.config if self.loaded else self.config.choices()[0]).source or ""

    @property
    def runtime(self) -> str | None:
        """What runs it, or what the deployment says; ``None``: it is left to the handlers."""
        return self.loaded.handler_name if self.loaded else self.config.runtime

    def join(self, arrival: int) -> None:
        """One more caller waits for it; its place in the queue is the first one's."""
        if self.waiting_callers == 0:
            self.arrival = arrival
        self.waiting_callers += 1

    def cancel_idle_timer(self) -> None:
        """It does not expire any more."""
        if self.idle_timer is not None:
            self.idle_timer.cancel()
            self.idle_timer = None

    def release(self) -> None:
        """A lease was given back."""
        self.leases -= 1
        self.last_used = time.monotonic()
        if self.leases == 0:
            for waiter in self.drained:
                if not waiter.done():
                    waiter.set_result(None)
            self.drained.clear()

    def status(self, memory: Mapping[str, int]) -> ModelStatus:
        """As it is now; ``memory`` is what the account has for it."""
        loaded, config = self.loaded, self.config
        idle = self.last_used is not None and not self.leases
        return ModelStatus(
            model_id=config.model_id,
            state=self.state,
            aliases=tuple(config.aliases),
            source=self.source,
            runtime=self.runtime,
            leases=self.leases,
            waiting=self.waiting_callers,
            waits_for=self.waits_for,
            last_used=self.last_used,
            idle_s=max(0.0, time.monotonic() - self.last_used) if idle and self.last_used else None,
            memory_bytes=loaded.memory_bytes if loaded else None,
            memory=memory,
            max_context_tokens=loaded.max_context_tokens if loaded else None,
            load_duration_s=self.load_duration_s,
            pinned=config.pinned,
            priority=config.priority,
            keep_alive_s=self.keep_alive_s,
            error=self.error.describe() if self.error else None,
            variants=tuple(self.outcomes),
        )


class EntryTable:
    """The models of a deployment, and the retired entries that may still hold memory.

    Iterating yields all of them; the table may change meanwhile.
    """

    def __init__(self, deployment: DeploymentConfig) -> None:
        self.current: dict[str, ModelEntry] = {}
        """By id, in the order of the deployment."""
        self.retired: set[ModelEntry] = set()
        self._names: dict[str, ModelEntry] = {}
        self.replace(deployment)

    def __iter__(self) -> Iterator[ModelEntry]:
        return iter([*self.current.values(), *self.retired])

    def replace(
        self, deployment: DeploymentConfig, changed: Collection[str] = ()
    ) -> list[ModelEntry]:
        """Take over another deployment.

        :param changed: ids of the models that get a new entry.
        :returns: the entries that are in the table no more.
        """
        before, self.current = self.current, {}
        for model in deployment.models:
            entry = before.get(model.model_id)
            if entry is None or model.model_id in changed:
                entry = ModelEntry(model, deployment)
            else:
                entry.configure(model, deployment)
            self.current[model.model_id] = entry
        self._names = {
            name: entry
            for model_id, entry in self.current.items()
            for name in (model_id, *entry.config.aliases)
        }
        return [entry for name, entry in before.items() if self.current.get(name) is not entry]

    def find(self, name: str) -> ModelEntry:
        """The entry of an id or alias. :raises ModelNotFoundError: there is none."""
        try:
            return self._names[name]
        except KeyError:
            known = ", ".join(self.current) or "none; add one to the deployment"
            raise ModelNotFoundError(
                f"{name!r} is not a model of this deployment (models: {known})"
                f"{did_you_mean(name, self._names)}",
                model_id=name,
            ) from None
