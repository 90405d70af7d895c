"""The models of a deployment: loaded once, leased to requests, never unloaded under one.

A model is ``unloaded``, ``loading``, ``ready``, ``draining`` (unloaded as soon as its last lease is
given back) or ``failed`` (the next request tries again).

This module is what a deployment is to its users. Behind it, :mod:`~engineroom.models.lifecycle`
changes states, :mod:`~engineroom.models.loader` loads, :mod:`~engineroom.models.memory_queue` holds
who waits for memory, :mod:`~engineroom.models.eviction` says who has to go, and
:mod:`engineroom.memory.account` says who holds how much. All of it belongs to the event loop; what
blocks (plugins, files, measurements) is done in threads.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeAlias

from pydantic import ValidationError

from engineroom.border import get_logger, own_copy, without_frames
from engineroom.config.changes import compare, load_settled
from engineroom.config.deployment import DeploymentConfig, load_deployment
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.config.options import problems
from engineroom.errors import ConfigurationError, EngineRoomError, ResourceNotAvailableError
from engineroom.handlers.dispatch import DispatchReport
from engineroom.handlers.registry import HandlerRegistry
from engineroom.memory.account import DeviceMemory, MemoryAccount
from engineroom.memory.probe import MachineProbe, MemoryProbe
from engineroom.models.entry import EntryTable, ModelEntry
from engineroom.models.lifecycle import Lifecycle
from engineroom.models.plan import Plan, make_plan
from engineroom.schemas import PrefixCacheScope
from engineroom.status import ModelState, ModelStatus, PreloadProgress, ReloadReport

__all__ = ["LLMModelManager", "ModelSource", "ModelState", "ModelStatus"]

logger = get_logger("engineroom.manager")

_File: TypeAlias = str | os.PathLike[str]
_Deployment: TypeAlias = DeploymentConfig | Mapping[str, Any] | Sequence[ModelConfig]


class ModelSource(Protocol):
    """All that the service needs of a manager."""

    def lease(self, model_id: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Hold a model for the time of one request.

        :raises ModelNotFoundError: there is no such model (on entering).
        """


