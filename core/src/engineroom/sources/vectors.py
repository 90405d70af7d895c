"""How long a model's vectors are, and to what lengths they may be cut.

A model that was trained for it (Matryoshka) puts what matters most first: the beginning of a vector
is a vector of its own. One that was not would answer with nonsense, so it is asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from engineroom.errors import ConfigurationError

__all__ = ["EmbeddingOptions", "VectorSizes", "cut_vectors", "vector_sizes"]

_UNIT: Final = 1e-3
"""How far from 1 the length of a vector is that was normalised, in half precision, too."""
_SHOWN: Final = 16

_Size = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]


class EmbeddingOptions(BaseModel):
    """What the options of a runtime inherit that makes embeddings."""

    matryoshka: Annotated[bool, Field(strict=True)] | list[_Size] | None = None
    """Whether vectors may be cut to fewer numbers, or to how many; ``None``: as the model's
    ``config.json`` says (``is_matryoshka``, ``matryoshka_dimensions``)."""


@dataclass(frozen=True, slots=True)
class VectorSizes:
    """How long a model's vectors are, and to what lengths they may be cut.

    :param size: numbers of a vector.
    :param smaller: to how many it may be cut; ``None``: to any number, empty: to none.
    """

    size: int
    smaller: frozenset[int] | None = frozenset()

    def check(self, dimensions: int) -> None:
        """Refuse a length that the model's vectors do not have and may not be cut to.

        :raises ConfigurationError: says which there are.
        """
        if dimensions == self.size:
            return
        if self.smaller is None:
            if dimensions < self.size:
                return
            those = f"1 to {self.size}"
        elif dimensions < self.size and dimensions in self.smaller:
            return
        else:
            fewer = sorted(size for size in self.smaller if size < self.size)
            some = ", ".join(map(str, fewer[:_SHOWN])) + (", …" if len(fewer) > _SHOWN else "")
            those = f"{some} or {self.size}" if fewer else ""
        if those:
            raise ConfigurationError(
                f"the model's vectors have {self.size} numbers and may be cut to {those}, not "
                f"{dimensions}",
                field="dimensions",
            )
        raise ConfigurationError(
            f"the model's vectors have {self.size} numbers, and it is not made for them to be cut "
            f"to {dimensions}; leave it out, or set the model's option matryoshka if it is",
            field="dimensions",
        )


def vector_sizes(
    size: int, options: EmbeddingOptions, config: Mapping[str, Any] | None = None
) -> VectorSizes:
    """How long a model's vectors are.

    :param size: numbers of a vector as the model makes it.
    :param config: the model's ``config.json``, if it has one.
    """
    stated: object = options.matryoshka
    if stated is None and config is not None:
        listed = config.get("matryoshka_dimensions")
        stated = listed if isinstance(listed, list) and listed else config.get("is_matryoshka")
    if isinstance(stated, list):
        known = (n for n in stated if type(n) is int and 0 < n < size)
        return VectorSizes(size, frozenset(known))
    return VectorSizes(size, None if stated is True else frozenset())


def cut_vectors(vectors: Sequence[Sequence[float]], size: int) -> list[list[float]]:
    """The beginnings of vectors; those of length 1 get that length again. Takes a while for many.

    :param size: at most as many numbers as each of them has.
    """
    cut: list[list[float]] = []
    for vector in vectors:
        beginning = list(vector[:size])
        if abs(math.hypot(*vector) - 1) < _UNIT:
            length = math.hypot(*beginning) or 1.0
            beginning = [number / length for number in beginning]
        cut.append(beginning)
    return cut
