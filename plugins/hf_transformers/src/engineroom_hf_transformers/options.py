"""What ``options:`` of a Transformers model may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from engineroom.prompts import ChatOptions
from engineroom.sources import EmbeddingOptions

__all__ = ["Dtype", "HfTransformersOptions"]

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


def _no_switch(value: Any) -> Any:
    """``max_context: on`` would be one token."""
    if isinstance(value, bool):
        raise ValueError(f"give a number, not {str(value).lower()}")
    return value


_Int: TypeAlias = Annotated[int, BeforeValidator(_no_switch), Field(le=2**31 - 1)]


class HfTransformersOptions(ChatOptions, EmbeddingOptions):
    """Options of one model. Sizes are in tokens where nothing else is said.

    ``n_ctx`` and ``n_parallel``, which other runtimes have, may be written for ``max_context`` and
    ``max_batch_size``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto``: a GPU where torch has one, else the CPU."""
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None = None
    """How to spread the layers over several GPUs, instead of ``device``. Needs ``accelerate``."""
    dtype: Dtype = "auto"
    """Type of the weights; ``auto``: as the checkpoint says, and float32 where that type is slow
    (half precision on a CPU without instructions for it)."""
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    """Kernels of the attention: torch's fused ones, or plain matrix products. ``auto``: fused."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; or write ``hf:owner/name@revision``."""
    max_batch_size: Annotated[_Int, Field(ge=1, le=1024)] = 8
    """Requests that are decoded at one time; more wait."""
    max_context: Annotated[_Int, Field(ge=8)] | None = None
    """Most tokens of prompt and generated text of one request. The cache has
    ``max_batch_size`` times as many. ``None``: what the model was made for, at most 4096."""
    prefill_chunk: Annotated[_Int, Field(ge=1)] = 128
    """Most prompt tokens of a step while others decode: what a long prompt may delay them by. Late
    in a prompt, where a token attends to many, a step reads fewer, so that it takes as long."""
    max_batch_tokens: Annotated[_Int, Field(ge=1)] | None = None
    """Most tokens of a step. ``None``: 128 on the CPU, where more gain nothing and a step could not
    be given up soon enough, and 1024 on a GPU; at least ``max_batch_size``."""
    max_queue: Annotated[_Int, Field(ge=0)] = 256
    """Most requests that wait for a place in the batch; more are refused at once."""
    prefix_cache: bool = True
    """Reuse the work on prompts whose beginning an earlier request had, too."""
    n_threads: Annotated[_Int, Field(ge=1, le=1024)] | None = None
    """Threads on the CPU, for all Transformers models of the process; ``None``: the physical
    cores that the process may use."""
    compile: bool = False
    """Compile the model with ``torch.compile``: the first requests wait for it."""
    quantization: dict[str, Any] | None = None
    """Quantise while loading: what Transformers' ``quantization_config`` says as a mapping, e.g.
    ``{quant_method: bitsandbytes, load_in_8bit: true}``. Needs that method's library."""
    adapter: str | None = None
    """Folder of a PEFT adapter (LoRA and others) that every request uses. Needs ``peft``."""
    draft_model: str | None = None
    """Source of a smaller model with the same vocabulary that proposes tokens, several of which
    are then checked in one step. Answers stay the same."""
    prompt_lookup: bool = False
    """Propose tokens that followed the same words earlier in the request's text. Answers stay the
    same; those that repeat their prompt come faster."""
    draft_tokens: Annotated[_Int, Field(ge=1, le=64)] = 4
    """How many tokens are proposed at a time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models that you trust."""
    allow_pickle: bool = False
    """Load weights that are no safetensors. Unpickling may run code that comes with them."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, options: Any) -> Any:
        """``n_ctx`` and ``n_parallel``, so that a deployment changes its runtime in one line."""
        if not isinstance(options, dict):
            return options
        options = dict(options)
        for other, own in (("n_ctx", "max_context"), ("n_parallel", "max_batch_size")):
            if other in options:
                if own in options:
                    raise ValueError(f"{own} and {other} are the same; give one of them")
                options[own] = options.pop(other)
        return options

    @model_validator(mode="after")
    def _fit_together(self) -> HfTransformersOptions:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("give either device or device_map; both were given")
        if self.draft_model is not None and self.prompt_lookup:
            raise ValueError("give either draft_model or prompt_lookup; both were given")
        if self.max_batch_tokens is not None and self.max_batch_size > self.max_batch_tokens:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} has no token for each of "
                f"max_batch_size={self.max_batch_size} requests; make it at least as large"
            )
        return self
