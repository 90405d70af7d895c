"""The models of a deployment: loaded once, leased to requests, never unloaded under one.

A model is ``unloaded``, ``loading``, ``ready``, ``draining`` (to be unloaded as soon as its last
lease is given back) or ``failed`` (the next request tries again). All state belongs to the event
loop; loads and unloads are tasks of the manager's own, so that a caller who is cancelled harms
nobody who waits for the same model.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

from pydantic import ValidationError

from engineroom.config import DeploymentConfig, load_deployment
from engineroom.errors import (
    ConfigurationError,
    EngineRoomError,
    InferenceError,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom.handler import InferenceHandler
from engineroom.options import problems
from engineroom.registry import DispatchReport, HandlerRegistry
from engineroom.schemas import LoadedModel, ModelConfig
from engineroom.suggestions import did_you_mean

__all__ = ["LLMModelManager", "ModelSource", "ModelState", "ModelStatus"]

logger = logging.getLogger(__name__)

ModelState: TypeAlias = Literal["unloaded", "loading", "ready", "draining", "failed"]


class ModelSource(Protocol):
    """All that the service needs of a manager."""

    def lease(self, model_id: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Hold a model for the time of one request.

        :raises ModelNotFoundError: there is no such model (on entering).
        """


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model as :meth:`LLMModelManager.list_models` shows it.

    :param leases: requests that hold it now.
    :param last_used: ``time.monotonic()`` of the last release; ``None``: never used.
    :param error: why it failed, where ``state`` is ``failed``.
    """

    model_id: str
    state: ModelState
    aliases: tuple[str, ...] = ()
    source: str = ""
    runtime: str | None = None
    leases: int = 0
    last_used: float | None = None
    memory_bytes: int | None = None
    max_context_tokens: int | None = None
    error: str | None = None


class _Entry:
    """One model: its configuration and everything about it that changes."""

    __slots__ = (
        "config",
        "error",
        "handler",
        "last_used",
        "leases",
        "loaded",
        "state",
        "task",
        "waiters",
    )

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.state: ModelState = "unloaded"
        self.loaded: LoadedModel | None = None
        self.handler: InferenceHandler | None = None
        self.leases = 0
        self.last_used: float | None = None
        self.error: EngineRoomError | None = None
        self.task: asyncio.Task[Any] | None = None
        self.waiters: list[asyncio.Future[None]] = []

    def release(self) -> None:
        self.leases -= 1
        self.last_used = time.monotonic()
        if self.leases == 0:
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self.waiters.clear()


class _Lease(AbstractAsyncContextManager[LoadedModel]):
    """Loads the model if need be, and keeps it loaded inside the ``async with``."""

    __slots__ = ("_entry", "_manager", "_model_id")

    def __init__(self, manager: LLMModelManager, model_id: str) -> None:
        self._manager = manager
        self._model_id = model_id
        self._entry: _Entry | None = None

    async def __aenter__(self) -> LoadedModel:
        entry = self._manager._find(self._model_id)
        while entry.state != "ready" or entry.loaded is None:
            await self._manager._become_ready(entry)
        # No await since the state was seen: nobody can have begun to unload it.
        entry.leases += 1
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
            entry.release()


class LLMModelManager:
    """Owns the life of every model of a deployment.

    :param config_path: the deployment file; without it and ``config``, the file that
        ``ENGINEROOM_CONFIG`` names.
    :param config: the deployment as an object, a mapping of the same shape, or a list of models.
    :param registry: the handlers that load models; ``None``: those that are installed, as the
        deployment's ``handlers`` says.
    :raises ConfigurationError: both or neither were given, or the deployment has mistakes.
    """

    def __init__(
        self,
        config_path: str | os.PathLike[str] | None = None,
        config: DeploymentConfig | Mapping[str, Any] | Sequence[ModelConfig] | None = None,
        *,
        registry: HandlerRegistry | None = None,
    ) -> None:
        if config_path is not None and config is not None:
            raise ConfigurationError("give config_path or config, not both")
        self.config = load_deployment(config_path) if config is None else _as_deployment(config)
        self._registry = registry
        self._entries = {model.model_id: _Entry(model) for model in self.config.models}
        self._names = {
            name: entry
            for entry in self._entries.values()
            for name in (entry.config.model_id, *entry.config.aliases)
        }
        self._closed = False

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

    def list_models(self) -> list[ModelStatus]:
        """Every model of the deployment and how it is."""
        return [_status(entry) for entry in self._entries.values()]

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

        :raises ModelNotFoundError: there is no such model.
        """
        entry = self._find(model_id)
        if entry.loaded is not None:
            return self.registry.explain(entry.loaded)
        reports = [self.registry.explain(choice) for choice in entry.config.choices()]
        return next((report for report in reports if report.chosen is not None), reports[0])

    # ── loading and unloading ────────────────────────────────────────────────────────────────

    def lease(self, model_id: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Hold a model, by id or alias; it is loaded first if it is not in memory.

        :raises ModelNotFoundError: there is no such model (on entering, as all errors).
        :raises ConfigurationError: its file or its options are wrong.
        :raises NoSuitableHandlerError: no installed handler loads it.
        """
        return _Lease(self, model_id)

    async def load_configured_models(self) -> None:
        """Load every model that has ``preload``, one after another.

        :raises EngineRoomError: the first failure; the models that load are kept, and the
            others are tried again with their first request.
        """
        failed: EngineRoomError | None = None
        for entry in self._entries.values():
            if entry.config.preload:
                try:
                    await self.load(entry.config.model_id)
                except EngineRoomError as error:
                    logger.error("preload of %r failed: %s", entry.config.model_id, error)
                    failed = failed or error
        if failed is not None:
            raise failed

    async def load(self, model_id: str) -> LoadedModel:
        """Load a model; many callers share one load. Raises as :meth:`lease`."""
        entry = self._find(model_id)
        while entry.state != "ready" or entry.loaded is None:
            await self._become_ready(entry)
        return entry.loaded

    async def unload(self, model_id: str, timeout_s: float | None = None) -> None:
        """Unload a model as soon as nobody holds it. One that is not loaded stays so.

        :param timeout_s: seconds to wait for its leases; ``None``: without end.
        :raises ResourceNotAvailableError: it was still held then; it goes on serving.
        """
        entry = self._find(model_id)
        while (task := entry.task) is not None and not task.done():
            unloading = entry.state == "draining"
            done, _ = await asyncio.wait([task], timeout=timeout_s if unloading else None)
            if not done:
                raise _still_held(entry, timeout_s)
            # Another caller's patience may have ended before ours: then it is ready again.
            if unloading and (entry.state != "ready" or task.exception() is None):
                task.result()
                return
        if entry.state == "ready":
            entry.state = "draining"  # from here on requests wait, and then load it anew
            await self._own(entry, self._unload(entry, timeout_s))

    async def close(self) -> None:
        """Unload everything. Loads that go on are stopped, leases are waited for; afterwards
        nothing is loaded any more.

        :raises EngineRoomError: the first failure; the other models are unloaded nevertheless.
        """
        self._closed = True
        failed: EngineRoomError | None = None
        for entry in self._entries.values():
            if entry.state == "loading" and entry.task is not None:
                entry.task.cancel()
                await asyncio.wait([entry.task])
            try:
                await self.unload(entry.config.model_id)
            except EngineRoomError as error:
                logger.error("unloading %r failed: %s", entry.config.model_id, error)
                failed = failed or error
        if failed is not None:
            raise failed

    async def _drain(self, entry: _Entry, timeout_s: float | None) -> None:
        released = asyncio.get_running_loop().create_future()
        entry.waiters.append(released)
        try:
            async with asyncio.timeout(timeout_s):
                await released
        except TimeoutError as error:
            raise _still_held(entry, timeout_s) from error
        finally:
            if released in entry.waiters:
                entry.waiters.remove(released)

    async def _become_ready(self, entry: _Entry) -> None:
        """Take part in the load that goes on, or begin one. The state is to be seen again."""
        if self._closed:
            raise _closed(entry.config.model_id)
        if entry.task is not None and not entry.task.done():
            unloading = entry.state == "draining"
            try:
                await asyncio.shield(entry.task)
            except EngineRoomError:
                if not unloading:
                    raise
            return
        entry.state = "loading"
        await self._own(entry, self._load(entry))

    async def _own(self, entry: _Entry, work: Awaitable[None]) -> None:
        """Run ``work`` to its end whatever becomes of the caller."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(_retrieve)
        entry.task = task
        await asyncio.shield(task)

    async def _load(self, entry: _Entry) -> None:
        started = time.perf_counter()
        model_id = entry.config.model_id
        try:
            config, handler = self._choose(entry.config)
            logger.info("loading model %r with %s from %s", model_id, handler.name, config.source)
            loaded = await _typed(
                handler, "load_model", model_id, lambda: handler.load_model(config)
            )
            if not isinstance(loaded, LoadedModel):
                raise InferenceError(
                    f"handler {handler.name!r}: load_model returned {type(loaded).__name__} "
                    "instead of a LoadedModel; mend the plugin"
                )
        except EngineRoomError as error:
            entry.state, entry.error = "failed", error.with_context(model_id=model_id)
            raise
        except asyncio.CancelledError as error:
            entry.state = "unloaded"
            if self._closed:
                raise _closed(model_id) from error
            raise
        except BaseException:
            entry.state = "unloaded"
            raise
        if loaded.handler_name is None:
            loaded.handler_name = handler.name
        entry.loaded, entry.handler, entry.error = loaded, handler, None
        entry.state = "ready"
        duration = time.perf_counter() - started
        logger.info("model %r is ready after %.1f s", model_id, duration)
        self.registry.notify("engineroom_model_loaded", loaded_model=loaded, duration_s=duration)

    def _choose(self, config: ModelConfig) -> tuple[ModelConfig, InferenceHandler]:
        """The first variant whose runtime is there, and its handler."""
        reasons: list[EngineRoomError] = []
        for choice in config.choices():
            try:
                return choice, self.registry.select_loader(choice)
            except EngineRoomError as error:
                reasons.append(error)
        if len(reasons) == 1:
            raise reasons[0]
        raise ConfigurationError(
            f"none of the {len(reasons)} variants of model {config.model_id!r} can be loaded: "
            + "; ".join(reason.message for reason in reasons),
            model_id=config.model_id,
        ) from reasons[0]

    async def _unload(self, entry: _Entry, timeout_s: float | None) -> None:
        if entry.leases:
            try:
                await self._drain(entry, timeout_s)
            except BaseException:
                entry.state = "ready"
                raise
        loaded, handler = entry.loaded, entry.handler
        assert loaded is not None and handler is not None
        started = time.perf_counter()
        model_id = entry.config.model_id
        entry.loaded = entry.handler = None
        try:
            await _typed(handler, "unload_model", model_id, lambda: handler.unload_model(loaded))
        except EngineRoomError as error:
            entry.state, entry.error = "failed", error
            raise
        except BaseException:
            entry.state = "unloaded"
            raise
        entry.state = "unloaded"
        duration = time.perf_counter() - started
        logger.info("model %r was unloaded in %.1f s", model_id, duration)
        self.registry.notify("engineroom_model_unloaded", loaded_model=loaded, duration_s=duration)

    def _find(self, model_id: str) -> _Entry:
        try:
            return self._names[model_id]
        except KeyError:
            known = ", ".join(self._entries) or "none; add one to the deployment"
            raise ModelNotFoundError(
                f"{model_id!r} is not a model of this deployment (models: {known})"
                f"{did_you_mean(model_id, self._names)}",
                model_id=model_id,
            ) from None


async def _typed(
    handler: InferenceHandler, method: str, model_id: str, call: Callable[[], Awaitable[Any]]
) -> Any:
    """Call foreign code; whatever it raises comes out typed, with its traceback in the log."""
    try:
        return await call()
    except EngineRoomError:
        raise
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # not the handler's own doing
        logger.exception("handler %r: %s failed for model %r", handler.name, method, model_id)
        raise InferenceError(
            f"handler {handler.name!r}: {method} failed: {type(error).__name__}: {error}",
            model_id=model_id,
        ) from error


def _closed(model_id: str) -> ResourceNotAvailableError:
    return ResourceNotAvailableError(
        f"the model manager is closed; model {model_id!r} is not loaded", model_id=model_id
    )


def _still_held(entry: _Entry, timeout_s: float | None) -> ResourceNotAvailableError:
    return ResourceNotAvailableError(
        f"model {entry.config.model_id!r} was still held by {entry.leases} requests "
        f"after {timeout_s} s; it was not unloaded; wait for them or cancel them",
        model_id=entry.config.model_id,
    )


def _retrieve(task: asyncio.Future[Any]) -> None:
    # Every waiter may have been cancelled; the entry keeps the error for the next one.
    if not task.cancelled():
        task.exception()


def _status(entry: _Entry) -> ModelStatus:
    loaded, config = entry.loaded, entry.config
    return ModelStatus(
        model_id=config.model_id,
        state=entry.state,
        aliases=tuple(config.aliases),
        source=(loaded.config if loaded else config.choices()[0]).source or "",
        runtime=loaded.handler_name if loaded else config.runtime,
        leases=entry.leases,
        last_used=entry.last_used,
        memory_bytes=loaded.memory_bytes if loaded else None,
        max_context_tokens=loaded.max_context_tokens if loaded else None,
        error=entry.error.describe() if entry.error else None,
    )


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
