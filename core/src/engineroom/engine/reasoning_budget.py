"""Reasoning that ends after so many tokens: what closes it is forced, and the answer begins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engineroom.engine.constraint import Constraint
from engineroom.generation.answer_grammars import Thoughts

__all__ = ["BudgetedConstraint", "ReasoningBudget"]


class ReasoningBudget:
    """Counts the tokens of an answer's reasoning, and tells what has to come once they are spent.

    :param thoughts: what stands around the reasoning.
    :param budget: most tokens of it.
    :param closing: the tokens that end it.
    """

    __slots__ = ("_begin", "_closing", "_end", "_left", "_place", "_read", "end")

    def __init__(self, thoughts: Thoughts, budget: int, closing: Sequence[int]) -> None:
        self.end: str = thoughts.end
        self._begin: bytes | None = thoughts.begin.encode() or None
        self._end: bytes | None = thoughts.end.encode()
        self._left = budget
        self._closing = closing
        self._place = 0  # how many tokens of the closing were taken
        self._read = b""  # as much of the text as may be part of a marker

    @property
    def forced(self) -> int | None:
        """The one token that may come next, where reasoning is over."""
        if self._end is None or self._begin is not None or self._left > 0:
            return None
        return self._closing[self._place] if self._place < len(self._closing) else None

    def take(self, token: int, piece: Callable[[int], bytes]) -> None:
        """A token was chosen.

        :param piece: the bytes of a token.
        """
        if token == self.forced:
            self._place += 1
        if self._end is None:
            return
        self._read += piece(token)
        if self._begin is not None:
            self._look_for_begin(self._begin)
        else:
            self._left -= 1
        if self._begin is None and self._end is not None:
            if self._end in self._read:
                self._end = None if self._place in (0, len(self._closing)) else self._end
            else:
                self._read = self._read[-len(self._end) :]

    def _look_for_begin(self, begin: bytes) -> None:
        text = self._read.lstrip()
        if text.startswith(begin):
            self._begin, self._read = None, text[len(begin) :]
        elif not begin.startswith(text):  # it answers at once
            self._end = None


class BudgetedConstraint(Constraint):
    """What the next token may be, where reasoning has a bound.

    :param inner: what the answer must match besides; ``None``: anything.
    :param piece: the bytes of a token.
    :param width: how many logits there are.
    """

    __slots__ = ("_budget", "_inner", "_piece")

    def __init__(
        self,
        inner: Constraint | None,
        budget: ReasoningBudget,
        piece: Callable[[int], bytes],
        width: int,
    ) -> None:
        super().__init__(None, width, frozenset())
        self._inner = inner
        self._budget = budget
        self._piece = piece

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._forced is None and (self._inner is None or self._inner.complete)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._inner is not None and self._inner.ended

    @property
    def _forced(self) -> int | None:
        """What has to come; not where the grammar does not have it, in the midst of a character."""
        forced = self._budget.forced
        if forced is None or self._inner is None or self._inner.allows(forced):
            return forced
        return None

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if (forced := self._forced) is not None:
            return token == forced
        return self._inner is None or self._inner.allows(token)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, one value a logit."""
        if (forced := self._forced) is not None:
            mask = np.zeros(self._width, np.bool_)
            mask[forced] = True
            return mask
        return np.ones(self._width, np.bool_) if self._inner is None else self._inner.allowed()

    def take(self, token: int) -> None:
        """A token was chosen, one that is allowed."""
        if self._inner is not None:
            self._inner.take(token)
        self._budget.take(token, self._piece)

    def copy(self) -> BudgetedConstraint:
        """Another one at the same place, for a beam."""
        inner = None if self._inner is None else self._inner.copy()
        return BudgetedConstraint(inner, copy.copy(self._budget), self._piece, self._width)
