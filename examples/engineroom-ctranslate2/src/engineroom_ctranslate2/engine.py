"""Requests, waiting and running: a bounded queue and the threads that work through it.

CTranslate2 decodes a batch to its end before it takes the next, with one set of sampling options
for all of it. So every request is a batch of its own, and ``n_parallel`` of them run at one time
over the same weights. Each running request has a thread here, which waits in ``generate_batch``;
CTranslate2 calls back once a token, and the answer to that call is what stops it.
"""

from __future__ import annotations

import atexit
import ctypes
import heapq
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from engineroom import (
    EngineRoomError,
    HandlerHealth,
    InferenceError,
    Mailbox,
    QueueFullError,
    ResourceNotAvailableError,
    TokenStep,
    deliver,
)

__all__ = ["Engine", "Job"]

logger = logging.getLogger("engineroom.ctranslate2")

_Decode: TypeAlias = Callable[[Any], TokenStep]
"""Makes a step of what CTranslate2 tells about a token."""


class Job:
    """One request: what to compute, and the mailbox for its steps. Made on the event loop.

    :param tokens: the prompt.
    :param options: arguments for ``generate_batch``.
    :param decode: called in a thread, once a token.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        options: Mapping[str, Any],
        decode: _Decode,
        priority: int = 0,
    ) -> None:
        self.tokens = tokens
        self.options = options
        self.priority = priority
        self.cancelled = False
        self._decode = decode
        self._last: TokenStep | EngineRoomError | None = None
        self.mailbox = Mailbox()

    def run(self, generator: Any) -> None:
        """Generate until the end, or until the job is cancelled. Blocks; does not raise.

        The last item is kept for :meth:`finish`.
        """
        try:
            generator.generate_batch([self.tokens], callback=self._on_token, **self.options)
        except Exception as error:
            logger.exception("CTranslate2 failed")
            self._last = InferenceError(f"CTranslate2 failed: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Hand the last item over. Called when the place is free again: whoever reads the end
        of an answer may take that place at once."""
        self._send(self._last or InferenceError("CTranslate2 ended without saying why"))

    def fail(self, error: EngineRoomError) -> None:
        """End the request with an error, from any thread; its computation ends with its token."""
        self._send(error)
        self.cancelled = True

    def _on_token(self, result: Any) -> bool:
        """Called by CTranslate2 with each token. True: stop."""
        if self.cancelled or self.mailbox.loop.is_closed():
            return True
        try:
            step = self._decode(result)
        except Exception as error:
            logger.exception("a token could not be read")
            self._last = InferenceError(f"a token could not be read: {error!r}")
            return True
        if step.finish is not None:
            self._last = step
            return True
        self._send(step)
        return self.cancelled

    def _send(self, item: TokenStep | EngineRoomError) -> None:
        if not self.cancelled:
            deliver([(self.mailbox, item)])


class Engine:
    """Owns a generator of CTranslate2 and the threads that use it.

    :param generator: a ``ctranslate2.Generator``, handed over for good.
    :param n_parallel: requests that run at one time; the generator's ``inter_threads``.
    :param max_queue: requests that wait; more are refused.
    """

    def __init__(self, generator: Any, n_parallel: int, max_queue: int, name: str) -> None:
        self.name: Final = name
        self._generator = generator
        self._n_parallel = n_parallel
        self._max_queue = max_queue
        self._wake = threading.Condition()
        # Guarded by _wake.
        self._waiting: list[tuple[int, int, Job]] = []
        self._running: set[Job] = set()
        self._closing = False
        self._orders = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, name=f"ctranslate2-{name}-{i}", daemon=True)
            for i in range(n_parallel)
        ]
        for thread in self._threads:
            thread.start()
        # CTranslate2 aborts the process if its threads outlive the interpreter.
        atexit.register(self.close)

    def submit(self, job: Job) -> None:
        """Queue a request; the highest priority goes first, then the oldest.

        :raises QueueFullError: ``max_queue`` requests are waiting already.
        :raises ResourceNotAvailableError: the model is being unloaded.
        """
        with self._wake:
            if self._closing:
                raise ResourceNotAvailableError("the model is being unloaded; send it again")
            # A request that a free thread is about to take does not wait.
            waiting = len(self._waiting) - (self._n_parallel - len(self._running))
            if waiting >= self._max_queue:
                raise QueueFullError(
                    f"{waiting} requests wait for model {self.name!r} already, which is the "
                    f"bound (option max_queue={self._max_queue}); send it again later"
                )
            heapq.heappush(self._waiting, (-job.priority, next(self._orders), job))
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Stop a request: at once if it waits, else with its next token. Harmless afterwards."""
        with self._wake:
            job.cancelled = True
            if any(entry[2] is job for entry in self._waiting):
                self._waiting = [entry for entry in self._waiting if entry[2] is not job]
                heapq.heapify(self._waiting)

    def health(self) -> HandlerHealth:
        """Requests running and waiting."""
        with self._wake:
            return HandlerHealth(
                ok=not self._closing,
                detail="the model is being unloaded" if self._closing else "",
                num_requests_running=len(self._running),
                num_requests_waiting=len(self._waiting),
            )

    def close(self) -> None:
        """End the threads and free the model. Blocks; requests that are left fail."""
        atexit.unregister(self.close)
        with self._wake:
            self._closing = True
            for job in (*self._running, *(entry[2] for entry in self._waiting)):
                job.fail(
                    ResourceNotAvailableError(
                        f"model {self.name!r} was unloaded while the request ran; send it again"
                    )
                )
            self._waiting.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._generator = None
        _give_back_memory()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            job.run(self._generator)
            with self._wake:
                self._running.remove(job)
            job.finish()

    def _take(self) -> Job | None:
        """Wait for a request. None: the engine ends."""
        with self._wake:
            while not self._waiting and not self._closing:
                self._wake.wait()
            if self._closing:
                return None
            job = heapq.heappop(self._waiting)[2]
            self._running.add(job)
            return job


def _give_back_memory() -> None:
    """Return freed memory to the system: glibc would keep the weights' for the next model."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(ctypes.c_size_t(0))
