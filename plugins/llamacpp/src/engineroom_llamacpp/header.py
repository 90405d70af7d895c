"""What a GGUF file says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["GgufArray", "GgufHeader", "Tensor", "whole"]


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata.

    :param values: its numbers, where they are few; those of a vocabulary are not kept.
    """

    length: int
    values: tuple[Any, ...] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's entry.

    :param kind: ggml's number for the type of its values.
    :param offset: of its data, from the beginning of the file.
    :param size: bytes of its data; 0: the type is not known here.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself.

    :param metadata: scalar and string values; of arrays only their length.
    :param tensor_bytes: bytes of all tensors.
    :param kinds: GGUF's number for the type of each value of the metadata.
    """

    version: int
    metadata: Mapping[str, Any]
    tensor_count: int
    tensor_bytes: int
    file_bytes: int
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)
    kinds: Mapping[str, int] = field(default_factory=dict, repr=False)
    path: Path | None = None

    @property
    def file(self) -> str:
        """The file, for messages."""
        return repr(str(self.path)) if self.path is not None else "the model"

    @property
    def architecture(self) -> str:
        """The model's architecture, e.g. ``llama``."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """A number of the architecture's own, e.g. ``block_count``.

        ``None``: it is not there, or is not one whole number (some have one for each layer).
        """
        return whole(self.metadata.get(f"{self.architecture}.{key}"))

    def numbers(self, key: str, count: int) -> tuple[int, ...] | None:
        """A number of the architecture's own for each of ``count`` layers.

        ``None``: it is not there, or is neither one whole number nor one for each layer.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, GgufArray):
            values = value.values or ()
            fits = len(values) >= count and all(whole(each) is not None for each in values)
            return values[:count] if fits else None
        one = whole(value)
        return None if one is None else (one,) * count


def whole(value: Any) -> int | None:
    """A whole number; ``None``: it is none, or a truth value."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
