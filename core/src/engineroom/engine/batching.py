"""What every engine that batches does the same: a queue, slots, turns, cancelling, ending.

A runtime that decodes in this process subclasses :class:`BatchingEngine` and writes one method,
:meth:`~BatchingEngine.step`: compute one decoding step of all that is in ``running``. The engine
takes its turns on a thread (:class:`~engineroom.DecodeLoop`); requests come in from any event loop
and what they get goes back through their :class:`~engineroom.Mailbox`, once a step for all of
them.

* The queue is bounded; what does not fit is refused at once. Where it is full of one key's
  requests, that one's last makes room for another's.
* Waiting requests go by priority, into which their waiting grows, and key by key
  (:class:`~engineroom.WaitingLine`).
* Cancelling takes effect before the next step, wherever the request is.
* Whatever a step lets out ends the engine, and no other one on its thread: its requests fail
  with ``EngineDeadError``, and so does whatever is sent afterwards.
"""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from engineroom.border import get_logger, log_failure, own_copy, without_frames, words
from engineroom.engine.base import Engine
from engineroom.engine.decode_loop import DecodeLoop
from engineroom.errors import (
    EngineDeadError,
    EngineRoomError,
    QueueFullError,
    ResourceNotAvailableError,
)
from engineroom.forks import Home
from engineroom.generation.mailbox import Mailbox, deliver
from engineroom.generation.steps import TokenStep
from engineroom.handlers.base import HandlerHealth
from engineroom.telemetry import RequestLogger
from engineroom.turns import WaitingLine, turn_of

__all__ = ["BatchingEngine", "EngineTask"]

logger = get_logger("engineroom.batching")

_Item = tuple[Mailbox, TokenStep | EngineRoomError]


@dataclass(eq=False, slots=True, kw_only=True)
class EngineTask:
    """One request on its way through an engine. Runtimes add what they need.

    Made on the request's event loop, where its steps are taken from ``mailbox``.

    :param log: where the request's records go.
    :param priority: waiting requests of a higher one go first, unless they came so much later
        that the others' waiting weighs more; see :func:`~engineroom.turn_of`.
    """

    log: RequestLogger
    priority: int = 0
    mailbox: Mailbox = field(default_factory=Mailbox)
    order: int = 0
    """When it came, among the engine's requests; set by :meth:`BatchingEngine.submit`."""
    rank: tuple[float, int] = (0.0, 0)
    """Who goes first: the smallest, by turn and then by order. It never changes, so that a request
    that gave way comes again before all that came long after it. Set with ``order``."""
    cancelled: bool = False
    """Nobody waits for it any more."""
    done: bool = False
    """It has left the engine."""

    @property
    def owner(self) -> str:
        """Name of the key that its request came with; those of one name wait behind each other."""
        return self.log.key_name


_T = TypeVar("_T", bound=EngineTask)


