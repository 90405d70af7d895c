"""What lies at a source, read and checked without loading it.

Headers of weights come from anyone: what was cut short, lies about its sizes or points outside
of its folder is refused here, with a typed error, before a library maps or allocates by it.
The formats are described in safetensors' README and in ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, Literal, NoReturn, TypeAlias

from engineroom import ConfigurationError, ModelConfig, resolve_source
from engineroom.sources import HubSource, PathSource, Source, parse_source
from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = [
    "DEFAULT_CONTEXT",
    "Checkpoint",
    "check_safetensors",
    "choose_device",
    "choose_dtype",
    "context_tokens",
    "estimate_bytes",
    "find_checkpoint",
    "looks_native",
    "read_config",
    "read_json",
    "trained_tokens",
]

logger = logging.getLogger("engineroom.hf_transformers")

DEFAULT_CONTEXT: Final = 4096
"""Most tokens of a request where the option does not say it: caches are preallocated."""

Format: TypeAlias = Literal["safetensors", "pickle", "gguf"]

_MAX_CONFIG: Final = 16 * 2**20
_MAX_INDEX: Final = 64 * 2**20
_MAX_HEADER: Final = 100_000_000  # safetensors' own bound
_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})
_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on this machine.

    :param path: its folder, or its GGUF file.
    :param config: what ``config.json`` says; of a GGUF file its metadata, under the same names.
    :param weights: the files that hold its weights.
    :param values: how many numbers it has of each type, as safetensors names types; a GGUF file's
        are all counted as ``F32``, the type that they are unpacked to.
    """

    path: Path
    format: Format
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    values: Mapping[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.path.parent if self.format == "gguf" else self.path


# ── finding ──────────────────────────────────────────────────────────────────────────────────


def looks_native(config: ModelConfig) -> bool:
    """Whether a source has the form that this runtime is for. Nothing is downloaded.

    A folder with ``config.json`` and weights, a safetensors file in one, or a repository on the
    hub. Never a GGUF file: llama.cpp's own format is loaded here only by a deployment that names
    this runtime.
    """
    try:
        source = parse_source(config.source or "")
        if isinstance(source, HubSource):
            return source.file is None or source.file.lower().endswith(".safetensors")
        path = resolve_source(source)
        if path.is_file() and path.suffix == ".safetensors":
            path = path.parent
        return (path / "config.json").is_file() and _weights_of(path) is not None
    except (LookupError, ValueError, OSError):  # ours among them
        return False


def find_checkpoint(source: str, options: HfTransformersOptions) -> Checkpoint:
    """The model that a source stands for, downloaded first if it is on the hub. Blocks.

    :raises ModelNotFoundError: there is no such path or repository.
    :raises ConfigurationError: what is there is damaged, no model, or may not be loaded without
        an option that is not set.
    """
    parsed = _with_revision(parse_source(source), options.revision)
    if isinstance(parsed, HubSource) and parsed.file and not parsed.file.endswith(".gguf"):
        parsed = HubSource(parsed.repo, parsed.revision, None)  # one file of a model is no model
    path = resolve_source(parsed)
    if path.is_file():
        if path.suffix == ".safetensors":
            path = path.parent
        elif _begins_like_gguf(path):
            return _gguf(path)
        else:
            raise ConfigurationError(
                f"{str(path)!r} is neither a folder with config.json and safetensors files nor a "
                "GGUF file; give the model's folder"
            )
    return _folder(path, options)


def _with_revision(source: Source, revision: str | None) -> Source:
    if revision is None:
        return source
    if not isinstance(source, HubSource):
        where = source.path if isinstance(source, PathSource) else source.file
        raise ConfigurationError(
            f"revision={revision!r} is for models on the hub, but {str(where)!r} is on this "
            "machine; remove the option, or write hf:owner/name"
        )
    if source.revision not in {None, revision}:
        raise ConfigurationError(
            f"source says revision {source.revision!r} of {source.repo}, and the option revision "
            f"says {revision!r}; give one of them"
        )
    return HubSource(source.repo, revision, source.file)


def _folder(folder: Path, options: HfTransformersOptions) -> Checkpoint:
    config = _model_config(folder)
    if (folder / "adapter_config.json").exists():
        # Transformers would load the model that the adapter names, from wherever that is.
        raise ConfigurationError(
            f"{str(folder)!r} is a model and an adapter at once; move adapter_config.json away to "
            "load the model, and give an adapter's folder as the option adapter"
        )
    if config.get("auto_map") and options.trust_remote_code:
        logger.warning("%s: running the Python code that comes with the model", folder)
    if not isinstance(config.get("model_type"), str):
        _refuse(folder / "config.json", "it does not say its model_type")
    architectures = config.get("architectures")
    if not (
        isinstance(architectures, list)
        and architectures
        and all(isinstance(each, str) for each in architectures)
    ):
        _refuse(
            folder / "config.json",
            "it names no architectures, so that nobody knows what the weights are for; add the "
            'class that they were saved from, e.g. "architectures": ["LlamaForCausalLM"]',
        )
    found = _weights_of(folder)
    if found is None:
        files = ", ".join(sorted(f.name for f in folder.iterdir() if f.is_file())[:12])
        raise ConfigurationError(
            f"{str(folder)!r} has no weights: neither model.safetensors nor an index of several "
            f"(it has {files}); download it again"
        )
    kind, first = found
    if kind == "pickle" and not options.allow_pickle:
        raise ConfigurationError(
            f"{str(folder)!r} has no safetensors, only {first.name}: reading pickled weights may "
            "run code that comes with them. Convert them to safetensors, or set the option "
            "allow_pickle: true if you trust where they come from"
        )
    weights = _shards(first) if first.suffix == ".json" else (first,)
    if kind == "pickle":
        return Checkpoint(folder, kind, config, weights)
    values: dict[str, int] = {}
    for path in weights:
        for name, count in check_safetensors(path).items():
            values[name] = values.get(name, 0) + count
    return Checkpoint(folder, kind, config, weights, values)


def _model_config(folder: Path) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        return read_config(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"{str(folder)!r} is an adapter, not a model; give the model that it was made for as "
            "source, and this folder as the option adapter"
        )
    raise ConfigurationError(
        f"{str(folder)!r} has no config.json, so it is no model of Transformers; give the folder "
        "that save_pretrained() wrote or the hub has, or the full name of a GGUF file"
    )


def _weights_of(folder: Path) -> tuple[Format, Path] | None:
    """The file of all weights or their index, by the names that Transformers looks for."""
    names: dict[str, Format] = {
        "model.safetensors": "safetensors",
        "model.safetensors.index.json": "safetensors",
        "pytorch_model.bin": "pickle",
        "pytorch_model.bin.index.json": "pickle",
    }
    for name, kind in names.items():
        if (folder / name).is_file():
            return kind, folder / name
    return None


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_config(index, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index, "it has no weight_map")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not _inside(name):
            _refuse(index, f"it points outside of its folder, to {str(name)[:80]!r}")
    paths = tuple(index.parent / name for name in sorted(names))
    if missing := [path.name for path in paths if not path.is_file()]:
        _refuse(index, f"of its files, {', '.join(missing[:8])} is not there")
    return paths


def _inside(name: str) -> bool:
    # By the name alone: files of the hub's cache are links to elsewhere.
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts or not path.parts:
            return False
    return "\0" not in name


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def read_config(path: Path, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from a file of at most ``limit`` bytes.

    :raises ConfigurationError: it is damaged, too large, or no object.
    """
    data = read_json(path, limit)
    if not isinstance(data, dict):
        _refuse(path, f"it is no JSON object but {type(data).__name__}")
    return data


def read_json(path: Path, limit: int = _MAX_CONFIG) -> Any:
    """What a JSON file of at most ``limit`` bytes says.

    :raises ConfigurationError: it is damaged or too large.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            _refuse(path, f"it has {size} bytes; no model's has more than {limit}")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{str(path)!r} is damaged: it is not valid JSON ({error}); download it again"
        ) from error


def _refuse(path: Path, why: str) -> NoReturn:
    raise ConfigurationError(f"{str(path)!r} cannot be used: {why}")


def check_safetensors(path: Path) -> dict[str, int]:
    """How many values of each type a safetensors file has, after checking its header.

    :raises ConfigurationError: the file was cut short, or its header is no such.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
                _damaged(path, f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        _damaged(path, "its header is not valid JSON")
    if not isinstance(header, dict):
        _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    values: dict[str, int] = {}
    spans = []
    for name, entry in header.items():
        kind, count, span = _tensor(path, name, entry)
        values[kind] = values.get(kind, 0) + count
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            _damaged(path, f"its tensors overlap or leave a gap at byte {min(begin, end)}")
        end = stop
    if 8 + length + end != size:
        _damaged(
            path,
            f"its header says {8 + length + end} bytes, but the file has {size}: it was cut short "
            "or written to",
        )
    return values


def _tensor(path: Path, name: str, entry: Any) -> tuple[str, int, tuple[int, int]]:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = _BITS[kind]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        _damaged(path, f"the entry of tensor {name[:80]!r} is not understood")
    if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        _damaged(path, f"tensor {name[:80]!r} has an impossible shape or place")
    count = math.prod(shape)
    if begin > end or (end - begin) * 8 != count * bits:
        _damaged(path, f"tensor {name[:80]!r} has other sizes than its shape says")
    return kind, count, (begin, end)


def _damaged(path: Path, why: str) -> NoReturn:
    raise ConfigurationError(
        f"{str(path)!r} is not a usable safetensors file: {why}; download it again"
    )


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────

_SCALARS: Final = {
    kind: struct.Struct("<" + code)
    for kind, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_GGUF_HEADER: Final = 256 * 2**20
"""Real ones have some 20 MiB. Bounds the time that a damaged file can cost."""
_GGUF_NAMES: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
}


def _begins_like_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _gguf(path: Path) -> Checkpoint:
    """The header of a GGUF file, walked within its bounds."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as m:
            metadata, count = _GgufWalk(path, m).header()
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str):
        _bad_gguf(path, "it does not say its architecture")
    config = {"model_type": kind} | {
        name: metadata[f"{kind}.{key}"]
        for key, name in _GGUF_NAMES.items()
        if f"{kind}.{key}" in metadata
    }
    return Checkpoint(path, "gguf", config, (path,), {"F32": count})


