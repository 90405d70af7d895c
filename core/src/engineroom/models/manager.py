"""The models of a deployment: loaded once, leased to requests, never unloaded under one.

A model is ``unloaded``, ``loading``, ``ready``, ``draining`` (to be unloaded as soon as its last
lease is given back) or ``failed`` (the next request tries again). Loads and unloads are tasks of
the manager's own, so that a caller who is cancelled harms nobody who waits for the same model.
What blocks (plugins, files, measurements) is done in threads.

Here is what a deployment is to its users. The states are in :mod:`engineroom.models.lifecycle`, who
holds how much memory in :mod:`engineroom.memory.account`, who waits for it and who has to go in
:mod:`engineroom.models.eviction`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from pydantic import ValidationError

from engineroom.config.changes import compare, load_settled
from engineroom.config.deployment import DeploymentConfig, load_deployment
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.config.options import problems
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import (
    ConfigurationError,
    EngineDeadError,
    EngineRoomError,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom.handlers.dispatch import DispatchReport
from engineroom.handlers.registry import HandlerRegistry
from engineroom.memory.account import DeviceMemory
from engineroom.memory.probe import MachineMeter, MemoryMeter
from engineroom.models.entry import ModelEntry
from engineroom.models.lifecycle import ModelLives
from engineroom.models.plan import Plan, make_plan
from engineroom.status import ModelState, ModelStatus, PreloadProgress, ReloadReport

__all__ = ["LLMModelManager", "ModelSource", "ModelState", "ModelStatus"]

logger = logging.getLogger("engineroom.manager")


class ModelSource(Protocol):
    """All that the service needs of a manager."""

    def lease(self, model_id: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Hold a model for the time of one request.

        :raises ModelNotFoundError: there is no such model (on entering).
        """


class _Lease(AbstractAsyncContextManager[LoadedModel]):
    """Loads the model if need be, and keeps it loaded inside the ``async with``."""

    __slots__ = ("_entry", "_manager", "_model_id")

    def __init__(self, manager: LLMModelManager, model_id: str) -> None:
        self._manager = manager
        self._model_id = model_id
        self._entry: ModelEntry | None = None

    async def __aenter__(self) -> LoadedModel:
        entry = await self._manager._obtain(self._model_id, lease=True)
        assert entry.loaded is not None
        self._entry = entry
        return entry.loaded

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._manager._release(entry, dead=isinstance(error, EngineDeadError))


