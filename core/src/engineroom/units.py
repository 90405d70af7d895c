"""Sizes and durations as people write them: ``16GiB``, ``5m``, ``forever``."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Final, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

__all__ = [
    "FOREVER",
    "ByteSize",
    "DeviceBudgets",
    "DeviceSizes",
    "Duration",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
]

FOREVER: Final = math.inf
"""A duration without end."""

_SIZE: Final = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)")
_SIZES: Final = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_DURATION: Final = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d)?")
_DURATIONS: Final = {"ms": 0.001, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DEVICE: Final = re.compile(r"cpu|metal|(?!cpu|metal)[a-z]{2,16}:\d{1,3}")
_MOST_BYTES: Final = 1 << 60


def parse_size(value: Any) -> int:
    """Bytes: a number, or a text such as ``16GiB`` (2³⁰) or ``16GB`` (10⁹).

    :raises ValueError: it is neither, negative, or more than any machine has.
    """
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        factor = _SIZES.get(match["unit"].lower())
        if factor is None:
            raise ValueError(f"{match['unit']!r} is no unit of memory; write MiB, GiB, MB or GB")
        value = float(match["number"]) * factor
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError("must be a size: a number of bytes, or a text such as 16GiB or 500MB")
    if value > _MOST_BYTES:
        raise ValueError("is more memory than any machine has; check the unit")
    return int(value)


def parse_duration(value: Any) -> float:
    """Seconds: a number, a text such as ``30s``, ``5m`` or ``1h``, or ``forever`` (infinity).

    :raises ValueError: it is none of these, or negative.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if text == "forever":
            return FOREVER
        if match := _DURATION.fullmatch(text):
            value = float(match["number"]) * _DURATIONS[match["unit"]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(
            "must be a duration: a number of seconds, a text such as 30s, 5m or 1h, or forever"
        )
    return float(value)


def parse_budget(value: Any) -> int | None:
    """As :func:`parse_size`; ``unlimited`` is ``None``."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "unlimited"):
        return None
    return parse_size(value)


def check_devices(value: dict[str, Any]) -> dict[str, Any]:
    """Names of devices: ``cpu``, ``cuda:0``.

    :raises ValueError: one of them is none.
    """
    for name in value:
        if not _DEVICE.fullmatch(name):
            raise ValueError(f"{name!r} is no device; write cpu, or cuda:0 for the first GPU")
    return value


def _written(value: float) -> float | str:
    return "forever" if math.isinf(value) else value  # JSON has no infinity


ByteSize: TypeAlias = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
"""A number of bytes; takes what :func:`parse_size` does."""
DeviceBudgets: TypeAlias = Annotated[
    dict[str, Annotated[int | None, BeforeValidator(parse_budget)]], AfterValidator(check_devices)
]
"""What models may take of each device, in bytes; ``None``: no bound."""
DeviceSizes: TypeAlias = Annotated[dict[str, ByteSize], AfterValidator(check_devices)]
"""Bytes of each device."""
Duration: TypeAlias = Annotated[
    float, BeforeValidator(parse_duration), Field(ge=0), PlainSerializer(_written, when_used="json")
]
"""Seconds; takes what :func:`parse_duration` does."""


def format_size(count: int | None) -> str:
    """Bytes in GiB, or in what is less where that is little; ``None``: not known."""
    if count is None:
        return "unknown"
    for unit, size, digits in (("GiB", 2**30, 1), ("MiB", 2**20, 0), ("KiB", 2**10, 0)):
        if abs(count) >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} B"


def format_duration(seconds: float) -> str:
    """Seconds as :func:`parse_duration` takes them, in the largest unit that is exact."""
    if math.isinf(seconds):
        return "forever"
    for unit, factor in (("h", 3600), ("m", 60)):
        if seconds and seconds % factor == 0:
            return f"{seconds / factor:.0f}{unit}"
    return f"{seconds:.12g}s"
