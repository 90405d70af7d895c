"""The handler: what engineroom asks of the llama.cpp runtime."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from engineroom import (
    Capabilities,
    ConfigurationError,
    Embeddings,
    GenerationParams,
    HandlerHealth,
    InferenceRequest,
    LoadedModel,
    Mailbox,
    ModelConfig,
    ModelNotFoundError,
    TokenHandler,
    parse_options,
    resolve_source,
)
from engineroom.engine import BackgroundLoad
from engineroom.prompts import (
    check_adapter,
    check_prompt,
    check_texts,
    check_token_ids,
    tokens_of,
)
from engineroom.sources import is_gguf
from engineroom_llamacpp.loading import estimate_bytes, load_engine, unload_engine
from engineroom_llamacpp.options import LlamaCppOptions

if TYPE_CHECKING:
    from engineroom_llamacpp.embedding import EmbeddingEngine
    from engineroom_llamacpp.engine import LlamaEngine

__all__ = ["LlamaCppHandler"]

logger = logging.getLogger("engineroom.llamacpp")

_HONOURED: Final = frozenset(GenerationParams.model_fields) - {"structured_output"}


class LlamaCppHandler(TokenHandler):
    """Runs GGUF models with llama.cpp, many requests at a time, in this process.

    Options of a model are :class:`~engineroom_llamacpp.options.LlamaCppOptions`.
    """

    name: ClassVar[str] = "llamacpp"
    api_version: ClassVar[str] = "1.0"

    def capabilities(self) -> Capabilities:
        """Everything but structured output and tools; embeddings from models that
        are made for them, and adapters that the options give a name.
        """
        return Capabilities(
            params=_HONOURED, chat=True, embeddings=True, adapters=True, prompt_token_ids=True
        )

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        """True for models that this handler loaded."""
        if loaded_model.handler_name != self.name:
            return False
        from engineroom_llamacpp.embedding import EmbeddingEngine
        from engineroom_llamacpp.engine import LlamaEngine

        return isinstance(loaded_model.model_object, LlamaEngine | EmbeddingEngine)

    def can_load(self, config: ModelConfig) -> bool:
        """True for GGUF files, by their first bytes, or by name where they are not here yet."""
        source = config.source or ""
        if source.startswith("hf:"):
            return source.lower().endswith(".gguf")
        try:
            path = resolve_source(source)
        except (ConfigurationError, ModelNotFoundError):
            return source.lower().endswith(".gguf")
        return path.is_file() and is_gguf(path)

    def estimate_memory(self, config: ModelConfig) -> Mapping[str, int] | None:
        """Weights and cache in bytes on each device, from the file's header alone."""
        options = parse_options(LlamaCppOptions, config)
        return estimate_bytes(config.source or "", options)

    def import_runtime(self) -> None:
        """Import llama.cpp, and initialise it.

        :raises ConfigurationError: it is not installed, or its shared library cannot be loaded.
        """
        from engineroom_llamacpp.library import load

        load()

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        """Load the weights and make the context, in a thread.

        :raises ModelNotFoundError: there is no such file.
        :raises ConfigurationError: an option is wrong, or the file is damaged.
        :raises ResourceNotAvailableError: there is no memory for the context.
        """
        options = parse_options(LlamaCppOptions, config)
        load = BackgroundLoad(
            lambda: load_engine(config, options),
            lambda loaded: unload_engine(loaded[0]),
            name="llamacpp",
        )
        engine, memory = await load.result()
        logger.info(
            "model %r: %s, %d tokens of context for %d sequences, %d threads",
            config.model_id,
            engine.model.path.name,
            engine.n_ctx,
            options.n_parallel,
            engine.threads,
        )
        return LoadedModel(
            model_id=config.model_id,
            model_object=engine,
            config=config,
            handler_name=self.name,
            tokenizer=engine.model,
            max_context_tokens=engine.n_ctx,
            memory_bytes=memory,
        )

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """End the engine's thread, free context and weights, and give the memory back."""
        await asyncio.to_thread(unload_engine, _engine(loaded_model))

    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int:
        """Tokens of ``text``, read as plain text, without any that the model adds."""
        return len(_engine(loaded_model).model.tokenize(text, special=False))

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """The engine's own word."""
        return _engine(loaded_model).health()

    async def embed(self, loaded_model: LoadedModel, texts: Sequence[str]) -> Embeddings:
        """Texts as vectors, pooled as the model's file says.

        :raises ConfigurationError: the model makes no embeddings, or a text is too long for it.
        :raises QueueFullError: too many requests wait.
        """
        engine = _embedder(loaded_model)
        model = engine.model
        tokens = await asyncio.to_thread(lambda: [model.whole(text) for text in texts])
        check_texts(tokens, engine.n_ctx)
        task = engine.embed(tokens)
        try:
            await task.mailbox.get()
        finally:
            engine.cancel(task)
        return Embeddings(task.vectors, sum(map(len, tokens)))

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[Mailbox, None]:
        """Queue the request and yield a step a token.

        :raises ConfigurationError: the prompt is empty or longer than the context, it or a
            ``logit_bias`` names a token that the model has not, the chat template refuses the
            messages, or beams are asked for that cannot be searched with.
        :raises QueueFullError: too many requests wait.
        """
        engine = _generator(loaded_model)
        tokens = await tokens_of(engine.model, request)
        _check(engine, request, tokens)
        task = engine.request(request, tokens)
        try:
            yield task.mailbox
        finally:
            engine.cancel(task)


