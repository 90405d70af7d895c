"""Read the header of a GGUF file within bounds, and check it against the file.

A file that was cut short, is of another format, or lies about its sizes is refused here with a
typed error, before a library maps or allocates by it: some end the process over that. The format
is described in ggml's ``docs/gguf.md`` (versions 2 and 3; little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

from engineroom.errors import ConfigurationError
from engineroom.sources.gguf import MAGIC, GgufArray, GgufHeader, GgufTensor, gguf_part_paths, whole

__all__ = ["read_gguf_header", "refuse_gguf"]

_READ: Final = mmap.ACCESS_READ
_VERSIONS: Final = (2, 3)
_MAX_DIMENSIONS: Final = 4
_MAX_NESTING: Final = 4
_FIRST: Final = "model-00001-of-00003.gguf"
_MAX_VALUES: Final = 4096
"""Numbers of an array that are kept: those of one for each layer, not those of a vocabulary."""
_MAPPED: Final = 32
"""What ggml asks of the address of mapped tensors."""
_MAX_ENTRIES: Final = 100_000
"""Tensors, or entries of the metadata; real ones have some thousand. Each costs memory here."""
_MAX_STRINGS: Final = 2**22
"""Strings of an array that are kept: tokens of a vocabulary."""
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


def read_gguf_header(path: Path, *, keep: Collection[str] = ()) -> GgufHeader:
    """Read and check the header; of a model in several files, those of all. Blocks.

    :param path: the file, or the first of several (``…-00001-of-00003.gguf``).
    :param keep: keys of the metadata whose arrays of strings are kept, as bytes.
    :raises ConfigurationError: the file is empty, no GGUF file, cut short, of another version,
        or its declared sizes do not fit it; the message says which.
    """
    header = _read(path, keep)
    if (count := whole(header.metadata.get("split.count")) or 1) != 1:
        header = _with_parts(path, header, count)
    if not isinstance(header.metadata.get("general.architecture"), str):
        refuse_gguf(path, "it does not say its architecture")
    return header


def _read(path: Path, keep: Collection[str] = ()) -> GgufHeader:
    try:
        size = path.stat().st_size
        if size < 24:  # asked before it is opened: a pipe would never open
            refuse_gguf(path, f"it has only {size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=_READ) as view:
            return _Reader(path, view, size, keep).header()
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _with_parts(path: Path, header: GgufHeader, count: int) -> GgufHeader:
    paths = gguf_part_paths(path)
    if len(paths) != count:
        refuse_gguf(path, f"it is one of {count} files; name the first, as {_FIRST}")
    parts = [header]
    for part in paths[1:]:
        if not part.is_file():
            refuse_gguf(path, f"{part.name!r}, a part of it, is not there")
        parts.append(_read(part))
    tensors = tuple(tensor for header in parts for tensor in header.tensors)
    names = Counter(tensor.name for tensor in tensors)
    if twice := next((name for name, times in names.items() if times > 1), None):
        refuse_gguf(path, f"two of its files have the tensor {twice[:80]!r}")
    return replace(
        header,
        tensor_count=len(tensors),
        tensor_bytes=sum(header.tensor_bytes for header in parts),
        file_bytes=sum(header.file_bytes for header in parts),
        tensors=tensors,
    )


def refuse_gguf(path: Path, why: str) -> NoReturn:
    """Say that a file is no GGUF file that can be used.

    :raises ConfigurationError: always.
    """
    raise ConfigurationError(
        f"{str(path)!r} is not a usable GGUF file: {why}; download it again, or convert the "
        "model with llama.cpp's convert_hf_to_gguf.py"
    )


@dataclass(slots=True, eq=False)
class _Reader:
    """A cursor over the file that never reads past its end."""

    path: Path
    view: mmap.mmap
    size: int
    keep: Collection[str]
    at: int = 0

    def header(self) -> GgufHeader:
        if self.view[:4] != MAGIC:
            self._refuse(f"it begins with {self.view[:4]!r} instead of b'GGUF'")
        self.at = 4
        version = self._scalar(4)
        if version not in _VERSIONS:
            swapped = int.from_bytes(struct.pack("<I", version), "big")
            if swapped in _VERSIONS:
                self._refuse(f"it is of version {version}; its byte order is big-endian")
            self._refuse(f"it is of version {version}; versions 2 and 3 can be read")
        tensors, pairs = self._scalar(10), self._scalar(10)
        # The smallest pair takes 13 bytes, the smallest tensor entry 32.
        self._enough(pairs, 13, "metadata entries", _MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        for _ in range(pairs):
            key = self._string()
            if key in metadata:
                self._refuse(f"the metadata key {key[:80]!r} is there twice")
            kinds[key] = self._scalar(4)
            metadata[key] = self._value(kinds[key], key in self.keep)
        self._enough(tensors, 32, "tensors", _MAX_ENTRIES)
        declared = self._tensors(tensors)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.at // alignment) * alignment
        if declared and start % _MAPPED:
            self._refuse(f"its data begin at byte {start}, no multiple of {_MAPPED}")
        placed = self._placed(declared, start, alignment)
        total = sum(tensor.size for tensor in placed)
        return GgufHeader(version, metadata, tensors, total, self.size, placed, kinds, self.path)

    def _placed(
        self, declared: list[GgufTensor], start: int, alignment: int
    ) -> tuple[GgufTensor, ...]:
        """The tensors where they lie in the file, each inside of it and none over another."""
        placed = []
        for tensor in declared:
            if tensor.offset % alignment:
                self._refuse(f"tensor {tensor.name[:80]!r} is not aligned")
            tensor = replace(tensor, offset=start + tensor.offset)  # noqa: PLW2901
            end = tensor.offset + tensor.size
            if end > self.size:
                self._refuse(
                    f"tensor {tensor.name[:80]!r} ends at byte {end}, but the file has "
                    f"{self.size}: it was cut short"
                )
            placed.append(tensor)
        ordered = sorted(placed, key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.size > after.offset:
                self._refuse(
                    f"tensors {before.name[:80]!r} and {after.name[:80]!r} lie over each other"
                )
        return tuple(placed)

    def _tensors(self, count: int) -> list[GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self._string()
            if name in tensors:
                self._refuse(f"the tensor {name[:80]!r} is there twice")
            dimensions = self._scalar(4)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                self._refuse(f"tensor {name[:80]!r} has {dimensions} dimensions")
            shape = tuple(self._scalar(10) for _ in range(dimensions))
            kind, offset = self._scalar(4), self._scalar(10)
            values = math.prod(shape)
            per_block, block = _BLOCKS.get(kind, (0, 0))
            if not 1 <= values < 2**63 or (per_block and shape[0] % per_block):
                self._refuse(f"tensor {name[:80]!r} has the impossible shape {list(shape)}")
            length = values // per_block * block if per_block else 0
            tensors[name] = GgufTensor(name, shape, kind, offset, length)
        return list(tensors.values())

    def _value(self, kind: int, keep: bool = False, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind)
        if depth >= _MAX_NESTING:
            self._refuse("its metadata has arrays in arrays in arrays")
        inner, count = self._scalar(4), self._scalar(10)
        values: tuple[Any, ...] | None = None
        if inner in _SCALARS:
            at, code = self.at, _SCALARS[inner]
            self._skip(count * code.size)
            if count <= _MAX_VALUES:
                numbers = struct.Struct(f"<{count}{code.format[1:]}")
                values = numbers.unpack_from(self.view, at)
        elif inner == _STRING:
            self._enough(count, 8, "strings of an array", _MAX_STRINGS if keep else math.inf)
            if keep:
                values = tuple(self._bytes() for _ in range(count))
            else:
                for _ in range(count):
                    self._skip(self._scalar(10))
        elif inner == _ARRAY:
            self._enough(count, 12, "arrays of an array")
            for _ in range(count):
                self._value(_ARRAY, depth=depth + 1)
        else:
            self._refuse(f"its metadata has a value of the unknown type {inner}")
        return GgufArray(count, values, inner)

    def _refuse(self, why: str) -> NoReturn:
        refuse_gguf(self.path, why)

    def _scalar(self, kind: int) -> Any:
        code = _SCALARS.get(kind)
        if code is None:
            self._refuse(f"its metadata has a value of the unknown type {kind}")
        at = self.at
        self._skip(code.size)
        return code.unpack_from(self.view, at)[0]

    def _string(self) -> str:
        return self._bytes().decode("utf-8", "replace")

    def _bytes(self) -> bytes:
        length = self._scalar(10)
        at = self.at
        self._skip(length)
        return self.view[at : self.at]

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > self.size:
            self._refuse(f"its header goes on past its {self.size} bytes: it was cut short")
        if self.at > _MAX_HEADER:
            self._refuse(f"its header goes on past {_MAX_HEADER} bytes, as no model's does")

    def _enough(self, count: int, least: int, what: str, most: float = math.inf) -> None:
        if count * least > self.size - self.at:
            self._refuse(f"it declares {count} {what}, for which it is too small")
        if count > most:
            self._refuse(f"it declares {count} {what}, and no model has more than {most}")
