"""How much of a prompt a step reads beside requests that decode. Pure.

Each token attends to all that come before it, so that the same number of tokens takes the longer
the further on in the prompt they are: with SmolLM2-135M on a CPU twice as long after 900 tokens.
What decoding requests are to be spared is time. So the further on, the fewer tokens a step reads:
as many as take no longer than a whole chunk does at the beginning of a prompt. How much dearer
later tokens are depends on the model, its quantisation and the machine; it is learnt from the
steps themselves.

Attention passes over the cells of other sequences, too, and quicker than over the prompt's own.
They count as fewer tokens before it. Where more prompts wait than requests decode, a step reads
more.
"""

from __future__ import annotations

import math
from typing import Final

__all__ = ["PromptPace", "Usual"]

_LEAST: Final = 16
"""Fewer tokens are not worth a step: weights are read from memory once for all of them. And counts
are multiples of it."""
_KEPT: Final = 0.97
"""What an observation still counts when the next one comes."""
_MOST_OFF: Final = 1.5
"""A step that takes more than so many times what was expected was disturbed from outside, and
counts only for that."""
_NEW: Final = 0.2
"""What the last step counts in the mean of those that only decode."""
_FEW: Final = 2
"""More requests that decode are not spared more, where prompts wait in a row: the last of these
would wait for many small steps."""
_ENOUGH: Final = 4
"""Observations after which something is expected."""


class Usual:
    """A running average that one disturbed observation moves little."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def see(self, value: float) -> None:
        """Count an observation."""
        usual = value if self.value is None else self.value
        self.value = usual + _NEW * (min(value, _MOST_OFF * usual) - usual)


class PromptPace:
    """Deals the tokens of prompts out to steps.

    :param chunk: most tokens of prompts of a step.
    :param masked: what a cell of another sequence, which is passed over, takes of the time of one
        of the token's own.
    :param least: fewer tokens of a prompt are not worth a step, as long as there are more.
    """

    def __init__(self, chunk: int, masked: float = 1.0, least: int = _LEAST) -> None:
        self.chunk = chunk
        self._masked = masked
        self._unit = min(_LEAST, chunk)
        self.least = min(max(least, _LEAST), chunk)
        self.read_last = False
        """Whether the last step had tokens of prompts."""
        self.read_alone = False
        """Whether it had those alone, and requests that decode waited for it."""
        self._dearer = 0.0  # by what share a token is, for each that comes before it
        self._sums = [0.0] * 5  # of weights w, w·x, w·x², w·y, w·x·y
        self._seen = 0
        self._decoding = Usual()
        self.begin()

    @property
    def dearer(self) -> float:
        """By what share a token takes longer, for each that comes before it; 0: not known."""
        return self._dearer

    def begin(self, waiting: int = 1, decoding: int = 1) -> None:
        """A new step.

        :param waiting: prompts that wait to be read.
        :param decoding: requests that decode. They wait for a whole chunk, and for more where many
            prompts wait for them: each of their steps keeps all of these.
        """
        self._share = max(1.0, waiting * waiting / min(max(1, decoding), _FEW))
        self.most_tokens = int(self._share * self.chunk)
        self._taken = 0
        self._spent = 0.0
        self._places = 0.0

    def place(self, position: int, cells: int) -> int:
        """Where in a prompt alone a token would take as long as behind ``position`` others here.

        :param cells: those that are in use, the prompt's own among them.
        """
        return position + int(self._masked * max(0, cells - position))

    def most(self, position: int, available: int) -> int:
        """How many tokens of a prompt may be read from ``position`` on in this step.

        :param available: tokens that there are.
        :returns: at least one for a step's first prompt.
        """
        budget = self._share * self._cost(0, self.chunk)
        count = self._that_cost(position, budget - self._spent)
        if count < min(available, self.most_tokens):
            count -= count % self._unit
            if not self._taken:
                count = max(count, self.least)
        return min(count, available, self.most_tokens - self._taken)

    def add(self, position: int, count: int) -> None:
        """So many tokens from ``position`` on are read in this step."""
        self._taken += count
        self._spent += self._cost(position, count)
        self._places += count * (position + count / 2)

    def end(self, seconds: float, *, decoding: bool, beside: bool = False) -> None:
        """The step took so long.

        :param decoding: whether there were tokens of decoding requests in it.
        :param beside: whether decoding requests waited for it.
        """
        self.read_last = bool(self._taken)
        self.read_alone = self.read_last and beside and not decoding
        if not decoding and not beside:  # no step of the kind that is to be planned
            return
        if not self._taken:
            self._decoding.see(seconds)
            return
        place = self._places / self._taken
        others = self._decoding.value or 0.0 if decoding else 0.0
        per_token = max(0.0, seconds - others) / self._taken
        if self._seen >= _ENOUGH and (expected := self._expected(place)) > 0:
            per_token = min(per_token, _MOST_OFF * expected)
        self._learn(place, per_token)

    def end_of_tokens(self, seconds: float) -> None:
        """As :meth:`end`, of a step that had tokens of decoding requests alone, without
        :meth:`begin`.
        """
        self.read_last = self.read_alone = False
        self._decoding.see(seconds)

    def _learn(self, place: float, per_token: float) -> None:
        """Fit a line through what tokens took at their places; recent ones count most."""
        weight = self._taken / self.chunk
        new = (1.0, place, place * place, per_token, place * per_token)
        self._sums = [
            _KEPT * old + weight * value for old, value in zip(self._sums, new, strict=True)
        ]
        self._seen += 1
        at_start, rise = self._line()
        self._dearer = rise / at_start if at_start > 0 else 0.0

    def _line(self) -> tuple[float, float]:
        """Seconds of a token at the beginning, and how many more for each before it."""
        w, wx, wxx, wy, wxy = self._sums
        spread = w * wxx - wx * wx
        rise = (w * wxy - wx * wy) / spread if spread > 1e-6 * w * wxx else 0.0
        at_start = (wy - rise * wx) / w
        if rise > 0 and at_start > 0:
            return at_start, rise
        return wy / w, 0.0

    def _expected(self, place: float) -> float:
        at_start, rise = self._line()
        return at_start + rise * place

    def _cost(self, position: int, count: int) -> float:
        """What tokens cost, in tokens at a beginning."""
        return count * (1 + self._dearer * (position + count / 2))

    def _that_cost(self, position: int, cost: float) -> int:
        """How many tokens cost so much."""
        if cost <= 0:
            return 0
        slope = 1 + self._dearer * position
        return int(2 * cost / (slope + math.sqrt(slope * slope + 2 * self._dearer * cost)) + 1e-9)
