"""Headers of files with weights, and JSON beside them, read within their bounds.

They come from anyone: what was cut short, lies about its sizes or is too large is refused here,
with a typed error, before a library maps or allocates by it. The formats are described in
safetensors' README and in ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from engineroom import ConfigurationError

__all__ = [
    "BITS",
    "begins_like_gguf",
    "check_safetensors",
    "read_config",
    "read_gguf",
    "read_json",
    "refuse",
]

_MAX_CONFIG: Final = 16 * 2**20
_MAX_HEADER: Final = 100_000_000  # safetensors' own bound
BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Type of a number, as safetensors names types → how many bits it has."""


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────


def read_config(path: Path, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from a file of at most ``limit`` bytes.

    :raises ConfigurationError: it is damaged, too large, or no object.
    """
    data = read_json(path, limit)
    if not isinstance(data, dict):
        refuse(path, f"it is no JSON object but {type(data).__name__}")
    return data


def read_json(path: Path, limit: int = _MAX_CONFIG) -> Any:
    """What a JSON file of at most ``limit`` bytes says.

    :raises ConfigurationError: it is damaged or too large.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            refuse(path, f"it has {size} bytes; no model's has more than {limit}")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{str(path)!r} is damaged: it is not valid JSON ({error}); download it again"
        ) from error


def refuse(path: Path, why: str) -> NoReturn:
    """Say that a file is not what it should be.

    :raises ConfigurationError: always.
    """
    raise ConfigurationError(f"{str(path)!r} cannot be used: {why}")


# ── safetensors ──────────────────────────────────────────────────────────────────────────────


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
        bits = BITS[kind]
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


def begins_like_gguf(path: Path) -> bool:
    """Whether a file says that it is in GGUF."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: Path) -> tuple[dict[str, Any], int]:
    """What the header of a GGUF file says, as ``config.json`` would, and how many values it has.

    :raises ConfigurationError: the file was cut short, or its header is no such.
    """
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
    return config, count


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
