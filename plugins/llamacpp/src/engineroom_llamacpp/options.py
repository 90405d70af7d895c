"""What ``options:`` of a llama.cpp model may say."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engineroom import ByteSize
from engineroom.prompts import ChatOptions
from engineroom.sources import EmbeddingOptions

__all__ = ["DEFAULT_CONTEXT", "CacheType", "LlamaCppOptions", "LoraAdapter"]

CacheType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]

DEFAULT_CONTEXT: Final = 8192
"""Cells of the cache where neither the options nor the model ask for fewer."""
_UNQUANTISED = ("f32", "f16", "bf16")


def _switch(value: Any) -> Any:
    """YAML reads ``on`` and ``off`` as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _no_switch(value: Any) -> Any:
    """``n_gpu_layers: on`` would be one layer."""
    if isinstance(value, bool):
        raise ValueError(f"give a number, not {str(value).lower()}")
    return value


_Int: TypeAlias = Annotated[int, BeforeValidator(_no_switch), Field(le=2**31 - 1)]
_Float: TypeAlias = Annotated[float, BeforeValidator(_no_switch), Field(allow_inf_nan=False)]


def _adapter(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class LoraAdapter(BaseModel):
    """A LoRA adapter.

    With a ``name`` it is applied to requests that ask for it by ``adapter``; without one to every
    request.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    scale: _Float = 1.0
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class LlamaCppOptions(ChatOptions, EmbeddingOptions):
    """Options of one model. Sizes are in tokens where nothing else is said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_ctx: Annotated[_Int, Field(ge=8)] | None = None
    """Cells of the key/value cache, shared by all sequences; one request may use them all.
    ``None``: what the model was trained for, at most 8192."""
    kv_unified: bool | Literal["auto"] = "auto"
    """``False``: each of ``n_parallel`` requests has ``n_ctx / n_parallel`` cells of its own and no
    more, and pays nothing for what others have. What is reused is copied then, not shared.
    ``True``: all have the whole in common. ``auto``: each has its own, as long as that is enough
    for each request; then it goes over to the whole for all, and back. On CPUs, with 1,024 cells or
    more for each; else as ``True``."""
    n_parallel: Annotated[_Int, Field(ge=1, le=256)] = 8
    """Requests that are decoded at one time; more wait."""
    n_batch: Annotated[_Int, Field(ge=1, le=65536)] = 512
    """Most tokens of one decoding step."""
    n_ubatch: Annotated[_Int, Field(ge=1, le=65536)] = 512
    """Most tokens that llama.cpp computes at once inside of a step."""
    prefill_chunk: Annotated[_Int, Field(ge=1)] = 128
    """Most prompt tokens of a step while others decode: what a long prompt may delay them by.
    Further on in a prompt, where tokens take longer, a step has fewer."""
    max_queue: Annotated[_Int, Field(ge=0)] = 256
    """Most requests that wait for a sequence; more are refused at once."""
    prefix_cache: bool = True
    """Reuse the work on prompts whose beginning an earlier or a running request had, too."""
    prompt_cache_memory: ByteSize | None = None
    """Host memory for prompts that nobody computes with: they leave the cache, where they would
    slow every step down, and come back when they are asked for again. ``None``: twice the
    key/value cache's, at most an eighth of what is free. 0: they stay in the cache."""
    draft_model: str | None = None
    """Source of a smaller model with the same vocabulary that proposes tokens, several of which
    are then checked in one step. Answers stay the same."""
    prompt_lookup: bool = False
    """Propose tokens that followed the same words earlier in the request's text. Answers stay the
    same; those that repeat their prompt come faster."""
    draft_tokens: Annotated[_Int, Field(ge=1, le=64)] = 4
    """How many tokens are proposed at a time."""
    n_threads: Annotated[_Int, Field(ge=1, le=1024)] | None = None
    """Threads for decoding; ``None``: the physical cores that the process may use."""
    n_threads_batch: Annotated[_Int, Field(ge=1, le=1024)] | None = None
    """Threads for prompts; ``None``: as ``n_threads``."""
    n_gpu_layers: Annotated[_Int, Field(ge=-1)] = -1
    """Layers to keep on GPUs, if this build of llama.cpp has them; -1: all."""
    main_gpu: Annotated[_Int, Field(ge=0)] | None = None
    """Number of the one GPU to use, of several; ``None``: the layers are split over all."""
    tensor_split: list[Annotated[_Float, Field(ge=0)]] | None = None
    """Share of the layers on each GPU, e.g. ``[3, 1]``; ``None``: by their free memory."""
    flash_attn: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Flash attention."""
    cache_type_k: CacheType = "f16"
    """Type of the keys in the cache."""
    cache_type_v: CacheType = "f16"
    """Type of the values in the cache; quantised ones need flash attention."""
    lora: list[Annotated[LoraAdapter, BeforeValidator(_adapter)]] = Field(default_factory=list)
    """LoRA adapters: paths of GGUF files, or ``{path: …, scale: …, name: …}``. Requests choose
    those that have a name by ``adapter``; the others are applied to every request."""
    requantize: Literal["q4_0", "q8_0"] | None = None
    """Load a copy of the weights in this quantisation, made at the first load and kept in the
    cache folder. It computes faster where the file's own has no fast kernel, and answers
    otherwise."""
    trial: bool = True
    """Load a file that was not loaded before in a process of its own first: llama.cpp may end the
    process over a damaged one."""
    use_mmap: bool = True
    """Map the file instead of reading it."""
    use_mlock: bool = False
    """Keep the model from being swapped out."""
    rope_freq_base: Annotated[_Float, Field(gt=0)] | None = None
    """Base frequency of rotary positions; ``None``: as the model says."""
    rope_freq_scale: Annotated[_Float, Field(gt=0)] | None = None
    """Scale of rotary positions; ``None``: as the model says."""
    normalize: bool = True
    """Give embeddings the length 1, as llama.cpp's own server does; GGUF files do not say."""

    @model_validator(mode="after")
    def _fit_together(self) -> LlamaCppOptions:
        if self.cache_type_v not in _UNQUANTISED and self.flash_attn == "off":
            raise ValueError(
                f"cache_type_v={self.cache_type_v} needs flash attention; "
                "set flash_attn to auto or on, or cache_type_v to f16"
            )
        if self.draft_model is not None and self.prompt_lookup:
            raise ValueError("give either draft_model or prompt_lookup; both were given")
        if self.n_ctx is not None and self.n_parallel > self.n_ctx:
            raise ValueError(f"n_ctx={self.n_ctx} has no cell for each of n_parallel sequences")
        if self.main_gpu is not None and self.tensor_split:
            raise ValueError("main_gpu is one GPU, tensor_split is for several; set one of them")
        names = [adapter.name for adapter in self.lora if adapter.name is not None]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"lora: two adapters have the name {twice[0]!r}")
        if self.n_parallel > self.n_batch:
            raise ValueError(
                f"n_batch={self.n_batch} has no token for each of n_parallel={self.n_parallel} "
                "sequences; make it at least as large"
            )
        return self
