"""The threads that decode: one for all models on the CPU, one for each model on GPUs.

Runtimes that compute on the CPU bring teams of threads that spin at barriers, and OpenMP keeps
such a team for every thread that ever computed: two threads that decode on the same cores slow
each other down tenfold and more, and even an idle team costs. So there is one thread for the
CPU, whatever the runtimes, and the models take turns, a step each. What else computes, such as
a load that tries the model out, does it in :func:`run_in_new_thread`, whose team ends with it.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from engineroom.border import get_logger, log_failure, tame, words
from engineroom.engine.step_watch import StepWatch
from engineroom.forks import renew_in_child
from engineroom.memory.machine import Limits, cpu
from engineroom.prompts.threads import settle

__all__ = ["CPU_LOOP", "DecodeLoop", "Worker", "default_threads", "run_in_new_thread"]

logger = get_logger("engineroom.batching")

_T = TypeVar("_T")
_LOOK_S: Final = 1.0
"""Seconds after which it is noticed that a thread was ended from outside of Python, or is stuck."""


class Worker(Protocol):
    """What takes turns on a loop.

    It may have a method ``lost(why)``, which is called where the thread has ended under its turn:
    from another thread, which must not touch what that turn was computing with.
    """

    @property
    def has_work(self) -> bool:
        """Whether :meth:`turn` would do anything. Asked under the loop's ``condition``."""

    def turn(self) -> bool:
        """Do one step. Must not raise: the worker would be lost.

        :returns: ``False`` when the worker has ended, and cleaned up.
        """


class DecodeLoop:
    """A thread that lives as long as it has workers.

    Should it end in the midst of a turn, however that comes, the worker whose turn it was is lost,
    and the others go on in a new thread.

    :param name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.begin()

    def begin(self) -> None:
        """Have no worker yet, or none any more: a process that is forked has not their thread."""
        self.condition = threading.Condition()
        """Guards what workers share with other threads; notify it when there is work."""
        self._workers: list[Worker] = []
        self._thread: threading.Thread | None = None
        self._retired = threading.Event()
        self._turn: Worker | None = None  # whose it is
        self._steps = StepWatch(logger)

    def stuck(self) -> str:
        """What to tell of a turn that has been running for too long; empty: none has."""
        return self._steps.look()

    def add(self, worker: Worker) -> None:
        """Let a worker take its turns."""
        with self.condition:
            self._workers.append(worker)
            if self._thread is None:
                self._start()
            self.condition.notify_all()

    def wait_for_end(self, worker: Worker) -> None:
        """Block until the worker has ended, and the thread too if it was the last."""
        with self.condition:
            thread = self._thread
            self.condition.wait_for(lambda: worker not in self._workers)
            retired = thread is not self._thread
        while retired and thread is not None and _runs(thread):
            thread.join(_LOOK_S)

    def _start(self) -> None:
        self._retired = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()
        threading.Thread(
            target=self._watch,
            args=(self._thread, self._retired),
            name=f"{self._name}-watch",
            daemon=True,
        ).start()

    def _run(self) -> None:
        try:
            while self._take_turns():
                pass
        except BaseException as error:  # noqa: BLE001 - a defect of a worker, or raised from outside
            log_failure(logger, error, "the thread %s has ended in a turn", self._name)
            self._renew(threading.current_thread(), words(error))

    def _take_turns(self) -> bool:
        """One turn of each worker that has work. False: the last worker has ended."""
        with self.condition:
            while not (ready := [worker for worker in self._workers if self._has_work(worker)]):
                self.condition.wait()
        for worker in ready:
            self._turn = worker
            self._steps.begins(str(getattr(worker, "name", "?")))
            goes_on = worker.turn()
            self._turn = None
            self._steps.ends()
            if not goes_on and self._remove(worker):
                return False
        return True

    def _has_work(self, worker: Worker) -> bool:
        self._turn = worker
        has_work = worker.has_work
        self._turn = None
        return has_work

    def _remove(self, worker: Worker) -> bool:
        """Let a worker go.

        :returns: whether it was the last; then the thread ends, and the next worker gets another.
        """
        with self.condition:
            self._workers.remove(worker)
            if not self._workers:
                self._thread = None
                self._retired.set()
            self.condition.notify_all()
            return not self._workers

    def _watch(self, thread: threading.Thread, retired: threading.Event) -> None:
        """A library may end the thread behind Python's back, or keep it: nobody is told then."""
        while not retired.wait(_LOOK_S):
            self._steps.look()
            if not _runs(thread):
                why = "the thread that computed it has ended"
                logger.error("the thread %s has ended without a word", self._name)
                self._renew(thread, why)
                return

    def _renew(self, thread: threading.Thread, why: str) -> None:
        """The thread has ended: without the worker whose turn it was, the others go on."""
        with self.condition:
            if self._thread is not thread:
                return
            lost, self._turn, self._thread = self._turn, None, None
            self._steps.ends()
            self._retired.set()
            if lost in self._workers:
                self._workers.remove(lost)
            if self._workers:
                self._start()
            self.condition.notify_all()
        if (tell := getattr(lost, "lost", None)) is not None:
            tell(why)


def _runs(thread: threading.Thread) -> bool:
    """Whether a thread lives. Python believes so of one that the system has ended."""
    if not thread.is_alive():
        return False
    tasks = "/proc/self/task"
    return not os.path.isdir(tasks) or os.path.exists(f"{tasks}/{thread.native_id}")  # noqa: PTH110, PTH112 - once a second


CPU_LOOP: Final = DecodeLoop("engineroom-cpu")
"""Decodes every model, of whatever runtime, that runs on the CPU of this process."""
renew_in_child(CPU_LOOP.begin)


async def run_in_new_thread(call: Callable[[], _T], name: str) -> _T:
    """As :func:`asyncio.to_thread`, but in a thread that ends with the call.

    The threads of asyncio's pool stay, and with each its idle team of OpenMP's. As soon as the
    teams have more threads than there are cores, GNU OpenMP lets them all sleep at barriers
    instead of spinning, which slows every step of the decoding thread.

    A cancelled caller does not stop the call; what it returns or raises is then dropped.

    :param name: the thread's name.
    :raises Exception: what the call raised; ``InferenceError`` where that was none, such as a panic
        of Rust's.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()
    context = contextvars.copy_context()

    def run(future: asyncio.Future[_T]) -> None:
        error: Exception | None = None
        value: _T | None = None
        try:
            value = context.run(tame(call))
        except Exception as raised:  # noqa: BLE001 - raised again where it is awaited
            error = raised
        try:
            loop.call_soon_threadsafe(settle, future, error, value)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass
        finally:
            # A traceback refers to its frames: what a call that failed has left would live on.
            del future, error

    threading.Thread(target=run, args=(future,), name=name).start()
    try:
        return await future
    finally:
        del future


def default_threads() -> int:
    """How many threads computing on the CPU should use: the physical cores that there are for
    this process. More only wait for each other at barriers.

    Without psutil, two hardware threads a core are not told from two cores.
    """
    usable = cpu(Limits()).usable
    try:
        import psutil
    except ImportError:
        return usable
    logical = psutil.cpu_count(logical=True) or usable
    physical = psutil.cpu_count(logical=False) or logical
    return max(1, min(usable, physical, round(usable * physical / logical)))
