"""Many requests through one Transformers model, a step at a time.

Queue, slots and cancelling are :class:`~engineroom.BatchingEngine`'s; drafts and what requests get
are :class:`~engineroom.engine.Scheduler`'s. A step here packs one token of every decoding request
and chunks of the prompts that are still to be read into one row (:mod:`.attention`), runs the model
once and chooses the next tokens (:mod:`.sampling`).

* A long prompt never stalls the others: beside decoding requests a step reads at most
  ``prefill_chunk`` of its tokens, and fewer where they attend to many (:mod:`.chunking`).
* Where tokens are proposed (:mod:`.drafting`), a decoding request has several in the step.
* What only ``generate()`` can do (beam search; every request of a model whose cache cannot be
  driven) goes on beside, a token of it each step (:mod:`.by_generate`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from engineroom import (
    CPU_LOOP,
    BatchingEngine,
    DecodeLoop,
    HandlerHealth,
    InferenceRequest,
    ResourceNotAvailableError,
    request_logger,
    work_logger,
    work_priority,
)
from engineroom.engine import Constraint, SamplerState, Scheduler, StepBatch, logprob_maker
from engineroom.prompts import PairTokens
from engineroom.sources import PoolingRecipe, vector_sizes
from engineroom_hf_transformers.attention import StepStoppedError
from engineroom_hf_transformers.by_generate import GenerateCall, neutral
from engineroom_hf_transformers.cache import Slots
from engineroom_hf_transformers.chunking import ReadingCost
from engineroom_hf_transformers.drafting import make_drafter
from engineroom_hf_transformers.embedding import EmbeddingJob, recipe_of
from engineroom_hf_transformers.model import forward_of, reading_cost, why_not_driven
from engineroom_hf_transformers.outcomes import Outcomes
from engineroom_hf_transformers.ranking import RankingJob, uses_sigmoid
from engineroom_hf_transformers.step_errors import step_error
from engineroom_hf_transformers.tasks import (
    EmbeddingTask,
    Job,
    PackedSlice,
    Task,
    compose,
    tokens_of,
)
from engineroom_hf_transformers.tokens import Vocabulary

if TYPE_CHECKING:
    import torch

    from engineroom_hf_transformers.loading import Parts
    from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["SILENT", "HfEngine"]

logger = logging.getLogger("engineroom.hf_transformers")

SILENT: Final = frozenset({"embedding", "ranking"})
"""Kinds of models that generate no text."""
_CPU_TOKENS: Final = 128
"""Prompts are read as fast (355 tokens/s) as with 512 (361), in layers of 12 ms instead of 47; a
step can be given up between layers. SmolLM2-135M, two cores, float32."""
_GPU_TOKENS: Final = 1024
_PROMPT_LOGITS: Final = 1 << 26
"""Bytes of a step's logits that tell of prompts, in float32."""
_LEAST_PROMPT_ROWS: Final = 16


