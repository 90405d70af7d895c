"""Where one request is in the grammar that its answer must match."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engineroom.errors import ConfigurationError, InferenceError

__all__ = ["Constraint", "first_line"]


class Constraint:
    """Where one request is in its grammar. Used by one thread at a time."""

    __slots__ = ("_ends", "_matcher", "_width")

    def __init__(self, matcher: Any, width: int, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._width = width
        self._ends = ends

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if token in self._ends:
            return self.complete
        return not self.ended and self._matcher.validate_tokens([token]) == 1

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, one value a logit.

        :raises ConfigurationError: the grammar is too complex to go on, or lets nothing follow.
        """
        mask = np.zeros(self._width, np.bool_)
        if not self.ended:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(bits, count=self._width, bitorder="little")
            mask[: bits.size] = bits
        self._check()
        mask[list(self._ends)] = self.complete
        if not mask.any():
            raise ConfigurationError(
                "the grammar lets nothing follow, and the text is not complete; change it"
            )
        return mask

    def take(self, token: int) -> None:
        """A token was chosen, one that is allowed.

        :raises ConfigurationError: the grammar is too complex to go on.
        :raises InferenceError: it is not allowed.
        """
        if token not in self._ends and self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            raise InferenceError(f"token {token} does not fit the grammar")

    def undo(self, count: int) -> None:
        """Take the last ``count`` tokens back, none of which ended the text."""
        if count and not self._matcher.rollback(count):
            self._check()
            raise InferenceError("the grammar cannot be set back")

    def copy(self) -> Constraint:
        """Another one at the same place, for a beam; takes less than a tenth of a millisecond."""
        return Constraint(self._matcher.deep_copy(), self._width, self._ends)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigurationError(
                f"the grammar became too complex at this place of the text: "
                f"{first_line(self._matcher.get_error())}; simplify it"
            )


def first_line(message: str) -> str:
    """What is wrong, without the grammar, which a message must not repeat at length."""
    first, *rest = message.strip().splitlines() or ["?"]
    # What is wrong with a regular expression stands below it.
    wrong = next((line for line in rest if line.startswith("error: ")), "")
    return f"{first[:300]} {wrong[7:300]}".rstrip()
