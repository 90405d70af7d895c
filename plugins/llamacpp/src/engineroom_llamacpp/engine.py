"""The scheduler: many requests through one llama.cpp context, a step at a time.

Queue, slots and cancelling are :class:`~engineroom.batching.BatchingEngine`'s. A step here puts
one token of every decoding request and a chunk of every prompt that is still to be read into one
batch, computes it, chooses the next tokens, and hands them to asyncio all at once.

* A long prompt never stalls the others: beside decoding requests a step reads at most
  ``prefill_chunk`` of its tokens.
* Cells of the unified cache are counted. When they run out, the youngest request gives its cells
  back and is read anew later; to its caller it only pauses. A request that is alone and fills
  the whole context ends with ``length``.
* Cancelling takes effect before the next step; where the cancelled request is the only one in
  the batch, the computation itself is aborted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from engineroom import (
    CPU_LOOP,
    BatchingEngine,
    DecodeLoop,
    EngineRoomError,
    EngineTask,
    InferenceError,
    InferenceRequest,
    Mailbox,
    TokenLogprob,
    TokenStep,
    request_logger,
)
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.library import last_error
from engineroom_llamacpp.model import END, LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions
from engineroom_llamacpp.sampling import Logits, Sampler, top_logprobs

if TYPE_CHECKING:
    from engineroom_llamacpp.embedding import EmbeddingEngine

__all__ = ["LlamaEngine", "Task"]

logger = logging.getLogger("engineroom.llamacpp")

_ABORTED: Final = 2
_NO_ROOM: Final = 1


@dataclass(eq=False, slots=True, kw_only=True)
class Task(EngineTask):
    """One request on its way through the engine.

    :param tokens: the prompt's tokens, then the generated ones.
    :param limit: length at which it ends with ``length``.
    :param cached: how many of them are in the cache; what comes after is still to be computed.
    :param sequence: its sequence in the context; ``None``: it waits for one.
    :param adapter: the named LoRA adapter that it is computed with.
    """

    tokens: list[int]
    prompt_tokens: int
    sampler: Sampler
    limit: int
    logprobs: int | None
    cached: int = 0
    sequence: int | None = None
    announced: bool = False
    adapter: str | None = None


class LlamaEngine(BatchingEngine[Task]):
    """Owns a model and its context.

    The constructor loads the context; run it outside of the event loop.
    """

    def __init__(self, model: LlamaModel, options: LlamaCppOptions, name: str) -> None:
        self.model = model
        self.options = options
        self._context = LlamaContext(model, options)
        self.n_ctx = self._context.n_ctx
        self.threads = self._context.threads
        self.on_gpu = self._context.on_gpu
        loop = DecodeLoop(f"llamacpp-{name}") if self._context.on_gpu else CPU_LOOP
        super().__init__(name, loop, max_running=options.n_parallel, max_queue=options.max_queue)
        self._free = list(range(options.n_parallel - 1, -1, -1))
        self.embedder: EmbeddingEngine | None = None
        """Makes embeddings with the same weights, where the model is made for it; set by whoever
        loads it."""
        self._adapter: str | None = None
        self.preemptions = 0
        """How often a request gave its cells back to let another go on."""
        self.open()

    def request(self, request: InferenceRequest, tokens: list[int]) -> Task:
        """Queue a request; see :meth:`~engineroom.batching.BatchingEngine.submit`."""
        params = request.params
        new = self.n_ctx if params.max_new_tokens is None else params.max_new_tokens
        return self.submit(
            Task(
                tokens=list(tokens),
                prompt_tokens=len(tokens),
                sampler=Sampler(params, tokens, self.model.n_vocab),
                limit=min(len(tokens) + new, self.n_ctx),
                logprobs=params.logprobs,
                adapter=request.adapter,
                log=request_logger(logger, request),
                priority=request.priority,
            )
        )

    # ── slots ────────────────────────────────────────────────────────────────────────────────

    def may_start(self, task: Task) -> bool:
        """Whether there are cells for its prompt and a token, beside what is promised."""
        # Promised is all that running requests still have to read, and a token each.
        promised = sum(len(t.tokens) + 1 for t in self.running)
        return promised + len(task.tokens) + 1 <= self.n_ctx

    def started(self, task: Task) -> None:
        """Give it a sequence."""
        task.sequence = self._free.pop()

    def released(self, task: Task) -> None:
        """Its cells and its sequence are free."""
        assert task.sequence is not None
        self._context.forget(task.sequence)
        self._free.append(task.sequence)
        task.sequence = None
        task.cached = 0

    def interrupt(self, on: bool) -> None:
        """Abort the computation."""
        self._context.abort.set(on)

    def shut(self) -> None:
        """Free the context."""
        self._context.close()

    def cache_usage(self) -> float:
        """Used share of the cells."""
        return sum(task.cached for task in self.running) / self.n_ctx

    def _preempt(self) -> None:
        """Let the youngest running request wait until there is room to read it again."""
        task = max(self.running, key=lambda t: t.rank)
        self.preemptions += 1
        task.log.debug("%d tokens give way; the request waits for room", task.cached)
        self.wait_again(task)

    # ── a step ───────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """One batch: compose, compute, sample, hand over."""
        rows = self._compose()
        while not rows and self.running:
            if len(self.running) == 1:
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
        elif status == _NO_ROOM and len(self.running) > 1:
            self._preempt()
        else:
            self._fail(rows, status)

    def _compose(self) -> list[tuple[Task, int, int]]:
        """Fill the batch, with requests of one adapter.

        :returns: for each request in it, how many tokens, and its row of logits (-1: none yet).
        """
        context = self._context
        context.begin()
        tasks = self._whose_turn()
        context.use_adapter(self._adapter)
        room = self.n_ctx - sum(t.cached for t in self.running)
        budget = context.n_batch
        rows: list[tuple[Task, int, int]] = []
        reading: list[Task] = []
        for task in tasks:
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

    def _whose_turn(self) -> list[Task]:
        """Running requests of one adapter. The adapters take turns, a step each."""
        names = list(dict.fromkeys(task.adapter for task in self.running))
        last = names.index(self._adapter) if self._adapter in names else -1
        if names:
            self._adapter = names[(last + 1) % len(names)]
        return [task for task in self.running if task.adapter == self._adapter]

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
                    self.leave(task)
                    parcels.append((task.mailbox, failure))
                    continue
                parcels.append((task.mailbox, step))
                if step.finish is not None:
                    self.leave(task)
        self.hand_over(parcels)

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
        for task, _, _ in rows:
            task.log.error("llama_decode returned %d: %s", status, why)
        error = InferenceError(f"llama.cpp could not compute the step (status {status}): {why}")
        self.fail([task for task, _, _ in rows], error)