class HfEngine(BatchingEngine[Job]):
    """Owns a model and its cache. The constructor looks at the model; run it in a thread.

    :param parts: the loaded model, with everything that belongs to it.
    """

    def __init__(self, parts: Parts, options: HfTransformersOptions, name: str) -> None:
        self.parts = parts
        self.options = options
        self.n_ctx = parts.n_context
        self.n_vocab = parts.n_vocab
        trained = f"(the model was made for {parts.n_trained or 'an unknown number'})"
        self.longer_context = f"set the option max_context higher {trained}"
        self._max_batch_tokens = options.max_batch_tokens or max(
            options.max_batch_size,
            _CPU_TOKENS if parts.device.type == "cpu" else _GPU_TOKENS,
        )
        self.codec = Vocabulary(
            parts.tokenizer,
            parts.end_ids,
            parts.n_vocab,
            options,
            encoder=parts.kind != "causal",
        )
        self.logprob = logprob_maker(self.codec.token_bytes)
        """Makes a log probability as responses give it."""
        self._interrupted = False
        self._generations: set[GenerateCall] = set()
        neutral(parts.model)
        self.recipe: PoolingRecipe | None = recipe_of(parts.folder, parts)
        """How to make embeddings; ``None``: the model is not made for it."""
        if self.recipe is not None:
            config = parts.model.config
            if width := getattr(config.get_text_config(), "hidden_size", None):
                self.vector_sizes = vector_sizes(int(width), options, config.to_dict())
        self._sigmoid = parts.kind == "ranking" and uses_sigmoid(parts.model.config.to_dict())
        self.why_one_by_one = why_not_driven(parts, options)
        """Why requests run one at a time; empty: they are batched."""
        batched = not self.why_one_by_one
        self._forward = forward_of(parts, options) if batched else None
        self._cost = reading_cost(parts) if batched else ReadingCost({})
        self._slots = (
            Slots(self._forward.cache, reuse=options.prefix_cache) if self._forward else None
        )
        drafter = make_drafter(parts, options, self._max_batch_tokens) if batched else None
        self.scheduler: Scheduler[Task] = Scheduler(self, drafter, options.draft_tokens)
        self.memory_bytes = sum(
            (
                parts.weight_bytes,
                parts.draft.weight_bytes if parts.draft is not None else 0,
                self._forward.cache.nbytes if self._forward is not None else 0,
                drafter.nbytes if drafter is not None else 0,
            )
        )
        self._prompt_rows = max(_LEAST_PROMPT_ROWS, _PROMPT_LOGITS // (4 * parts.n_vocab))
        on_cpu = parts.device.type == "cpu"
        super().__init__(
            name,
            CPU_LOOP if on_cpu else DecodeLoop(f"hf_transformers-{name}"),
            max_running=options.max_batch_size if batched else 1,
            max_queue=options.max_queue,
        )
        if self.why_one_by_one and parts.kind not in SILENT:
            logger.warning(
                "model %r runs its requests one at a time, by generate(): %s",
                name,
                self.why_one_by_one,
            )
        self.open()

    def request(
        self,
        request: InferenceRequest,
        tokens: list[int],
        constraint: Constraint | None = None,
    ) -> Task:
        """Queue a request; see :meth:`~engineroom.BatchingEngine.submit`."""
        params = request.params
        new = self.n_ctx if params.max_new_tokens is None else params.max_new_tokens
        task = Task(
            request=request,
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            sampling=SamplerState(params, tokens, constraint),
            decoder=self.codec.decoder(tokens),
            limit=min(len(tokens) + new, self.n_ctx),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            cache_scope=request.cache_scope,
            log=request_logger(logger, request),
            priority=request.priority,
        )
        self.submit(task)
        return task

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Vectors of texts, each as token ids; see :meth:`~engineroom.BatchingEngine.run`."""
        assert self.recipe is not None
        most, stopped = self._max_batch_tokens, self._is_interrupted
        work = EmbeddingJob(self.parts, self.recipe, texts, most, stopped)
        log = work_logger(logger, self.name)
        await self.run(EmbeddingTask(work=work, log=log, priority=work_priority()))
        return work.vectors

    async def rank(self, pairs: Sequence[PairTokens]) -> list[float]:
        """Scores of pairs of texts; see :meth:`~engineroom.BatchingEngine.run`."""
        most, stopped = self._max_batch_tokens, self._is_interrupted
        work = RankingJob(self.parts, pairs, most, stopped, sigmoid=self._sigmoid)
        log = work_logger(logger, self.name)
        await self.run(EmbeddingTask(work=work, log=log, priority=work_priority()))
        return [score for (score,) in work.vectors]

    def health(self) -> HandlerHealth:
        """The engine's own word, and why requests run one at a time, if they do."""
        health = super().health()
        if health.ok and self.why_one_by_one and self.parts.kind not in SILENT:
            detail = f"one request at a time, by generate(): {self.why_one_by_one}"
            return replace(health, detail=detail)
        return health

    # ── slots ────────────────────────────────────────────────────────────────────────────────

    def started(self, task: Job) -> None:
        """Give it a slot of the cache, with as much of its prompt as lies there already."""
        if not isinstance(task, Task):
            return
        if self._slots is None or (task.request.params.num_beams or 1) > 1:
            work = GenerateCall(self.parts, task, self.codec.ends, self._is_interrupted)
            self._generations.add(work)
            task.work = work
            return
        busy = [
            (other.slot, other.tokens[: other.cached])
            for other in self.running
            if isinstance(other, Task) and other.slot is not None
        ]
        task.slot, task.cached = self._slots.take(
            task.tokens[: task.reusable], busy, task.cache_scope
        )
        task.reused = task.cached

    def released(self, task: Job) -> None:
        """Its slot is free; what was computed stays until the slot is given away."""
        if task.work is not None:
            task.work.close()
            if isinstance(task.work, GenerateCall):
                self._generations.discard(task.work)
            task.work = None
        if not isinstance(task, Task):
            return
        if task.slot is not None and self._slots is not None:
            written = len(task.tokens) + len(task.draft)
            self._slots.give_back(
                task.slot, task.tokens[: task.cached], unsound=written if task.cache_invalid else 0
            )
            self.scheduler.forget(task)
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
        if self.scheduler.drafter is not None:
            self.scheduler.drafter.close()
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
            self._step_together(batched)
        for job in [job for job in self.running if job.work is not None]:
            self._go_on(job)

    def _step_together(self, tasks: Sequence[Task]) -> None:
        """Schedule a batch, run it, and hand over what came of it."""
        slices: list[PackedSlice] = []
        try:
            slices = self._schedule(tasks)
            outcomes = Outcomes(self._run(slices), self.codec, self.logprob)
            results = self.scheduler.postprocess(slices, outcomes)
        except StepStoppedError:
            return  # whose step it was has been cancelled; the next turn sees to that
        except Exception as error:  # noqa: BLE001 - logged with its traceback in _fail_jobs
            self._fail_jobs([part.task for part in slices] or list(tasks), error)
            return
        results.send()

    def _schedule(self, tasks: Sequence[Task]) -> list[PackedSlice]:
        decoding = [task for task in tasks if task.decodes]
        self.scheduler.propose(decoding, self._max_batch_tokens // max(1, len(decoding)) - 1)
        most, chunk = self._max_batch_tokens, self.options.prefill_chunk
        return compose(tasks, most, chunk, self._cost, self._prompt_rows)

    def _run(self, slices: Sequence[PackedSlice]) -> torch.Tensor:
        """The logits of a step."""
        assert self._forward is not None
        return self._forward(
            [token for part in slices for token in tokens_of(part)],
            [part.span for part in slices if part.outputs == part.count == 1],
            [part.span for part in slices if not part.outputs == part.count == 1],
            [
                part.span.row + part.count - part.outputs + place
                for part in slices
                for place in range(-part.prompt_rows, part.outputs)
            ],
            self._is_interrupted,
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
        results: StepBatch[Task] = StepBatch(self)
        results.add(job, step)
        results.send()

    def _fail_jobs(self, jobs: Sequence[Job], error: Exception) -> None:
        """The step failed: its requests end, and the engine serves the next ones.

        What the step may have written to the cache is not taken for computed.
        """
        import torch

        for job in jobs:
            job.log.error("the step failed: %s", type(error).__name__, exc_info=error)
            if isinstance(job, Task):
                job.cache_invalid = True
        failure = step_error(error, self.parts.device)
        if isinstance(failure, ResourceNotAvailableError) and self.parts.device.type == "cuda":
            torch.cuda.empty_cache()
        failure.__cause__ = error
        self.fail([job for job in jobs if not job.done], failure)
        dead: Any = getattr(torch, "AcceleratorError", ())
        if dead and isinstance(error, dead):
            raise error  # nothing can be computed on the device any more
