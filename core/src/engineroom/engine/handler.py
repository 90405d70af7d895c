"""From an engine to a whole handler: what runtimes with an engine for each model do alike.

A handler over :class:`~engineroom.BatchingEngine` subclasses :class:`EngineHandler`, which loads in
a thread, gives back what nobody waits for, reads prompts, refuses what does not fit, and queues
requests. The runtime says how its models are made, and what it can do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pydantic import BaseModel

from engineroom.border import in_thread
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.config.options import parse_options
from engineroom.engine.background_load import BackgroundLoad
from engineroom.engine.base import Engine
from engineroom.errors import ConfigurationError, ModelNotFoundError
from engineroom.generation.mailbox import Mailbox
from engineroom.generation.steps import TokenStep
from engineroom.generation.traits import PLAIN, ModelTraits
from engineroom.handlers.base import Embeddings, HandlerHealth, Scores
from engineroom.handlers.token_handler import TokenHandler
from engineroom.prompts.limits import check_prompt, check_prompt_logprobs, check_token_ids
from engineroom.prompts.reading import (
    in_lane,
    read_prompt,
    stop_reading,
    stuck_in_reading,
    tokens_of_pairs,
    tokens_of_texts,
)
from engineroom.prompts.work import check_stopped
from engineroom.schemas import InferenceRequest
from engineroom.sources.source import find_source
from engineroom.telemetry import work_key

if TYPE_CHECKING:
    from engineroom.engine.constraint import Constraint
    from engineroom.engine.constraints import GrammarCompiler

__all__ = ["EngineHandler"]

_COUNTED_CONTEXTS: Final = 8
"""A prompt that is only counted may be so many times as long as the context: a client counts to
see how much it has to leave out."""
_OF_THE_END: Final = frozenset({"min_tokens", "ignore_eos"})
_LOOKED_UP: Final = 1024
"""After so many tokens it is looked whether anybody still waits for their bytes."""


class EngineHandler(TokenHandler):
    """Base class of a runtime that has an :class:`Engine` for each model.

    Write ``options_class``, :meth:`make_engine`, :meth:`is_native`, ``capabilities``, and what of
    the others differs. ``can_handle`` knows engines by their class :class:`Engine`.
    """

    options_class: ClassVar[type[BaseModel]]
    """What ``options:`` of a model may say."""

    # ── what a runtime writes ────────────────────────────────────────────────────────────────

    @abstractmethod
    def make_engine(self, config: ModelConfig, options: Any) -> Engine:
        """Load the model. Blocks, in a thread; import the runtime here, not before.

        :param options: an ``options_class``.
        :raises ModelNotFoundError: there is no such file.
        :raises ConfigurationError: an option is wrong, or the file is damaged.
        :raises ResourceNotAvailableError: there is no memory for it.
        """

    def free_engine(self, engine: Any) -> None:
        """Give back what :meth:`make_engine` made. Blocks, in a thread."""
        engine.close()

    def is_native(self, path: Path) -> bool:
        """Whether a file or folder that is there has the runtime's own format; see ``can_load``."""
        return False

    def is_native_name(self, source: str) -> bool:
        """The same of what is not here, or not yet, by its name alone."""
        return False

    def generator(self, engine: Any) -> Any:
        """The engine that generates text, where there are others.

        :raises ConfigurationError: this model generates none.
        """
        return engine

    def embedder(self, engine: Any) -> Any:
        """The engine that makes embeddings.

        :raises ConfigurationError: this model makes none.
        """
        raise ConfigurationError(f"handler {self.name!r} makes no embeddings")

    def ranker(self, engine: Any) -> Any:
        """The engine that scores documents.

        :raises ConfigurationError: this model scores none.
        """
        raise ConfigurationError(f"handler {self.name!r} ranks no documents")

    def check(self, engine: Any, request: InferenceRequest, tokens: list[int]) -> None:
        """Refuse what the model cannot do, before the request is queued.

        :param tokens: the prompt.
        :raises ConfigurationError: the prompt is empty or longer than the context, or it or a
            ``logit_bias`` names a token that the model does not have, or it has more
            ``prompt_logprobs`` than are told.
        """
        check_prompt(tokens, engine.n_ctx, engine.longer_context)
        check_prompt_logprobs(tokens, request.params.prompt_logprobs)
        ids, bias = request.prompt_token_ids, request.params.logit_bias
        check_token_ids(engine.n_vocab, prompt=ids, bias=bias)

    # ── what is the same on all of them ──────────────────────────────────────────────────────

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        """True for models that a handler of this name loaded."""
        return loaded_model.handler_name == self.name and isinstance(
            loaded_model.model_object, Engine
        )

    def can_load(self, config: ModelConfig) -> bool:
        """By what lies there, or by name where nothing does yet."""
        source = config.source or ""
        try:
            path = find_source(source)
        except (ConfigurationError, ModelNotFoundError):
            path = None
        return self.is_native_name(source) if path is None else self.is_native(path)

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        """Load in a thread; see :meth:`make_engine`. A load that is cancelled is given back."""
        options = parse_options(self.options_class, config)
        load = BackgroundLoad(
            lambda: self.make_engine(config, options), self.free_engine, name=self.name
        )
        return self.loaded_model(config, await load.result())

    def loaded_model(self, config: ModelConfig, engine: Any) -> LoadedModel:
        """What the manager is told of an engine that is ready."""
        return LoadedModel(
            model_id=config.model_id,
            model_object=engine,
            config=config,
            handler_name=self.name,
            tokenizer=engine.codec,
            max_context_tokens=engine.n_ctx,
            memory_bytes=engine.memory_bytes,
            vector_sizes=engine.vector_sizes,
        )

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """End the engine and give everything back, in a thread, once no prompt is read any more."""
        engine = loaded_model.model_object

        def free() -> None:
            stop_reading(getattr(engine, "codec", None))
            self.free_engine(engine)

        await in_thread(free)

    def traits(self, loaded_model: LoadedModel) -> ModelTraits:
        """As the engine's codec says."""
        codec = getattr(loaded_model.model_object, "codec", None)
        return getattr(codec, "traits", PLAIN)

    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int:
        """Tokens of ``text``, read as plain text, without any that the model adds."""
        count: int = loaded_model.model_object.codec.count(text)
        return count

    async def count_prompt_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> int:
        """Tokens of a request's input, read as for an answer, also where the context is too short.

        :raises ConfigurationError: the chat template refuses it, or it is many times as long.
        :raises QueueFullError: too many prompts wait to be read.
        """
        engine = self.generator(loaded_model.model_object)
        prompt = await read_prompt(
            engine.codec,
            request,
            n_ctx=engine.n_ctx,
            advice=engine.longer_context,
            contexts=_COUNTED_CONTEXTS,
        )
        return len(prompt.tokens)

    async def tokenize(self, loaded_model: LoadedModel, request: InferenceRequest) -> list[int]:
        """Token ids of a request's input, also where the context is too short for it. A text has
        around it what a model that generates none wants there, if this one does not.

        :raises ConfigurationError: the chat template refuses it, or it is many times as long.
        :raises QueueFullError: too many prompts wait to be read.
        """
        engine = loaded_model.model_object
        try:
            self.generator(engine)
            ends = False
        except ConfigurationError:
            ends = True
        prompt = await read_prompt(
            engine.codec,
            request,
            n_ctx=engine.n_ctx,
            advice=getattr(engine, "longer_context", ""),
            contexts=_COUNTED_CONTEXTS,
            ends=ends,
        )
        return prompt.tokens

    async def token_bytes(
        self, loaded_model: LoadedModel, tokens: Sequence[int]
    ) -> list[bytes] | None:
        """The bytes that each token stands for, looked up where it holds up nobody.

        :raises ConfigurationError: the model has no such token, or its runtime does not tell.
        :raises QueueFullError: too many prompts wait to be read.
        """
        engine = loaded_model.model_object
        codec, most = engine.codec, engine.n_vocab - 1
        if (bytes_of := getattr(codec, "token_bytes", None)) is None:
            return None

        def look_up() -> list[bytes]:
            if (largest := max(tokens, default=0)) > most:
                raise ConfigurationError(
                    f"tokens has {largest}; the model's tokens are 0 to {most}", field="tokens"
                )
            pieces: list[bytes] = []
            for start in range(0, len(tokens), _LOOKED_UP):
                check_stopped()
                pieces += map(bytes_of, tokens[start : start + _LOOKED_UP])
            return pieces

        return await in_lane(codec, look_up, key=work_key(), size=len(tokens))

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """The engine's own word, unless reading its prompts does not come to an end."""
        engine = loaded_model.model_object
        health: HandlerHealth = engine.health()
        if health.ok and (stuck := stuck_in_reading(getattr(engine, "codec", None))):
            return replace(health, ok=False, detail=stuck)
        return health

    async def embed(
        self, loaded_model: LoadedModel, texts: Sequence[str | Sequence[int]]
    ) -> Embeddings:
        """Texts as vectors.

        :raises ConfigurationError: the model makes no embeddings, a text is too long for it, or it
            has no such token.
        :raises QueueFullError: too many requests wait.
        """
        engine = self.embedder(loaded_model.model_object)
        tokens = await tokens_of_texts(engine.codec, texts, engine.n_ctx, n_vocab=engine.n_vocab)
        return Embeddings(await engine.embed(tokens), sum(map(len, tokens)))

    async def rerank(self, loaded_model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> Scores:
        """Scores of pairs of texts.

        :raises ConfigurationError: the model scores none, or a pair is too long for it.
        :raises QueueFullError: too many requests wait.
        """
        engine = self.ranker(loaded_model.model_object)
        tokens = await tokens_of_pairs(engine.codec, pairs, engine.n_ctx)
        return Scores(await engine.rank(tokens), sum(map(len, tokens)))

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep | Mailbox, None]:
        """Read the prompt, check and queue the request; its steps come through its mailbox.

        :raises ConfigurationError: see :meth:`generator` and :meth:`check`; or the chat template
            refuses the messages.
        :raises QueueFullError: too many requests wait.
        """
        engine = self.generator(loaded_model.model_object)
        codec = engine.codec
        prompt = await read_prompt(codec, request, n_ctx=engine.n_ctx, advice=engine.longer_context)
        self.check(engine, request, prompt.tokens)
        bounded = self.traits(loaded_model).limits(request)
        if bounded or self._constrains(request) or self._delays_end(request):
            constraint = await self._constraint(engine, request, prompt.tail)
            task = engine.request(request, prompt.tokens, constraint)
        else:
            task = engine.request(request, prompt.tokens)
        try:
            if prompt.tail is not None and self.traits(loaded_model).parses(request):
                yield TokenStep(prompt_tail=prompt.tail)
            yield task.mailbox
        finally:
            engine.cancel(task)

    def _constrains(self, request: InferenceRequest) -> bool:
        """Whether the answer must match a form; what is not claimed is left out, if asked so."""
        if not request.constrained:
            return False
        claimed, output = self.capabilities().structured_output, request.params.structured_output
        calls = request.requires_call or request.has_strict_tools
        return (not calls or "grammar" in claimed) and (output is None or output.kind in claimed)

    def _delays_end(self, request: InferenceRequest) -> bool:
        """Whether the answer may not end as the model likes."""
        asked = _OF_THE_END & request.params.requested()
        return bool(asked and asked <= self.capabilities().params)

    async def _constraint(
        self, engine: Any, request: InferenceRequest, tail: str | None
    ) -> Constraint | None:
        from engineroom.engine.constraints import GrammarCompiler  # it needs numpy

        if engine.grammars is None:
            engine.grammars = GrammarCompiler(engine.codec)
        compiler: GrammarCompiler = engine.grammars
        return await compiler.compile(request, tail)
