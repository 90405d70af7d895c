"""Read the header of a GGUF file, and check it against the file, before llama.cpp sees it.

A file that was cut short, is of another format, or lies about its sizes is refused here with a
typed error: inside the library some of that ends the process. The format is described in
ggml's ``docs/gguf.md`` (versions 2 and 3; little-endian).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from engineroom import ConfigurationError

__all__ = ["MAGIC", "GgufHeader", "is_gguf", "read_header"]

MAGIC: Final = b"GGUF"
_READ: Final = mmap.ACCESS_READ
_VERSIONS: Final = (2, 3)
_MAX_DIMENSIONS: Final = 4
_MAX_NESTING: Final = 4
_MAX_LAYERS: Final = 512
_MAX_HEADER: Final = 256 * 2**20
"""Real ones have some 20 MiB. Bounds the time and the memory that a damaged file can cost."""

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    kind: struct.Struct("<" + code)
    for kind, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip

# Values in a block, bytes of a block (ggml's type traits).
_BLOCKS: Final[Mapping[int, tuple[int, int]]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata, without its values."""

    length: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself.

    :param metadata: scalar and string values; of arrays only their length.
    :param tensor_bytes: bytes of all tensors.
    """

    version: int
    metadata: Mapping[str, Any]
    tensor_count: int
    tensor_bytes: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        """The model's architecture, e.g. ``llama``."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """A number of the architecture's own, e.g. ``block_count``.

        ``None``: it is not there, or is not one whole number (some have one for each layer).
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_gguf(path: Path) -> bool:
    """Whether the file begins like a GGUF file."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Read and check the header.

    :raises ConfigurationError: the file is empty, no GGUF file, cut short, of another version,
        or its declared sizes do not fit it; the message says which.
    """
    try:
        size = path.stat().st_size
        if size < 24:  # asked before it is opened: a pipe would never open
            _refuse(path, f"it has only {size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=_READ) as view:
            return _Reader(path, view, size).header()
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _refuse(path: Path, why: str) -> NoReturn:
    raise ConfigurationError(
        f"{str(path)!r} is not a usable GGUF file: {why}; download it again, or convert the "
        "model with llama.cpp's convert_hf_to_gguf.py"
    )


class _Reader:
    """A cursor over the file that never reads past its end."""

    def __init__(self, path: Path, view: mmap.mmap, size: int) -> None:
        self._path = path
        self._view = view
        self._size = size
        self._at = 0

    def header(self) -> GgufHeader:
        if self._view[:4] != MAGIC:
            _refuse(self._path, f"it begins with {self._view[:4]!r} instead of b'GGUF'")
        self._at = 4
        version = self._scalar(4)
        if version not in _VERSIONS:
            _refuse(self._path, f"it is of version {version}; versions 2 and 3 can be read")
        tensors, pairs = self._scalar(10), self._scalar(10)
        # The smallest pair takes 13 bytes, the smallest tensor entry 32.
        self._enough(pairs, 13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in metadata:
                _refuse(self._path, f"the metadata key {key[:80]!r} is there twice")
            kind = self._scalar(4)
            if key == "tokenizer.ggml.tokens":
                self._no_token_twice(kind, self._at)
            metadata[key] = self._value(kind)
        self._enough(tensors, 32, "tensors")
        declared = self._tensors(tensors)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            _refuse(self._path, f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self._at // alignment) * alignment
        total = 0
        for name, offset, length in declared:
            if offset % alignment:
                _refuse(self._path, f"tensor {name[:80]!r} is not aligned")
            if start + offset + length > self._size:
                _refuse(
                    self._path,
                    f"tensor {name[:80]!r} ends at byte {start + offset + length}, but the file "
                    f"has {self._size}: it was cut short",
                )
            total += length
        if not isinstance(metadata.get("general.architecture"), str):
            _refuse(self._path, "it does not say its architecture")
        header = GgufHeader(version, metadata, tensors, total, self._size)
        self._numbers_in_range(header)
        return header

    def _numbers_in_range(self, header: GgufHeader) -> None:
        """Numbers over which llama.cpp ends the process."""
        layers = header.number("block_count")
        if layers is not None and not 1 <= layers <= _MAX_LAYERS:
            _refuse(self._path, f"it declares {layers} layers, not 1 to {_MAX_LAYERS}")
        for key, value in header.metadata.items():
            if key.endswith("_epsilon") and isinstance(value, float) and not value >= 0.0:
                _refuse(self._path, f"{key[:80]} is {value}, not a small positive number")

    def _tensors(self, count: int) -> list[tuple[str, int, int]]:
        found: list[tuple[str, int, int]] = []
        for _ in range(count):
            name = self._string()
            dimensions = self._scalar(4)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                _refuse(self._path, f"tensor {name[:80]!r} has {dimensions} dimensions")
            shape = [self._scalar(10) for _ in range(dimensions)]
            kind, offset = self._scalar(4), self._scalar(10)
            values = 1
            for extent in shape:
                values *= extent
            per_block, block = _BLOCKS.get(kind, (0, 0))
            if values == 0 or (per_block and shape[0] % per_block):
                _refuse(self._path, f"tensor {name[:80]!r} has the impossible shape {shape}")
            length = values // per_block * block if per_block else 0
            found.append((name, offset, length))
        return found

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind)
        if depth >= _MAX_NESTING:
            _refuse(self._path, "its metadata has arrays in arrays in arrays")
        inner, count = self._scalar(4), self._scalar(10)
        if inner in _SCALARS:
            self._skip(count * _SCALARS[inner].size)
        elif inner == _STRING:
            self._enough(count, 8, "strings of an array")
            for _ in range(count):
                self._skip(self._scalar(10))
        elif inner == _ARRAY:
            self._enough(count, 12, "arrays of an array")
            for _ in range(count):
                self._value(_ARRAY, depth + 1)
        else:
            _refuse(self._path, f"its metadata has a value of the unknown type {inner}")
        return GgufArray(count)

    def _no_token_twice(self, kind: int, start: int) -> None:
        """llama.cpp ends the process over a vocabulary that has a token twice."""
        inner = self._scalar(4) if kind == _ARRAY else None
        if inner != _STRING:
            _refuse(self._path, "its vocabulary is no array of strings")
        count = self._scalar(10)
        self._enough(count, 8, "tokens")
        tokens: set[bytes] = set()
        for _ in range(count):
            length = self._scalar(10)
            at = self._at
            self._skip(length)
            token = self._view[at : self._at]
            if token in tokens and token:  # empty ones get a name of their own
                _refuse(self._path, f"its vocabulary has the token {token[:80]!r} twice")
            tokens.add(token)
        self._at = start

    def _scalar(self, kind: int) -> Any:
        code = _SCALARS.get(kind)
        if code is None:
            _refuse(self._path, f"its metadata has a value of the unknown type {kind}")
        at = self._at
        self._skip(code.size)
        return code.unpack_from(self._view, at)[0]

    def _string(self) -> str:
        length = self._scalar(10)
        at = self._at
        self._skip(length)
        return self._view[at : at + length].decode("utf-8", "replace")

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > self._size:
            _refuse(self._path, f"its header goes on past its {self._size} bytes: it was cut short")
        if self._at > _MAX_HEADER:
            _refuse(self._path, f"its header goes on past {_MAX_HEADER} bytes, as no model's does")

    def _enough(self, count: int, least: int, what: str) -> None:
        if count * least > self._size - self._at:
            _refuse(self._path, f"it declares {count} {what}, for which it is too small")
