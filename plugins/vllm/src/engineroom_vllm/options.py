"""What ``options:`` of a vLLM model may say."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engineroom.prompts import ChatOptions
from engineroom.sources import EmbeddingOptions

__all__ = ["OWN_ARGUMENTS", "LoraModule", "VLLMOptions"]

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", re.IGNORECASE)
_UNITS: Final = {
    "b": 1,
    **{f"{unit}ib": 1024**power for power, unit in enumerate("kmgt", 1)},
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgt", 1)},
}


def _no_switch(value: Any) -> Any:
    """``n_parallel: on`` would be one request."""
    if isinstance(value, bool):
        raise ValueError(f"give a number, not {str(value).lower()}")
    return value


def _bytes(value: Any) -> Any:
    """``2GiB`` and the like, or a number of bytes."""
    if isinstance(value, str):
        if (match := _SIZE.fullmatch(value)) is None:
            raise ValueError(f"{value!r} is no size; write a number of bytes, or such as 2GiB")
        return int(float(match[1]) * _UNITS[(match[2] or "b").lower()])
    return _no_switch(value)


_Int: TypeAlias = Annotated[int, BeforeValidator(_no_switch), Field(le=2**31 - 1)]
_Float: TypeAlias = Annotated[float, BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
_Bytes: TypeAlias = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]


class LoraModule(BaseModel):
    """A LoRA adapter, used by requests whose ``adapter`` or ``model_id`` is its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    path: Annotated[str, Field(min_length=1)]


class VLLMOptions(ChatOptions, EmbeddingOptions):
    """Options of one model. Sizes are in tokens where nothing else is said.

    The names are vLLM's own. ``n_ctx`` and ``n_parallel``, which other runtimes have, may be
    written for ``max_model_len`` and ``max_num_seqs``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    max_model_len: Annotated[_Int, Field(ge=8)] | None = None
    """Most tokens that prompt and answer may have together; ``None``: what the model was trained
    for, at most 8192."""
    n_ctx: Annotated[_Int, Field(ge=8)] | None = None
    """The same, under the name that other runtimes have."""
    max_num_seqs: Annotated[_Int, Field(ge=1, le=4096)] | None = None
    """Requests that are decoded at one time; more wait. ``None``: 8 on CPUs, 64 on GPUs."""
    n_parallel: Annotated[_Int, Field(ge=1, le=4096)] | None = None
    """The same, under the name that other runtimes have."""
    max_queue: Annotated[_Int, Field(ge=0)] = 256
    """Most requests that wait; more are refused at once."""
    runner: Literal["auto", "generate", "pooling"] = "auto"
    """What the model is for: ``generate`` text, or ``pooling``, which makes embeddings. ``auto``:
    encoders, decoders without their head, and folders with a ``modules.json`` make embeddings."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and computation; ``auto``: as the model's files say."""
    quantization: str | None = None
    """How the weights are quantised (``awq``, ``fp8``, …); ``None``: as the model's files say."""
    gpu_memory_utilization: Annotated[_Float, Field(gt=0, le=1)] | None = None
    """Share of the device's memory that the model may take in all; what weights and computation
    leave of it becomes cache. ``None``: the cache is as large as ``kv_cache_memory`` says."""
    kv_cache_memory: _Bytes | None = None
    """Bytes of key/value cache on each device (``2GiB`` is understood). ``None``: room for as
    many whole contexts as run at one time, at most eight, and on a CPU at most half of the
    memory that is free."""
    tensor_parallel_size: Annotated[_Int, Field(ge=1, le=1024)] = 1
    """Devices that share each layer."""
    pipeline_parallel_size: Annotated[_Int, Field(ge=1, le=1024)] = 1
    """Groups of devices that share the layers."""
    distributed_executor_backend: Literal["mp", "ray", "uni", "external_launcher"] | None = None
    """How several devices are driven; ``ray`` reaches over machines. ``None``: vLLM chooses."""
    enable_prefix_caching: bool = True
    """Use again what was computed for an earlier request with the same beginning."""
    enforce_eager: bool | None = None
    """Do without compilation and CUDA graphs; ``None``: on CPUs only."""
    lora_modules: list[LoraModule] = Field(default_factory=list)
    """LoRA adapters. A request gets the one whose name is the ``model_id`` that it asks for, so
    each name has to be one of the model's ``aliases``."""
    speculative_config: dict[str, Any] | None = None
    """Speculative decoding, as vLLM's own setting of that name."""
    n_threads: Annotated[_Int, Field(ge=1, le=1024)] | None = None
    """On CPUs: threads; ``None``: the physical cores that the process may use, but for one on
    machines with more than four."""
    bind_threads: bool = True
    """On CPUs: keep each thread on a core of its own."""
    load_timeout_s: Annotated[_Float, Field(gt=0)] = 1800.0
    """Seconds that the engine may take to become ready."""
    keep_ready_s: Annotated[_Float, Field(ge=0)] = 0.0
    """On CPUs: seconds that the process which engines are forked from stays, with vLLM imported,
    once the last engine has ended. The next load is the quicker by its start."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Any other argument of vLLM's engine, by its name there."""

    @model_validator(mode="after")
    def _fit_together(self) -> VLLMOptions:
        for own, other in (("max_model_len", "n_ctx"), ("max_num_seqs", "n_parallel")):
            if getattr(self, own) is not None and getattr(self, other) is not None:
                raise ValueError(f"{own} and {other} are the same; give one of them")
        if self.gpu_memory_utilization is not None and self.kv_cache_memory is not None:
            raise ValueError(
                "gpu_memory_utilization and kv_cache_memory both say how large the cache is; "
                "give one of them"
            )
        names = [module.name for module in self.lora_modules]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"lora_modules: {twice[0]!r} is there twice; give each its own name")
        if taken := sorted(set(self.engine_args) & OWN_ARGUMENTS.keys()):
            said = ", ".join(f"{name} ({OWN_ARGUMENTS[name]})" for name in taken)
            raise ValueError(f"engine_args: these are not for there: {said}")
        if self.speculative_config is not None and self.lora_modules:
            raise ValueError("lora_modules and speculative_config do not go together")
        return self

    @property
    def context(self) -> int | None:
        """``max_model_len``, under either name."""
        return self.max_model_len if self.max_model_len is not None else self.n_ctx

    @property
    def parallel(self) -> int | None:
        """``max_num_seqs``, under either name."""
        return self.max_num_seqs if self.max_num_seqs is not None else self.n_parallel


OWN_ARGUMENTS: Final = {
    **{
        name: f"write options.{name}"
        for name in (
            "max_model_len",
            "max_num_seqs",
            "runner",
            "dtype",
            "quantization",
            "gpu_memory_utilization",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "distributed_executor_backend",
            "enable_prefix_caching",
            "enforce_eager",
            "speculative_config",
        )
    },
    "kv_cache_memory_bytes": "write options.kv_cache_memory",
    "model": "write the model's source",
    "enable_lora": "write options.lora_modules",
    "generation_config": "engineroom's parameters never come from the model's files",
    "override_generation_config": "engineroom's parameters never come from the model's files",
    "logprobs_mode": "engineroom reports log probabilities as the model gave them",
    "logits_processors": "they would change what engineroom's parameters mean",
    "scheduling_policy": "requests have priorities",
    "structured_outputs_config": "grammars are those of llguidance, as on every runtime",
    "skip_tokenizer_init": "a model without a tokenizer generates no text",
}
"""Arguments of the engine that ``engine_args`` may not have, and what to do instead."""
