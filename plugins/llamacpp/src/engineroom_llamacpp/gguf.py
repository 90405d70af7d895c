"""Read the header of a GGUF file, and check it against the file, before llama.cpp sees it.

A file that was cut short, is of another format, or lies about its sizes is refused here with a
typed error: inside the library some of that ends the process. The format is described in
ggml's ``docs/gguf.md`` (versions 2 and 3; little-endian).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

from engineroom import ConfigurationError
from engineroom_llamacpp.header import GgufArray, GgufHeader, Tensor, whole
from engineroom_llamacpp.metadata import what_is_wrong

__all__ = [
    "MAGIC",
    "GgufArray",
    "GgufHeader",
    "Tensor",
    "is_gguf",
    "part_paths",
    "read_header",
]

MAGIC: Final = b"GGUF"
_READ: Final = mmap.ACCESS_READ
_VERSIONS: Final = (2, 3)
_MAX_DIMENSIONS: Final = 4
_MAX_NESTING: Final = 4
_MAX_PARTS: Final = 999
_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_FIRST: Final = "model-00001-of-00003.gguf"
_MAX_PIECE: Final = 256
"""Bytes of a token of WordPiece's; real ones have up to some 60."""
_BEGINNING: Final = re.compile(rb"\\x[0-9a-fA-F]{2}|\\?.", re.DOTALL)
"""The first byte of a token of RWKV's, which are written with escapes."""
_MAX_VALUES: Final = 4096
"""Numbers of an array that are kept: those of one for each layer, not those of a vocabulary."""
_MAPPED: Final = 32
"""What ggml asks of the address of mapped tensors."""
_MAX_ENTRIES: Final = 100_000
"""Tensors, or entries of the metadata; real ones have some thousand. Each costs memory here."""
_MAX_TOKENS: Final = 2**22
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


def is_gguf(path: Path) -> bool:
    """Whether the file begins like a GGUF file."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Read and check the header; of a model in several files, those of all.

    :param path: the file, or the first of several (``…-00001-of-00003.gguf``).
    :raises ConfigurationError: the file is empty, no GGUF file, cut short, of another version,
        or its declared sizes do not fit it; the message says which.
    """
    header = replace(_read(path), path=path)
    if (count := whole(header.metadata.get("split.count")) or 1) != 1:
        header = _with_parts(path, header, count)
    if not isinstance(header.metadata.get("general.architecture"), str):
        _refuse(path, "it does not say its architecture")
    if wrong := what_is_wrong(header):
        _refuse(path, wrong)
    return header


