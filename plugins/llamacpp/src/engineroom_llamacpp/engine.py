"""Many requests through one llama.cpp context, a step at a time.

Queue, slots and cancelling are :class:`~engineroom.BatchingEngine`'s; drafts and what requests get
are :class:`~engineroom.engine.Scheduler`'s. A step puts one token of every decoding request and
a chunk of every prompt that is still to be read into one batch (:mod:`.tasks`) and computes it.

* A long prompt never stalls the others: beside decoding requests a step reads at most
  ``prefill_chunk`` of its tokens, and fewer where later ones take longer (:mod:`.pace`).
* Beginnings that an earlier or another running request has are not computed again
  (:mod:`.sequences`).
* What nobody computes with waits in host memory (:mod:`.moving`), so that it costs no step.
* Cells of the unified cache are counted (:mod:`.cells`). When they run out, the youngest request
  gives its cells back and gets them again later; to its caller it only pauses. A request that is
  alone and fills the whole context ends with ``length``.
* Where tokens are proposed (:mod:`.drafting`), a decoding request has several in the step.
* A beam search (:mod:`.beams`) has a sequence a beam.
* Cancelling takes effect before the next step; where the cancelled request is the only one in
  the batch, the computation itself is aborted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Final

from engineroom import (
    CPU_LOOP,
    BatchingEngine,
    ConfigurationError,
    DecodeLoop,
    HandlerHealth,
    InferenceError,
    InferenceRequest,
    request_logger,
)
from engineroom.engine import (
    BatchSlice,
    Constraint,
    Sampler,
    Scheduler,
    StepBatch,
)
from engineroom_llamacpp.beams import Beams
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.drafting import make_drafter
from engineroom_llamacpp.layout import Layout
from engineroom_llamacpp.library import last_error
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.moving import Mover
from engineroom_llamacpp.options import LlamaCppOptions
from engineroom_llamacpp.outcomes import Outcomes, nonsense
from engineroom_llamacpp.pace import PromptPace
from engineroom_llamacpp.sequences import CellSequence, Origin, Sequences
from engineroom_llamacpp.tasks import Task, compose, compose_tokens, contents, decode_alone

if TYPE_CHECKING:
    from engineroom_llamacpp.embedding import EmbeddingEngine

__all__ = ["LlamaEngine", "Task"]

logger = logging.getLogger("engineroom.llamacpp")

_MASKED_FUSED: Final = 0.15
"""What a masked cell takes of the time of another, where attention is fused: 0.17 µs of 1.1 with
SmolLM2 on one core. Where it is not, all of them are computed."""
_ABORTED: Final = 2
_NO_ROOM: Final = 1


class LlamaEngine(BatchingEngine[Task]):
    """Owns a model and its context.

    The constructor loads the context; run it outside of the event loop.

    :param draft: the model that proposes tokens, if there is one; the engine closes it.
    :param prompt_cache: bytes of host memory for prompts that wait to be used again.
    """

    def __init__(
        self,
        model: LlamaModel,
        options: LlamaCppOptions,
        name: str,
        draft: LlamaModel | None = None,
        prompt_cache: int = 0,
    ) -> None:
        self.codec = self.model = model
        self.n_vocab = model.n_vocab
        self.options = options
        drafts = options.prompt_lookup or draft is not None
        if drafts and model.has_states:
            raise ConfigurationError(
                f"{'prompt_lookup' if draft is None else 'draft_model'}: this model keeps states, "
                "which cannot be set back behind tokens that turn out wrong; leave it out"
            )
        self._context = LlamaContext(
            model, options, outputs=1 + options.draft_tokens if drafts else 1
        )
        self.n_ctx = self._context.n_ctx
        self.longer_context = (
            f"set the option n_ctx higher (the model was trained for {model.n_ctx_train})"
        )
        self.threads = self._context.threads
        self.on_gpu = self._context.on_gpu
        self.most_beams = min(self._context.most_sequences, self._context.n_batch)
        """Most beams of a request."""
        self.sequences = Sequences(
            self._context,
            self._context.sequences,
            self._context.cells,
            # A state cannot be set back, and a window's cells are used again when it has passed.
            reuse=options.prefix_cache and self._context.keeps_all,
            shared=self._context.unified,
        )
        self.mover = Mover(self._context, self.sequences, prompt_cache)
        self.layout = Layout(self._context, self.sequences, options.draft_tokens if drafts else 0)
        try:
            drafter = make_drafter(draft, options, max(self.n_ctx, self._context.cells))
        except BaseException:
            self._context.close()
            raise
        self.scheduler: Scheduler[Task] = Scheduler(self, drafter, options.draft_tokens)
        masked = _MASKED_FUSED if options.flash_attn != "off" else 1.0
        self._paces = {
            adapter: PromptPace(options.prefill_chunk, masked, self._context.tile)
            for adapter in (None, *model.adapters_by_name)
        }
        self._outcomes = Outcomes(model, self._context)
        self._beams = Beams(model, self._context, self.sequences, self._outcomes.ends)
        loop = DecodeLoop(f"llamacpp-{name}") if self._context.on_gpu else CPU_LOOP
        super().__init__(name, loop, max_running=options.n_parallel, max_queue=options.max_queue)
        self.embedder: EmbeddingEngine | None = None
        """Makes embeddings with the same weights, if the model can; set by whoever loads it."""
        self._adapter: str | None = None
        # Nobody takes turns, and nobody proposes tokens.
        self._plain = drafter is None and not model.adapters_by_name
        self.preemptions = 0
        """How often a request gave its cells back to let another go on."""
        self.open()

    def request(
        self,
        request: InferenceRequest,
        tokens: list[int],
        constraint: Constraint | None = None,
    ) -> Task:
        """Queue a request; see :meth:`~engineroom.BatchingEngine.submit`."""
        params = request.params
        room = self.n_ctx - len(tokens)
        beams = params.num_beams or 1
        if beams > 1:
            room //= beams
        new = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        return self.submit(
            Task(
                tokens=list(tokens),
                prompt_tokens=len(tokens),
                sampler=Sampler(params, tokens, constraint),
                limit=len(tokens) + new,
                logprobs=params.logprobs,
                prompt_logprobs=params.prompt_logprobs,
                cache_scope=request.cache_scope,
                adapter=request.adapter,
                beams=self._beams.search(params, new),
                log=request_logger(logger, request),
                priority=request.priority,
            )
        )

    def health(self) -> HandlerHealth:
        """The engine's own word, and how many of the proposed tokens were right."""
        health = super().health()
        right, proposed = self.scheduler.accepted, self.scheduler.proposed
        if health.ok and proposed:
            detail = f"{right} of {proposed} proposed tokens were right ({right / proposed:.0%})"
            return replace(health, detail=detail)
        return health

    # ── slots ────────────────────────────────────────────────────────────────────────────────

    def may_start(self, task: Task) -> bool:
        """Whether there are sequences and cells for it, beside what is promised."""
        running = self.running
        if task.run_alone or any(other.run_alone for other in running):
            return False
        # More beams than there are requests at one time are searched with alone.
        if sum(other.width for other in running) + task.width > self.options.n_parallel:
            return False
        if not self.mover.may_displace(running, self._context.n_batch):
            return False
        # Promised is all that running requests still have to read, and a token each.
        promised = self.sequences.cells.busy + sum(other.cells_needed for other in running)
        room = self.sequences.cells.count - promised - len(task.tokens) - task.width
        if room >= 0 or task.beams is not None:
            return room >= 0
        known = task.tokens[: task.reusable]
        return room + self.sequences.common(known, self._contents(task.origin)) >= 0

    def started(self, task: Task) -> None:
        """Give it a sequence, with as much of its prompt as is in the cache already."""
        if task.beams is None:
            sequence, task.cached = self.sequences.take(
                task.tokens[: task.reusable], self._contents(task.origin), task.origin
            )
        else:
            # Reuse changes the last digits, and beams weigh what is nearly as likely: the same
            # request would find another text the second time.
            sequence = self.sequences.begin(task.origin)
        task.sequences = [sequence]
        self.layout.started(task, self.running)
        self.mover.go_on(task)
        task.cache_invalid = False
        if task.beams is None and task.reusable == len(task.tokens):
            self.mover.look_up(task)
        if task.reused is None:
            task.reused = task.cached
            if task.coming:
                piece, common = task.coming[0]
                task.reused = piece.start + common
        if task.beams is not None:
            task.beams.restart()

    def released(self, task: Task) -> None:
        """Its sequences are unused; what was computed stays until they are given away."""
        kept = [] if task.cache_invalid else task.tokens[: task.cached]
        self.scheduler.forget(task)
        for sequence in task.sequences[1:]:
            self.sequences.give_back(sequence)
        self.sequences.give_back(task.sequences[0], kept)
        task.sequences = []
        task.draft = []
        task.coming = []
        task.cached = 0

    def interrupt(self, on: bool) -> None:
        """Abort the computation."""
        self._context.abort.set(on)
        if self.scheduler.drafter is not None:
            self.scheduler.drafter.interrupt(on)

    def shut(self) -> None:
        """Free the context, and the drafter."""
        self.mover.store.clear()
        self._context.close()
        if self.scheduler.drafter is not None:
            self.scheduler.drafter.close()
            logger.info(
                "model %r: %d of %d proposed tokens were right",
                self.name,
                self.scheduler.accepted,
                self.scheduler.proposed,
            )

    def cache_usage(self) -> float:
        """Share of the cells that running requests have."""
        return self.sequences.cells.busy / self.sequences.cells.count

    def _contents(self, origin: Origin) -> Iterator[tuple[CellSequence, list[int]]]:
        """What running requests of this origin have in the cache."""
        return contents(task for task in self.running if task.origin == origin)

    def _preempt(self) -> None:
        """Let the youngest running request wait until there is room to read it again."""
        task = max(self.running, key=lambda t: t.rank)
        self.preemptions += 1
        task.log.debug("%d tokens give way; the request waits for room", task.cached)
        self.mover.pause(task, self.waiting)
        self.wait_again(task)

    def _lay_out(self) -> None:
        """Go over to the other layout of the cache; running requests pause."""
        if (error := self.layout.refused) is not None:
            logger.warning("model %r: %s", self.name, error)
            self.fail([task for task in self.running if not self.layout.fits(task)], error)
            return
        for task in list(self.running):
            self.mover.pause(task, self.waiting)
            self.wait_again(task)
        self.mover.keep_all()
        self.layout.change()

    # ── a step ───────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """Schedule a batch, run it, and hand over what came of it."""
        if self.layout.is_wrong(self.running):
            self._lay_out()
            return
        self.mover.begin(self.running, self._context.n_batch)
        if self._plain and decode_alone(self.running):
            self._step_of_tokens()
        else:
            self._step_of_any()

    def _step_of_tokens(self) -> None:
        """A token of each request, and nothing else: what nearly all steps are.

        What is asked and counted for prompts, beams, drafts and adapters would take a tenth of a
        millisecond of each such step, of a small model's two to five.
        """
        slices = compose_tokens(self.running, self._context, self.sequences)
        if not slices:
            self._step_of_any()
            return
        began = perf_counter()
        if status := self._context.decode():
            self._not_computed(slices, status)
            return
        seconds = perf_counter() - began
        grow, cut = self.sequences.cells.grow, self.sequences.cut
        for part in slices:
            grow(part.task.sequences[0].chain, 1)
        results = self.scheduler.postprocess(slices, self._outcomes)
        for part in slices:
            part.task.run_alone = False
            if part.task.cached < part.task.sequences[0].chain.length:
                cut(part.task.sequences[0], part.task.cached)
        self._hand_over(slices, results)
        self.mover.computed(len(slices), 0, seconds)
        self._paces[None].end_of_tokens(perf_counter() - began)

    def _step_of_any(self) -> None:
        slices = self._schedule()
        if not slices:
            return
        decoding = slices[0].task.decodes
        beside = any(task.decodes for task in self.running)
        rows = sum(part.count * len(part.task.sequences) for part in slices)
        read = sum(part.count for part in slices if not part.task.decodes)
        began = perf_counter()
        if status := self._context.decode():
            self._not_computed(slices, status)
        else:
            seconds = perf_counter() - began
            self._postprocess(slices)
            self.mover.computed(rows, read, seconds)
            pace = self._paces[self._adapter]
            pace.end(perf_counter() - began, decoding=decoding, beside=beside)
            self.mover.store.dearer = pace.dearer

    def _schedule(self) -> list[BatchSlice[Task]]:
        """Fill the context's batch; where there is no room, the youngest give way."""
        tasks = self._whose_turn()
        self.mover.bring(tasks)
        decoding = (task for task in tasks if task.decodes and task.beams is None)
        self.scheduler.propose(decoding, self._context.n_batch // max(1, len(tasks)) - 1)
        slices = self._compose(tasks)
        while not slices and self.running:
            if len(self.running) == 1:
                raise RuntimeError("a lone request has no room in the cache")
            self._preempt()
            slices = self._compose(self._whose_turn())
        return slices

    def _compose(self, tasks: Sequence[Task]) -> list[BatchSlice[Task]]:
        self._context.use_adapter(self._adapter)
        return compose(tasks, self._context, self.sequences, self._paces[self._adapter])

    def _whose_turn(self) -> list[Task]:
        """Running requests of one adapter. The adapters take turns, a step each."""
        names = list(dict.fromkeys(task.adapter for task in self.running))
        last = names.index(self._adapter) if self._adapter in names else -1
        if names:
            self._adapter = names[(last + 1) % len(names)]
        return [task for task in self.running if task.adapter == self._adapter]

    def _postprocess(self, slices: Sequence[BatchSlice[Task]]) -> None:
        """Each request's next tokens, from the step's logits; what is wrong leaves the cache."""
        for part in slices:
            for sequence in part.task.sequences:
                self.sequences.cells.grow(sequence.chain, part.count)
        results = self.scheduler.postprocess(
            (part for part in slices if part.task.beams is None), self._outcomes
        )
        for part in slices:
            if part.task.beams is not None:
                self._beams.go_on(part, results)
            else:
                self.sequences.cut(part.task.sequences[0], part.task.cached)
            if part.outputs:
                part.task.run_alone = False
        self._hand_over(slices, results)

    def _hand_over(self, slices: Sequence[BatchSlice[Task]], results: StepBatch[Task]) -> None:
        results.send()
        if results.without_numbers:
            self._no_numbers(results.without_numbers, alone=len(slices) == 1)

    # ── what fails ───────────────────────────────────────────────────────────────────────────

    def _not_computed(self, slices: Sequence[BatchSlice[Task]], status: int) -> None:
        """Keep what can be kept of an aborted step, make room, or fail the step's requests."""
        if status == _ABORTED:
            for part in slices:
                self._keep_aborted(part.task)
        elif status == _NO_ROOM and self.sequences.idle:
            self.sequences.forget_idle()
        elif status == _NO_ROOM and len(self.running) > 1:
            self._preempt()
        else:
            self._fail([part.task for part in slices], status)

    def _keep_aborted(self, task: Task) -> None:
        """Of an aborted step, what had been computed already is right."""
        if len(task.sequences) != 1:
            task.cache_invalid = True
            return
        (sequence,) = task.sequences
        length = self._context.length(sequence.index)
        if task.reusable < len(task.tokens):  # its logits are wanted, too
            length = min(length, task.cached)
        self.sequences.cells.grow(sequence.chain, max(0, length - task.cached))
        task.cached = max(task.cached, min(length, len(task.tokens)))
        self.sequences.cut(sequence, task.cached)

    def _no_numbers(self, tasks: Sequence[Task], *, alone: bool) -> None:
        """NaN or infinity came out for requests.

        Where attention is not fused, what is masked has no weight, but no weight times NaN is
        NaN: one request's cells can spoil what all others compute. So the cache is emptied, all
        are read again, and those that are in question run alone: there they fail or go on.
        """
        for task in tasks:
            task.cache_invalid = True
        if alone:
            for task in tasks:
                task.log.error("the model computed no numbers for the next token")
            self.fail(tasks, nonsense())
        else:
            for task in tasks:
                task.run_alone = True
        for task in list(self.running):
            task.cache_invalid = True
            self.wait_again(task)
        self.sequences.forget_idle()
        self.mover.store.clear()
        self._context.clear()

    def _fail(self, tasks: Sequence[Task], status: int) -> None:
        """The computation failed: its requests end, the engine goes on."""
        why = last_error("it does not say why")
        for task in tasks:
            task.cache_invalid = True
            task.log.error("llama_decode returned %d: %s", status, why)
        error = InferenceError(f"llama.cpp could not compute the step (status {status}): {why}")
        self.fail(tasks, error)
