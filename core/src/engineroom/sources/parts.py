"""Models in several files: ``model-00001-of-00003.gguf``, and the same of safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["missing_parts", "part_names"]

_MAX_PARTS: Final = 999
_PART: Final = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)", re.DOTALL
)


def part_names(name: str) -> list[str]:
    """The names of all files of a model, given that of any; of a model in one file, its own."""
    part = _PART.fullmatch(name)
    if part is None or not 1 < (count := int(part["count"])) <= _MAX_PARTS:
        return [name]
    if not 1 <= int(part["number"]) <= count:
        return [name]
    return [
        f"{part['stem']}-{number:05}-of-{part['count']}{part['suffix']}"
        for number in range(1, count + 1)
    ]


def missing_parts(names: Iterable[str]) -> list[str]:
    """The files that are missing of the models that these are parts of, by name."""
    here = set(names)
    return sorted({part for name in here for part in part_names(name)} - here)
