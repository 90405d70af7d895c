"""The handler: what engineroom asks of the Transformers runtime."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
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
    TokenHandler,
    parse_options,
)
from engineroom.engine import BackgroundLoad
from engineroom.prompts import check_prompt, check_texts, check_token_ids, tokens_of
from engineroom_hf_transformers.checkpoint import find_checkpoint, looks_native
from engineroom_hf_transformers.loading import load_engine, release
from engineroom_hf_transformers.options import HfTransformersOptions
from engineroom_hf_transformers.sizes import estimate_bytes

if TYPE_CHECKING:
    from engineroom_hf_transformers.engine import HfEngine

__all__ = ["HuggingFaceTransformersHandler"]

logger = logging.getLogger("engineroom.hf_transformers")

_HONOURED: Final = frozenset(GenerationParams.model_fields) - {"structured_output"}


class HuggingFaceTransformersHandler(TokenHandler):
    """Runs language models with Transformers, many requests at a time, in this process.

    Options of a model are :class:`~engineroom_hf_transformers.options.HfTransformersOptions`.
    """

    name: ClassVar[str] = "hf_transformers"
    api_version: ClassVar[str] = "1.0"

    def capabilities(self) -> Capabilities:
        """Everything but structured output; embeddings from models that are made for them."""
        return Capabilities(
            params=_HONOURED, chat=True, tools=True, embeddings=True, prompt_token_ids=True
        )

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        """True for models that this handler loaded."""
        if loaded_model.handler_name != self.name:
            return False
        from engineroom_hf_transformers.engine import HfEngine

        return isinstance(loaded_model.model_object, HfEngine)

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

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        """Load the weights and look at what the model can do, in a thread.

        :raises ModelNotFoundError: there is no such folder, file or repository.
        :raises ConfigurationError: an option is wrong, or the checkpoint is damaged or not safe.
        :raises ResourceNotAvailableError: there is no memory for it.
        """
        options = parse_options(HfTransformersOptions, config)
        load = BackgroundLoad(lambda: _load(config, options), _unload, name="hf_transformers")
        engine = await load.result()
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
        return LoadedModel(
            model_id=config.model_id,
            model_object=engine,
            config=config,
            handler_name=self.name,
            tokenizer=engine.parts.tokenizer,
            max_context_tokens=engine.n_ctx,
            memory_bytes=engine.memory_bytes,
        )

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """End the engine, drop cache and weights, and give the memory back."""
        await asyncio.to_thread(_unload, _engine(loaded_model))

    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int:
        """Tokens of ``text``, read as plain text, without any that the model adds."""
        return _engine(loaded_model).vocabulary.count(text)

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """The engine's own word, and why requests run one at a time, if they do."""
        engine = _engine(loaded_model)
        found = engine.health()
        if found.ok and engine.why_one_by_one and engine.parts.kind != "embedding":
            detail = f"one request at a time, by generate(): {engine.why_one_by_one}"
            return replace(found, detail=detail)
        return found

    async def embed(self, loaded_model: LoadedModel, texts: Sequence[str]) -> Embeddings:
        """Texts as vectors, pooled as the model's folder says.

        :raises ConfigurationError: the model makes no embeddings, or a text is too long for it.
        :raises QueueFullError: too many requests wait.
        """
        engine = _engine(loaded_model)
        if engine.recipe is None:
            raise ConfigurationError(
                "this model generates text and makes no embeddings; use an encoder, or a model "
                "whose folder has a modules.json that says how to pool"
            )
        tokens = await asyncio.to_thread(lambda: [engine.vocabulary.whole(t) for t in texts])
        check_texts(tokens, engine.n_ctx)
        job, work = engine.embed(tokens, engine.recipe)
        try:
            await job.mailbox.get()
        finally:
            engine.cancel(job)
        return Embeddings(work.vectors, sum(map(len, tokens)))

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[Mailbox, None]:
        """Queue the request and yield what each step gives.

        :raises ConfigurationError: the prompt is empty or longer than the context, it or a
            ``logit_bias`` names a token that the model has not, the chat template refuses the
            messages, or beams are asked for together with log probabilities.
        :raises QueueFullError: too many requests wait.
        """
        engine = _engine(loaded_model)
        tools = None if request.tool_choice == "none" else request.tools
        tokens = await tokens_of(engine.vocabulary, request, tools)
        _check(engine, request, tokens)
        task = engine.request(request, tokens)
        try:
            yield task.mailbox
        finally:
            engine.cancel(task)


def _engine(loaded_model: LoadedModel) -> HfEngine:
    engine: HfEngine = loaded_model.model_object
    return engine


def _load(config: ModelConfig, options: HfTransformersOptions) -> HfEngine:
    from engineroom_hf_transformers.engine import HfEngine

    return load_engine(config, options, lambda parts: HfEngine(parts, options, config.model_id))


def _unload(engine: HfEngine) -> None:
    engine.close()
    release(engine.parts)


def _check(engine: HfEngine, request: InferenceRequest, tokens: list[int]) -> None:
    params = request.params
    if engine.parts.kind == "embedding":
        raise ConfigurationError(
            "this model makes embeddings and generates no text; ask for embeddings, or load a "
            "model for causal language modelling"
        )
    trained = f"(the model was made for {engine.parts.n_trained or 'an unknown number'})"
    check_prompt(tokens, engine.n_ctx, f"set the option max_context higher {trained}")
    ids, bias = request.prompt_token_ids, params.logit_bias
    check_token_ids(engine.parts.n_vocab, prompt=ids, bias=bias)
    if (params.num_beams or 1) > 1 and params.logprobs is not None:
        raise ConfigurationError(
            "logprobs cannot be told with num_beams: beam search weighs whole texts, not tokens; "
            "leave one of them out"
        )
    if request.tool_choice not in (None, "auto", "none"):
        raise ConfigurationError(
            f"tool_choice {request.tool_choice!r} cannot be enforced by this runtime; "
            "leave it out, or send 'auto' or 'none'"
        )
