"""What a model will take of each device, from its file's header alone.

Weights and key/value cache are counted as llama.cpp places them: the last ``n_gpu_layers`` layers
(one more: the output layer) go to GPUs, split over them by ``tensor_split`` or by their free
memory, and each layer's share of the cache goes with it. What reads the tokens stays with the CPU.
A mapped file counts in full, though its pages come and go as they are used. On the CPU, weights
that have fast kernels are copied into another order, and the mapped pages that they came from are
given back when memory is short: a process may be seen to have both for a while. What llama.cpp
needs to compute (some forty MiB) is not counted, but for what grows with the text: where a model
that generates makes embeddings, logits of every token of a text, twice.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from typing import Final

from engineroom import ConfigurationError
from engineroom.memory import kv_layers
from engineroom.sources import GgufHeader, GgufTensor
from engineroom_llamacpp.library import gpu_devices
from engineroom_llamacpp.options import DEFAULT_CONTEXT, LlamaCppOptions

__all__ = ["check_positions", "estimate", "is_encoder", "pooling_of", "prompt_cache"]

_CACHE_BYTES: Final = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32,
                       "q4_1": 20 / 32, "q5_0": 22 / 32, "q5_1": 24 / 32}  # fmt: skip
_ROUNDED: Final = 256
_CACHES: Final = 2
"""Prompts that wait take so many times the memory of the key/value cache, where no option says."""
_SHARE_OF_FREE: Final = 8
"""They take at most this fraction of what is free."""
_MEAN: Final = 1
_POOLINGS: Final = {0: "none", _MEAN: "mean", 2: "cls", 3: "last"}
_RANK: Final = 4
_LAYER: Final = re.compile(r"blk\.(\d+)\.")
_OUTPUT: Final = re.compile(r"output(_norm)?\.|cls\b")


def is_encoder(header: GgufHeader) -> bool:
    """Whether the model reads texts as wholes: it makes embeddings and generates nothing."""
    return header.metadata.get(f"{header.architecture}.attention.causal") is False


def pooling_of(header: GgufHeader) -> int | None:
    """How the model's outputs become a vector: llama.cpp's number for it.

    An encoder that does not say gets the mean. ``None``: it makes no embeddings.

    :raises ConfigurationError: it makes something else (a rank), or nothing that is known.
    """
    pooling = header.number("pooling_type")
    if pooling == _RANK:
        raise ConfigurationError(
            f"{header.file} ranks texts (pooling_type 4) and makes no embeddings; this runtime "
            "runs models that generate text or make embeddings"
        )
    if pooling is not None and pooling not in _POOLINGS:
        known = ", ".join(f"{number} ({name})" for number, name in _POOLINGS.items())
        raise ConfigurationError(f"{header.file} has the pooling_type {pooling}; known are {known}")
    if not pooling:
        return _MEAN if is_encoder(header) else None
    return pooling


def check_positions(header: GgufHeader, options: LlamaCppOptions) -> None:
    """A model that learnt its positions has no others, and llama.cpp would end the process.

    :raises ConfigurationError: ``n_ctx`` is beyond them.
    """
    if options.n_ctx is None or is_encoder(header):
        return  # encoders get no more than they know
    for tensor in header.tensors:
        if tensor.name == "position_embd.weight" and options.n_ctx > tensor.shape[-1]:
            raise ConfigurationError(
                f"n_ctx={options.n_ctx} is more than the {tensor.shape[-1]} positions that "
                f"{header.file} has learnt; set it to no more"
            )


def estimate(
    header: GgufHeader,
    options: LlamaCppOptions,
    size_of: Callable[[GgufTensor], int] = lambda tensor: tensor.size,
) -> dict[str, int]:
    """Bytes of weights and cache on each device, ``{"cpu": …, "cuda:0": …}``.

    :param size_of: bytes of a tensor, where they are not to be those of the file.
    """
    layers = header.number("block_count") or 0
    place = _places(layers, options)
    taken: dict[str, int] = {"cpu": 0}

    def add(device: str, count: int) -> None:
        taken[device] = taken.get(device, 0) + count

    own_output = any(tensor.name == "output.weight" for tensor in header.tensors)
    for tensor in header.tensors:
        size = size_of(tensor)
        if (match := _LAYER.match(tensor.name)) is not None:
            add(place(min(int(match[1]), layers)), size)
        elif _OUTPUT.match(tensor.name):
            add(place(layers), size)
        else:
            add("cpu", size)
            if tensor.name == "token_embd.weight" and not own_output and place(layers) != "cpu":
                add(place(layers), size)  # a copy of it is the output layer
    for layer, size in enumerate(_cache(header, options)):
        add(place(layer), size)
    if not is_encoder(header):
        add(place(layers), 2 * 4 * _embedding_tokens(header, options) * _vocabulary(header))
    return taken


def prompt_cache(header: GgufHeader, options: LlamaCppOptions, free: int | None) -> int:
    """Bytes of host memory for prompts that wait to be used again.

    :param free: bytes of it that are free; ``None``: not known.
    """
    # What cannot be cut is not used again.
    cut = not header.number("attention.sliding_window") and not any(
        key.startswith(f"{header.architecture}.ssm.") for key in header.metadata
    )
    if not options.prefix_cache or not cut or is_encoder(header):
        return 0
    if options.prompt_cache_memory is not None:
        return options.prompt_cache_memory
    most = _CACHES * sum(_cache(header, options))
    return most if free is None else min(most, free // _SHARE_OF_FREE)


def _places(layers: int, options: LlamaCppOptions) -> Callable[[int], str]:
    """The device of each layer; the one after the last is the output's."""
    devices = gpu_devices() if options.n_gpu_layers else []
    if options.main_gpu is not None:
        devices = devices[options.main_gpu : options.main_gpu + 1]
    on_gpu = layers + 1 if options.n_gpu_layers < 0 else min(options.n_gpu_layers, layers + 1)
    if not devices or not on_gpu:
        return lambda _: "cpu"
    first = layers + 1 - on_gpu
    bounds = _bounds(devices, options.tensor_split)

    def place(layer: int) -> str:
        if layer < first:
            return "cpu"
        number = bisect.bisect_right(bounds, (layer - first) / on_gpu)
        return devices[min(number, len(devices) - 1)][0]

    return place


