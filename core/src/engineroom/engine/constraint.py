"""Where one request is in the grammar that its answer must match."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engineroom.errors import ConfigurationError, InferenceError
from engineroom.generation.grammars import first_line

__all__ = ["FREE_S", "PER_TOKEN_S", "TOO_LONG", "Constraint"]

FREE_S: Final = 2.0
"""Seconds of the processor that a request's grammar may take in all, and"""
PER_TOKEN_S: Final = 0.02
"""for each token besides. Usual ones take a hundredth of that; an ambiguous one (``s: s s | /./``)
takes more for each token than for the one before, and all that decode beside it wait for it."""
TOO_LONG: Final = (
    "the grammar takes too long for each token, and would delay other requests; an ambiguous rule "
    "(s: s s | …) may be written as a repetition (s: x*)"
)
"""What is said of one that has taken more."""


class Constraint:
    """Where one request is in its grammar. Used by one thread at a time.

    :param left: seconds of the processor that it may still take.
    """

    __slots__ = ("_ends", "_left_s", "_matcher", "_width")

    def __init__(
        self, matcher: Any, width: int, ends: frozenset[int], left: float = FREE_S
    ) -> None:
        self._matcher = matcher
        self._width = width
        self._ends = ends
        self._left_s = left

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
        began = time.thread_time()
        fits = not self.ended and self._matcher.validate_tokens([token]) == 1
        self._left_s -= time.thread_time() - began
        return fits

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, one value a logit.

        :raises ConfigurationError: the grammar is too complex to go on, or lets nothing follow.
        """
        began = time.thread_time()
        mask = np.zeros(self._width, np.bool_)
        if not self.ended:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(bits, count=self._width, bitorder="little")
            mask[: bits.size] = bits
        self._left_s -= time.thread_time() - began
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
        began = time.thread_time()
        if token not in self._ends and self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            raise InferenceError(f"token {token} does not fit the grammar")
        self._left_s += PER_TOKEN_S - (time.thread_time() - began)
        if self._left_s < 0:
            raise ConfigurationError(TOO_LONG)

    def copy(self) -> Constraint:
        """Another one at the same place, for a beam; takes less than a tenth of a millisecond."""
        return Constraint(self._matcher.deep_copy(), self._width, self._ends, self._left_s)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigurationError(
                f"the grammar became too complex at this place of the text: "
                f"{first_line(self._matcher.get_error())}; simplify it"
            )
