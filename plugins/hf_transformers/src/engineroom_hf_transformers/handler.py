"""The handler: what engineroom asks of the Transformers runtime."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from engineroom import (
    STRUCTURED_KINDS,
    Capabilities,
    ConfigurationError,
    EngineHandler,
    GenerationParams,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    parse_options,
)
from engineroom.prompts import check_beams
from engineroom_hf_transformers.checkpoint import find_checkpoint, looks_native
from engineroom_hf_transformers.loading import load_engine, release
from engineroom_hf_transformers.options import HfTransformersOptions
from engineroom_hf_transformers.sizes import estimate_bytes

if TYPE_CHECKING:
    from engineroom_hf_transformers.engine import HfEngine

__all__ = ["HuggingFaceTransformersHandler"]

logger = logging.getLogger("engineroom.hf_transformers")

_HONOURED: Final = frozenset(GenerationParams.model_fields)
_MOST_PROMPT_LOGITS: Final = 1 << 29
"""Bytes of logits, in float32, of a prompt that is computed at one go."""


class HuggingFaceTransformersHandler(EngineHandler):
    """Runs language models with Transformers, many requests at a time, in this process.

    Options of a model are :class:`~engineroom_hf_transformers.options.HfTransformersOptions`.
    """

    name: ClassVar[str] = "hf_transformers"
    api_version: ClassVar[str] = "1.0"
    options_class = HfTransformersOptions

    def capabilities(self) -> Capabilities:
        """Everything; embeddings from models that are made for them."""
        return Capabilities(
            params=_HONOURED,
            chat=True,
            tools=True,
            template_args=True,
            reasoning_budget=True,
            structured_output=frozenset(STRUCTURED_KINDS),
            embeddings=True,
            prompt_token_ids=True,
            continue_final_message=True,
            rerank=True,
        )

    def can_load(self, config: ModelConfig) -> bool:
        """True for folders with a ``config.json`` and weights, and for hub repositories."""
        return looks_native(config)

    def estimate_memory(self, config: ModelConfig) -> Mapping[str, int] | None:
        """Weights and cache in bytes, from the checkpoint's headers alone."""
        options = parse_options(HfTransformersOptions, config)
        source = config.source or ""
        if source.startswith("hf:"):
            return None  # it would have to be downloaded first
        return estimate_bytes(find_checkpoint(source, options), options)

    def import_runtime(self) -> None:
        """Import torch and what a load needs of transformers: seconds, the first time.

        :raises ConfigurationError: they are not installed, or cannot be imported.
        """
        from engineroom_hf_transformers.loading import import_libraries

        import_libraries()

    def make_engine(self, config: ModelConfig, options: HfTransformersOptions) -> HfEngine:
        """Load the weights and look at what the model can do."""
        from engineroom_hf_transformers.engine import HfEngine

        engine = load_engine(
            config, options, lambda parts: HfEngine(parts, options, config.model_id)
        )
        logger.info(
            "model %r: %s on %s, %d tokens of context, %s",
            config.model_id,
            engine.parts.dtype,
            engine.parts.device,
            engine.n_ctx,
            "one request at a time"
            if engine.why_one_by_one
            else f"{options.max_batch_size} requests at a time",
        )
        return engine

    def loaded_model(self, config: ModelConfig, engine: HfEngine) -> LoadedModel:
        """With the tokenizer as Transformers has it."""
        loaded = super().loaded_model(config, engine)
        loaded.tokenizer = engine.parts.tokenizer
        return loaded

    def free_engine(self, engine: HfEngine) -> None:
        """End the engine, drop cache and weights, and give the memory back."""
        engine.close()
        release(engine.parts)

    def generator(self, engine: HfEngine) -> HfEngine:
        """The engine, unless its model has no head over the vocabulary."""
        if engine.parts.kind == "ranking":
            raise ConfigurationError(
                "this model ranks documents and generates no text; ask for scores (rerank), or "
                "load a model for causal language modelling"
            )
        if engine.parts.kind == "embedding":
            raise ConfigurationError(
                "this model makes embeddings and generates no text; ask for embeddings, or load a "
                "model for causal language modelling"
            )
        return engine

    def embedder(self, engine: HfEngine) -> HfEngine:
        """The engine, where the model's folder says how to pool."""
        if engine.recipe is None:
            raise ConfigurationError(
                "this model generates text and makes no embeddings; use an encoder, or a model "
                "whose folder has a modules.json that says how to pool"
            )
        return engine

    def ranker(self, engine: HfEngine) -> HfEngine:
        """The engine, where its model has one label for two texts."""
        if engine.parts.kind != "ranking":
            raise ConfigurationError(
                "this model ranks no documents; use a cross-encoder: a model for sequence "
                "classification with one label"
            )
        return engine

    def check(self, engine: HfEngine, request: InferenceRequest, tokens: list[int]) -> None:
        """Refuse too many beams, and beams with log probabilities, as well."""
        super().check(engine, request, tokens)
        check_beams(request.params.num_beams)
        if request.params.prompt_logprobs is not None and engine.why_one_by_one:
            _check_prompt_logits(engine, len(tokens))
        if (request.params.num_beams or 1) > 1 and request.params.logprobs is not None:
            raise ConfigurationError(
                "logprobs cannot be told with num_beams: beam search weighs whole texts, not "
                "tokens; leave one of them out"
            )


def _check_prompt_logits(engine: HfEngine, length: int) -> None:
    """Where a model computes a prompt at one go, all of its logits are there at one time."""
    if engine.parts.kind != "causal":
        raise ConfigurationError(
            f"prompt_logprobs: this model is an {engine.parts.kind} model, which reads a prompt "
            "and does not predict it; leave it out, or use a model for causal language modelling"
        )
    most = _MOST_PROMPT_LOGITS // (4 * engine.n_vocab)
    if length > most:
        raise ConfigurationError(
            f"prompt_logprobs: the prompt has {length} tokens, and this model, which computes it "
            f"at one go ({engine.why_one_by_one}), has them for {most} at most; send a shorter one"
        )
