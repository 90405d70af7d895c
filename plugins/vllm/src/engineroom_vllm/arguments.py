"""The arguments of vLLM's engine, from a model's folder, its options and the plan of its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from engineroom import ConfigurationError
from engineroom_vllm.embedding import recipe_of, runner_of
from engineroom_vllm.folder import ModelFolder
from engineroom_vllm.memory import MemoryPlan
from engineroom_vllm.options import VLLMOptions

__all__ = ["engine_arguments", "pooling_arguments"]

_MOST_LOGPROBS: Final = 4096
"""Of one token: what beam search asks for; requests are bounded by the contract."""
_NO_SHARE: Final = 0.01
"""Of a device's memory: what has to be free when an engine starts, even where its cache's size is
given. By itself it is nine tenths, and a second model would find no place."""
_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of LoRA adapters that vLLM has room for."""


def engine_arguments(
    folder: ModelFolder,
    options: VLLMOptions,
    memory: MemoryPlan,
    *,
    eager: bool,
    cpu: bool = False,
) -> dict[str, Any]:
    """Arguments of vLLM's engine. ``None`` leaves one to vLLM.

    :param cpu: vLLM computes on one.
    :raises ConfigurationError: a LoRA adapter is not there, or has no place.
    """
    arguments: dict[str, Any] = {
        "model": str(folder.path),
        "runner": runner_of(folder, options),
        # How much an encoder reads, more files than one tell, and vLLM knows them.
        "max_model_len": options.context if folder.encoder else memory.context,
        "max_num_seqs": memory.parallel,
        # Left to itself, vLLM computes a model of 32-bit weights in 16 bits.
        "dtype": folder.dtype if options.dtype == "auto" else options.dtype,
        "quantization": options.quantization,
        "gpu_memory_utilization": options.gpu_memory_utilization
        or (None if memory.cache_bytes is None else _NO_SHARE),
        "kv_cache_memory_bytes": memory.cache_bytes_each,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "distributed_executor_backend": options.distributed_executor_backend,
        "enable_prefix_caching": None if folder.encoder else options.enable_prefix_caching,
        "enforce_eager": eager,
        "speculative_config": options.speculative_config,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": _MOST_LOGPROBS,
        "scheduling_policy": "priority",
        # The one that reads our grammars; left to itself, vLLM takes another one first.
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if arguments["runner"] == "pooling":
        arguments |= pooling_arguments(folder)
    if options.lora_modules:
        rank = max(_rank(Path(module.path).expanduser()) for module in options.lora_modules)
        # A request without an adapter has the number -1. Kernels on GPUs skip it; on CPUs it is
        # an index, and means the last place: that one has to stay empty.
        places = len(options.lora_modules) + cpu
        if cpu and (wished := options.engine_args.get("max_loras", places)) < places:
            raise ConfigurationError(
                f"engine_args: max_loras is {wished}, and on a CPU there has to be a place for "
                f"each of lora_modules and an empty one: {places}; leave it out"
            )
        arguments |= {
            "enable_lora": True,
            "max_loras": places,
            "max_lora_rank": next((r for r in _RANKS if r >= rank), rank),
        }
    return arguments | options.engine_args


def pooling_arguments(folder: ModelFolder) -> dict[str, Any]:
    """Arguments of an engine that makes embeddings.

    :raises ConfigurationError: the folder asks for what vLLM cannot do.
    """
    recipe = recipe_of(folder)
    return {
        "runner": "pooling",
        # A text comes without a cache scope, and the time that it takes would tell of another's.
        "enable_prefix_caching": None if folder.encoder else False,
        "pooler_config": {"pooling_type": recipe.pooling, "use_activation": recipe.normalise},
    }


def _rank(path: Path) -> int:
    file = path / "adapter_config.json"
    try:
        rank = json.loads(file.read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"lora_modules: {str(path)!r} holds no adapter (a folder with adapter_config.json, "
            f"which says the rank r, and its weights): {type(error).__name__}: {error}"
        ) from error
    if type(rank) is not int or rank < 1:
        raise ConfigurationError(f"lora_modules: {str(file)!r} says the rank is {rank!r}")
    return rank