def _engine(loaded_model: LoadedModel) -> LlamaEngine | EmbeddingEngine:
    engine: LlamaEngine | EmbeddingEngine = loaded_model.model_object
    return engine


def _generator(loaded_model: LoadedModel) -> LlamaEngine:
    from engineroom_llamacpp.engine import LlamaEngine

    engine = _engine(loaded_model)
    if not isinstance(engine, LlamaEngine):
        raise ConfigurationError(
            "this model makes embeddings and generates no text; ask for embeddings, or load a "
            "model that generates text"
        )
    return engine


def _embedder(loaded_model: LoadedModel) -> EmbeddingEngine:
    from engineroom_llamacpp.engine import LlamaEngine

    engine = _engine(loaded_model)
    found = engine.embedder if isinstance(engine, LlamaEngine) else engine
    if found is None:
        raise ConfigurationError(
            "this model generates text and makes no embeddings; use an encoder, or a model whose "
            "file says how to pool (pooling_type)"
        )
    return found


def _check(engine: LlamaEngine, request: InferenceRequest, tokens: list[int]) -> None:
    trained = f"(the model was trained for {engine.model.n_ctx_train})"
    check_prompt(tokens, engine.n_ctx, f"set the option n_ctx higher {trained}")
    ids, bias = request.prompt_token_ids, request.params.logit_bias
    check_token_ids(engine.model.n_vocab, prompt=ids, bias=bias)
    check_adapter(request.adapter, engine.model.adapters_by_name, "lora")
    if (request.params.num_beams or 1) > 1:
        _check_beams(engine, request.params, len(tokens))


def _check_beams(engine: LlamaEngine, params: GenerationParams, length: int) -> None:
    beams = params.num_beams or 1
    if not params.greedy:
        raise ConfigurationError(
            "num_beams with sampling (beam sampling): this runtime has none; set do_sample=False "
            "or temperature=0, or use hf_transformers"
        )
    if params.logprobs is not None:
        raise ConfigurationError(
            "logprobs cannot be told with num_beams: beam search weighs whole texts, not tokens; "
            "leave one of them out"
        )
    if beams > engine.most_beams:
        raise ConfigurationError(
            f"num_beams={beams}: at most {engine.most_beams} can be searched with; load the model "
            "with a larger n_parallel and n_batch"
        )
    if length + beams > engine.n_ctx:
        raise ConfigurationError(
            f"the prompt has {length} tokens, the context has {engine.n_ctx}, and at least one "
            f"must be left for each of num_beams={beams}; shorten the prompt, or set the option "
            "n_ctx higher"
        )