def _bad_gguf(path: Path, why: str) -> NoReturn:
    raise ConfigurationError(f"{str(path)!r} is not a usable GGUF file: {why}; download it again")


class _GgufWalk:
    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._at = 4

    def header(self) -> tuple[dict[str, Any], int]:
        """Numbers and strings of the metadata, and how many values all tensors have."""
        version = self._scalar(4)
        if version not in {2, 3}:
            _bad_gguf(self._path, f"it is of version {version}; 2 and 3 can be read")
        tensors, pairs = self._scalar(10), self._scalar(10)
        self._room(pairs, 13)
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._scalar(4))
        self._room(tensors, 32)
        total = end = 0
        for _ in range(tensors):
            self._string()
            dimensions = self._scalar(4)
            if not 1 <= dimensions <= 8:
                _bad_gguf(self._path, f"a tensor has {dimensions} dimensions")
            count = math.prod(self._scalar(10) for _ in range(dimensions))
            self._scalar(4)
            offset = self._scalar(10)
            total += count
            # No type has less than one bit a value.
            end = max(end, offset + count // 8)
        if self._at + end > len(self._view):
            _bad_gguf(self._path, "its tensors go on past its end: it was cut short")
        return metadata, total

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind)
        inner, count = self._scalar(4), self._scalar(10)
        if inner in _SCALARS:
            self._skip(count * _SCALARS[inner].size)
        elif inner == _STRING:
            self._room(count, 8)
            for _ in range(count):
                self._skip(self._scalar(10))
        elif inner == _ARRAY and depth < 4:
            self._room(count, 12)
            for _ in range(count):
                self._value(_ARRAY, depth + 1)
        else:
            _bad_gguf(self._path, f"its metadata has an array of the unknown type {inner}")
        return None

    def _scalar(self, kind: int) -> Any:
        code = _SCALARS.get(kind)
        if code is None:
            _bad_gguf(self._path, f"its metadata has a value of the unknown type {kind}")
        at = self._at
        self._skip(code.size)
        return code.unpack_from(self._view, at)[0]

    def _string(self) -> str:
        length = self._scalar(10)
        at = self._at
        self._skip(length)
        return self._view[at : at + min(length, 4096)].decode("utf-8", "replace")

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > len(self._view):
            _bad_gguf(self._path, "its header goes on past its end: it was cut short")
        if self._at > _MAX_GGUF_HEADER:
            _bad_gguf(self._path, f"its header goes on past {_MAX_GGUF_HEADER} bytes")

    def _room(self, count: int, least: int) -> None:
        if count * least > len(self._view) - self._at:
            _bad_gguf(self._path, f"it declares {count} entries, for which it is too small")


