"""The handler: what engineroom asks of the llama.cpp runtime."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from engineroom import (
    STRUCTURED_KINDS,
    Capabilities,
    ConfigurationError,
    EngineHandler,
    GenerationParams,
    HandlerHealth,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    parse_options,
)
from engineroom.prompts import check_adapter, check_prompt
from engineroom.sources import find_gguf, is_gguf
from engineroom_llamacpp.loading import estimate_bytes, load_engine, unload_engine
from engineroom_llamacpp.options import LlamaCppOptions

if TYPE_CHECKING:
    from engineroom_llamacpp.embedding import EmbeddingEngine
    from engineroom_llamacpp.engine import LlamaEngine

__all__ = ["LlamaCppHandler"]

logger = logging.getLogger("engineroom.llamacpp")

_HONOURED: Final = frozenset(GenerationParams.model_fields)


class LlamaCppHandler(EngineHandler):
    """Runs GGUF models with llama.cpp, many requests at a time, in this process.

    Options of a model are :class:`~engineroom_llamacpp.options.LlamaCppOptions`.
    """

    name: ClassVar[str] = "llamacpp"
    api_version: ClassVar[str] = "1.0"
    options_class = LlamaCppOptions

    def capabilities(self) -> Capabilities:
        """Everything; embeddings from models that are made for them, and adapters that the options
        give a name.
        """
        return Capabilities(
            params=_HONOURED,
            chat=True,
            tools=True,
            template_args=True,
            reasoning_budget=True,
            structured_output=frozenset(STRUCTURED_KINDS),
            embeddings=True,
            adapters=True,
            prompt_token_ids=True,
            continue_final_message=True,
        )

    def is_native(self, path: Path) -> bool:
        """True for GGUF files, by their first bytes; and for a folder with one GGUF model and no
        ``config.json``, which would make it other runtimes' as well.
        """
        if path.is_dir():
            if (path / "config.json").exists():
                return False
            try:
                path = find_gguf(path)
            except ConfigurationError:
                return False
        return path.is_file() and is_gguf(path)

    def is_native_name(self, source: str) -> bool:
        """True for what is called a GGUF file."""
        return source.lower().endswith(".gguf")

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

    def make_engine(
        self, config: ModelConfig, options: LlamaCppOptions
    ) -> LlamaEngine | EmbeddingEngine:
        """Load the weights and make the context."""
        engine = load_engine(config, options)
        logger.info(
            "model %r: %s, %d tokens of context for %d sequences, %d threads",
            config.model_id,
            engine.model.path.name,
            engine.n_ctx,
            options.n_parallel,
            engine.threads,
        )
        return engine

    def free_engine(self, engine: LlamaEngine | EmbeddingEngine) -> None:
        """End the engine's thread, free context and weights, and give the memory back."""
        unload_engine(engine)

    def generator(self, engine: LlamaEngine | EmbeddingEngine) -> LlamaEngine:
        """The engine itself, unless it is one for embeddings alone."""
        from engineroom_llamacpp.engine import LlamaEngine

        if not isinstance(engine, LlamaEngine):
            raise ConfigurationError(
                "this model makes embeddings and generates no text; ask for embeddings, or load a "
                "model that generates text"
            )
        return engine

    def embedder(self, engine: LlamaEngine | EmbeddingEngine) -> EmbeddingEngine:
        """The engine itself, or the one beside it, where the model's file says how to pool."""
        alone: Any = engine
        embedder: EmbeddingEngine | None = getattr(engine, "embedder", alone)
        if embedder is None:
            raise ConfigurationError(
                "this model generates text and makes no embeddings; use an encoder, or a model "
                "whose file says how to pool (pooling_type)"
            )
        return embedder

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """That of both engines, where texts and vectors have one each."""
        health = super().health(loaded_model)
        embedder: EmbeddingEngine | None = getattr(loaded_model.model_object, "embedder", None)
        if embedder is None:
            return health
        other = embedder.health()
        return HandlerHealth(
            ok=health.ok and other.ok,
            detail=(health if other.ok or not health.ok else other).detail,
            num_requests_running=health.num_requests_running + other.num_requests_running,
            num_requests_waiting=health.num_requests_waiting + other.num_requests_waiting,
            kv_cache_usage=health.kv_cache_usage,
            dead=health.dead or other.dead,
        )

    def check(self, engine: LlamaEngine, request: InferenceRequest, tokens: list[int]) -> None:
        """Refuse adapters that are not loaded, and beams that cannot be searched with, as well."""
        super().check(engine, request, tokens)
        check_adapter(request.adapter, engine.model.adapters_by_name, "lora")
        if (request.params.num_beams or 1) > 1:
            _check_beams(engine, request.params, tokens)


def _check_beams(engine: LlamaEngine, params: GenerationParams, tokens: list[int]) -> None:
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
    check_prompt(tokens, engine.n_ctx, engine.longer_context, beams=beams)
