"""One running vLLM engine: requests into it, and tokens out of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar

from engineroom import (
    Border,
    ConfigurationError,
    HandlerHealth,
    InferenceError,
    InferenceRequest,
    QueueFullError,
    TokenStep,
    turn_of,
    work_logger,
    work_priority,
)
from engineroom.engine import (
    TOO_LONG,
    Engine,
    Likeliest,
    StepWatch,
    grammar_of,
    reasoning_budget_of,
)
from engineroom.prompts import (
    check_adapter,
    check_prompt,
    check_prompt_logprobs,
    check_texts,
    check_token_ids,
)
from engineroom_vllm.beams import search
from engineroom_vllm.failures import Failures
from engineroom_vllm.folder import ModelFolder
from engineroom_vllm.footprint import Footprint
from engineroom_vllm.library import Library
from engineroom_vllm.lifecycle import Lifecycle
from engineroom_vllm.log import EngineLog
from engineroom_vllm.options import VLLMOptions
from engineroom_vllm.outputs import Outputs
from engineroom_vllm.prompt_rows import prompt_steps
from engineroom_vllm.reasoning import within_budget
from engineroom_vllm.running import Running
from engineroom_vllm.sampling import beam_search, check_params, sampling_arguments
from engineroom_vllm.text import TextCodec
from engineroom_vllm.turnstile import Turnstile

__all__ = ["VLLMEngine"]

logger = logging.getLogger("engineroom.vllm")

_T = TypeVar("_T")
_LARGE_BIAS: Final = 4096
"""Entries of a ``logit_bias`` that take a third of a millisecond."""


class VLLMEngine(Engine):
    """Owns an engine's processes. Made by :mod:`.loading`; ends with :meth:`close`.

    :param llm: vLLM's ``AsyncLLM``, ready.
    :param footprint: the processes that belong to it.
    :param log: what they write.
    :param when_closed: called once the engine is closed.
    """

    longer_context = "set the option max_model_len higher"

    def __init__(
        self,
        library: Library,
        llm: Any,
        *,
        name: str,
        folder: ModelFolder,
        options: VLLMOptions,
        footprint: Footprint,
        log: EngineLog,
        when_closed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.options = options
        self.footprint = footprint
        self._library = library
        facts = library.facts(llm)
        self.n_ctx: int = facts.context
        self.n_vocab: int = facts.vocabulary
        self.parallel: int = facts.parallel
        self.cache_tokens: int = facts.cache_tokens
        self.embeds: bool = library.pools(llm.vllm_config)
        self.vector_sizes = library.vectors(llm.vllm_config, options) if self.embeds else None
        self.codec = TextCodec(llm.get_tokenizer(), options)
        own = self.codec.end_token
        self._ends = folder.end_tokens | ({own} if own is not None else set())
        self._outputs = Outputs(self.codec, self._ends)
        self._adapters = {
            module.name: library.lora(module.name, number, module.path)
            for number, module in enumerate(options.lora_modules, 1)
        }
        self._one_large_bias = asyncio.Lock()
        # Texts: as many as the engine computes in a step, and as many that wait for the next.
        # Requests: as many as it has places for, and some that are at hand when one ends.
        self._ahead = min(1 + self.parallel // 8, options.max_queue)
        self._turnstile = Turnstile(
            2 * self.parallel if self.embeds else self.parallel + self._ahead
        )
        self._orders = itertools.count()
        self._running: dict[int, Running] = {}
        self._steps = StepWatch(logger)
        self.lifecycle = Lifecycle(library, llm, name, footprint, log, when_closed)
        self._failures = Failures(library, self.lifecycle)

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    async def wake(self) -> None:
        """Listen to the engine from now on, on this event loop.

        :raises EngineDeadError: it has ended already.
        :raises ConfigurationError: it can neither generate text nor make embeddings.
        """
        with Border(logger, f"model {self.name!r}: listening to vLLM's engine"):
            try:
                tasks = await self._library.wake(self.lifecycle.llm)
            except self._library.dead_error as error:
                raise self.lifecycle.gone() from error.with_traceback(None)
        if self.embeds and "embed" not in tasks:
            raise ConfigurationError(
                f"vLLM runs model {self.name!r} for {', '.join(tasks)}, not for embeddings; save "
                "it without its head (transformers' AutoModel), or use hf_transformers"
            )

    async def generate(
        self, request: InferenceRequest, tokens: list[int], tail: str | None = None
    ) -> AsyncGenerator[TokenStep, None]:
        """Run a request; a step for each token. Closing the generator aborts it in the engine.

        :param tail: how the prompt ends that a chat template wrote.

        :raises ConfigurationError: the prompt does not fit, or a parameter is out of reach.
        :raises QueueFullError: too many requests wait.
        :raises EngineDeadError: the engine has ended.
        """
        self._check(request, tokens)
        if self.lifecycle.ended:
            raise self.lifecycle.gone()
        order = next(self._orders)
        running = self._running[order] = Running(len(tokens), tail=tail, prompt=len(tokens))
        steps = self._beams if beam_search(request.params) else self._tokens
        most = max(0, self.options.max_queue - self._ahead)
        try:
            async with self._turnstile.passed(
                request.key_name or "", request.priority, most=most, full=self._full
            ):
                if self.lifecycle.ended:  # it did while it waited
                    raise self.lifecycle.gone()
                # From here on: whoever waited for others' keys would wait for them once more.
                running.turn = int(1000 * turn_of(request.priority, time.monotonic()))
                self._came()
                with self._failures.typed():
                    async with aclosing(steps(request, tokens, running, order)) as generated:
                        async for step in generated:
                            self._steps.begins(self.name)  # the next one
                            yield step
        finally:
            self._went(order)

    async def embed(self, texts: Sequence[list[int]]) -> list[list[float]]:
        """Vectors of texts, each as token ids. Cancelling aborts what is in the engine.

        :raises ConfigurationError: a text does not fit.
        :raises QueueFullError: too many requests wait.
        :raises EngineDeadError: the engine has ended.
        """
        check_texts(texts, self.n_ctx)
        if self.lifecycle.ended:
            raise self.lifecycle.gone()
        if len(self._running) - self.parallel >= self.options.max_queue:
            raise self._full()
        owner, priority = work_logger(logger).key_name, work_priority()
        order = next(self._orders)
        running = self._running[order] = Running(0)
        vectors: list[list[float]] = [[] for _ in texts]
        todo = iter(enumerate(texts))  # some requests have many

        async def work() -> None:
            for number, ids in todo:
                async with self._turnstile.passed(owner, priority):
                    self._came()
                    vectors[number] = await self._vector(ids, f"{order}-{number}", running)

        try:
            await self._failures.together(
                [work() for _ in range(min(len(texts), 2 * self.parallel))]
            )
        finally:
            self._went(order)
        return vectors

    def _came(self) -> None:
        if self._turnstile.inside == 1:
            self._steps.begins(self.name)

    def _went(self, order: int) -> None:
        del self._running[order]
        if not self._running:
            self._steps.ends()

    async def _vector(self, ids: list[int], request_id: str, running: Running) -> list[float]:
        if self.lifecycle.ended:
            raise self.lifecycle.gone()
        running.ids.append(request_id)
        running.tokens += len(ids)
        numbers: list[float] = []
        try:
            outputs = self._library.encode(self.lifecycle.llm, ids, request_id)
            async with aclosing(outputs):
                async for output in outputs:
                    self._steps.begins(self.name)
                    numbers = self._library.vector(output)
        finally:
            running.ids.remove(request_id)
            running.tokens -= len(ids)
        if not numbers and self.lifecycle.ended:
            raise self.lifecycle.gone()
        if not numbers or not all(map(math.isfinite, numbers)):
            raise InferenceError(
                "the model computed no numbers for a text; its files may be damaged"
            )
        return numbers

    def _check(self, request: InferenceRequest, tokens: Sequence[int]) -> None:
        check_prompt(tokens, self.n_ctx, self.longer_context)
        check_prompt_logprobs(tokens, request.params.prompt_logprobs)
        check_token_ids(self.n_vocab, prompt=request.prompt_token_ids)
        check_adapter(request.adapter, self._adapters, "lora_modules")
        speculative = self.options.speculative_config is not None
        check_params(request.params, self.n_vocab, speculative=speculative)
        limited = self.codec.traits.limits(request)
        if limited and (beam_search(request.params) or not self.codec.knows_bytes):
            raise ConfigurationError(
                "reasoning_budget: with vLLM it is honoured without num_beams, and where the "
                "model's tokeniser tells the bytes of its tokens; leave it out, or use llamacpp"
            )
        if beam_search(request.params) and request.constrained:
            raise ConfigurationError(
                "num_beams together with tools that must be called, or are strict: vLLM's beams "
                "are searched by the model's own probabilities; leave it out, or use "
                "hf_transformers"
            )

    def _full(self) -> QueueFullError:
        return QueueFullError(
            f"{self.options.max_queue} requests wait for model {self.name!r} already, which is the "
            f"bound (option max_queue={self.options.max_queue}); send it again later"
        )

    def _tokens(
        self, request: InferenceRequest, tokens: list[int], running: Running, order: int
    ) -> AsyncGenerator[TokenStep, None]:
        budget = reasoning_budget_of(self.codec, request, running.tail)
        if budget is None:
            return self._answer(request, tokens, running, f"{order}", running.tail)
        numbers = itertools.count()

        def part(
            request: InferenceRequest, ids: list[int], tail: str | None, forced: int | None
        ) -> AsyncGenerator[TokenStep, None]:
            name, closed = f"{order}-{next(numbers)}", tail == budget.end
            return self._answer(request, ids, running, name, tail, forced, closed=closed)

        room, piece = self.n_ctx - len(tokens), self.codec.piece
        return within_budget(
            request, tokens, budget, part, tail=running.tail, room=room, piece=piece
        )

    async def _answer(
        self,
        request: InferenceRequest,
        tokens: list[int],
        running: Running,
        name: str,
        tail: str | None,
        forced: int | None = None,
        *,
        closed: bool = False,
    ) -> AsyncGenerator[TokenStep, None]:
        """:param forced: the one token that may come, and is the last.
        :param closed: it goes on behind reasoning that was ended.
        """
        # Where there may be more than content, a stop sequence that is no content ends nothing.
        stops = () if self.codec.traits.parses(request) else request.stop_sequences or ()
        stop_tokens = await self.codec.find_stop_tokens(stops)
        if len(request.params.logit_bias or ()) > _LARGE_BIAS:
            # vLLM goes through it on the event loop: for one of them, then for other events.
            async with self._one_large_bias:
                await asyncio.sleep(0)
        arguments = sampling_arguments(
            request.params,
            room=self.n_ctx - len(tokens),
            n_vocab=self.n_vocab,
            stop_token_ids=stop_tokens,
            written=len(tokens) - running.prompt,
        )
        grammar = None
        if forced is None:
            grammar = await grammar_of(self.codec, request, tail, closed=closed)
        else:
            arguments |= {"max_tokens": 1, "min_tokens": 0, "allowed_token_ids": [forced]}
        sampling = self._library.sampling(arguments, grammar, detokenize=not self.codec.knows_bytes)
        first = True
        async with aclosing(self._ask(request, tokens, sampling, name, running)) as outputs:
            async for output in outputs:
                if first:
                    first = False
                    yield TokenStep(
                        prompt_tokens=len(tokens),
                        cached_prompt_tokens=max(output.num_cached_tokens or 0, 0),
                        prompt_tail=tail,
                    )
                    if (count := request.params.prompt_logprobs) is not None:
                        rows, make = output.prompt_logprobs, self._outputs.make_logprob
                        async with aclosing(prompt_steps(rows, tokens, count, make)) as told:
                            async for step in told:
                                yield step
                answer = output.outputs[0]
                if answer.finish_reason == "abort":
                    raise self.lifecycle.gone()
                if answer.finish_reason == "error" and grammar is not None:
                    raise ConfigurationError(TOO_LONG)
                for step in self._outputs.steps(answer, request.params.logprobs):
                    running.tokens += len(step.token_ids)
                    yield step

    def _ask(
        self,
        request: InferenceRequest,
        tokens: list[int],
        sampling: Any,
        request_id: str,
        running: Running,
    ) -> AsyncGenerator[Any, None]:
        running.ids.append(request_id)
        return self._library.generate(
            self.lifecycle.llm,
            tokens,
            sampling,
            request_id,
            turn=running.turn,
            cache_salt=request.cache_scope or None,
            lora=self._adapters.get(request.adapter or request.model_id),
        )

    # ── beams ────────────────────────────────────────────────────────────────────────────────

    async def _beams(
        self, request: InferenceRequest, tokens: list[int], running: Running, order: int
    ) -> AsyncGenerator[TokenStep, None]:
        """The best of several sequences, by requests for one token each; vLLM has no other way."""
        params = request.params
        room = self.n_ctx - len(tokens)
        limit = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        numbers = itertools.count()
        cached: list[int] = []

        async def likeliest(generated: tuple[int, ...], count: int) -> Likeliest:
            one = {"max_tokens": 1, "temperature": 0.0, "logprobs": count}
            sampling = self._library.sampling(one)
            ids = [*tokens, *generated]
            name = f"{order}-{next(numbers)}"
            choices: Likeliest = ()
            async with aclosing(self._ask(request, ids, sampling, name, running)) as outputs:
                async for output in outputs:
                    self._steps.begins(self.name)
                    cached.append(max(output.num_cached_tokens or 0, 0))
                    answer = output.outputs[0]
                    if answer.finish_reason == "abort":
                        raise self.lifecycle.gone()
                    if answer.logprobs:
                        values = ((i, entry.logprob) for i, entry in answer.logprobs[0].items())
                        choices = sorted(values, key=lambda choice: -choice[1])[:count]
            running.ids.remove(name)
            return choices

        async def expand(sequences: list[tuple[int, ...]], count: int) -> list[Likeliest]:
            return await self._failures.together([likeliest(g, count) for g in sequences])

        best = await search(
            expand,
            beams=params.num_beams or 1,
            limit=limit,
            ends=self._ends,
            early_stopping=bool(params.early_stopping),
            least=params.logprobs or 0,
            least_tokens=params.least_tokens,
        )
        yield TokenStep(
            prompt_tokens=len(tokens),
            cached_prompt_tokens=cached[0] if cached else 0,
            prompt_tail=running.tail,
        )
        for token, choices in zip(best.tokens, best.choices, strict=True):
            if token in self._ends:
                yield TokenStep(finish="eos_token")
                return
            step = TokenStep((token,), self.codec.piece(token))
            if params.logprobs is not None:
                step.logprobs = (self._outputs.logprob(token, choices, params.logprobs),)
            yield step
        yield TokenStep(finish="length")

    # ── life and death ───────────────────────────────────────────────────────────────────────

    def health(self) -> HandlerHealth:
        """Requests running and waiting, as this side knows them, and how full the cache is."""
        count = len(self._running)
        death = self.lifecycle.death
        usage = None
        if self.cache_tokens:
            used = sum(running.tokens for running in self._running.values())
            usage = min(1.0, used / self.cache_tokens)
        stuck = "" if death else self._steps.look()
        return HandlerHealth(
            ok=not death and not self.lifecycle.closing and not stuck,
            detail=death or stuck,
            dead=bool(death),
            num_requests_running=min(count, self.parallel),
            num_requests_waiting=max(0, count - self.parallel),
            kv_cache_usage=usage,
        )

    async def stop(self) -> None:
        """Take no more requests, and end those that run; each is told that it has ended."""
        await self.lifecycle.stop([i for running in self._running.values() for i in running.ids])

    def close(self) -> None:
        """End the processes; see :meth:`.Lifecycle.close`. Blocks for some seconds."""
        self.lifecycle.close()