def _bounds(devices: Sequence[tuple[str, int]], split: Sequence[float] | None) -> list[float]:
    shares: list[float] = [free for _, free in devices]
    if split and any(split):
        shares = [*split, *[0.0] * len(devices)][: len(devices)]
    total = sum(shares) or 1
    return [sum(shares[: count + 1]) / total for count in range(len(shares))]


def _cache(header: GgufHeader, options: LlamaCppOptions) -> list[int]:
    """Bytes of the key/value cache for each layer."""
    if is_encoder(header):
        return []
    trained = header.number("context_length") or DEFAULT_CONTEXT
    cells = options.n_ctx or min(trained, DEFAULT_CONTEXT)
    if not options.kv_unified:  # llama.cpp rounds each part up
        parts = options.n_parallel
        cells = (cells // parts + _ROUNDED - 1) // _ROUNDED * _ROUNDED * parts
    k_bytes, v_bytes = _CACHE_BYTES[options.cache_type_k], _CACHE_BYTES[options.cache_type_v]
    embedding = _embedding_tokens(header, options)  # a second context, of halves
    return [
        int(cells * (layer.keys * k_bytes + layer.values * v_bytes))
        + embedding * (layer.keys + layer.values) * 2
        for layer in kv_layers(header.config())
    ]


def _embedding_tokens(header: GgufHeader, options: LlamaCppOptions) -> int:
    """Tokens of the context that makes embeddings; 0: there is none."""
    if pooling_of(header) is None:
        return 0
    trained = header.number("context_length") or DEFAULT_CONTEXT
    return min(options.n_ctx or DEFAULT_CONTEXT, trained)


def _vocabulary(header: GgufHeader) -> int:
    """Rows of the matrix that reads tokens."""
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight":
            return tensor.shape[-1]
    return 0
