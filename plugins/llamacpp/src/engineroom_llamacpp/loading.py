"""Loading and unloading, which block: a file into an engine, and an engine into nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engineroom import (
    ConfigurationError,
    ModelConfig,
    find_source,
    give_back_memory,
    resolve_source,
)
from engineroom_llamacpp.gguf import GgufHeader, read_header
from engineroom_llamacpp.options import LlamaCppOptions

if TYPE_CHECKING:
    from engineroom_llamacpp.engine import LlamaEngine
    from engineroom_llamacpp.model import LlamaModel

__all__ = ["Load", "estimate_bytes", "load_engine", "unload_engine"]

DEFAULT_CELLS: Final = 8192
"""As :data:`engineroom_llamacpp.context.DEFAULT_CONTEXT`, without llama.cpp."""
_CACHE_BYTES: Final = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32,
                       "q4_1": 20 / 32, "q5_0": 22 / 32, "q5_1": 24 / 32}  # fmt: skip


class Load:
    """A load in a thread. It cannot be stopped there, but what it makes can be given back."""

    def __init__(self, config: ModelConfig, options: LlamaCppOptions) -> None:
        self._config = config
        self._options = options
        self._lock = threading.Lock()
        self._abandoned = False
        self._engine: LlamaEngine | None = None

    def run(self) -> tuple[LlamaEngine, int]:
        """Load; in the thread. Returns the engine and the memory that it takes, in bytes."""
        engine, memory = load_engine(self._config, self._options)
        with self._lock:
            abandoned = self._abandoned
            self._engine = engine
        if abandoned:
            unload_engine(engine)
        return engine, memory

    def abandon(self) -> None:
        """Nobody wants the engine any more, whether it is there already or comes later."""
        with self._lock:
            self._abandoned = True
            engine = self._engine
        if engine is not None:  # it came, but nobody got it
            threading.Thread(
                target=unload_engine, args=(engine,), name="llamacpp-unload", daemon=True
            ).start()


def _file(path: Path) -> Path:
    """The GGUF file that a source stands for."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "none"
    raise ConfigurationError(
        f"{str(path)!r} is a folder with {len(files)} GGUF files ({found}); name one file"
    )


def _cache_bytes(header: GgufHeader, options: LlamaCppOptions) -> int:
    layers = header.number("block_count") or 0
    width = header.number("embedding_length") or 0
    heads = header.number("attention.head_count") or 1
    kv_heads = header.number("attention.head_count_kv") or heads
    k_width = (header.number("attention.key_length") or width // heads) * kv_heads
    v_width = (header.number("attention.value_length") or width // heads) * kv_heads
    trained = header.number("context_length") or DEFAULT_CELLS
    cells = options.n_ctx or min(trained, DEFAULT_CELLS)
    per_cell = (
        k_width * _CACHE_BYTES[options.cache_type_k] + v_width * _CACHE_BYTES[options.cache_type_v]
    )
    return int(layers * cells * per_cell)


def estimate_bytes(source: str, options: LlamaCppOptions) -> int | None:
    """Weights and cache, from the file's header alone; ``None``: the file is not here yet."""
    path = find_source(source)
    if path is None:
        return None
    header = read_header(_file(path))
    found = header.tensor_bytes + _cache_bytes(header, options)
    if options.draft_model is not None:
        draft = estimate_bytes(options.draft_model, _draft_options(header, options))
        return None if draft is None else found + draft
    return found


def load_engine(config: ModelConfig, options: LlamaCppOptions) -> tuple[LlamaEngine, int]:
    path = _file(resolve_source(config.source or ""))
    header = read_header(path)
    from engineroom_llamacpp.engine import LlamaEngine
    from engineroom_llamacpp.model import LlamaModel

    model = LlamaModel(path, options)
    memory = model.memory_bytes + _cache_bytes(header, options)
    draft: LlamaModel | None = None
    try:
        if options.draft_model is not None:
            draft, taken = _load_draft(options.draft_model, model, _draft_options(header, options))
            memory += taken
        engine = LlamaEngine(model, options, config.model_id, draft)
    except BaseException:
        if draft is not None:
            draft.close()
        model.close()
        raise
    return engine, memory


def _draft_options(header: GgufHeader, options: LlamaCppOptions) -> LlamaCppOptions:
    """What holds for a draft model: its cache has as many cells as that of its model."""
    trained = header.number("context_length") or DEFAULT_CELLS
    n_ctx = options.n_ctx or min(trained, DEFAULT_CELLS)
    update: dict[str, Any] = {
        "n_ctx": n_ctx,
        "draft_model": None,
        "lora": [],
        "chat_template": None,
    }
    return options.model_copy(update=update)


def _load_draft(source: str, model: LlamaModel, options: LlamaCppOptions) -> tuple[LlamaModel, int]:
    """The draft model, and the bytes that it takes.

    :raises ConfigurationError: it cannot propose tokens to this model.
    """
    from engineroom_llamacpp.model import LlamaModel

    path = _file(resolve_source(source))
    header = read_header(path)
    draft = LlamaModel(path, options)
    why = ""
    if not draft.same_vocabulary(model):
        why = "its vocabulary is another one; take a smaller model of the same family"
    elif draft.has_states:
        why = "it keeps states, which cannot be set back behind tokens that turn out wrong"
    if why:
        draft.close()
        raise ConfigurationError(f"draft_model: {path.name!r} cannot propose tokens: {why}")
    return draft, draft.memory_bytes + _cache_bytes(header, options)


def unload_engine(engine: LlamaEngine) -> None:
    engine.close()
    engine.model.close()
    give_back_memory()
