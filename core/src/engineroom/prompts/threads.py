"""The threads that prompts are read in: few, owned, and shared out fairly.

A chat template takes up to two seconds of the CPU, and a tokenizer may. That is no work for the
event loop, nor for its own pool of threads, which everybody else uses: a few such prompts would
hold up unloads, imports and other models. Here are at most :data:`MOST_THREADS`, because those that
run Python's code take turns with the event loop. They begin with the first prompt and end when
nobody needs them. One in which a prompt does not come to an end is given up: its request is told,
and another thread takes its place.

Each model has a :class:`PromptLane`. Neither a model nor a key can have all threads. Those that
wait go in turn, key by key, and of one key's the short ones soon overtake the long ones.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from engineroom.border import get_logger, tame
from engineroom.errors import InferenceError, QueueFullError, ResourceNotAvailableError
from engineroom.forks import renew_in_child
from engineroom.hangs import STUCK_VARIABLE, stuck_after_s
from engineroom.prompts.work import Reading, take_turn_from

__all__ = ["MOST_THREADS", "PromptLane", "settle"]

logger = get_logger("engineroom.prompts")

MOST_THREADS: Final = 4
_MOST_OF_LANE: Final = 3
_MOST_OF_KEY: Final = 2
"""Threads that a model, and one key of it, may have at one time."""
_MOST_WAITING: Final = 4096
"""Prompts that may wait for one model; a service has less by default, whatever they wait for."""
_IDLE_S: Final = 5.0
_LOOK_S: Final = 1.0
"""Seconds after which it is looked whether a prompt is stuck."""
_STUCK: Final = (
    "reading a prompt has not come to an end after %g s, and is given up (%s says after how long); "
    "should the model stay unwell, restart the process"
)
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

    __slots__ = ("_call", "_context", "_loop", "_most", "began", "future", "rank", "stopped")

    def __init__(self, call: Callable[[], _T], most: int | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._call: Callable[[], _T] | None = call
        self._most = most
        self.future: asyncio.Future[_T] = self._loop.create_future()
        self.rank = 0
        self.began = 0.0
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
        work.began = time.monotonic()
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
        self.given_up = False
        """It is stuck, and another one has its place."""
        self.taken: tuple[_Party, _Work[Any]] | None = None
        self._threads = threads

    def run(self) -> None:
        """Take work until there has been none for a while."""
        while self._threads.take(self):
            assert self.taken is not None
            self.taken[1].run()
        if self.given_up:
            logger.warning("a prompt that was given up has come to an end")


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
        self._busy: set[_Thread] = set()
        self._gone = threading.Condition(self.lock)
        """Notified when there is no thread any more."""
        self._watched = False

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
            if not self._watched:
                watch = threading.Thread(target=self._watch, daemon=True)
                watch.name = "engineroom-prompts-watch"
                with suppress(RuntimeError):  # then nobody watches, for now
                    watch.start()
                    self._watched = True

    def _watch(self) -> None:
        """Give up the threads that are stuck, as long as there are any. In a thread."""
        while True:
            with self.lock:
                self._gone.wait_for(lambda: not self._count, _LOOK_S)
                since = time.monotonic() - stuck_after_s()
                stuck = [t for t in self._busy if t.taken is not None and t.taken[1].began <= since]
                for thread in stuck:
                    self._give_up(thread)
                self._watched = goes_on = self._count > 0
            for _ in stuck:
                logger.error(_STUCK, stuck_after_s(), STUCK_VARIABLE)
            if not goes_on:
                return

    def _give_up(self, thread: _Thread) -> None:
        """Have another one in place of a thread that is stuck. With the lock."""
        assert thread.taken is not None and thread.ident is not None
        party, work = thread.taken
        thread.given_up = True
        self._busy.remove(thread)
        self._count -= 1
        take_turn_from(thread.ident)
        party.lane.give_up(party, work)
        if self.parties:
            with suppress(RuntimeError):  # whoever comes next tries again
                self.need_one()

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
                self._busy.discard(thread)
            if thread.given_up:
                return False
            while (party := self._next()) is None:
                self._idle.append(thread)
                thread.wake.wait(_IDLE_S)
                if thread in self._idle:  # nobody needed it
                    self._idle.remove(thread)
                    thread.retired = True
                if thread.retired:
                    self._count -= 1
                    if not self._count:
                        self._gone.notify()
                    return False
            thread.taken = party, party.take()
            self._busy.add(thread)
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
        self._stuck: set[_Work[Any]] = set()
        """What was given up, and has not come to an end since."""
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
        :raises InferenceError: the call raised what is no ``Exception``, or is stuck.
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

        Blocks: a template ends at once, a tokenizer when it is through; what is stuck may never
        end, and what it reads with cannot be freed. May be called again.
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
        self._stuck.discard(work)
        party.running.discard(work)
        self._forget_if_idle(party)
        if self._closed:
            _THREADS.ended.notify_all()

    def give_up(self, party: _Party, work: _Work[Any]) -> None:
        """It is stuck in a thread. With the lock.

        It counts as the model's until it ends, so that there is a bound to such threads, but not
        as its key's: that goes on.
        """
        work.stopped = True
        work.tell(
            InferenceError(
                f"reading the prompt has not come to an end after {stuck_after_s():g} s: the "
                "model's tokeniser, chat template or grammar is stuck in it"
            )
        )
        party.running.discard(work)
        self._stuck.add(work)
        if len(self._stuck) < _MOST_OF_LANE:
            return
        for other in list(self._parties.values()):
            for waiting in other.waiting:
                waiting.tell(self._all_stuck())
            if other.waiting:
                other.waiting = []
                _THREADS.parties.remove(other)
                self._forget_if_idle(other)

    def stuck(self) -> str:
        """What to tell of prompts that were given up; empty: none was, or they have ended."""
        with _THREADS.lock:
            count = len(self._stuck)
        if not count:
            return ""
        return (
            f"reading a prompt does not come to an end, in {count} of {_MOST_OF_LANE} threads of "
            "this model; should it never, restart the process"
        )

    def _all_stuck(self) -> ResourceNotAvailableError:
        return ResourceNotAvailableError(
            f"no prompt can be read for this model: {len(self._stuck)} do not come to an end, "
            "which is the bound; restart the process"
        )

    def _add(self, work: _Work[Any], key: str | None, size: int) -> _Party:
        with _THREADS.lock:
            if self._closed:
                raise _unloading()
            if len(self._stuck) >= _MOST_OF_LANE:
                raise self._all_stuck()
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
        idle = not party.waiting and not party.running
        if idle and self._parties.get(party.key) is party:
            del self._parties[party.key]


def _unloading() -> ResourceNotAvailableError:
    return ResourceNotAvailableError("the model is being unloaded; send it again")
