"""The scheduler: many requests through one llama.cpp context, a step at a time.

At each of its turns the engine does one step: take what came in, give sequences to waiting
requests, put one token of every decoding request and a chunk of every prompt that is still to be
read into one batch, compute it, choose the next tokens, and hand them to asyncio all at once.

* A long prompt never stalls the others: beside decoding requests a step reads at most
  ``prefill_chunk`` of its tokens.
* Cells of the unified cache are counted. When they run out, the youngest request gives its cells
  back and is read anew later; to its caller it only pauses. A request that is alone and fills
  the whole context ends with ``length``.
* Cancelling takes effect before the next step; where the cancelled request is the only one in
  the batch, the computation itself is aborted.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from engineroom import (
    EngineDeadError,
    EngineRoomError,
    HandlerHealth,
    InferenceError,
    InferenceRequest,
    Mailbox,
    QueueFullError,
    RequestLogger,
    ResourceNotAvailableError,
    TokenLogprob,
    TokenStep,
    deliver,
    request_logger,
)
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.library import last_error
from engineroom_llamacpp.loop import CPU_LOOP, DecodeLoop
from engineroom_llamacpp.model import END, LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions
from engineroom_llamacpp.sampling import Logits, Sampler, top_logprobs

__all__ = ["LlamaEngine", "Task"]

logger = logging.getLogger("engineroom.llamacpp")

_ABORTED: Final = 2
_NO_ROOM: Final = 1


@dataclass(eq=False, slots=True)
class Task:
    """One request on its way through the engine.

    :param tokens: the prompt's tokens, then the generated ones.
    :param cached: how many of them are in the cache; what comes after is still to be computed.
    :param sequence: its sequence in the context; ``None``: it waits for one.
    :param limit: length at which it ends with ``length``.
    """

    tokens: list[int]
    prompt_tokens: int
    mailbox: Mailbox
    sampler: Sampler
    limit: int
    logprobs: int | None
    log: RequestLogger
    priority: int
    order: int
    cached: int = 0
    sequence: int | None = None
    cancelled: bool = False
    done: bool = False
    announced: bool = field(default=False)

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the higher priority, then the one that came first."""
        return (-self.priority, self.order)