def _read(path: Path) -> GgufHeader:
    try:
        size = path.stat().st_size
        if size < 24:  # asked before it is opened: a pipe would never open
            _refuse(path, f"it has only {size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=_READ) as view:
            return _Reader(path, view, size).header()
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def part_paths(path: Path) -> list[Path]:
    """The files of a model in several, by the name of the first; of any other file, itself."""
    name = _PART.fullmatch(path.name)
    if name is None or int(name[2]) != 1 or not 1 < int(name[3]) <= _MAX_PARTS:
        return [path]
    numbers = range(1, int(name[3]) + 1)
    return [path.with_name(f"{name[1]}-{n:05}-of-{name[3]}.gguf") for n in numbers]


def _with_parts(path: Path, header: GgufHeader, count: int) -> GgufHeader:
    paths = part_paths(path)
    if len(paths) != count:
        _refuse(path, f"it is one of {count} files; name the first, as {_FIRST}")
    parts = [header]
    for each in paths[1:]:
        if not each.is_file():
            _refuse(path, f"{each.name!r}, a part of it, is not there")
        parts.append(_read(each))
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    names = Counter(tensor.name for tensor in tensors)
    if twice := next((name for name, times in names.items() if times > 1), None):
        _refuse(path, f"two of its files have the tensor {twice[:80]!r}")
    return replace(
        header,
        tensor_count=len(tensors),
        tensor_bytes=sum(part.tensor_bytes for part in parts),
        file_bytes=sum(part.file_bytes for part in parts),
        tensors=tensors,
    )


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
        self._tokens: set[bytes] = set()

    def header(self) -> GgufHeader:
        if self._view[:4] != MAGIC:
            _refuse(self._path, f"it begins with {self._view[:4]!r} instead of b'GGUF'")
        self._at = 4
        version = self._scalar(4)
        if version not in _VERSIONS:
            swapped = int.from_bytes(struct.pack("<I", version), "big")
            if swapped in _VERSIONS:
                _refuse(self._path, f"it is of version {version}; its byte order is big-endian")
            _refuse(self._path, f"it is of version {version}; versions 2 and 3 can be read")
        tensors, pairs = self._scalar(10), self._scalar(10)
        # The smallest pair takes 13 bytes, the smallest tensor entry 32.
        self._enough(pairs, 13, "metadata entries", _MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        for _ in range(pairs):
            key = self._string()
            if key in metadata:
                _refuse(self._path, f"the metadata key {key[:80]!r} is there twice")
            kind = self._scalar(4)
            if key == "tokenizer.ggml.tokens":
                self._check_tokens(kind, self._at)
            metadata[key] = self._value(kind)
            kinds[key] = kind
        self._enough(tensors, 32, "tensors", _MAX_ENTRIES)
        declared = self._tensors(tensors)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            _refuse(self._path, f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self._at // alignment) * alignment
        if declared and start % _MAPPED:
            _refuse(self._path, f"its data begin at byte {start}, no multiple of {_MAPPED}")
        placed = self._placed(declared, start, alignment)
        total = sum(tensor.size for tensor in placed)
        self._check_vocabulary(metadata)
        return GgufHeader(version, metadata, tensors, total, self._size, placed, kinds)

    def _placed(self, declared: list[Tensor], start: int, alignment: int) -> tuple[Tensor, ...]:
        """The tensors where they lie in the file, each inside of it and none over another."""
        placed = []
        for tensor in declared:
            if tensor.offset % alignment:
                _refuse(self._path, f"tensor {tensor.name[:80]!r} is not aligned")
            tensor = replace(tensor, offset=start + tensor.offset)  # noqa: PLW2901
            end = tensor.offset + tensor.size
            if end > self._size:
                _refuse(
                    self._path,
                    f"tensor {tensor.name[:80]!r} ends at byte {end}, but the file has "
                    f"{self._size}: it was cut short",
                )
            placed.append(tensor)
        ordered = sorted(placed, key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.size > after.offset:
                _refuse(
                    self._path,
                    f"tensors {before.name[:80]!r} and {after.name[:80]!r} lie over each other",
                )
        return tuple(placed)

    def _tensors(self, count: int) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        for _ in range(count):
            name = self._string()
            if name in found:
                _refuse(self._path, f"the tensor {name[:80]!r} is there twice")
            dimensions = self._scalar(4)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                _refuse(self._path, f"tensor {name[:80]!r} has {dimensions} dimensions")
            shape = tuple(self._scalar(10) for _ in range(dimensions))
            kind, offset = self._scalar(4), self._scalar(10)
            values = math.prod(shape)
            per_block, block = _BLOCKS.get(kind, (0, 0))
            if not 1 <= values < 2**63 or (per_block and shape[0] % per_block):
                _refuse(self._path, f"tensor {name[:80]!r} has the impossible shape {list(shape)}")
            length = values // per_block * block if per_block else 0
            found[name] = Tensor(name, shape, kind, offset, length)
        return list(found.values())

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind)
        if depth >= _MAX_NESTING:
            _refuse(self._path, "its metadata has arrays in arrays in arrays")
        inner, count = self._scalar(4), self._scalar(10)
        values: tuple[Any, ...] | None = None
        if inner in _SCALARS:
            at, code = self._at, _SCALARS[inner]
            self._skip(count * code.size)
            if count <= _MAX_VALUES:
                numbers = struct.Struct(f"<{count}{code.format[1:]}")
                values = numbers.unpack_from(self._view, at)
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
        return GgufArray(count, values)

    def _check_tokens(self, kind: int, start: int) -> None:
        """llama.cpp ends the process over a vocabulary that has a token twice."""
        inner = self._scalar(4) if kind == _ARRAY else None
        if inner != _STRING:
            _refuse(self._path, "its vocabulary is no array of strings")
        count = self._scalar(10)
        self._enough(count, 8, "tokens", _MAX_TOKENS)
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
        self._tokens = tokens

    def _check_vocabulary(self, metadata: Mapping[str, Any]) -> None:
        """What a vocabulary must have for texts to be read, and to be read in time.

        One of sentencepiece's falls back to bytes: where it has no token for some byte, the first
        text that has it ends the process. WordPiece tries all lengths up to that of the longest
        token, at every place.
        """
        model = metadata.get("tokenizer.ggml.model")
        if model == "rwkv":
            self._check_beginnings()
        if model == "bert" and (longest := max(map(len, self._tokens), default=0)) > _MAX_PIECE:
            _refuse(self._path, f"its vocabulary has a token of {longest} bytes")
        if model != "llama":
            return
        for byte in range(256):
            if b"<0x%02X>" % byte not in self._tokens and bytes([byte]) not in self._tokens:
                _refuse(self._path, f"its vocabulary has no token for the byte 0x{byte:02X}")

    def _check_beginnings(self) -> None:
        """RWKV's tokenizer stays where it is, for ever, where a text begins as a token does and
        has no token that begins so: a single byte must be one.
        """
        beginnings: set[int] = set()
        whole_tokens: set[int] = set()
        for token in self._tokens:
            if (match := _BEGINNING.match(token)) is not None:
                same = whole_tokens if match.end() == len(token) else beginnings
                same.add(_byte(match[0]))
        for byte in sorted(beginnings - whole_tokens):
            _refuse(
                self._path,
                f"its vocabulary has tokens that begin with the byte 0x{byte:02X}, and none for it",
            )

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

    def _enough(self, count: int, least: int, what: str, most: float = math.inf) -> None:
        if count * least > self._size - self._at:
            _refuse(self._path, f"it declares {count} {what}, for which it is too small")
        if count > most:
            _refuse(self._path, f"it declares {count} {what}, and no model has more than {most}")


def _byte(escaped: bytes) -> int:
    """A byte that may be written with an escape."""
    if len(escaped) == 4:
        return int(escaped[2:].decode(), 16)
    return {b"\\t": 9, b"\\n": 10, b"\\r": 13}.get(escaped, escaped[-1])
