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
import threading
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from engineroom.memory.machine import Limits, cpu

__all__ = ["CPU_LOOP", "DecodeLoop", "Worker", "default_threads", "run_in_new_thread"]

_T = TypeVar("_T")


class Worker(Protocol):
    """What takes turns on a loop."""

    @property
    def has_work(self) -> bool:
        """Whether :meth:`turn` would do anything. Asked under the loop's ``condition``."""

    def turn(self) -> bool:
        """Do one step. Must not raise.

        :returns: ``False`` when the worker has ended, and cleaned up.
        """


class DecodeLoop:
    """A thread that lives as long as it has workers.

    :param name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self.condition: Final = threading.Condition()
        """Guards what workers share with other threads; notify it when there is work."""
        self._name = name
        self._workers: list[Worker] = []
        self._thread: threading.Thread | None = None

    def add(self, worker: Worker) -> None:
        """Let a worker take its turns."""
        with self.condition:
            self._workers.append(worker)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self.condition.notify_all()

    def wait_for_end(self, worker: Worker) -> None:
        """Block until the worker has ended, and the thread too if it was the last."""
        with self.condition:
            thread = self._thread
            self.condition.wait_for(lambda: worker not in self._workers)
            retired = thread is not self._thread
        if retired and thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self.condition:
                while not (ready := [worker for worker in self._workers if worker.has_work]):
                    self.condition.wait()
            for worker in ready:
                if not worker.turn() and self._remove(worker):
                    return

    def _remove(self, worker: Worker) -> bool:
        """Let a worker go.

        :returns: whether it was the last; then the thread ends, and the next worker gets another.
        """
        with self.condition:
            self._workers.remove(worker)
            if not self._workers:
                self._thread = None
            self.condition.notify_all()
            return not self._workers


CPU_LOOP: Final = DecodeLoop("engineroom-cpu")
"""Decodes every model, of whatever runtime, that runs on the CPU of this process."""


async def run_in_new_thread(call: Callable[[], _T], name: str) -> _T:
    """As :func:`asyncio.to_thread`, but in a thread that ends with the call.

    The threads of asyncio's pool stay, and with each its idle team of OpenMP's. As soon as the
    teams have more threads than there are cores, GNU OpenMP lets them all sleep at barriers
    instead of spinning, which slows every step of the decoding thread.

    A cancelled caller does not stop the call; what it returns or raises is then dropped.

    :param name: the thread's name.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()
    context = contextvars.copy_context()

    def run(future: asyncio.Future[_T]) -> None:
        error: BaseException | None = None
        value: _T | None = None
        try:
            value = context.run(call)
        except BaseException as raised:  # noqa: BLE001 - raised again where it is awaited
            error = raised
        try:
            loop.call_soon_threadsafe(_settle, future, error, value)
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


def _settle(future: asyncio.Future[_T], error: BaseException | None, value: _T | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)  # type: ignore[arg-type]


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
