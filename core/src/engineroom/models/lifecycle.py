"""The states of models and every way from one to another; see :mod:`engineroom.models.manager`.

All state belongs to the event loop. Between seeing that a model is ready and counting its lease
there is no ``await``, and what makes room for others runs in callbacks of its own, so there are no
locks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from engineroom.config.deployment import DeploymentConfig
from engineroom.errors import EngineRoomError, ResourceNotAvailableError
from engineroom.handlers.registry import HandlerRegistry
from engineroom.memory.account import MemoryAccount
from engineroom.memory.probe import MemoryMeter
from engineroom.models.entry import ModelEntry
from engineroom.models.eviction import Room, Unwanted
from engineroom.models.loader import Loader
from engineroom.status import ModelState

__all__ = ["ModelLives"]

logger = logging.getLogger("engineroom.manager")

_T = TypeVar("_T")


class ModelLives(ABC):
    """Loads, leases and unloads entries; which ones there are, a subclass knows.

    :param config: the deployment.
    :param meter: how memory is measured.
    """

    def __init__(self, config: DeploymentConfig, meter: MemoryMeter) -> None:
        self.config = config
        self._account = MemoryAccount(config.memory)
        self._retired: set[ModelEntry] = set()
        self._room = Room(self._account, self._all_entries, self._evict)
        self._loader = Loader(self._account, self._room, meter, self._in_thread)
        self._arrivals = 0
        self._closed = False

    @property
    @abstractmethod
    def registry(self) -> HandlerRegistry:
        """The handlers that load the models."""

    @abstractmethod
    def _find(self, model_id: str) -> ModelEntry:
        """The entry of an id or alias. :raises ModelNotFoundError: there is none."""

    @abstractmethod
    def _all_entries(self) -> Iterable[ModelEntry]:
        """Every entry that may hold memory, retired ones included."""

    # ── getting hold of a model ──────────────────────────────────────────────────────────────

    async def _obtain(self, model_id: str, *, lease: bool) -> ModelEntry:
        """The model's entry, ready; with ``lease``, held. No ``await`` comes after it was seen."""
        entry = self._find(model_id)
        if not entry.usable:
            entry = await self._wait_for(entry, model_id)
        if lease:
            entry.leases += 1
            entry.cancel_timer()
        return entry

    async def _wait_for(self, entry: ModelEntry, model_id: str) -> ModelEntry:
        self._arrivals += 1
        arrival = self._arrivals
        entry = self._join(entry, arrival)
        try:
            while not entry.usable:
                if entry.retired:
                    entry.wanted -= 1
                    entry = self._join(self._find(model_id), arrival)
                else:
                    await self._become_ready(entry)
        finally:
            entry.wanted -= 1
            self._room.kick()
        return entry

    def _join(self, entry: ModelEntry, arrival: int) -> ModelEntry:
        if entry.wanted == 0:
            entry.arrival = arrival
        entry.wanted += 1
        return entry

    def _release(self, entry: ModelEntry, dead: bool) -> None:
        entry.release(time.monotonic())
        if dead and entry.usable:
            self._begin_unload(entry, "its engine has ended; the next request loads it anew")
        elif entry.leases == 0:
            self._idle(entry, just_used=True)
            if self._room.waiting:
                self._room.kick()

    def _idle(self, entry: ModelEntry, *, just_used: bool) -> None:
        """Nobody holds the model: begin to count, where it does not stay forever."""
        entry.cancel_timer()
        if entry.keep_alive_s is None or not entry.usable or entry.leases or self._closed:
            return
        if entry.keep_alive_s == 0:
            if just_used and not entry.wanted:
                self._begin_unload(entry, "keep_alive is 0")
            return
        loop = asyncio.get_running_loop()
        entry.timer = loop.call_later(entry.keep_alive_s, self._expire, entry)

    def _expire(self, entry: ModelEntry) -> None:
        entry.timer = None
        if entry.usable and not entry.leases and not entry.wanted and not self._closed:
            self._begin_unload(entry, f"nobody used it for {entry.keep_alive_s:g} s (keep_alive)")

    async def _become_ready(self, entry: ModelEntry) -> None:
        """Take part in the load that goes on, or begin one. The state is to be seen again."""
        if self._closed:
            raise _closed(entry.config.model_id)
        if entry.task is None or entry.task.done():
            self._set(entry, "loading", "a request needs it")
            task = self._start(entry, self._load(entry))
        else:
            task = entry.task
        unloading = entry.state == "draining"
        try:
            await asyncio.shield(task)
        except EngineRoomError:
            if not unloading:
                raise
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not task.cancelled() or (current is not None and current.cancelling()):
                raise  # we were cancelled, not the load before it had begun

    async def _load(self, entry: ModelEntry) -> None:
        try:
            deadline = asyncio.get_running_loop().time() + entry.load_timeout_s
            candidates = await self._loader.survey(entry, self.registry)
            fallback = entry.config.fallback
            fallback = self.config.fallback if fallback is None else fallback
            await self._loader.load(entry, candidates, deadline, fallback=fallback)
        except Unwanted:
            self._set(entry, "unloaded", "nobody waits for it any more")
            return
        except EngineRoomError as error:
            entry.error = error.with_context(model_id=entry.config.model_id)
            self._set(entry, "failed", error.message)
            raise
        except asyncio.CancelledError as error:
            self._set(entry, "unloaded", "its load was stopped")
            if entry.retired:
                return  # it was us; who waits for it goes on to what replaces it
            if self._closed:
                raise _closed(entry.config.model_id) from error
            raise
        except BaseException:
            self._set(entry, "unloaded", "its load was stopped")
            raise
        assert entry.loaded is not None
        entry.error = None
        entry.ready_at = time.monotonic()
        entry.loads += 1
        self._set(entry, "ready", "it was loaded")
        duration = entry.load_duration_s or 0.0
        logger.info("model %r is ready after %.1f s", entry.config.model_id, duration)
        self.registry.notify(
            "engineroom_model_loaded", loaded_model=entry.loaded, duration_s=duration
        )
        self._idle(entry, just_used=False)

    # ── letting go of a model ────────────────────────────────────────────────────────────────

    async def _unload_entry(self, entry: ModelEntry, timeout_s: float | None = None) -> None:
        while (task := entry.task) is not None and not task.done():
            unloading = entry.state == "draining"
            done, _ = await asyncio.wait([task], timeout=timeout_s if unloading else None)
            if not done:
                raise _still_held(entry, timeout_s)
            # Another caller's patience may have ended before ours: then it is ready again.
            if unloading and (entry.state != "ready" or task.exception() is None):
                task.result()
                return
        if entry.usable:
            self._set(entry, "draining", "it was asked for")  # requests wait, and load it anew
            await asyncio.shield(self._start(entry, self._unload(entry, timeout_s)))

    def _evict(self, entry: ModelEntry, reason: str) -> None:
        entry.drain = asyncio.get_running_loop().create_future()
        self._begin_unload(entry, reason)

    def _begin_unload(self, entry: ModelEntry, reason: str) -> None:
        """Unload it as soon as nobody holds it; nobody waits for that."""
        logger.info("model %r is unloaded: %s", entry.config.model_id, reason)
        self._set(entry, "draining", reason)
        _ = self._start(entry, self._unload(entry, None))

    async def _unload(self, entry: ModelEntry, timeout_s: float | None) -> None:
        entry.cancel_timer()
        if entry.leases:
            try:
                await self._drained(entry, timeout_s)
            except BaseException as error:
                self._set(entry, "ready", str(error) or type(error).__name__)
                raise
        entry.drain = None
        loaded = entry.loaded
        assert loaded is not None
        started = time.perf_counter()
        try:
            not_returned = await self._loader.unload(entry)
        except EngineRoomError as error:
            entry.error = error
            self._set(entry, "failed", error.message)
            raise
        except BaseException:
            self._set(entry, "unloaded", "its unload was stopped")
            raise
        duration = time.perf_counter() - started
        self._set(entry, "unloaded", "it was unloaded")
        logger.info("model %r was unloaded in %.1f s", entry.config.model_id, duration)
        self.registry.notify(
            "engineroom_model_unloaded",
            loaded_model=loaded,
            duration_s=duration,
            not_returned=not_returned,
        )

    async def _drained(self, entry: ModelEntry, timeout_s: float | None) -> None:
        """Wait for the last lease; or until an eviction turns out not to be needed."""
        if (released := entry.drain) is None:
            released = asyncio.get_running_loop().create_future()
        entry.waiters.append(released)
        try:
            async with asyncio.timeout(timeout_s):
                await released
        except TimeoutError as error:
            raise _still_held(entry, timeout_s) from error
        finally:
            entry.drain = None
            if released in entry.waiters:
                entry.waiters.remove(released)

    def _retire(self, entry: ModelEntry) -> None:
        """Its place is taken: stop its load, or unload it after its last request."""
        entry.retired = True
        self._retired.add(entry)
        if entry.state == "loading" and entry.task is not None:
            entry.task.cancel()
        elif entry.usable:
            self._begin_unload(entry, "the deployment has replaced or removed it")
        elif entry.task is None or entry.task.done():
            self._retired.discard(entry)

    # ── small things ─────────────────────────────────────────────────────────────────────────

    def _set(self, entry: ModelEntry, state: ModelState, reason: str) -> None:
        old, entry.state = entry.state, state
        model_id = entry.config.model_id
        logger.debug("model %r: %s → %s (%s)", model_id, old, state, reason)
        self.registry.notify(
            "engineroom_model_state_changed",
            model_id=model_id,
            old_state=old,
            new_state=state,
            reason=reason,
        )

    def _start(self, entry: ModelEntry, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` to its end whatever becomes of the caller."""
        task = asyncio.get_running_loop().create_task(work)
        entry.task = task
        task.add_done_callback(partial(self._ended, entry))
        return task

    def _ended(self, entry: ModelEntry, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # all who waited may have gone; the entry keeps it for the next one
        elif entry.task is task and entry.state == "loading":  # it had not even begun
            self._set(entry, "unloaded", "its load was stopped")
        if entry.task is task and entry.retired:
            if entry.usable:
                self._begin_unload(entry, "the deployment has replaced or removed it")
            else:
                self._retired.discard(entry)
        self._room.kick()

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(call)


def _closed(model_id: str) -> ResourceNotAvailableError:
    return ResourceNotAvailableError(
        f"the model manager is closed; model {model_id!r} is not loaded", model_id=model_id
    )


def _still_held(entry: ModelEntry, timeout_s: float | None) -> ResourceNotAvailableError:
    return ResourceNotAvailableError(
        f"model {entry.config.model_id!r} was still held by {entry.leases} requests "
        f"after {timeout_s} s; it was not unloaded; wait for them or cancel them",
        model_id=entry.config.model_id,
    )