class BatchingEngine(Engine, Generic[_T]):
    """Many requests through one model, a step at a time.

    :param name: the model's name, for messages.
    :param loop: where it takes its turns: the one for the CPU, or one of its own.
    :param max_running: requests that are decoded at one time.
    :param max_queue: requests that wait beyond those; more are refused at once.
    """

    def __init__(self, name: str, loop: DecodeLoop, *, max_running: int, max_queue: int) -> None:
        self.name = name
        self._loop = loop
        self._home = Home(f"the engine of model {name!r}")
        self._max_running = max_running
        self._max_queue = max_queue
        # Guarded by the loop's condition; ``running`` is changed by the thread alone.
        self._incoming: list[_T] = []
        self._cancelling = False  # whether there is one to be taken out
        self._alone: _T | None = None
        self._interrupting = False  # the step, or the next one
        self._closing = False
        self._ended = False
        self._dead: EngineDeadError | None = None
        self._orders = itertools.count()
        self.waiting: WaitingLine[_T] = WaitingLine()
        """Requests that wait, on the thread; to be changed by :meth:`wait_again` only."""
        self.running: list[_T] = []
        """Requests that hold a slot, in the order in which they got it."""

    # ── what a runtime writes ────────────────────────────────────────────────────────────────

    @abstractmethod
    def step(self) -> None:
        """Compute one step of what is in ``running``, and :meth:`hand_over` what it gave.

        Requests that end are taken out with :meth:`leave`. What fails should fail its requests
        (:meth:`fail`) and return; an exception that gets out ends the engine.
        """

    def can_step(self) -> bool:
        """Whether :meth:`step` has anything to do for those that run. By default always.

        A runtime that computes in threads of its own says no until one of them has something for
        the engine, and then calls :meth:`wake`. Asked before each turn: must not block.
        """
        return True

    def may_start(self, task: _T) -> bool:
        """Whether the first of those that wait can be given a slot now; one is free.

        Always true for a request that would be alone: else nothing would ever go on.
        """
        return True

    def started(self, task: _T) -> None:
        """The request was given a slot: give it what it needs. On the thread, and not under the
        loop's condition: it may take its time.
        """

    def released(self, task: _T) -> None:
        """The request has left ``running``: take back what :meth:`started` gave."""

    def interrupt(self, on: bool) -> None:
        """Abort the step that is being computed, or (``False``) let the next ones through.

        Called from any thread under the loop's condition: must not block. Where a runtime can
        do this, cancelling a request that is alone, and closing, need not wait for the step.
        """

    def shut(self) -> None:
        """Free everything; called once, on the thread, after the last step."""

    def cache_usage(self) -> float | None:
        """Used share of the key/value cache, 0 to 1. Called under the loop's condition."""
        return None

    # ── for asyncio ──────────────────────────────────────────────────────────────────────────

    def submit(self, task: _T) -> _T:
        """Queue a request; its steps come through ``task.mailbox``.

        :raises QueueFullError: ``max_queue`` requests are waiting already, and no other key has
            more of them than this one's.
        :raises EngineDeadError: the engine has died.
        :raises ResourceNotAvailableError: the engine is being closed.
        :raises ConfigurationError: it belongs to the process that this one was forked from.
        """
        self._home.check()
        with self._loop.condition:
            if self._dead is not None:
                raise own_copy(self._dead)
            if self._closing:
                raise ResourceNotAvailableError("the model is being unloaded; send it again")
            waiting = len(self.waiting) + len(self._incoming)
            free = self._max_running - len(self.running)
            leaving = self._make_room(task, waiting + 1 - self._max_queue - max(0, free))
            task.order = next(self._orders)
            task.rank = (turn_of(task.priority, time.monotonic()), task.order)
            self._incoming.append(task)
            self._loop.condition.notify_all()
        deliver((other.mailbox, self._full(waiting)) for other in leaving)
        return task

    def _make_room(self, task: _T, missing: int) -> list[_T]:
        """Take those out of a full queue who have to leave it for this one."""
        if missing <= 0:
            return []
        self._sort_in()
        leaving = self.waiting.yield_to(task, missing)
        if leaving is None:
            raise self._full(len(self.waiting))
        for other in leaving:
            self.waiting.remove(other)
            other.done = True
        return leaving

    def _full(self, waiting: int) -> QueueFullError:
        return QueueFullError(
            f"{waiting} requests wait for model {self.name!r} already, which is the "
            f"bound (option max_queue={self._max_queue}); send it again later"
        )

    def _sort_in(self) -> None:
        for task in self._incoming:
            self.waiting.add(task)
        self._incoming.clear()

    def cancel(self, task: _T) -> None:
        """Stop a request's work and give its slot back. Harmless after its end."""
        with self._loop.condition:
            task.cancelled = True
            if task.done:
                return
            if task in self._incoming:  # its place in the queue is free at once
                self._incoming.remove(task)
                task.done = True
            elif task in self.waiting:
                self.waiting.remove(task)
                task.done = True
            if not task.done:
                self._cancelling = True
                if self._alone is task:
                    self._interrupt(True)
                self._loop.condition.notify_all()

    async def run(self, task: _T) -> TokenStep:
        """Queue a request whose first step is its last, and wait for that.

        :raises EngineRoomError: as :meth:`submit` raises it, or what ended the request.
        """
        self.submit(task)
        try:
            return await task.mailbox.get()
        finally:
            self.cancel(task)

    def health(self) -> HandlerHealth:
        """Requests running and waiting, and how full the cache is."""
        with self._loop.condition:
            stuck = self._loop.stuck()
            return HandlerHealth(
                ok=self._dead is None and not self._closing and not stuck,
                detail=self._dead.message if self._dead else stuck,
                dead=self._dead is not None,
                num_requests_running=len(self.running),
                num_requests_waiting=len(self.waiting) + len(self._incoming),
                kv_cache_usage=None if self._ended else self.cache_usage(),
            )

    def open(self) -> None:
        """Begin to take turns; to be called once, when the engine is ready."""
        self._home.settle()
        self._loop.add(self)

    def close(self) -> None:
        """End the engine and free what it has. Blocks; requests still running fail.

        :raises ConfigurationError: it belongs to the process that this one was forked from.
        """
        self._home.check()
        with self._loop.condition:
            self._closing = True
            if not self._ended:
                self._interrupt(True)
            self._loop.condition.notify_all()
        self._loop.wait_for_end(self)

    def wake(self) -> None:
        """Ask :meth:`can_step` again. From any thread."""
        with self._loop.condition:
            self._loop.condition.notify_all()

    # ── for steps, on the thread ─────────────────────────────────────────────────────────────

    def hand_over(self, items: Iterable[_Item]) -> None:
        """Give requests their steps, or the errors that end them: once a step, for all."""
        deliver(items)

    def leave(self, task: _T) -> None:
        """The request has ended; its slot is free."""
        task.done = True
        self._release(task)

    def wait_again(self, task: _T) -> None:
        """The request gives its slot back, and goes on when there is room again."""
        self._release(task)
        with self._loop.condition:
            self.waiting.put_back(task)

    def fail(self, tasks: Iterable[_T], error: EngineRoomError) -> None:
        """End requests with an error; the engine goes on. Each gets an error of its own.

        Log it before, with its causes: it loses its frames here.
        """
        without_frames(error)
        failed = list(tasks)
        for task in failed:
            self.leave(task)
        deliver((task.mailbox, own_copy(error)) for task in failed if not task.cancelled)

    # ── turns ────────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        if self._incoming or self._closing or self._cancelling:
            return True
        if self.waiting and len(self.running) < self._max_running:
            return True
        try:
            return bool(self.running) and self.can_step()
        except BaseException:  # noqa: BLE001 - the turn asks again, and ends the engine
            return True

    def turn(self) -> bool:
        """One step, or the end; see :class:`~engineroom.engine.decode_loop.Worker`."""
        failure: EngineRoomError
        try:
            if self._take_in():
                if self.running and self.can_step():
                    self.step()
                return True
            failure = ResourceNotAvailableError(
                f"model {self.name!r} was unloaded while the request ran; send it again"
            )
        except BaseException as error:  # noqa: BLE001 - other models take turns on this thread
            log_failure(logger, error, "the engine of model %r has died", self.name)
            failure = self._death(words(error), error)
        self._end(failure)
        return False

    def lost(self, why: str) -> None:
        """The thread has ended under it: tell its requests, and free nothing. See ``Worker``."""
        self._end(self._death(why), free=False)

    def _death(self, why: str, cause: BaseException | None = None) -> EngineDeadError:
        dead = EngineDeadError(
            f"the engine of model {self.name!r} has died: {why}; unload the model and load it again"
        )
        dead.__cause__ = None if cause is None else without_frames(cause)
        return dead

    def _interrupt(self, on: bool) -> None:
        self._interrupting = on
        try:
            self.interrupt(on)
        except BaseException as error:  # noqa: BLE001 - then the step is waited for
            log_failure(logger, error, "a step of model %r could not be aborted", self.name)

    def _take_in(self) -> bool:
        """Drop what was cancelled, start what can start. False: the engine is to end."""
        while True:
            with self._loop.condition:
                if self._closing:
                    return False
                if self._interrupting:
                    self._interrupt(False)
                if self._incoming:
                    self._sort_in()
                if self._cancelling:
                    self._drop_cancelled()
                task = self._admit()
                if task is None:
                    self._alone = self.running[0] if len(self.running) == 1 else None
                    return True
            self.started(task)  # may take its time: nobody else waits for it

    def _drop_cancelled(self) -> None:
        self._cancelling = False
        for task in [t for t in self.waiting if t.cancelled]:
            self.waiting.remove(task)
            task.done = True
        for task in [t for t in self.running if t.cancelled]:
            self.leave(task)

    def _admit(self) -> _T | None:
        """The next request that can have a slot, in ``running`` by now."""
        if not self.waiting or len(self.running) >= self._max_running:
            return None
        task = self.waiting.heads()[0]
        if self.running and not self.may_start(task):
            return None
        self.waiting.serve(task, time.monotonic())
        self.running.append(task)
        return task

    def _release(self, task: _T) -> None:
        self.running.remove(task)
        if self._alone is task:  # an engine at rest would keep it, and with it its prompt
            with self._loop.condition:
                self._alone = None
        self.released(task)

    def _end(self, failure: EngineRoomError, *, free: bool = True) -> None:
        """Free everything, and tell the requests that are left."""
        with self._loop.condition:
            if self._ended:
                return
            if isinstance(failure, EngineDeadError):
                self._dead = failure
            self._closing = self._ended = True
            left = [*self.running, *self.waiting, *self._incoming]
            self.running, self.waiting, self._incoming = [], WaitingLine(), []
            self._alone = None
            for task in left:
                task.done = True
        try:
            if free:
                self.shut()
        except BaseException as error:  # noqa: BLE001 - what has died may fail at anything
            log_failure(
                logger, error, "the engine of model %r could not free what it had", self.name
            )
        deliver((task.mailbox, own_copy(failure)) for task in left if not task.cancelled)
