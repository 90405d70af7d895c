"""The threads that prompts are read in: few, owned, and shared out fairly.

A chat template takes up to two seconds of the CPU, and a tokenizer may. That is no work for the
event loop, nor for its own pool of threads, which everybody else uses: a few such prompts would
hold up unloads, imports and other models. Here are at most :data:`MOST_THREADS`, because those that
run Python's code take turns with the event loop. They begin with the first prompt and end when
nobody needs them.

Each model has a :class:`PromptLane`. Neither a model nor a key can have all threads. Those that
wait go in turn, key by key, and of one key's the short ones soon overtake the long ones.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from engineroom.border import tame
from engineroom.errors import QueueFullError, ResourceNotAvailableError
from engineroom.forks import renew_in_child
from engineroom.prompts.work import Reading

__all__ = ["MOST_THREADS", "PromptLane", "settle"]

MOST_THREADS: Final = 4
_MOST_OF_LANE: Final = 3
_MOST_OF_KEY: Final = 2
"""Threads that a model, and one key of it, may have at one time."""
_MOST_WAITING: Final = 4096
"""Prompts that may wait for one model; a service has less by default, whatever they wait for."""
_IDLE_S: Final = 5.0
_CHARS_A_PLACE: Final = 1000
"""A prompt is overtaken by one that came later for each so many of its characters."""

_T = TypeVar("_T")


def settle(future: asyncio.Future[Any], error: Exception | None, value: Any) -> None:
    """Give a future what came of a call, unless nobody waits for it. On its event loop."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


