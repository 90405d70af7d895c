"""How much memory a model is to take: what its cache needs, not nine tenths of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engineroom import ResourceNotAvailableError
from engineroom_vllm.folder import ModelFolder
from engineroom_vllm.options import VLLMOptions

__all__ = ["PROCESS_BYTES", "MemoryPlan", "plan", "require"]

PROCESS_BYTES: Final = 1536 << 20
"""Main memory of an engine's processes without weights and cache, on a CPU; measured."""
_SLACK: Final = 256
"""Tokens of cache beyond a whole context: blocks that are begun and one that vLLM keeps."""
_MOST_CONTEXTS: Final = 8
_UNKNOWN: Final = 1 << 30
"""Bytes of cache on a CPU for a model whose files do not tell what a token takes."""
CPU_PARALLEL: Final = 8
GPU_PARALLEL: Final = 64


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes that an engine is started with.

    :param context: tokens that one request may have.
    :param parallel: requests at one time.
    :param weight_bytes: of the weights, on all devices together.
    :param cache_bytes: of the key/value cache, on all devices together; ``None``: vLLM takes
        what ``gpu_memory_utilization`` leaves.
    :param devices: how many there are.
    """

    context: int
    parallel: int
    weight_bytes: int
    cache_bytes: int | None
    devices: int

    @property
    def cache_bytes_each(self) -> int | None:
        """Bytes of cache on each device."""
        return None if self.cache_bytes is None else -(-self.cache_bytes // self.devices)

    @property
    def total_bytes(self) -> int:
        """Weights and cache."""
        return self.weight_bytes + (self.cache_bytes or 0)


def plan(
    folder: ModelFolder, options: VLLMOptions, *, cpu: bool, free: int | None = None
) -> MemoryPlan:
    """Work out the sizes.

    :param cpu: the model runs in main memory.
    :param free: bytes that are free there; ``None``: not known.
    """
    context = folder.context(options.context)
    parallel = options.parallel or (CPU_PARALLEL if cpu else GPU_PARALLEL)
    devices = options.tensor_parallel_size * options.pipeline_parallel_size
    weights = folder.loaded_bytes(options.dtype)
    token = folder.token_bytes(options.dtype)
    cache: int | None
    if options.kv_cache_memory is not None:
        cache = options.kv_cache_memory * devices
    elif options.gpu_memory_utilization is not None:
        cache = None
    elif folder.encoder:
        cache = 0
    elif token == 0:
        cache = _UNKNOWN if cpu else None
    else:
        least = token * (context + _SLACK)
        cache = token * (context * min(parallel, _MOST_CONTEXTS) + _SLACK)
        if free is not None:
            cache = min(cache, max(least, (free - weights - PROCESS_BYTES) // 2))
    return MemoryPlan(context, parallel, weights, cache, devices)


def require(memory: MemoryPlan, free: int) -> None:
    """Refuse to start an engine that does not fit into main memory.

    :param free: bytes that are free there.
    :raises ResourceNotAvailableError: says what is needed, what there is, and what to do.
    """
    needed = memory.total_bytes + PROCESS_BYTES
    if needed <= free:
        return
    cache = memory.cache_bytes or 0
    raise ResourceNotAvailableError(
        f"{_gib(needed)} of memory are needed ({_gib(memory.weight_bytes)} for the weights, "
        f"{_gib(cache)} for the cache of {memory.context} tokens of context, "
        f"{_gib(PROCESS_BYTES)} for the processes), {_gib(free)} are free; lower max_model_len or "
        "kv_cache_memory, unload another model, or take a smaller one"
    )


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
