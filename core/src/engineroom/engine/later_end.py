"""An answer that may not end before it has so many tokens: ``min_tokens`` and ``ignore_eos``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engineroom.engine.constraint import Constraint

__all__ = ["LaterEnd"]


class LaterEnd(Constraint):
    """What the next token may be, where no end-of-sequence token may come yet.

    A form that the answer must match goes before it: where nothing else may follow, the end may.

    :param inner: what the answer must match besides; ``None``: anything.
    :param least: before so many tokens it may not end.
    :param width: how many logits there are.
    :param ends: tokens that end a text.
    """

    __slots__ = ("_inner", "_later")

    def __init__(
        self, inner: Constraint | None, least: int, width: int, ends: frozenset[int]
    ) -> None:
        super().__init__(None, width, ends)
        self._inner = inner
        self._later = least  # tokens that have to come yet

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self.ended or (self._later <= 0 and (self._inner is None or self._inner.complete))

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._inner is not None and self._inner.ended

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if token in self._ends and self._later > 0 and not self.ended:
            return False
        return self._inner is None or self._inner.allows(token)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, one value a logit."""
        inner = self._inner
        mask = np.ones(self._width, np.bool_) if inner is None else inner.allowed()
        if self._later <= 0:
            return mask
        without_end = mask.copy()
        without_end[list(self._ends)] = False
        return without_end if without_end.any() else mask

    def take(self, token: int) -> None:
        """A token was chosen, one that is allowed."""
        if self._inner is not None:
            self._inner.take(token)
        self._later -= 1

    def copy(self) -> LaterEnd:
        """Another one at the same place, for a beam."""
        inner = None if self._inner is None else self._inner.copy()
        return LaterEnd(inner, self._later, self._width, self._ends)
