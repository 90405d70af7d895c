"""The scheduler: many requests through one Transformers model, a step at a time.

Queue, slots and cancelling are :class:`~engineroom.batching.BatchingEngine`'s. A step here packs
one token of every decoding request and chunks of the prompts that are still to be read into one
row (:mod:`.attention`), runs the model once, chooses the next tokens (:mod:`.sampling`) and hands
them to asyncio all at once.

* A long prompt never stalls the others: beside decoding requests a step reads at most
  ``prefill_chunk`` of its tokens.
* Where tokens are proposed (:mod:`.drafting`), a decoding request has several in the step; those
  that the model would have chosen itself are kept.
* What only ``generate()`` can do (beam search; every request of a model whose cache cannot be
  driven) goes on beside, a token of it each step (:mod:`.by_generate`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from engineroom import (
    CPU_LOOP,
    BatchingEngine,
    DecodeLoop,
    EngineRoomError,
    EngineTask,
    FinishReason,
    InferenceError,
    InferenceRequest,
    Mailbox,
    RequestLogger,
    ResourceNotAvailableError,
    TokenLogprob,
    TokenStep,
    request_logger,
)
from engineroom_hf_transformers.attention import Span, StepStoppedError
from engineroom_hf_transformers.by_generate import Generation, MakeLogprob, NoNumbersError, neutral
from engineroom_hf_transformers.cache import Slot, Slots
from engineroom_hf_transformers.drafting import Drafter, make_drafter
from engineroom_hf_transformers.embedding import EmbeddingJob, Recipe, recipe_of
from engineroom_hf_transformers.model import forward_of, why_not_driven
from engineroom_hf_transformers.sampling import Sampling, choose, logprobs_of
from engineroom_hf_transformers.tokens import Vocabulary

if TYPE_CHECKING:
    import torch

    from engineroom_hf_transformers.loading import Parts
    from engineroom_hf_transformers.options import HfTransformersOptions
    from engineroom_hf_transformers.tokens import Decoder

__all__ = ["HfEngine", "Task"]

logger = logging.getLogger("engineroom.hf_transformers")


class Work(Protocol):
    """What is not done in the batch, but beside it, a piece each step."""

    def advance(self, make_logprob: MakeLogprob) -> TokenStep | None:
        """Do a piece.

        :returns: what came of it; ``None``: nothing that could be shown.
        """

    def close(self) -> None:
        """End it where it stands."""


@dataclass(eq=False, slots=True, kw_only=True)
class Job(EngineTask):
    """What the engine has to do.

    :param work: what does it, unless the batch does.
    """

    work: Work | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class Task(Job):
    """One request for text on its way through the engine.

    :param tokens: the prompt's tokens, then the generated ones.
    :param limit: length at which it ends with ``length``.
    :param cached: how many of them are in the cache; what comes after is still to be computed.
    :param reused: how many of the prompt's an earlier request had computed.
    :param proposed: tokens that may come next, to be checked in the step.
    :param doubtful: whether what it wrote to the cache was not seen to be numbers.
    """

    request: InferenceRequest
    tokens: list[int]
    prompt_tokens: int
    sampling: Sampling
    decoder: Decoder
    limit: int
    logprobs: int | None
    slot: Slot | None = None
    cached: int = 0
    reused: int = 0
    proposed: list[int] = field(default_factory=list)
    announced: bool = False
    doubtful: bool = True

    @property
    def decodes(self) -> bool:
        """Whether all but its last token is computed."""
        return len(self.tokens) - self.cached == 1


@dataclass(frozen=True, slots=True)
class _Row:
    """A request's part of a step: which of the step's logits are its own."""

    task: Task
    span: Span
    first: int
    outputs: int


@dataclass(slots=True)
class _Outcome:
    """What a request gets of a step."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class HfEngine(BatchingEngine[Job]):
    """Owns a model and its cache. The constructor looks at the model; run it in a thread.

    :param parts: the loaded model, with everything that belongs to it.
    """

    def __init__(self, parts: Parts, options: HfTransformersOptions, name: str) -> None:
        self.parts = parts
        self.options = options
        self.n_ctx = parts.n_context
        self.vocabulary = Vocabulary(
            parts.tokenizer,
            parts.end_ids,
            parts.n_vocab,
            options.chat_template,
            encoder=parts.kind != "causal",
        )
        self._interrupted = False
        self._generations: set[Generation] = set()
        neutral(parts.model)
        self.recipe: Recipe | None = recipe_of(parts.folder, parts)
        """How to make embeddings; ``None``: the model is not made for it."""
        self.why_one_by_one = why_not_driven(parts, options)
        """Why requests run one at a time; empty: they are batched."""
        batched = not self.why_one_by_one
        self._forward = forward_of(parts, options) if batched else None
        self._slots = (
            Slots(self._forward.cache, reuse=options.prefix_cache) if self._forward else None
        )
        self._drafter: Drafter | None = make_drafter(parts, options) if batched else None
        self.proposed = self.accepted = 0
        """Tokens that were proposed by the draft, and those of them that were right."""
        on_cpu = parts.device.type == "cpu"
        super().__init__(
            name,
            CPU_LOOP if on_cpu else DecodeLoop(f"hf_transformers-{name}"),
            max_running=options.max_batch_size if batched else 1,
            max_queue=options.max_queue,
        )
        if self.why_one_by_one and parts.kind != "embedding":
            logger.warning(
                "model %r runs its requests one at a time, by generate(): %s",
                name,
                self.why_one_by_one,
            )
        self.open()

    @property
    def memory_bytes(self) -> int:
        """Weights and cache, those of the draft included."""
        parts = [self.parts] + ([self.parts.draft] if self.parts.draft is not None else [])
        found = sum(each.weight_bytes for each in parts)
        if self._forward is not None:
            found += self._forward.cache.nbytes
        if self._drafter is not None:
            found += self._drafter.nbytes
        return found

    def request(self, request: InferenceRequest, tokens: list[int]) -> Task:
        """Queue a request; see :meth:`~engineroom.batching.BatchingEngine.submit`."""
        params = request.params
        new = self.n_ctx if params.max_new_tokens is None else params.max_new_tokens
        task = Task(
            request=request,
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            sampling=Sampling(params, tokens),
            decoder=self.vocabulary.decoder(tokens),
            limit=min(len(tokens) + new, self.n_ctx),
            logprobs=params.logprobs,
            log=request_logger(logger, request),
            priority=request.priority,
        )
        self.submit(task)
        return task

    def embed(self, texts: Sequence[Sequence[int]], recipe: Recipe) -> tuple[Job, EmbeddingJob]:
        """Queue texts, as token ids, to be turned into vectors; see :meth:`request`."""
        work = EmbeddingJob(
            self.parts, recipe, texts, self.options.max_batch_tokens, self._is_interrupted
        )
        job = Job(work=work, log=RequestLogger(logger, {"model_id": self.name}))
        self.submit(job)
        return job, work

    # ── slots ────────────────────────────────────────────────────────────────────────────────

    def started(self, task: Job) -> None:
        """Give it a slot of the cache, with as much of its prompt as lies there already."""
        if not isinstance(task, Task):
            return
        if self._slots is None or (task.request.params.num_beams or 1) > 1:
            work = Generation(self.parts, task, self.vocabulary.ends, self._is_interrupted)
            self._generations.add(work)
            task.work = work
            return
        busy = [
            (other.slot, other.tokens[: other.cached])
            for other in self.running
            if isinstance(other, Task) and other.slot is not None
        ]
        task.slot, task.cached = self._slots.take(task.tokens, busy)
        task.reused = task.cached

    def released(self, task: Job) -> None:
        """Its slot is free; what was computed stays until the slot is given away."""
        if task.work is not None:
            task.work.close()
            if isinstance(task.work, Generation):
                self._generations.discard(task.work)
            task.work = None
        if not isinstance(task, Task):
            return
        if task.slot is not None and self._slots is not None:
            written = len(task.tokens) + len(task.proposed)
            self._slots.give_back(
                task.slot, task.tokens[: task.cached], unsound=written if task.doubtful else 0
            )
            if self._drafter is not None:
                self._drafter.forget(task.slot.index)
            task.slot = None
        task.cached = 0

    def interrupt(self, on: bool) -> None:
        """Give the step up at its next layer."""
        self._interrupted = on

    def _is_interrupted(self) -> bool:
        return self._interrupted

    def shut(self) -> None:
        """Give up threads, cache and drafter; the model itself is its owner's."""
        for work in self._generations:
            work.close()
        self._generations.clear()
        if self._drafter is not None:
            self._drafter.close()
        if self._forward is not None:
            self._forward.close()

    def cache_usage(self) -> float | None:
        """Used share of the slots' tokens."""
        if self._forward is None:
            return None
        used = sum(task.cached for task in self.running if isinstance(task, Task))
        return used / (self._forward.cache.slots * self._forward.cache.length)

    # ── a step ───────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """One forward pass of what is batched, and one token of what is not."""
        batched = [t for t in self.running if isinstance(t, Task) and t.work is None]
        if batched:
            self._batch(batched)
        for job in [job for job in self.running if job.work is not None]:
            self._go_on(job)

    def _batch(self, tasks: Sequence[Task]) -> None:
        assert self._forward is not None
        rows: list[_Row] = []
        try:
            if self._drafter is not None:
                self._propose(tasks)
            rows = self._compose(tasks)
            logits = self._forward(
                [token for row in rows for token in _tokens_of(row)],
                [row.span for row in rows if row.outputs == row.span.count == 1],
                [row.span for row in rows if not row.outputs == row.span.count == 1],
                [
                    row.span.row + row.span.count - row.outputs + place
                    for row in rows
                    for place in range(row.outputs)
                ],
                self._is_interrupted,
            )
            parcels = self._sample(rows, logits)
        except StepStoppedError:
            return  # whose step it was has been cancelled; the next turn sees to that
        except Exception as error:  # noqa: BLE001 - logged with its traceback in _fail_jobs
            self._fail_jobs([row.task for row in rows] or list(tasks), error)
            return
        self.hand_over(parcels)

    def _propose(self, tasks: Sequence[Task]) -> None:
        """Ask for tokens that may come next, where they can be of use."""
        assert self._drafter is not None
        decoding = [task for task in tasks if task.decodes]
        room = self.options.max_batch_tokens // max(1, len(decoding)) - 1
        wanted = {
            task: min(
                self.options.draft_tokens,
                room,
                task.limit - len(task.tokens) - 1,
                self.n_ctx - len(task.tokens) - 1,
            )
            for task in decoding
        }
        found = self._drafter.propose(
            [
                (task.slot.index, task.tokens, count)
                for task, count in wanted.items()
                if count > 0 and task.slot is not None
            ]
        )
        for task in decoding:
            task.proposed = found.get(task.slot.index, []) if task.slot is not None else []

    def _compose(self, tasks: Sequence[Task]) -> list[_Row]:
        """Who has how many tokens in the step, and which logits."""
        decoding = sorted(
            (task for task in tasks if task.decodes and not task.proposed), key=_slot_index
        )
        checking = [task for task in tasks if task.decodes and task.proposed]
        rows: list[_Row] = []
        place = 0
        first = 0

        def add(task: Task, count: int, outputs: int) -> None:
            nonlocal place, first
            span = Span(place, _slot_index(task), task.cached, count)
            rows.append(_Row(task, span, first, outputs))
            place += count
            first += outputs

        for task in decoding:
            add(task, 1, 1)
        for task in checking:
            add(task, 1 + len(task.proposed), 1 + len(task.proposed))
        budget = max(1, self.options.max_batch_tokens - place)
        if rows:
            budget = min(budget, self.options.prefill_chunk)
        for task in tasks:
            todo = len(task.tokens) - task.cached
            if todo > 1 and budget > 0:
                count = min(todo, budget)
                add(task, count, 1 if count == todo else 0)
                budget -= count
        return rows

    def _sample(
        self, rows: Sequence[_Row], logits: torch.Tensor
    ) -> list[tuple[Mailbox, TokenStep | EngineRoomError]]:
        """Choose tokens: the first of each request together, then those after right proposals."""
        outcomes: dict[Task, _Outcome] = {}
        parcels: list[tuple[Mailbox, TokenStep | EngineRoomError]] = []
        pending: list[tuple[_Row, int]] = []
        broken: list[Task] = []
        for row in rows:
            task = row.task
            # Of a row that proposes, only what turns out to be right counts as computed.
            task.cached += row.span.count - max(0, row.outputs - 1)
            if row.outputs and not task.cancelled:
                pending.append((row, 0))
        while pending:
            places = [row.first + depth for row, depth in pending]
            picked = logits if len(places) == logits.shape[0] else logits[places]
            tokens = choose(picked, [row.task.sampling for row, _ in pending])
            odds = self._logprobs(picked, pending, tokens)
            further: list[tuple[_Row, int]] = []
            for (row, depth), token, probability in zip(pending, tokens, odds, strict=True):
                task = row.task
                if token is None:
                    outcomes.pop(task, None)
                    broken.append(task)
                    continue
                outcome = outcomes.setdefault(task, _Outcome())
                self._take(task, outcome, token, probability)
                if depth < row.outputs - 1:
                    self.proposed += 1
                    if outcome.finish is None and task.proposed[depth] == token:
                        self.accepted += 1
                        task.cached += 1
                        further.append((row, depth + 1))
            pending = further
        # Nobody leaves before nothing can fail any more: who has left gets what is in its parcel.
        for task in broken:
            parcels.append((task.mailbox, _nonsense()))
            task.cached, task.doubtful = 0, True
            self.leave(task)
        for task, outcome in outcomes.items():
            task.doubtful = False
            parcels.append((task.mailbox, self._step_of(task, outcome)))
            task.proposed = []
            if outcome.finish is not None:
                self.leave(task)
        return parcels

    def _take(
        self, task: Task, outcome: _Outcome, token: int, probability: TokenLogprob | None
    ) -> None:
        if self.vocabulary.ends(token):
            outcome.finish = "eos_token"
        else:
            task.tokens.append(token)
            outcome.tokens.append(token)
            outcome.text += task.decoder.feed(token)
            if probability is not None:
                outcome.logprobs.append(probability)
            if len(task.tokens) >= task.limit:
                outcome.finish = "length"
        if outcome.finish is not None:
            outcome.text += task.decoder.finish()

    def _step_of(self, task: Task, outcome: _Outcome) -> TokenStep:
        step = TokenStep(
            outcome.tokens, outcome.text, outcome.logprobs or None, finish=outcome.finish
        )
        if not task.announced:
            task.announced = True
            step.prompt_tokens = task.prompt_tokens
            step.cached_prompt_tokens = task.reused
        return step

    def _logprobs(
        self,
        logits: torch.Tensor,
        pending: Sequence[tuple[_Row, int]],
        tokens: Sequence[int | None],
    ) -> list[TokenLogprob | None]:
        found: list[TokenLogprob | None] = [None] * len(pending)
        wanting = [
            i
            for i, (row, _) in enumerate(pending)
            if row.task.logprobs is not None and tokens[i] is not None
        ]
        if wanting:
            chosen = [token for i in wanting if (token := tokens[i]) is not None]
            counts = [pending[i][0].task.logprobs or 0 for i in wanting]
            for i, token, (own, best) in zip(
                wanting, chosen, logprobs_of(logits[wanting], chosen, counts), strict=True
            ):
                found[i] = self.logprob(token, own, best)
        return found

    def logprob(self, token: int, own: float, best: list[tuple[int, float]]) -> TokenLogprob:
        """A token's log probability as responses give it."""
        text = self.vocabulary.token_text
        return TokenLogprob(
            token_id=token,
            token=text(token),
            logprob=own,
            top=[(i, text(i), value) for i, value in best],
        )

    # ── what generate() does, and what fails ─────────────────────────────────────────────────

    def _go_on(self, job: Job) -> None:
        """One more piece of what goes on beside the batch."""
        assert job.work is not None
        try:
            step = job.work.advance(self.logprob)
        except Exception as error:  # noqa: BLE001 - logged with its traceback in _fail_jobs
            self._fail_jobs([job], error)
            return
        if step is None:
            return
        if isinstance(job, Task) and not job.announced:
            job.announced = True
            step.prompt_tokens = job.prompt_tokens
            step.cached_prompt_tokens = 0
        if step.finish is not None:
            self.leave(job)
        self.hand_over([(job.mailbox, step)])

    def _fail_jobs(self, jobs: Sequence[Job], error: Exception) -> None:
        """The step failed: its requests end, and the engine serves the next ones.

        What the step may have written to the cache is not taken for computed.
        """
        import torch

        for job in jobs:
            job.log.error("the step failed: %s", type(error).__name__, exc_info=error)
            if isinstance(job, Task):
                job.doubtful = True
        failure: EngineRoomError
        if isinstance(error, NoNumbersError):
            failure = _nonsense()
        elif _is_out_of_memory(error):
            failure = ResourceNotAvailableError(
                f"there was no memory left for the step on {self.parts.device}; send it again "
                "later, or load the model with a smaller max_batch_size or max_context"
            )
            if self.parts.device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            failure = InferenceError(
                f"the model failed in a step: {type(error).__name__}: {_first_line(error)}"
            )
        failure.__cause__ = error
        self.fail([job for job in jobs if not job.done], failure)
        dead: Any = getattr(torch, "AcceleratorError", ())
        if dead and isinstance(error, dead):
            raise error  # nothing can be computed on the device any more


def _slot_index(task: Task) -> int:
    assert task.slot is not None
    return task.slot.index


def _tokens_of(row: _Row) -> list[int]:
    task, span = row.task, row.span
    known = task.tokens[span.start : span.end]
    return known + task.proposed[: span.count - len(known)]


def _nonsense() -> InferenceError:
    return InferenceError(
        "the model computed no numbers for the next token (NaN or infinity); its weights are "
        "damaged, or its dtype is too narrow: load it with dtype: float32 or bfloat16"
    )


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # On CPUs and Apple's GPUs torch has no class for it.
    said = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "it does not say why")
