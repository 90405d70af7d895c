"""A side of a comparison in a process of its own, which waits while the other one works.

The runtimes' thread pools belong to a process and get in each other's way. llama.cpp's is
OpenMP's, which makes a team of threads for every thread that decodes; as soon as the teams have
more threads than there are cores, GNU OpenMP lets all of them sleep at barriers instead of
spinning, and both sides lose up to 40 %. A process a side is also how they are used in life.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from benchmarks.harness import DiscardError

__all__ = ["Peak", "Worker"]


class Worker:
    """``factory(*arguments)`` in a process of its own.

    Use it in a ``with``. The object's ``close()`` is called at the end.
    """

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, factory, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._result()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method there and wait for what it returns."""
        self._pipe.send((method, arguments))
        return self._result()

    def _result(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a worker ended with status {self._process.exitcode}") from None
        if kind == "discard":
            raise DiscardError(value)
        if kind == "error":
            raise RuntimeError(f"in a worker:\n{value}")
        return value

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()  # which it takes for the end
        if kind is not None:  # nobody waits for what it is doing
            self._process.terminate()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Peak:
    """The most memory that this process has while the ``with`` lasts, looked at 100 times a second.

    Not the system's own high-water mark, which has what loading needed for a moment, too.
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def mib(self) -> float:
        """In MiB."""
        return self._most / 2**20

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, self._process.memory_info().rss)
            if self._ended.wait(0.01):
                return

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def _serve(pipe: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what ends
    try:
        served = factory(*arguments)
    except BaseException:  # noqa: BLE001 - sent to the parent, which raises it
        pipe.send(("error", traceback.format_exc()))
        return
    pipe.send(("done", None))
    try:
        while True:
            try:
                method, given = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(("done", getattr(served, method)(*given)))
            except DiscardError as error:
                pipe.send(("discard", str(error)))
            except Exception:  # noqa: BLE001 - sent to the parent, which raises it
                pipe.send(("error", traceback.format_exc()))
    finally:
        served.close()
