"""Where a model runs and how large it is there: device, dtype, context and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engineroom import ConfigurationError
from engineroom.memory import kv_values_per_token
from engineroom.sources import SAFETENSORS_BITS
from engineroom_hf_transformers.checkpoint import Checkpoint
from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = [
    "DEFAULT_CONTEXT",
    "choose_device",
    "choose_dtype",
    "context_tokens",
    "estimate_bytes",
    "trained_tokens",
]

DEFAULT_CONTEXT: Final = 4096
"""Most tokens of a request where the option does not say it: caches are preallocated."""

_FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})
_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def choose_device(options: HfTransformersOptions) -> str:
    """The device of a model that is on one: ``cpu``, ``cuda:N`` or ``mps``. Imports torch, unless
    the option says ``cpu``.

    :raises ConfigurationError: torch does not have the one that the option names.
    """
    name = options.device
    if name == "cpu":
        return "cpu"
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return f"cuda:{torch.cuda.current_device()}"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigurationError(
                "device: mps asks for Apple's GPU, and this torch has none; use cpu or auto"
            )
        return "mps"
    if not torch.cuda.is_available():
        why = "" if torch.version.cuda or torch.version.hip else " (it is a build for the CPU)"
        raise ConfigurationError(
            f"device: {name} asks for a GPU, and torch {torch.__version__} finds none{why}; "
            "use cpu or auto, or install a torch for your GPU and its driver"
        )
    number = int(name.partition(":")[2] or torch.cuda.current_device())
    if number >= (count := torch.cuda.device_count()):
        raise ConfigurationError(
            f"device: {name} does not exist; the GPUs are cuda:0 to cuda:{count - 1}"
        )
    return f"cuda:{number}"


def choose_dtype(config: Mapping[str, Any], options: HfTransformersOptions, device: str) -> str:
    """The type of the weights in memory, as torch names it. Imports torch for half precision.

    ``auto``: as the checkpoint says; where half precision would be emulated on the CPU, float32.
    """
    if options.dtype != "auto":
        return options.dtype
    text = _text_config(config)
    stored = next(
        (c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if c.get(k)), "float32"
    )
    stored = str(stored).removeprefix("torch.")
    if stored not in {"bfloat16", "float16"}:
        return "float32"
    return stored if device != "cpu" or _fast_on_cpu(stored) else "float32"


def _fast_on_cpu(dtype: str) -> bool:
    import torch

    names = (
        ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if dtype == "bfloat16"
        else ("_is_amx_fp16_supported",)
    )
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is a positive number."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
    return None


def trained_tokens(config: Mapping[str, Any]) -> int | None:
    """How many positions the model was made for; ``None``: it does not count them."""
    names = (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "max_sequence_length",
        "n_ctx",
    )
    return _number(_text_config(config), *names)


def context_tokens(config: Mapping[str, Any], options: HfTransformersOptions) -> int:
    """Most tokens of one request: what the model has positions for, and the option allows."""
    trained = trained_tokens(config)
    most = options.max_context or DEFAULT_CONTEXT
    return min(most, trained) if trained else most


def _weight_bytes(checkpoint: Checkpoint, options: HfTransformersOptions, number_bytes: int) -> int:
    if not checkpoint.values:  # pickled: no header says more than the file's size
        return sum(path.stat().st_size for path in checkpoint.weights)
    bits = 8 * number_bytes
    quantization = options.quantization or {}
    if quantization.get("load_in_4bit") or quantization.get("bits") == 4:
        bits = 4
    elif quantization.get("load_in_8bit") or quantization.get("bits") == 8:
        bits = 8
    return sum(
        count * (bits if kind in _FLOATS else SAFETENSORS_BITS[kind]) // 8
        for kind, count in checkpoint.values.items()
    )


def estimate_bytes(checkpoint: Checkpoint, options: HfTransformersOptions) -> dict[str, int]:
    """Bytes of weights and key/value cache, by device (``cpu``, ``cuda:N``), from headers alone.

    Memory that Apple's GPU shares with the CPU counts as ``cpu``.
    """
    devices = _devices(options)
    config = checkpoint.config
    number_bytes = _BYTES[choose_dtype(config, options, devices[0])]
    total = _weight_bytes(checkpoint, options, number_bytes)
    cells = options.max_batch_size * context_tokens(config, options)
    # Attention is handed latent vectors unpacked, and its keys and values are what slots keep.
    total += cells * kv_values_per_token(config, unpacked=True) * number_bytes
    share = -(-total // len(devices))
    return {"cpu" if device == "mps" else device: share for device in devices}


def _devices(options: HfTransformersOptions) -> list[str]:
    if options.device_map is None:
        return [choose_device(options)]
    if isinstance(options.device_map, dict):
        return sorted(set(map(_device_name, options.device_map.values())))
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _device_name(value: int | str) -> str:
    if isinstance(value, int) or value.isdigit():
        return f"cuda:{value}"
    return {"cuda": "cuda:0", "disk": "cpu"}.get(value, value)
