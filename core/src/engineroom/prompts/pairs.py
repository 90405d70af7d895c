"""Two texts that a model reads as one: a query, and a document that may answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PairFrame", "PairTokens", "pair_frame"]


@dataclass(frozen=True, slots=True)
class PairFrame:
    """What stands around two texts, and between them.

    :param types: of what is before, the first text, what is between, the second, and the end.
    """

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    types: tuple[int, int, int, int, int] = (0, 0, 0, 1, 1)


@dataclass(frozen=True, slots=True)
class PairTokens:
    """Two texts as a model reads them.

    They are joined when they are asked for: a query may stand before thousands of documents.

    :param first: token ids of the first text.
    :param second: those of the second.
    :param frame: what stands around them.
    """

    first: Sequence[int]
    second: Sequence[int]
    frame: PairFrame

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def tokens(self) -> list[int]:
        """Token ids of both, and of what stands around them."""
        return [token for part in self._parts for token in part]

    @property
    def types(self) -> list[int]:
        """Which of the two each belongs to, in the model's own numbers."""
        kinds = zip(self._parts, self.frame.types, strict=True)
        return [kind for part, kind in kinds for _ in part]

    @property
    def _parts(self) -> tuple[Sequence[int], ...]:
        frame = self.frame
        return (frame.before, self.first, frame.between, self.second, frame.behind)


def pair_frame(tokenizer: Any) -> PairFrame | None:
    """What a ``tokenizers.Tokenizer`` writes around two texts; ``None``: it joins none so that they
    can be told apart.
    """
    encoding = tokenizer.encode("x", "x")
    whose, ids, types = encoding.sequence_ids, encoding.ids, encoding.type_ids
    places = [[at for at, owner in enumerate(whose) if owner == number] for number in (0, 1)]
    if not all(places):
        return None
    (a, b), (c, d) = [(each[0], each[-1] + 1) for each in places]
    if not a < b <= c < d:
        return None
    parts = ((0, a), (a, b), (b, c), (c, d), (d, len(ids)))
    kinds = [types[start] if start < end else 0 for start, end in parts]
    pairs = zip(parts, kinds, strict=True)
    if any(set(types[start:end]) - {kind} for (start, end), kind in pairs):
        return None
    return PairFrame(
        tuple(ids[:a]),
        tuple(ids[b:c]),
        tuple(ids[d:]),
        (kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]),
    )