class LLMModelManager:
    """Loads, leases and unloads the models of a deployment.

    :param config_path: the deployment file; without it and ``config``, the file that
        ``ENGINEROOM_CONFIG`` names.
    :param config: the deployment as an object, a mapping of the same shape, or a list of models.
    :param registry: the handlers that load models; ``None``: those that are installed, as the
        deployment's ``handlers`` says.
    :param probe: how memory is measured; ``None``: on this machine.
    :param prefix_cache_scope: who finds again what was computed of a prompt, of all models that do
        not say so themselves; ``None``: as the deployment says.
    :raises ConfigurationError: both or neither were given, or the deployment has mistakes.
    """

    def __init__(
        self,
        config_path: _File | None = None,
        config: _Deployment | None = None,
        *,
        registry: HandlerRegistry | None = None,
        probe: MemoryProbe | None = None,
        prefix_cache_scope: PrefixCacheScope | None = None,
    ) -> None:
        if config_path is not None and config is not None:
            raise ConfigurationError("give config_path or config, not both")
        self._path = config_path
        self._from_file = config is None
        self.config = load_deployment(config_path) if config is None else _as_deployment(config)
        self._registry = registry
        self._prefix_cache_scope = prefix_cache_scope
        self._account = MemoryAccount(self.config.memory)
        self._table = EntryTable(self.config)
        self._lifecycle = Lifecycle(
            self._table, self._account, probe or MachineProbe(), lambda: self.registry
        )
        self._loads_ahead: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()

    @property
    def registry(self) -> HandlerRegistry:
        """The handlers that load the models; made when first needed."""
        if self._registry is None:
            self._registry = HandlerRegistry(
                allow=self.config.handlers, disabled=self.config.disabled_handlers
            )
        return self._registry

    def use_registry(self, registry: HandlerRegistry) -> None:
        """Load models with these handlers.

        :raises ConfigurationError: the manager has other ones already.
        """
        if self._registry not in (None, registry):
            raise ConfigurationError(
                "handlers were given to the service, but its manager has a registry of its own; "
                "give them in one place"
            )
        self._registry = registry

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    @property
    def config_path(self) -> _File | None:
        """The deployment file, as it was given; ``None``: the one that ``ENGINEROOM_CONFIG`` names.

        :raises ConfigurationError: the deployment came from no file.
        """
        if not self._from_file:
            raise ConfigurationError(
                "the manager was made without a deployment file; give the deployment itself"
            )
        return self._path

    def list_models(self) -> list[ModelStatus]:
        """Every model of the deployment and how it is."""
        entries = self._table.current.values()
        return [entry.status(self._account.holding(entry)) for entry in entries]

    def memory(self) -> tuple[DeviceMemory, ...]:
        """The account of every device: its budget, who holds what, what was not given back.

        A budget that is detected is not known before the first load that needs the device.
        """
        return self._account.report()

    def get_config(self, model_id: str) -> ModelConfig:
        """The model's configuration. :raises ModelNotFoundError: there is no such model."""
        return self._table.find(model_id).config

    def prefix_cache_scope(self, model_id: str) -> PrefixCacheScope:
        """Who finds again what was computed of a prompt: requests of the same key, or all.

        :raises ModelNotFoundError: there is no such model.
        """
        own = self.get_config(model_id).prefix_cache_scope
        return own or self._prefix_cache_scope or self.config.prefix_cache_scope

    def get_loaded_model(self, model_id: str) -> LoadedModel | None:
        """The model if it is in memory, without a lease: it may be unloaded any time.

        :raises ModelNotFoundError: there is no such model.
        """
        return self._table.find(model_id).loaded

    def explain(self, model_id: str) -> DispatchReport:
        """Which handler runs the model (or would load it), and why no other.

        Of a model with variants that was loaded, or failed to, it also tells what became of each;
        and whether all keys share what is computed of prompts.
        Blocks as long as the handlers look at the source: call it in a thread where that counts.

        :raises ModelNotFoundError: there is no such model.
        """
        entry = self._table.find(model_id)
        notes: list[str] = []
        if entry.loaded is not None:
            report = self.registry.explain(entry.loaded)
        else:
            reports = [self.registry.explain(choice) for choice in entry.config.choices()]
            report = next((report for report in reports if report.chosen is not None), reports[0])
        if len(entry.outcomes) > 1:
            notes += (
                f"variant {number}, {o.runtime or 'auto'} from {o.source}: {o.outcome}"
                + (f" ({o.reason})" if o.reason else "")
                for number, o in enumerate(entry.outcomes, 1)
            )
        if self.prefix_cache_scope(model_id) == "shared":
            notes.append("prompts: all keys find what was computed (prefix_cache_scope: shared)")
        return replace(report, notes=tuple(notes))

    async def plan(self) -> Plan:
        """What would be loaded, where, with what memory, and what would have to go for it.

        Nothing is loaded. Models that are loaded count as they are.
        """
        entries, candidates = list(self._table), {}
        for model_id, entry in self._table.current.items():  # a reload makes a new mapping
            candidates[model_id] = await self._lifecycle.candidates(entry)
        return make_plan(entries, candidates, self._account)

    # ── loading and unloading ────────────────────────────────────────────────────────────────

    def lease(self, model_id: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Hold a model, by id or alias; it is loaded first if it is not in memory.

        :raises ModelNotFoundError: there is no such model (on entering, as all errors).
        :raises ConfigurationError: its file or its options are wrong.
        :raises NoSuitableHandlerError: no installed handler loads it.
        :raises ResourceNotAvailableError: there is no room for it, and there was none for
            ``load_timeout_s``.
        """
        return self._lifecycle.lease(model_id)

    async def load(self, model_id: str) -> LoadedModel:
        """Load a model; many callers share one load. Raises as :meth:`lease`."""
        entry = await self._lifecycle.ready(model_id)
        assert entry.loaded is not None
        return entry.loaded

    async def load_configured_models(
        self, progress: Callable[[PreloadProgress], None] | None = None
    ) -> None:
        """Load every model that has ``preload`` and fits beside those before it, one by one.

        One that does not fit is left to its first request.

        :param progress: is told before and after each model.
        :raises EngineRoomError: the first failure; the models that load are kept, and the
            others are tried again with their first request.
        """
        to_load = [entry for entry in self._table.current.values() if entry.config.preload]
        failed: EngineRoomError | None = None
        for number, entry in enumerate(to_load, 1):
            step = partial(PreloadProgress, entry.config.model_id, number, len(to_load))
            try:
                await self._preload(entry, step, progress or (lambda _: None))
            except EngineRoomError as error:
                if not self._lifecycle.closed:  # else it was stopped
                    logger.error("preload of %r failed: %s", entry.config.model_id, error)
                failed = failed or without_frames(error)
        if failed is not None:
            raise own_copy(failed)

    async def unload(self, model_id: str, timeout_s: float | None = None) -> None:
        """Unload a model as soon as nobody holds it. One that is not loaded stays so.

        :param timeout_s: seconds to wait for its leases; ``None``: without end.
        :raises ResourceNotAvailableError: it was still held then; it goes on serving.
        """
        await self._lifecycle.unload(self._table.find(model_id), timeout_s)

    def engine_ended(self, loaded_model: LoadedModel) -> None:
        """Unload a model whose engine was seen to have ended; the next request loads it anew.

        A request that meets such an engine does so by itself. On the event loop; does not wait.
        """
        for entry in self._table:
            if entry.loaded is loaded_model:
                self._lifecycle.bury(entry)

    async def reload(self, deployment: _File | _Deployment | None = None) -> ReloadReport:
        """Put another deployment in the place of this one, without breaking a running request.

        Models that are gone or made from something else are unloaded as soon as their running
        requests end; new requests get the new ones at once. The rest stays loaded.

        :param deployment: a file, or the deployment itself; ``None``: the manager's own file.
        :raises ConfigurationError: it has mistakes; then nothing changes.
        """
        self._lifecycle.home.check()
        async with self._reloading:
            if self._lifecycle.closed:
                raise ResourceNotAvailableError("the model manager is closed; nothing was reloaded")
            if deployment is None or isinstance(deployment, str | os.PathLike):
                path = self.config_path if deployment is None else deployment
                new = await asyncio.to_thread(load_settled, path)
            else:
                new = _as_deployment(deployment)
            return self._apply(new)

    async def close(self) -> None:
        """Unload everything. Loads that go on are stopped, leases are waited for; afterwards
        nothing is loaded any more.

        :raises EngineRoomError: the first failure; the other models are unloaded nevertheless.
        """
        for task in self._loads_ahead:
            task.cancel()
        try:
            await self._lifecycle.close()
        finally:
            if self._loads_ahead:
                await asyncio.wait(self._loads_ahead)

    async def _preload(
        self,
        entry: ModelEntry,
        step: Callable[..., PreloadProgress],
        progress: Callable[[PreloadProgress], None],
    ) -> None:
        started = time.perf_counter()
        model_id = entry.config.model_id
        if not entry.usable and await self._lifecycle.fits_only_alone(entry):
            detail = "it does not fit beside the others; its first request loads it"
            logger.info("model %r is not loaded ahead: %s", model_id, detail)
            progress(step("skipped", time.perf_counter() - started, detail))
            return
        progress(step("loading"))
        try:
            await self.load(model_id)
        except EngineRoomError as error:
            progress(step("failed", time.perf_counter() - started, error.describe()))
            raise
        progress(step("ready", time.perf_counter() - started))

    # ── another deployment ───────────────────────────────────────────────────────────────────

    def _apply(self, new: DeploymentConfig) -> ReloadReport:
        report = compare(self.config, new)
        for device in self.config.memory:
            self._account.forget_budget(device)
        for device, budget in new.memory.items():
            self._account.set_budget(device, budget)
        self.config = new
        before = self._table.current
        running = [n for n in report.changed if before[n].state in ("ready", "loading")]
        for entry in self._table.replace(new, report.changed):
            self._lifecycle.retire(entry)
        for name in report.adjusted:
            self._lifecycle.start_idle_timer(self._table.current[name])
        logger.info("the deployment was reloaded: %s", report)
        self.registry.notify("engineroom_deployment_reloaded", report=report)
        added = [name for name in report.added if self._table.current[name].config.preload]
        if ahead := added + sorted(running):
            task = asyncio.get_running_loop().create_task(self._load_ahead(ahead))
            self._loads_ahead.add(task)
            task.add_done_callback(self._loads_ahead.discard)
        self._lifecycle.queue.wake()
        return report

    async def _load_ahead(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                await self.load(name)
            except EngineRoomError as error:
                logger.error("loading %r after the reload failed: %s", name, error.describe())


def _as_deployment(config: _Deployment) -> DeploymentConfig:
    if isinstance(config, DeploymentConfig):
        return config
    said = config if isinstance(config, Mapping) else {"models": list(config)}
    try:
        return DeploymentConfig.model_validate(said)
    except ValidationError as error:
        raise ConfigurationError(
            f"the deployment has mistakes: {problems(error, said, DeploymentConfig)}"
        ) from error