class _Work(Generic[_T]):
    """One call that waits or runs."""

    __slots__ = ("_call", "_context", "_loop", "_most", "future", "rank", "stopped")

    def __init__(self, call: Callable[[], _T], most: int | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._call: Callable[[], _T] | None = call
        self._most = most
        self.future: asyncio.Future[_T] = self._loop.create_future()
        self.rank = 0
        self.stopped = False

    def __lt__(self, other: _Work[Any]) -> bool:
        return self.rank < other.rank

    def run(self) -> None:
        """Call it, and let its event loop know. In a thread."""
        call, self._call = self._call, None
        assert call is not None
        error: Exception | None = None
        value: _T | None = None
        try:
            with Reading(self._is_stopped, self._most):
                value = self._context.run(tame(call))
        except Exception as raised:  # noqa: BLE001 - raised again where it is awaited
            error = raised
        self.tell(error, value)
        # A traceback refers to its frames, of which this is one: a refused prompt would live on.
        del self, call, error, value

    def tell(self, error: Exception | None, value: _T | None = None) -> None:
        """Let whoever waits know what came of it. From any thread."""
        try:
            self._loop.call_soon_threadsafe(settle, self.future, error, value)
        except RuntimeError:  # the loop is closed: nobody waits
            pass

    def _is_stopped(self) -> bool:
        return self.stopped


@dataclass(eq=False, slots=True)
class _Party:
    """What one key wants of one model."""

    lane: PromptLane
    key: str | None
    waiting: list[_Work[Any]] = field(default_factory=list)
    running: set[_Work[Any]] = field(default_factory=set)

    @property
    def may_run(self) -> bool:
        """Whether one more of its may run."""
        return self.lane.running < _MOST_OF_LANE and len(self.running) < _MOST_OF_KEY

    def take(self) -> _Work[Any]:
        """The first that waits, which runs from here on."""
        work = heapq.heappop(self.waiting)
        self.running.add(work)
        self.lane.running += 1
        return work


class _Thread(threading.Thread):
    """One of the threads, and what it does."""

    def __init__(self, threads: _Threads) -> None:
        super().__init__(name="engineroom-prompts", daemon=True)
        self.wake = threading.Condition(threads.lock)
        self.retired = False
        """It is to end instead of taking more."""
        self.taken: tuple[_Party, _Work[Any]] | None = None
        self._threads = threads

    def run(self) -> None:
        """Take work until there has been none for a while."""
        while self._threads.take(self):
            assert self.taken is not None
            self.taken[1].run()


class _Threads:
    """The threads of all lanes. ``lock`` guards everything here and in the lanes."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Have no thread yet, or none any more: a process that is forked has none of them."""
        self.lock = threading.Lock()
        self.ended = threading.Condition(self.lock)
        """Notified when something of a lane that is being closed has ended."""
        self.parties: deque[_Party] = deque()
        """Those of which something waits, in turn."""
        self._count = 0
        self._idle: list[_Thread] = []

    def need_one(self) -> None:
        """See to it that somebody takes what was added. With the lock."""
        if self._idle:
            self._idle.pop().wake.notify()
        elif self._count < MOST_THREADS:
            try:
                _Thread(self).start()
            except RuntimeError:  # the system gives no more: those that there are will do
                if not self._count:
                    raise
            else:
                self._count += 1

    def retire_idle(self) -> list[_Thread]:
        """Have the threads that have nothing to do end. With the lock."""
        retired, self._idle = self._idle, []
        for thread in retired:
            thread.retired = True
            thread.wake.notify()
        return retired

    def take(self, thread: _Thread) -> bool:
        """Put down what the thread has done, and give it the next.

        :returns: whether there is one; if not, the thread has to end.
        """
        with self.lock:
            if thread.taken is not None:
                thread.taken[0].lane.end(*thread.taken)
                thread.taken = None
            while (party := self._next()) is None:
                self._idle.append(thread)
                thread.wake.wait(_IDLE_S)
                if thread in self._idle:  # nobody needed it
                    self._idle.remove(thread)
                    thread.retired = True
                if thread.retired:
                    self._count -= 1
                    return False
            thread.taken = party, party.take()
            return True

    def _next(self) -> _Party | None:
        """Whose turn it is; it goes to the end of those that wait, or is none of them any more."""
        for _ in range(len(self.parties)):
            party = self.parties.popleft()
            if not party.may_run or len(party.waiting) > 1:
                self.parties.append(party)
            if party.may_run:
                return party
        return None


_THREADS: Final = _Threads()
renew_in_child(_THREADS.begin)


class PromptLane:
    """One model's share of the threads, for any number of event loops."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Have no work."""
        self.running = 0
        """Its work that a thread has taken. Changed by the threads alone, with their lock."""
        self._closed = False
        self._parties: dict[str | None, _Party] = {}
        self._count = 0

    async def run(
        self,
        call: Callable[[], _T],
        *,
        key: str | None = None,
        size: int = 0,
        most: int | None = None,
    ) -> _T:
        """Call it in a thread. Cancelling takes it out of the queue, or tells it to stop.

        :param key: name of the key whose it is; keys take turns.
        :param size: characters that there are to read, about.
        :param most: tokens that a text may come to; see :func:`.work.expect_tokens`.
        :raises QueueFullError: too many wait.
        :raises ResourceNotAvailableError: the model is being unloaded.
        :raises InferenceError: the call raised what is no ``Exception``.
        """
        work = _Work(call, most)
        party = self._add(work, key, size)
        try:
            return await work.future
        except asyncio.CancelledError:
            self._drop(party, work)
            raise
        finally:
            del work  # of whose future an error may come, whose traceback refers to this frame

    def close(self) -> None:
        """Refuse what comes, drop what waits, stop what runs, and wait for the end of that.

        Blocks: a template ends at once, a tokenizer when it is through. May be called again.
        """
        with _THREADS.lock:
            self._closed = True
            dropped = []
            for party in list(self._parties.values()):
                dropped += party.waiting
                for work in party.running:
                    work.stopped = True
                if party.waiting:
                    party.waiting = []
                    _THREADS.parties.remove(party)
                    self._forget_if_idle(party)
            _THREADS.ended.wait_for(lambda: not self.running)
            retired = _THREADS.retire_idle()
        for work in dropped:
            work.tell(_unloading())
        for thread in retired:
            thread.join()

    def end(self, party: _Party, work: _Work[Any]) -> None:
        """A thread is through with it. With the lock."""
        self.running -= 1
        party.running.discard(work)
        self._forget_if_idle(party)
        if self._closed:
            _THREADS.ended.notify_all()

    def _add(self, work: _Work[Any], key: str | None, size: int) -> _Party:
        with _THREADS.lock:
            if self._closed:
                raise _unloading()
            waiting = sum(len(party.waiting) for party in self._parties.values())
            if waiting >= _MOST_WAITING:
                raise QueueFullError(
                    f"{waiting} prompts wait to be read for this model already, which is the "
                    "bound; send it again later"
                )
            party = self._parties.get(key)
            if party is None:
                party = self._parties[key] = _Party(self, key)
            self._count += 1
            work.rank = self._count + size // _CHARS_A_PLACE
            heapq.heappush(party.waiting, work)
            if len(party.waiting) == 1:
                _THREADS.parties.append(party)
            _THREADS.need_one()
        return party

    def _drop(self, party: _Party, work: _Work[Any]) -> None:
        with _THREADS.lock:
            work.stopped = True
            if work in party.waiting:
                party.waiting.remove(work)
                heapq.heapify(party.waiting)
                if not party.waiting:
                    _THREADS.parties.remove(party)
                    self._forget_if_idle(party)

    def _forget_if_idle(self, party: _Party) -> None:
        if not party.waiting and not party.running:
            self._parties.pop(party.key, None)


def _unloading() -> ResourceNotAvailableError:
    return ResourceNotAvailableError("the model is being unloaded; send it again")
