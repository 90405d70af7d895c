"""Headers of safetensors files, checked against the file before a library maps it.

What was cut short or lies about its sizes is refused here, with a typed error. The format is
described in safetensors' README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from engineroom.errors import ConfigurationError

__all__ = ["SAFETENSORS_BITS", "SafetensorsHeader", "read_safetensors_header"]

_MAX_HEADER: Final = 100_000_000  # safetensors' own bound
SAFETENSORS_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Type of a number, as safetensors names types → how many bits it has."""


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says of itself.

    :param dtypes: name of a tensor → type of its numbers, as safetensors names types.
    :param values: type → how many numbers of it all tensors have together.
    """

    dtypes: Mapping[str, str]
    values: Mapping[str, int]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read the header, and check it against the size of the file. Blocks.

    :raises ConfigurationError: the file was cut short, or its header is no such.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
                _refuse(path, f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ConfigurationError:
        raise
    except (ValueError, RecursionError):
        _refuse(path, "its header is not valid JSON")
    if not isinstance(header, dict):
        _refuse(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    dtypes: dict[str, str] = {}
    values: dict[str, int] = {}
    spans = []
    for name, entry in header.items():
        dtype, count, span = _tensor(path, name, entry)
        dtypes[name] = dtype
        values[dtype] = values.get(dtype, 0) + count
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            _refuse(path, f"its tensors overlap or leave a gap at byte {min(begin, end)}")
        end = stop
    if 8 + length + end != size:
        _refuse(
            path,
            f"its header says {8 + length + end} bytes, but the file has {size}: it was cut short "
            "or written to",
        )
    return SafetensorsHeader(dtypes, values)


def _tensor(path: Path, name: str, entry: Any) -> tuple[str, int, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = SAFETENSORS_BITS[dtype]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        _refuse(path, f"the entry of tensor {name[:80]!r} is not understood")
    if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        _refuse(path, f"tensor {name[:80]!r} has an impossible shape or place")
    count = math.prod(shape)
    if begin > end or (end - begin) * 8 != count * bits:
        _refuse(path, f"tensor {name[:80]!r} has other sizes than its shape says")
    return dtype, count, (begin, end)


def _refuse(path: Path, why: str) -> NoReturn:
    raise ConfigurationError(
        f"{str(path)!r} is not a usable safetensors file: {why}; download it again"
    )