# ── sizes ────────────────────────────────────────────────────────────────────────────────────


def choose_device(options: HfTransformersOptions) -> str:
    """The device of a model that is on one: ``cpu``, ``cuda:N`` or ``mps``. Imports torch, unless
    the option says ``cpu``.

    :raises ConfigurationError: torch does not have the one that the option names.
    """
    wanted = options.device
    if wanted == "cpu":
        return "cpu"
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return f"cuda:{torch.cuda.current_device()}"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigurationError(
                "device: mps asks for Apple's GPU, and this torch has none; use cpu or auto"
            )
        return "mps"
    if not torch.cuda.is_available():
        why = "" if torch.version.cuda or torch.version.hip else " (it is a build for the CPU)"
        raise ConfigurationError(
            f"device: {wanted} asks for a GPU, and torch {torch.__version__} finds none{why}; "
            "use cpu or auto, or install a torch for your GPU and its driver"
        )
    number = int(wanted.partition(":")[2] or torch.cuda.current_device())
    if number >= (count := torch.cuda.device_count()):
        raise ConfigurationError(
            f"device: {wanted} does not exist; the GPUs are cuda:0 to cuda:{count - 1}"
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
    wanted = options.max_context or DEFAULT_CONTEXT
    return min(wanted, trained) if trained else wanted


def _cached_values(config: Mapping[str, Any]) -> int:
    """Numbers that the cache keeps of one token, in all layers; 0: it has no such cache."""
    text = _text_config(config)
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0
    heads = _number(text, "num_attention_heads", "n_head", "num_heads", "n_heads") or 0
    if not heads:
        return 0  # recurrent: its state is small
    width = _number(text, "hidden_size", "n_embd", "d_model", "dim") or 0
    kv_heads = _number(text, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        kv_heads = 1
    key = _number(text, "head_dim", "d_kv") or width // heads
    value = key
    if rank := _number(text, "qk_nope_head_dim"):  # latent attention, unpacked in the cache
        key, kv_heads = rank + (_number(text, "qk_rope_head_dim") or 0), heads
        value = _number(text, "v_head_dim") or key
    return layers * kv_heads * (key + value)


def _weight_bytes(checkpoint: Checkpoint, options: HfTransformersOptions, each: int) -> int:
    if not checkpoint.values:  # pickled: no header says more than the file's size
        return sum(path.stat().st_size for path in checkpoint.weights)
    bits = 8 * each
    quantization = options.quantization or {}
    if quantization.get("load_in_4bit") or quantization.get("bits") == 4:
        bits = 4
    elif quantization.get("load_in_8bit") or quantization.get("bits") == 8:
        bits = 8
    return sum(
        count * (bits if kind in _FLOATS else _BITS[kind]) // 8
        for kind, count in checkpoint.values.items()
    )


def estimate_bytes(checkpoint: Checkpoint, options: HfTransformersOptions) -> dict[str, int]:
    """Bytes of weights and key/value cache, by device (``cpu``, ``cuda:N``), from headers alone.

    Memory that Apple's GPU shares with the CPU counts as ``cpu``.
    """
    devices = _devices(options)
    config = checkpoint.config
    each = _BYTES[choose_dtype(config, options, devices[0])]
    total = _weight_bytes(checkpoint, options, each)
    cells = options.max_batch_size * context_tokens(config, options)
    total += cells * _cached_values(config) * each
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
