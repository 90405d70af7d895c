"""Loading and unloading, which block: a file into an engine, and an engine into nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from engineroom import (
    ConfigurationError,
    ModelConfig,
    find_source,
    give_back_memory,
    resolve_source,
)
from engineroom.memory import MachineProbe
from engineroom.sources import GgufHeader, find_gguf
from engineroom_llamacpp.metadata import read_header
from engineroom_llamacpp.options import DEFAULT_CONTEXT, LlamaCppOptions
from engineroom_llamacpp.requantizing import cached_copy, hint, requantized, size_in
from engineroom_llamacpp.sizes import (
    check_positions,
    estimate,
    is_encoder,
    pooling_of,
    prompt_cache,
)
from engineroom_llamacpp.trial import stand_trial

if TYPE_CHECKING:
    from engineroom_llamacpp.embedding import EmbeddingEngine
    from engineroom_llamacpp.engine import LlamaEngine
    from engineroom_llamacpp.model import LlamaModel

__all__ = ["estimate_bytes", "load_engine", "unload_engine"]


def estimate_bytes(source: str, options: LlamaCppOptions) -> dict[str, int] | None:
    """Weights and cache by device, from the headers of the model and of its draft model alone;
    ``None``: a file is not here yet.
    """
    path = find_source(source)
    if path is None:
        return None
    path = find_gguf(path)
    header = read_header(path)
    if waiting := _prompt_cache(header, options):
        without = options.model_copy(update={"prompt_cache_memory": 0})
        others = estimate_bytes(source, without)
        return None if others is None else dict(Counter(others) + Counter(cpu=waiting))
    if options.draft_model is not None:
        draft = estimate_bytes(options.draft_model, _draft_options(header, options))
        own = estimate_bytes(source, options.model_copy(update={"draft_model": None}))
        return None if draft is None or own is None else dict(Counter(own) + Counter(draft))
    target = options.requantize
    if target is None:
        return estimate(header, options)
    if (copy := cached_copy(path, options)) is not None:
        return estimate(read_header(copy), options)
    return estimate(header, options, lambda tensor: size_in(target, tensor))


def load_engine(config: ModelConfig, options: LlamaCppOptions) -> LlamaEngine | EmbeddingEngine:
    """An engine with its model. Encoders get one for embeddings alone."""
    path = find_gguf(resolve_source(config.source or ""))
    header = read_header(path)
    from engineroom_llamacpp.embedding import EmbeddingEngine
    from engineroom_llamacpp.engine import LlamaEngine
    from engineroom_llamacpp.model import LlamaModel

    pooling = pooling_of(header)
    if options.trial:
        stand_trial(path)
    made = requantized(path, header, options, config.model_id)
    if made != path:
        path, header = made, read_header(made)
    check_positions(header, options)
    model = LlamaModel(path, options)
    draft: LlamaModel | None = None
    engine: LlamaEngine | EmbeddingEngine | None = None
    taken = Counter(estimate(header, options))
    try:
        if is_encoder(header):
            assert pooling is not None
            engine = EmbeddingEngine(model, options, pooling, config.model_id)
        else:
            if options.draft_model is not None:
                draft, more = _load_draft(
                    options.draft_model, model, _draft_options(header, options)
                )
                taken += Counter(more)
            waiting = _prompt_cache(header, options)
            taken["cpu"] += waiting
            engine = LlamaEngine(model, options, config.model_id, draft, waiting)
            if pooling is not None:
                engine.embedder = EmbeddingEngine(model, options, pooling, config.model_id)
                engine.vector_sizes = engine.embedder.vector_sizes
    except BaseException:
        if engine is not None:
            engine.close()  # and with it the draft model
        elif draft is not None:
            draft.close()
        model.close()
        raise
    if not engine.on_gpu:
        hint(header, options, config.model_id)
    engine.memory_bytes = sum(taken.values())
    return engine


def _prompt_cache(header: GgufHeader, options: LlamaCppOptions) -> int:
    known = options.prompt_cache_memory is not None
    return prompt_cache(header, options, None if known else MachineProbe().capacity("cpu"))


def _draft_options(header: GgufHeader, options: LlamaCppOptions) -> LlamaCppOptions:
    """What holds for a draft model: its cache has as many cells as that of its model."""
    trained = header.number("context_length") or DEFAULT_CONTEXT
    n_ctx = options.n_ctx or min(trained, DEFAULT_CONTEXT)
    update: dict[str, Any] = {
        "n_ctx": n_ctx,
        "draft_model": None,
        "prompt_cache_memory": 0,
        "requantize": None,
        "lora": [],
        "chat_template": None,
        "chat_template_kwargs": None,
        "tool_format": None,
        "reasoning_format": None,
    }
    return options.model_copy(update=update)


def _load_draft(
    source: str, model: LlamaModel, options: LlamaCppOptions
) -> tuple[LlamaModel, dict[str, int]]:
    """The draft model, and the bytes that it takes of each device.

    :raises ConfigurationError: it cannot propose tokens to this model.
    """
    from engineroom_llamacpp.model import LlamaModel

    path = find_gguf(resolve_source(source))
    header = read_header(path)
    if options.trial:
        stand_trial(path)
    check_positions(header, options)
    draft = LlamaModel(path, options)
    why = ""
    if not draft.same_vocabulary(model):
        why = "its vocabulary is another one; take a smaller model of the same family"
    elif draft.has_states:
        why = "it keeps states, which cannot be set back behind tokens that turn out wrong"
    if why:
        draft.close()
        raise ConfigurationError(f"draft_model: {path.name!r} cannot propose tokens: {why}")
    return draft, estimate(header, options)


def unload_engine(engine: LlamaEngine | EmbeddingEngine) -> None:
    """End the engine, and free cache and weights."""
    engine.close()
    if (embedder := getattr(engine, "embedder", None)) is not None:
        embedder.close()
    engine.model.close()
    give_back_memory()