class LLMModelManager(ModelLives):
    """Owns the life of every model of a deployment.

    :param config_path: the deployment file; without it and ``config``, the file that
        ``ENGINEROOM_CONFIG`` names.
    :param config: the deployment as an object, a mapping of the same shape, or a list of models.
    :param registry: the handlers that load models; ``None``: those that are installed, as the
        deployment's ``handlers`` says.
    :param meter: how memory is measured; ``None``: on this machine.
    :raises ConfigurationError: both or neither were given, or the deployment has mistakes.
    """

    def __init__(
        self,
        config_path: str | os.PathLike[str] | None = None,
        config: DeploymentConfig | Mapping[str, Any] | Sequence[ModelConfig] | None = None,
        *,
        registry: HandlerRegistry | None = None,
        meter: MemoryMeter | None = None,
    ) -> None:
        if config_path is not None and config is not None:
            raise ConfigurationError("give config_path or config, not both")
        self._path = config_path
        self._from_file = config is None
        deployment = load_deployment(config_path) if config is None else _as_deployment(config)
        super().__init__(deployment, meter or MachineMeter())
        self._registry = registry
        self._entries = {m.model_id: ModelEntry(m, self.config) for m in self.config.models}
        self._names = self._by_name()
        self._background: set[asyncio.Task[Any]] = set()
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
    def config_path(self) -> str | os.PathLike[str] | None:
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
        return [entry.status(self._account.holding(entry)) for entry in self._entries.values()]

    def memory(self) -> tuple[DeviceMemory, ...]:
        """The account of every device: its budget, who holds what, what was not given back.

        A budget that is detected is not known before the first load that needs the device.
        """
        return self._account.report()

    def get_config(self, model_id: str) -> ModelConfig:
        """The model's configuration. :raises ModelNotFoundError: there is no such model."""
        return self._find(model_id).config

    def get_loaded_model(self, model_id: str) -> LoadedModel | None:
        """The model if it is in memory, without a lease: it may be unloaded any time.

        :raises ModelNotFoundError: there is no such model.
        """
        return self._find(model_id).loaded

    def explain(self, model_id: str) -> DispatchReport:
        """Which handler runs the model (or would load it), and why no other.

        Of a model with variants that was loaded, or failed to, it also tells what became of each.
        Blocks as long as the handlers look at the source: call it in a thread where that counts.

        :raises ModelNotFoundError: there is no such model.
        """
        entry = self._find(model_id)
        if entry.loaded is not None:
            report = self.registry.explain(entry.loaded)
        else:
            reports = [self.registry.explain(choice) for choice in entry.config.choices()]
            report = next((report for report in reports if report.chosen is not None), reports[0])
        if len(entry.outcomes) > 1:
            notes = tuple(
                f"variant {number}, {o.runtime or 'auto'} from {o.source}: {o.outcome}"
                + (f" ({o.reason})" if o.reason else "")
                for number, o in enumerate(entry.outcomes, 1)
            )
            report = report.with_notes(notes)
        return report

    async def plan(self) -> Plan:
        """What would be loaded, where, with what memory, and what would have to go for it.

        Nothing is loaded. Models that are loaded count as they are.
        """
        entries = [*self._entries.values(), *self._retired]
        surveys = {}
        for entry in self._entries.values():
            surveys[entry.config.model_id] = await self._loader.survey(entry, self.registry)
        return make_plan(self.config, entries, surveys, self._account)

    # ── loading and unloading ────────────────────────────────────────────────────────────────

    def lease(self, model_id: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Hold a model, by id or alias; it is loaded first if it is not in memory.

        :raises ModelNotFoundError: there is no such model (on entering, as all errors).
        :raises ConfigurationError: its file or its options are wrong.
        :raises NoSuitableHandlerError: no installed handler loads it.
        :raises ResourceNotAvailableError: there is no room for it, and there was none for
            ``load_timeout_s``.
        """
        return _Lease(self, model_id)

    async def load(self, model_id: str) -> LoadedModel:
        """Load a model; many callers share one load. Raises as :meth:`lease`."""
        entry = await self._obtain(model_id, lease=False)
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
        wanted = [entry for entry in self._entries.values() if entry.config.preload]
        failed: EngineRoomError | None = None
        for number, entry in enumerate(wanted, 1):
            step = partial(PreloadProgress, entry.config.model_id, number, len(wanted))
            try:
                await self._preload(entry, step, progress or (lambda _: None))
            except EngineRoomError as error:
                logger.error("preload of %r failed: %s", entry.config.model_id, error)
                failed = failed or error
        if failed is not None:
            raise failed

    async def unload(self, model_id: str, timeout_s: float | None = None) -> None:
        """Unload a model as soon as nobody holds it. One that is not loaded stays so.

        :param timeout_s: seconds to wait for its leases; ``None``: without end.
        :raises ResourceNotAvailableError: it was still held then; it goes on serving.
        """
        await self._unload_entry(self._find(model_id), timeout_s)

    async def reload(
        self,
        deployment: str
        | os.PathLike[str]
        | DeploymentConfig
        | Mapping[str, Any]
        | Sequence[ModelConfig]
        | None = None,
    ) -> ReloadReport:
        """Put another deployment in the place of this one, without breaking a running request.

        Models that are gone or made from something else are unloaded as soon as their running
        requests end; new requests get the new ones at once. The rest stays loaded.

        :param deployment: a file, or the deployment itself; ``None``: the manager's own file.
        :raises ConfigurationError: it has mistakes; then nothing changes.
        """
        async with self._reloading:
            if self._closed:
                raise ResourceNotAvailableError("the model manager is closed; nothing was reloaded")
            if deployment is None or isinstance(deployment, str | os.PathLike):
                path = self.config_path if deployment is None else deployment
                new = await self._in_thread(lambda: load_settled(path))
            else:
                new = _as_deployment(deployment)
            return self._apply(new)

    async def close(self) -> None:
        """Unload everything. Loads that go on are stopped, leases are waited for; afterwards
        nothing is loaded any more.

        :raises EngineRoomError: the first failure; the other models are unloaded nevertheless.
        """
        self._closed = True
        self._room.close(ResourceNotAvailableError("the model manager is closed"))
        for task in self._background:
            task.cancel()
        failed: EngineRoomError | None = None
        for entry in list(self._all_entries()):
            entry.cancel_timer()
            if entry.state == "loading" and entry.task is not None:
                entry.task.cancel()
                await asyncio.wait([entry.task])
            try:
                await self._unload_entry(entry)
            except EngineRoomError as error:
                logger.error("unloading %r failed: %s", entry.config.model_id, error)
                failed = failed or error
        if self._background:
            await asyncio.wait(self._background)
        if failed is not None:
            raise failed

    async def _preload(
        self,
        entry: ModelEntry,
        step: Callable[..., PreloadProgress],
        progress: Callable[[PreloadProgress], None],
    ) -> None:
        started = time.perf_counter()
        model_id = entry.config.model_id
        if not entry.usable:
            candidates = await self._loader.survey(entry, self.registry)
            fitting = [c for c in candidates if c.error is None]
            if any(self._room.fits_ever(entry, c.need) for c in fitting) and all(
                self._account.lacking(c.need) for c in fitting
            ):
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
        old, report = self.config, compare(self.config, new)
        self.config = new
        for device in {*old.memory, *new.memory}:
            if device in new.memory:
                self._account.set_budget(device, new.memory[device])
            else:
                self._account.forget_budget(device)
        running = {
            name
            for name in report.changed
            if self._entries[name].usable or self._entries[name].state == "loading"
        }
        entries = {}
        for model in new.models:
            entry = self._entries.get(model.model_id)
            if entry is None or model.model_id in report.changed:
                entry = ModelEntry(model, new)
            else:
                entry.configure(model, new)
            entries[model.model_id] = entry
        leaving = [entry for name, entry in self._entries.items() if entries.get(name) is not entry]
        self._entries = entries
        self._names = self._by_name()
        for entry in leaving:
            self._retire(entry)
        for name in report.adjusted:
            if not self._entries[name].leases:
                self._idle(self._entries[name], just_used=False)
        logger.info("the deployment was reloaded: %s", report)
        self.registry.notify("engineroom_deployment_reloaded", report=report)
        ahead = [n for n in report.added if entries[n].config.preload] + sorted(running)
        if ahead:
            self._spawn(self._load_ahead(ahead))
        self._room.kick()
        return report

    async def _load_ahead(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                await self.load(name)
            except EngineRoomError as error:
                logger.error("loading %r after the reload failed: %s", name, error.describe())

    # ── small things ─────────────────────────────────────────────────────────────────────────

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _all_entries(self) -> Iterable[ModelEntry]:
        return [*self._entries.values(), *self._retired]

    def _by_name(self) -> dict[str, ModelEntry]:
        return {
            name: entry
            for entry in self._entries.values()
            for name in (entry.config.model_id, *entry.config.aliases)
        }

    def _find(self, model_id: str) -> ModelEntry:
        try:
            return self._names[model_id]
        except KeyError:
            known = ", ".join(self._entries) or "none; add one to the deployment"
            raise ModelNotFoundError(
                f"{model_id!r} is not a model of this deployment (models: {known})"
                f"{did_you_mean(model_id, self._names)}",
                model_id=model_id,
            ) from None


def _as_deployment(
    config: DeploymentConfig | Mapping[str, Any] | Iterable[ModelConfig],
) -> DeploymentConfig:
    if isinstance(config, DeploymentConfig):
        return config
    try:
        if isinstance(config, Mapping):
            return DeploymentConfig.model_validate(config)
        return DeploymentConfig(models=list(config))
    except ValidationError as error:
        raise ConfigurationError(
            f"the deployment has mistakes: {problems(error, DeploymentConfig)}"
        ) from error
