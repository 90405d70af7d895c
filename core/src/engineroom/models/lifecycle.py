"""The states of models, and every way from one to another.

All state belongs to the event loop, so there are no locks. Two rules keep it true:

- No ``await`` comes between seeing that a model is ready and counting its lease.
- What evicts models runs in callbacks of its own (:mod:`engineroom.models.memory_queue`), never
  between the two.

Loads and unloads are tasks of their own, so that a caller who is cancelled harms nobody who waits
for the same model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from engineroom.border import failure, get_logger, log_failure, own_copy, passes, without_frames
from engineroom.config.model import LoadedModel
from engineroom.errors import EngineDeadError, EngineRoomError, ResourceNotAvailableError
from engineroom.forks import Home
from engineroom.handlers.registry import HandlerRegistry
from engineroom.memory.account import MemoryAccount
from engineroom.memory.probe import MemoryProbe
from engineroom.models.candidates import Candidate
from engineroom.models.entry import EntryTable, ModelEntry
from engineroom.models.eviction import Evictor
from engineroom.models.loader import Loader
from engineroom.models.memory_queue import MemoryQueue, NobodyWaitsError
from engineroom.status import ModelState

__all__ = ["Lifecycle"]

logger = get_logger("engineroom.manager")


class Lifecycle:
    """Loads, leases and unloads the entries of a table.

    Every change of a state goes through ``_change_state``, every load through ``_load``: there a
    failed load would note when it may be tried again, and ``_become_ready`` refuse until then.
    A model whose engine has died comes in by :meth:`release`; where a model runs (in this process
    or in another) is for its :class:`Candidate` to say and for the loader to follow.

    :param account: who holds how much memory.
    :param probe: how memory is measured.
    :param registry: the handlers; called when they are needed.
    """

    def __init__(
        self,
        table: EntryTable,
        account: MemoryAccount,
        probe: MemoryProbe,
        registry: Callable[[], HandlerRegistry],
    ) -> None:
        self.home = Home("this model manager")
        self.closed = False
        self.queue = MemoryQueue(Evictor(account, table), self._evict)
        self.loader = Loader(self.queue, probe)
        self._table = table
        self._registry = registry
        self._arrivals = 0

    # ── getting hold of a model ──────────────────────────────────────────────────────────────

    def lease(self, name: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Hold a model, by id or alias, inside of the ``async with``."""
        return _Lease(self, name)

    async def ready(self, name: str) -> ModelEntry:
        """The entry of an id or alias, ready now: it may be unloaded after the next ``await``."""
        entry = self._table.find(name)
        self.home.settle()
        if entry.usable:
            return entry
        self._arrivals += 1
        arrival = self._arrivals
        entry.join(arrival)
        try:
            while not entry.usable:
                if entry.retired:
                    successor = self._table.find(name)
                    entry.waiting_callers -= 1
                    entry = successor
                    entry.join(arrival)
                else:
                    await self._become_ready(entry)
        finally:
            entry.waiting_callers -= 1
            self.queue.wake()
        return entry

    def release(self, entry: ModelEntry, *, dead: bool) -> None:
        """Give a lease back. ``dead``: the model's engine has ended under it."""
        entry.release()
        if dead and entry.usable:
            self.bury(entry)
        elif entry.leases == 0:
            self.start_idle_timer(entry, just_used=True)
            if self.queue.waiting:
                self.queue.wake()

    def bury(self, entry: ModelEntry) -> None:
        """Its engine has ended: unload it, as soon as all who hold it have been told."""
        if entry.usable:
            self._begin_unload(entry, "its engine has ended; the next request loads it anew")

    def start_idle_timer(self, entry: ModelEntry, *, just_used: bool = False) -> None:
        """Begin to count where nobody holds the model and it does not stay forever."""
        entry.cancel_idle_timer()
        if entry.keep_alive_s is None or not entry.usable or entry.leases or self.closed:
            return
        if entry.keep_alive_s == 0:
            if just_used and not entry.waiting_callers:
                self._begin_unload(entry, "keep_alive is 0")
            return
        loop = asyncio.get_running_loop()
        entry.idle_timer = loop.call_later(entry.keep_alive_s, self._expire, entry)

    def _expire(self, entry: ModelEntry) -> None:
        entry.idle_timer = None
        if entry.usable and not entry.leases and not entry.waiting_callers and not self.closed:
            self._begin_unload(entry, f"nobody used it for {entry.keep_alive_s:g} s (keep_alive)")

    async def candidates(self, entry: ModelEntry) -> list[Candidate]:
        """The model's variants and what they need, in order of preference."""
        return await self.loader.candidates(entry, self._registry())

    async def fits_only_alone(self, entry: ModelEntry) -> bool:
        """Whether the model could be loaded, but not beside those that are loaded now."""
        needs = [c.need for c in await self.candidates(entry) if c.error is None]
        evictor = self.queue.evictor
        return any(evictor.can_ever_fit(entry, need) for need in needs) and all(
            evictor.account.lacking(need) for need in needs
        )

    async def _become_ready(self, entry: ModelEntry) -> None:
        """Take part in the load that goes on, or begin one. Then look at the state again."""
        if self.closed:
            raise _closed(entry)
        task = entry.task
        if task is None or task.done():
            self._change_state(entry, "loading", "a request needs it")
            task = self._start(entry, self._load(entry))
        unloading = entry.state == "draining"
        try:
            await asyncio.shield(task)
        except EngineRoomError as error:
            without_frames(error)
            if not unloading:
                raise own_copy(error) from error.__cause__  # it is the entry's, and others'
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not task.cancelled() or (current is not None and current.cancelling()):
                raise  # we were cancelled, not the load before it had begun

    async def _load(self, entry: ModelEntry) -> None:
        try:
            deadline = asyncio.get_running_loop().time() + entry.load_timeout_s
            await self.loader.load(entry, await self.candidates(entry), deadline)
        except NobodyWaitsError:
            self._change_state(entry, "unloaded", "nobody waits for it any more")
            return
        except BaseException as error:
            if passes(error) or _is_stopped():
                self._change_state(entry, "unloaded", "its load was stopped")
                if _is_stopped():
                    if entry.retired:
                        return  # it was us; who waits for it goes on to what replaces it
                    if self.closed:
                        raise _closed(entry) from error
                    raise asyncio.CancelledError from error  # whatever the handler made of it
                raise
            typed = _typed(entry, error)
            self._note_failure(entry, typed)
            raise typed from typed.__cause__
        entry.error = None
        entry.ready_at = time.monotonic()
        self._change_state(entry, "ready", "it was loaded")
        duration = entry.load_duration_s or 0.0
        logger.info("model %r is ready after %.1f s", entry.config.model_id, duration)
        self._registry().notify(
            "engineroom_model_loaded", loaded_model=entry.loaded, duration_s=duration
        )
        self.start_idle_timer(entry)

    # ── letting go of a model ────────────────────────────────────────────────────────────────

    async def unload(self, entry: ModelEntry, timeout_s: float | None = None) -> None:
        """Unload it as soon as nobody holds it. One that is not loaded stays so.

        :raises ResourceNotAvailableError: it was still held after ``timeout_s``; it goes on.
        """
        self.home.check()
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
            self._change_state(entry, "draining", "it was asked for")
            await asyncio.shield(self._start(entry, self._unload(entry, timeout_s)))

    def retire(self, entry: ModelEntry) -> None:
        """Its place in the table is taken: stop its load, or unload it after its last request."""
        entry.retired = True
        self._table.retired.add(entry)
        if entry.state == "loading" and entry.task is not None:
            entry.task.cancel()
        elif entry.usable:
            self._begin_unload(entry, "the deployment has replaced or removed it")
        elif entry.task is None or entry.task.done():
            self._table.retired.discard(entry)

    async def close(self) -> None:
        """Stop the loads, unload everything, and load nothing any more.

        :raises EngineRoomError: the first failure; the other models are unloaded nevertheless.
        """
        self.home.check()
        self.closed = True
        self.queue.close(ResourceNotAvailableError("the model manager is closed"))
        failed: EngineRoomError | None = None
        for entry in self._table:
            entry.cancel_idle_timer()
            if entry.state == "loading" and entry.task is not None:
                entry.task.cancel()
                await asyncio.wait([entry.task])
            try:
                await self.unload(entry)
            except EngineRoomError as error:
                logger.error("unloading %r failed: %s", entry.config.model_id, error)
                failed = failed or without_frames(error)
        if failed is not None:
            raise own_copy(failed)

    def _evict(self, entry: ModelEntry, reason: str) -> None:
        entry.eviction = asyncio.get_running_loop().create_future()
        self._begin_unload(entry, reason)

    def _begin_unload(self, entry: ModelEntry, reason: str) -> None:
        """Unload it as soon as nobody holds it; nobody waits for that."""
        logger.info("model %r is unloaded: %s", entry.config.model_id, reason)
        self._change_state(entry, "draining", reason)
        _ = self._start(entry, self._unload(entry, None))

    async def _unload(self, entry: ModelEntry, timeout_s: float | None) -> None:
        entry.cancel_idle_timer()
        if entry.leases:
            try:
                await self._drain(entry, timeout_s)
            except BaseException as error:
                self._change_state(entry, "ready", str(error) or type(error).__name__)
                raise
        entry.eviction = None
        loaded = entry.loaded
        started = time.perf_counter()
        try:
            not_returned = await self.loader.unload(entry)
        except BaseException as error:
            if passes(error):
                self._change_state(entry, "unloaded", "its unload was stopped")
                raise
            typed = _typed(entry, error)
            self._note_failure(entry, typed)
            raise typed from typed.__cause__
        duration = time.perf_counter() - started
        self._change_state(entry, "unloaded", "it was unloaded")
        logger.info("model %r was unloaded in %.1f s", entry.config.model_id, duration)
        self._registry().notify(
            "engineroom_model_unloaded",
            loaded_model=loaded,
            duration_s=duration,
            not_returned=not_returned,
        )

    async def _drain(self, entry: ModelEntry, timeout_s: float | None) -> None:
        """Wait for the last lease; or until an eviction turns out not to be needed."""
        drained = entry.eviction or asyncio.get_running_loop().create_future()
        entry.drained.append(drained)
        try:
            async with asyncio.timeout(timeout_s):
                await drained
        except TimeoutError as error:
            raise _still_held(entry, timeout_s) from error
        finally:
            entry.eviction = None
            if drained in entry.drained:
                entry.drained.remove(drained)

    # ── states and tasks ─────────────────────────────────────────────────────────────────────

    def _change_state(self, entry: ModelEntry, state: ModelState, reason: str) -> None:
        old, entry.state = entry.state, state
        model_id = entry.config.model_id
        logger.debug("model %r: %s → %s (%s)", model_id, old, state, reason)
        self._registry().notify(
            "engineroom_model_state_changed",
            model_id=model_id,
            old_state=old,
            new_state=state,
            reason=reason,
        )

    def _note_failure(self, entry: ModelEntry, error: EngineRoomError) -> None:
        """Keep what a load or an unload failed with; its frames hold what was half loaded."""
        entry.error = own_copy(without_frames(error))
        self._change_state(entry, "failed", error.message)

    def _start(self, entry: ModelEntry, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` to its end whatever becomes of the caller."""
        task = asyncio.get_running_loop().create_task(work)
        entry.task = task
        task.add_done_callback(partial(self._ended, entry))
        return task

    def _ended(self, entry: ModelEntry, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            if (error := task.exception()) is not None:  # all who waited may have gone
                without_frames(error)
        elif entry.task is task and entry.state == "loading":  # it had not even begun
            self._change_state(entry, "unloaded", "its load was stopped")
        if entry.task is task:
            entry.task = None
            if entry.retired and entry.usable:
                self._begin_unload(entry, "the deployment has replaced or removed it")
            elif entry.retired:
                self._table.retired.discard(entry)
        self.queue.wake()


@dataclass(slots=True, eq=False)
class _Lease(AbstractAsyncContextManager[LoadedModel]):
    lifecycle: Lifecycle
    name: str
    entry: ModelEntry | None = None

    async def __aenter__(self) -> LoadedModel:
        self.entry = entry = await self.lifecycle.ready(self.name)
        entry.leases += 1
        entry.cancel_idle_timer()
        assert entry.loaded is not None
        return entry.loaded

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        entry, self.entry = self.entry, None
        if entry is not None:
            self.lifecycle.release(entry, dead=isinstance(error, EngineDeadError))


def _is_stopped() -> bool:
    """Whether somebody stops the load that the current task does."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _typed(entry: ModelEntry, error: BaseException) -> EngineRoomError:
    """What a load or unload failed with, as its callers are told."""
    model_id = entry.config.model_id
    if isinstance(error, EngineRoomError):
        return error.with_context(model_id=model_id)
    log_failure(logger, error, "model %r: loading or unloading it failed", model_id)
    return failure(error, model_id=model_id)


def _closed(entry: ModelEntry) -> ResourceNotAvailableError:
    model_id = entry.config.model_id
    return ResourceNotAvailableError(
        f"the model manager is closed; model {model_id!r} is not loaded", model_id=model_id
    )


def _still_held(entry: ModelEntry, timeout_s: float | None) -> ResourceNotAvailableError:
    return ResourceNotAvailableError(
        f"model {entry.config.model_id!r} was still held by {entry.leases} requests "
        f"after {timeout_s} s; it was not unloaded; wait for them or cancel them",
        model_id=entry.config.model_id,
    )
