"""A model of the deployment as the manager keeps it, and as it shows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from engineroom.config.deployment import DeploymentConfig
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.errors import EngineRoomError
from engineroom.handlers.base import InferenceHandler
from engineroom.memory.account import Footprint
from engineroom.status import ModelState, ModelStatus, VariantOutcome

__all__ = ["ModelEntry"]


class ModelEntry:
    """One model: its configuration and everything about it that changes.

    It is the owner of the model's memory in the account. When a reload of the deployment changes
    the model, a new entry takes its place, and this one is ``retired`` until its requests end.
    """

    __slots__ = (
        "arrival",
        "config",
        "drain",
        "error",
        "footprints",
        "handler",
        "keep_alive_s",
        "known",
        "last_used",
        "leases",
        "load_duration_s",
        "load_timeout_s",
        "loaded",
        "loads",
        "outcomes",
        "ready_at",
        "retired",
        "state",
        "task",
        "timer",
        "variant",
        "waiters",
        "waits_for",
        "wanted",
    )

    def __init__(self, config: ModelConfig, deployment: DeploymentConfig) -> None:
        self.state: ModelState = "unloaded"
        self.loaded: LoadedModel | None = None
        self.handler: InferenceHandler | None = None
        self.leases = 0
        self.wanted = 0  # callers that wait for it to be ready
        self.arrival = 0  # when the first of them came
        self.last_used: float | None = None
        self.ready_at = 0.0
        self.load_duration_s: float | None = None
        self.loads = 0
        self.error: EngineRoomError | None = None
        self.task: asyncio.Task[Any] | None = None  # its load or its unload
        self.waiters: list[asyncio.Future[None]] = []  # for its last lease to be given back
        self.drain: asyncio.Future[None] | None = None  # the one of an eviction, which can end
        self.timer: asyncio.TimerHandle | None = None
        self.waits_for = ""
        self.variant: int | None = None
        self.known: dict[int, dict[str, int]] = {}  # what each variant was seen to hold
        self.footprints: dict[int, Footprint] = {}
        self.outcomes: list[VariantOutcome] = []
        self.retired = False
        self.configure(config, deployment)

    def __str__(self) -> str:
        return f"{self.config.model_id} (being replaced)" if self.retired else self.config.model_id

    def configure(self, config: ModelConfig, deployment: DeploymentConfig) -> None:
        """Take over what can be changed while the model is loaded."""
        self.config = config
        self.keep_alive_s = (
            config.keep_alive if config.keep_alive is not None else deployment.keep_alive
        )
        if self.keep_alive_s == float("inf"):
            self.keep_alive_s = None
        self.load_timeout_s = (
            config.load_timeout_s
            if config.load_timeout_s is not None
            else deployment.load_timeout_s
        )

    @property
    def usable(self) -> bool:
        """Whether it can be leased right now."""
        return self.state == "ready" and self.loaded is not None

    def cancel_timer(self) -> None:
        """It does not expire any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def release(self, now: float) -> None:
        """A lease was given back."""
        self.leases -= 1
        self.last_used = now
        if self.leases == 0:
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self.waiters.clear()

    def status(self, memory: Mapping[str, int]) -> ModelStatus:
        """As it is now; ``memory`` is what the account has for it."""
        loaded, config = self.loaded, self.config
        idle = self.last_used is not None and not self.leases
        return ModelStatus(
            model_id=config.model_id,
            state=self.state,
            aliases=tuple(config.aliases),
            source=(loaded.config if loaded else config.choices()[0]).source or "",
            runtime=loaded.handler_name if loaded else config.runtime,
            leases=self.leases,
            waiting=self.wanted,
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
