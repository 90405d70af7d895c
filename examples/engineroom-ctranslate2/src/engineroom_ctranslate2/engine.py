"""The engine: queue, slots and cancelling are ``BatchingEngine``'s, computing is CTranslate2's.

CTranslate2 decodes a batch to its end before it takes the next, with one set of sampling options
for all of it. So every request is a batch of its own, and ``n_parallel`` of them run at one time
over the same weights. Each has a thread here, which waits in ``generate_batch``; CTranslate2 calls
back once a token, and the answer to that call is what stops it. Tokens go to the request from
there. Only its end passes through the engine's own thread, so that the slot is free when the
request hears of it.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engineroom import (
    BatchingEngine,
    DecodeLoop,
    EngineRoomError,
    EngineTask,
    InferenceError,
    TokenStep,
    give_back_memory,
)

__all__ = ["Engine", "Job"]

logger = logging.getLogger("engineroom.ctranslate2")


@dataclass(eq=False, kw_only=True)
class Job(EngineTask):
    """One request: what to compute.

    :param tokens: the prompt.
    :param options: arguments for ``generate_batch``.
    :param decode: makes a step of what CTranslate2 says about a token; called in a thread.
    """

    tokens: Sequence[str]
    options: Mapping[str, Any]
    decode: Callable[[Any], TokenStep]
    last: TokenStep | EngineRoomError | None = None
    """What ends it."""


class Engine(BatchingEngine[Job]):
    """Owns a generator of CTranslate2.

    :param generator: a ``ctranslate2.Generator``, handed over for good.
    :param n_parallel: requests that run at one time; the generator's ``inter_threads``.
    :param max_queue: requests that wait; more are refused.
    """

    def __init__(self, generator: Any, n_parallel: int, max_queue: int, name: str) -> None:
        loop = DecodeLoop(f"ctranslate2-{name}")
        super().__init__(name, loop, max_running=n_parallel, max_queue=max_queue)
        self._generator = generator
        self._over: deque[Job] = deque()  # threads append, the engine's takes
        self._threads: set[threading.Thread] = set()
        # CTranslate2 aborts the process if its threads outlive the interpreter.
        atexit.register(self.close)
        self.open()

    def close(self) -> None:
        """End the threads and free the model. Blocks; requests that are left fail."""
        atexit.unregister(self.close)
        super().close()

    # ── on the engine's thread ───────────────────────────────────────────────────────────────

    def started(self, task: Job) -> None:
        """Compute it in a thread of its own."""
        name = f"ctranslate2-{self.name}-{task.order}"
        thread = threading.Thread(target=self._generate, args=(task,), name=name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def can_step(self) -> bool:
        """A step is needed where one has ended; tokens go their own way."""
        return bool(self._over)

    def step(self) -> None:
        """Free the slots of those that have ended, then tell them."""
        ended = [self._over.popleft() for _ in range(len(self._over))]
        ended = [job for job in ended if not job.done]  # the others were cancelled meanwhile
        for job in ended:
            self.leave(job)
        lost = InferenceError("CTranslate2 ended without saying why")
        self.hand_over((job.mailbox, job.last or lost) for job in ended)

    def shut(self) -> None:
        """Wait for what is still computed, each to the end of its token, and free the model."""
        for thread in list(self._threads):
            thread.join()
        self._generator = None
        give_back_memory()

    # ── in a request's thread ────────────────────────────────────────────────────────────────

    def _generate(self, job: Job) -> None:
        def on_token(result: Any) -> bool:
            """Called by CTranslate2 with each token. True: stop."""
            if job.cancelled or job.done or job.mailbox.loop.is_closed():
                return True
            try:
                step = job.decode(result)
            except BaseException as error:
                logger.exception("a token could not be read")
                job.last = InferenceError(f"a token could not be read: {error!r}")
                return True
            if step.finish is not None:
                job.last = step
                return True
            self.hand_over([(job.mailbox, step)])
            return job.cancelled

        try:
            self._generator.generate_batch([job.tokens], callback=on_token, **job.options)
        except BaseException as error:
            logger.exception("CTranslate2 failed")
            job.last = InferenceError(f"CTranslate2 failed: {type(error).__name__}: {error}")
        self._threads.discard(threading.current_thread())
        self._over.append(job)
        self.wake()