class LlamaEngine:
    """Owns a model and its context, and takes its turns on a thread of :mod:`.loop`.

    The constructor loads the context; run it outside of the event loop.
    """

    def __init__(self, model: LlamaModel, options: LlamaCppOptions, name: str) -> None:
        self.model = model
        self.options = options
        self.name = name
        self._context = LlamaContext(model, options)
        self.n_ctx = self._context.n_ctx
        self.threads = self._context.threads
        self._loop = DecodeLoop(f"llamacpp-{name}") if self._context.on_gpu else CPU_LOOP
        self._wake = self._loop.condition
        # Guarded by _wake; _running and _free are changed by the thread alone.
        self._incoming: list[Task] = []
        self._waiting: list[Task] = []
        self._alone: Task | None = None
        self._closing = False
        self._ended = False
        self._dead: EngineDeadError | None = None
        self._running: list[Task] = []
        self._free = list(range(options.n_parallel - 1, -1, -1))
        self._orders = itertools.count()
        self.preemptions = 0
        """How often a request gave its cells back to let another go on."""
        self._loop.add(self)

    # ── for asyncio ──────────────────────────────────────────────────────────────────────────

    def submit(self, request: InferenceRequest, tokens: list[int]) -> Task:
        """Queue a request; its steps come through ``task.mailbox``.

        :raises QueueFullError: ``max_queue`` requests are waiting already.
        :raises EngineDeadError: the engine has ended.
        """
        params = request.params
        new = self.n_ctx if params.max_new_tokens is None else params.max_new_tokens
        task = Task(
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            mailbox=Mailbox(),
            sampler=Sampler(params, tokens, self.model.n_vocab),
            limit=min(len(tokens) + new, self.n_ctx),
            logprobs=params.logprobs,
            log=request_logger(logger, request),
            priority=request.priority,
            order=next(self._orders),
        )
        with self._wake:
            if self._dead is not None:
                raise EngineDeadError(self._dead.message)
            if self._closing:
                raise ResourceNotAvailableError("the model is being unloaded; send it again")
            waiting = len(self._waiting) + len(self._incoming)
            free = self.options.n_parallel - len(self._running)
            if waiting >= self.options.max_queue + max(0, free):
                raise QueueFullError(
                    f"{waiting} requests wait for model {self.name!r} already, which is the "
                    f"bound (option max_queue={self.options.max_queue}); send it again later"
                )
            self._incoming.append(task)
            self._wake.notify_all()
        return task

    def cancel(self, task: Task) -> None:
        """Stop a request's work and give its sequence back. Harmless after its end."""
        with self._wake:
            task.cancelled = True
            if not task.done:
                if self._alone is task:
                    self._context.abort.set(True)
                self._wake.notify_all()

    def health(self) -> HandlerHealth:
        """Requests running and waiting, and how full the cache is."""
        with self._wake:
            running = list(self._running)
            return HandlerHealth(
                ok=self._dead is None and not self._closing,
                detail=self._dead.message if self._dead else "",
                num_requests_running=len(running),
                num_requests_waiting=len(self._waiting) + len(self._incoming),
                kv_cache_usage=sum(task.cached for task in running) / self.n_ctx,
            )

    def close(self) -> None:
        """End the engine and free its context. Blocks; requests still running fail."""
        with self._wake:
            self._closing = True
            if not self._ended:
                self._context.abort.set(True)
            self._wake.notify_all()
        self._loop.wait_for_end(self)

    # ── the thread ───────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._running or self._incoming or self._waiting or self._closing)

    def turn(self) -> bool:
        """One step, or the end; see :class:`~engineroom_llamacpp.loop.Worker`."""
        failure: EngineRoomError
        try:
            if self._take_in():
                self._step()
                return True
            failure = ResourceNotAvailableError(
                f"model {self.name!r} was unloaded while the request ran; send it again"
            )
        except Exception as error:
            logger.exception("the engine of model %r has died", self.name)
            failure = EngineDeadError(
                f"the engine of model {self.name!r} has died: {type(error).__name__}: {error}; "
                "unload the model and load it again"
            )
        self._end(failure)
        return False

    def _end(self, failure: EngineRoomError) -> None:
        """Free the context, and tell the requests that are left."""
        with self._wake:
            if isinstance(failure, EngineDeadError):
                self._dead = failure
            self._closing = self._ended = True
            left = [*self._running, *self._waiting, *self._incoming]
            self._running, self._waiting, self._incoming = [], [], []
            self._alone = None
            for task in left:
                task.done = True
        self._context.close()
        deliver((task.mailbox, _copy(failure)) for task in left if not task.cancelled)

    def _take_in(self) -> bool:
        """Drop what was cancelled, start what can start. False: the engine is to end."""
        with self._wake:
            if self._closing:
                return False
            self._context.abort.set(False)
            self._waiting += self._incoming
            self._incoming.clear()
            for task in [t for t in self._waiting if t.cancelled]:
                self._waiting.remove(task)
                task.done = True
            for task in [t for t in self._running if t.cancelled]:
                self._leave(task)
            self._admit()
            self._alone = self._running[0] if len(self._running) == 1 else None
        return True

    def _admit(self) -> None:
        """Give free sequences to waiting requests, as long as their prompts fit."""
        if not self._waiting:
            return
        self._waiting.sort(key=lambda task: task.rank)
        # What is promised: all that running requests still have to read, and a token each.
        promised = sum(len(t.tokens) + 1 for t in self._running)
        while self._waiting and self._free:
            task = self._waiting[0]
            if self._running and promised + len(task.tokens) + 1 > self.n_ctx:
                break
            self._waiting.pop(0)
            task.sequence = self._free.pop()
            self._running.append(task)
            promised += len(task.tokens) + 1

    def _leave(self, task: Task) -> None:
        """The request has ended: its cells and its sequence are free."""
        task.done = True
        self._release(task)

    def _release(self, task: Task) -> None:
        assert task.sequence is not None
        self._context.forget(task.sequence)
        self._free.append(task.sequence)
        task.sequence = None
        task.cached = 0
        self._running.remove(task)

    def _preempt(self) -> None:
        """Let the youngest running request wait until there is room to read it again."""
        task = max(self._running, key=lambda t: t.rank)
        self.preemptions += 1
        task.log.debug("%d tokens give way; the request waits for room", task.cached)
        self._release(task)
        with self._wake:
            self._waiting.append(task)

    def _step(self) -> None:
        """One batch: compose, compute, sample, hand over."""
        rows = self._compose()
        while not rows and self._running:
            if len(self._running) == 1:
                raise RuntimeError("a lone request has no room in the cache")
            self._preempt()
            rows = self._compose()
        if not rows:
            return
        status = self._context.decode()
        if status == 0:
            self._sample(rows)
        elif status == _ABORTED:
            for task, _, _ in rows:
                assert task.sequence is not None
                task.cached = max(0, self._context.length(task.sequence))
        elif status == _NO_ROOM and len(self._running) > 1:
            self._preempt()
        else:
            self._fail(rows, status)

    def _compose(self) -> list[tuple[Task, int, int]]:
        """Fill the batch.

        :returns: for each request in it, how many tokens, and its row of logits (-1: none yet).
        """
        context = self._context
        context.begin()
        room = self.n_ctx - sum(t.cached for t in self._running)
        budget = context.n_batch
        rows: list[tuple[Task, int, int]] = []
        reading: list[Task] = []
        for task in self._running:
            if len(task.tokens) - task.cached > 1:
                reading.append(task)
            elif room < 1:
                return []  # a decoding request must not be left behind: make room first
            else:
                assert task.sequence is not None
                row = context.add(task.sequence, task.cached, task.tokens[-1:], True)
                rows.append((task, 1, row))
                room -= 1
                budget -= 1
        if rows:
            budget = min(budget, self.options.prefill_chunk)
        for task in reading:
            todo = len(task.tokens) - task.cached
            count = min(todo, budget, room)
            if count < 1:
                break
            chunk = task.tokens[task.cached : task.cached + count]
            assert task.sequence is not None
            last = count == todo
            row = context.add(task.sequence, task.cached, chunk, last)
            rows.append((task, count, row if last else -1))
            room -= count
            budget -= count
        return rows

    def _sample(self, rows: Sequence[tuple[Task, int, int]]) -> None:
        parcels: list[tuple[Mailbox, TokenStep | EngineRoomError]] = []
        for task, count, row in rows:
            task.cached += count
            if row >= 0 and not task.cancelled:
                try:
                    step = self._next_token(task, row)
                except Exception as error:
                    task.log.exception("a token could not be chosen")
                    failure = InferenceError(
                        f"a token could not be chosen: {type(error).__name__}: {error}"
                    )
                    self._leave(task)
                    parcels.append((task.mailbox, failure))
                    continue
                parcels.append((task.mailbox, step))
                if step.finish is not None:
                    self._leave(task)
        if parcels:
            deliver(parcels)

    def _next_token(self, task: Task, row: int) -> TokenStep:
        logits = self._context.logits(row)
        token = task.sampler.sample(logits)
        piece = self.model.piece(token)
        if piece is END:
            step = TokenStep(finish="eos_token")
        else:
            task.tokens.append(token)
            full = len(task.tokens) >= task.limit
            step = TokenStep((token,), piece or b"", finish="length" if full else None)
            if task.logprobs is not None:
                step.logprobs = (self._logprob(logits, token, task.logprobs),)
        if not task.announced:
            task.announced = True
            step.prompt_tokens = task.prompt_tokens
            step.cached_prompt_tokens = 0
        return step

    def _logprob(self, logits: Logits, token: int, count: int) -> TokenLogprob:
        model = self.model
        own, best = top_logprobs(logits, token, count)
        return TokenLogprob(
            token_id=token,
            token=model.token_text(token),
            logprob=own,
            top=[(i, model.token_text(i), value) for i, value in best],
        )

    def _fail(self, rows: Sequence[tuple[Task, int, int]], status: int) -> None:
        """The computation failed: its requests end, the engine goes on."""
        why = last_error("it does not say why")
        error = InferenceError(f"llama.cpp could not compute the step (status {status}): {why}")
        for task, _, _ in rows:
            task.log.error("llama_decode returned %d: %s", status, why)
            self._leave(task)
        deliver((task.mailbox, _copy(error)) for task, _, _ in rows)


def _copy(error: EngineRoomError) -> EngineRoomError:
    """Each request gets an error of its own, to which its names can be added."""
    return type(error)(error.message)
