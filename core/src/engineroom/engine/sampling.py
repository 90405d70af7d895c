"""Choosing the next token of a request: its state, and the choice over one row in numpy.

The order of the steps is the contract's: ``logit_bias``, penalties, ``temperature``, ``top_k``,
``top_p``, ``min_p``. Every request draws from a generator of its own, as many numbers for each
token, so that neighbours never change what a seed gives. Of tokens that are equally likely the
lower ids come first, so that the same seed draws the same token however a runtime sorts.

Beside others, a runtime computes logits that differ in their last digits. A number that points at
a place of the cumulated probabilities would be moved by the sum of all these differences, and among
thousands of unlikely tokens it would point at another one, every hundred tokens or so. So tokens
race instead: each block of the vocabulary, then each token of the first block, has a random time
divided by how likely it is. Only two that are as good as even change places then.

Numpy is exact, the same on every runtime, and quick: greedy is one ``argmax`` over a view of a
library's own buffer; sampling sorts only the few candidates that truncation leaves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engineroom.engine.constraint import Constraint
from engineroom.schemas import GenerationParams

__all__ = [
    "Logits",
    "NoNumbersError",
    "Sampler",
    "SamplerState",
    "largest",
    "top_logprobs",
]

Logits: TypeAlias = NDArray[np.float32]
"""A row of logits, one a token of the vocabulary."""
TokenIds: TypeAlias = NDArray[np.int64]

_BLOCK: Final = 1024
_BLOCKS: Final = 256
"""Blocks that have a time even where there are fewer, so that the width of a row, which runtimes
pad, does not change what is drawn later."""
_FIRST_GUESS: Final = 256
_FEW: Final = 20
"""As many of the likeliest tokens are told with one, at most."""
_FEW_BLOCKS: Final = 128
_MANY: Final = 4096
_TINY: Final = float(np.finfo(np.float32).tiny)
_HUGE: Final = float(np.finfo(np.float32).max)


class NoNumbersError(Exception):
    """The model computed NaN or infinity for the next token."""


class _TokenSet:
    """Token ids, each once, as an array that grows."""

    __slots__ = ("_count", "_ids", "_known")

    def __init__(self, tokens: Sequence[int]) -> None:
        self._ids = np.unique(np.fromiter(tokens, np.int64, len(tokens)))
        self._count = self._ids.size
        self._known = set(self._ids.tolist())

    @property
    def ids(self) -> TokenIds:
        """All of them, in any order."""
        return self._ids[: self._count]

    def add(self, token: int) -> None:
        if token in self._known:
            return
        self._known.add(token)
        if self._count == self._ids.size:
            self._ids = np.resize(self._ids, 2 * self._count + _FIRST_GUESS)
        self._ids[self._count] = token
        self._count += 1


class SamplerState:
    """The sampling state of one request: its parameters, its penalties and its random generator.

    Made on the event loop; what takes as long as the prompt or the bias is long is made when it is
    first needed, on the thread that samples.

    :param params: the request's parameters.
    :param prompt: token ids of the prompt, which ``repetition_penalty`` counts too.
    :param constraint: what the next token may be; ``None``: anything.
    """

    def __init__(
        self,
        params: GenerationParams,
        prompt: Sequence[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.constraint = constraint
        self._places: dict[tuple[int, ...], Constraint] = {}
        self.greedy = params.greedy
        self.temperature = max(1.0 if params.temperature is None else params.temperature, _TINY)
        self.top_k = params.top_k or 0
        self.top_p = 1.0 if params.top_p is None else params.top_p
        self.min_p = params.min_p or 0.0
        self.repetition = min(params.repetition_penalty or 1.0, _HUGE)
        self.presence = params.presence_penalty or 0.0
        self.frequency = params.frequency_penalty or 0.0
        self.bias = params.logit_bias or {}
        self.counts: Counter[int] = Counter()
        """How often each generated token came."""
        self._prompt: Sequence[int] = prompt if self.repetition != 1.0 else ()
        self.touches = bool(self.bias or self.repetition != 1.0 or self.presence or self.frequency)
        """Whether bias or penalties change the logits."""
        self._seed = params.seed

    @property
    def truncates(self) -> bool:
        """Whether not every token may be drawn."""
        return bool(self.top_k or self.top_p < 1.0 or self.min_p > 0.0)

    @cached_property
    def bias_arrays(self) -> tuple[TokenIds, Logits]:
        """The tokens that ``logit_bias`` names, and what is added to theirs."""
        count = len(self.bias)
        return (
            np.fromiter(self.bias.keys(), np.int64, count),
            np.fromiter(self.bias.values(), np.float32, count),
        )

    @property
    def seen(self) -> TokenIds:
        """The tokens that ``repetition_penalty`` is for, each once."""
        return self._seen.ids

    @property
    def count_arrays(self) -> tuple[TokenIds, Logits]:
        """The tokens that were generated, and how often."""
        size = len(self.counts)
        return (
            np.fromiter(self.counts.keys(), np.int64, size),
            np.fromiter(self.counts.values(), np.float32, size),
        )

    @cached_property
    def _random(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self._seed))

    @cached_property
    def _seen(self) -> _TokenSet:
        prompt, self._prompt = self._prompt, ()
        return _TokenSet(prompt)

    def draw(self) -> float:
        """The request's next random number, from 0 to 1 (excluded)."""
        return 0.0 if self.greedy else float(self._random.random())

    def race(self, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The request's next random times: of the blocks of so many tokens, and of the tokens of
        a block.

        They are exponential: divided by how likely it is, each is the least as often as that.
        """
        blocks = -(-width // _BLOCK)
        most = max(blocks, _BLOCKS)
        times = self._random.standard_exponential(most + _BLOCK) + _TINY
        return times[:blocks], times[most:]

    def take(self, token: int) -> None:
        """The token was chosen. :raises InferenceError: it does not fit the grammar."""
        if self.constraint is not None:
            self.constraint.take(token)
        if self.touches:
            self.counts[token] += 1
            if self.repetition != 1.0:
                self._seen.add(token)

    def constraint_after(self, generated: tuple[int, ...]) -> Constraint:
        """The constraint behind these tokens, for a beam; kept for those that go on from there.

        :raises InferenceError: they do not fit the grammar.
        """
        assert self.constraint is not None
        if (known := self._places.get(generated)) is None:
            parent = generated[:-1]
            known = (self._places.get(parent) or self.constraint).copy()
            for token in generated[len(parent) if parent in self._places else 0 :]:
                known.take(token)
            for old in [tokens for tokens in self._places if len(tokens) < len(parent)]:
                del self._places[old]
            self._places[generated] = known
        return known


class Sampler(SamplerState):
    """Chooses the next tokens of one request, each from a row of logits in numpy."""

    def sample(self, logits: Logits) -> int:
        """The next token. ``logits`` is not changed, and not kept.

        Under a constraint, a token is drawn first, and another one of those that are allowed only
        where that is refused: which is as likely to give each token as masking the others first.
        Truncation, though, has to see the masked row.

        :raises NoNumbersError: they have no finite maximum.
        :raises InferenceError: the constraint allows nothing.
        """
        row = self._adjusted(logits, self.seen) if self.touches else logits
        constraint = self.constraint
        if constraint is not None and not self.greedy and self.truncates:
            row = _masked(row, constraint)
        token = self._choose(row)
        if constraint is not None and not constraint.allows(token):
            token = self._choose(_masked(row, constraint))
        self.take(token)
        return token

    def _choose(self, row: Logits) -> int:
        if self.greedy:
            token = int(row.argmax())  # of NaN, if there is one
            if not math.isfinite(row[token]):
                raise NoNumbersError
            return token
        if not self.truncates:
            return _race(_weights(row, _peak(row), self.temperature), self)
        ids, weights = self._candidates(row)
        cumulative = np.cumsum(weights)
        return int(ids[_place(cumulative, self.draw() * cumulative[-1])])

    def log_probabilities(self, logits: Logits, generated: Sequence[int]) -> Logits:
        """Log probabilities of the next token, with bias and penalties on them, for beam search.

        They are not normalised again, as in transformers.

        :param generated: the tokens after the prompt.
        :raises NoNumbersError: the logits have no finite maximum.
        """
        row: Logits = logits - _peak(logits)
        row -= np.float32(math.log(np.exp(row).sum(dtype=np.float64)))
        if self.constraint is not None:
            row = _masked(row, self.constraint_after(tuple(generated)))
        if not self.touches:
            return row
        self.counts = Counter(generated)
        seen = self.seen
        return self._adjusted(row, np.union1d(seen, np.array(generated, np.int64)))

    def _adjusted(self, logits: Logits, seen: TokenIds) -> Logits:
        """A copy with bias and penalties, that for repetition on the tokens ``seen``."""
        row = logits.copy()
        if self.bias:
            ids, values = self.bias_arrays
            row[ids] += values
        if self.repetition != 1.0:
            values = row[seen]
            penalty = np.float32(self.repetition)
            with np.errstate(over="ignore"):
                smaller = values * penalty
            # Not to minus infinity, unless it was there: a token must stay possible.
            smaller = np.maximum(smaller, np.minimum(values, np.float32(-_HUGE)))
            row[seen] = np.where(values > 0, values / penalty, smaller)
        if self.counts and (self.presence or self.frequency):
            ids, counts = self.count_arrays
            row[ids] -= np.float32(self.presence) + np.float32(self.frequency) * counts
        return row

    def _candidates(self, row: Logits) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What top_k, top_p and min_p leave: ids, likeliest first, and their weights."""
        total: float | None = None
        peak = _peak(row)
        if 0 < self.top_k < row.size:
            ids = largest(row, self.top_k)
            weights = _weights(row[ids], peak, self.temperature).astype(np.float64)
        else:
            everything = _weights(row, peak, self.temperature)
            total = float(everything.sum(dtype=np.float64))
            # Without top_p, min_p alone decides: the whole mass is there, to rounding, too early.
            mass = total * self.top_p if self.top_p < 1.0 else math.inf
            ids, weights = _head(everything, mass, self.min_p)
        if self.top_p < 1.0:
            before = np.cumsum(weights) - weights
            keep = before < self.top_p * (weights.sum() if total is None else total)
            keep[0] = True
            ids, weights = ids[keep], weights[keep]
        if self.min_p > 0.0:
            keep = weights >= self.min_p * weights[0]
            ids, weights = ids[keep], weights[keep]
        return ids, weights


def _masked(row: Logits, constraint: Constraint) -> Logits:
    """A copy in which only what is allowed is possible."""
    masked: Logits = np.where(constraint.allowed()[: row.size], row, np.float32(-np.inf))
    return masked


def _peak(row: Logits) -> np.float32:
    """The largest logit. :raises NoNumbersError: it is no finite number."""
    peak: np.float32 = row.max()  # NaN, if there is one
    if not math.isfinite(peak):
        raise NoNumbersError
    return peak


def _weights(row: Logits, peak: np.float32, temperature: float) -> Logits:
    """Unnormalised probabilities; that of ``peak`` is 1."""
    with np.errstate(over="ignore"):  # to minus infinity, which is right
        weights: Logits = (row - peak) / np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def _place(cumulative: NDArray[np.float64], target: float) -> int:
    """Where ``target`` falls: never where nothing is added, not even by rounding."""
    place = int(np.searchsorted(cumulative, target, side="right"))
    if place < cumulative.size:
        return place
    return int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def largest(values: Logits, count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first; of equals the lower ones first."""
    if count <= _FEW and values.size >= _MANY:
        return _few_largest(values, count)
    least = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > least)
    above = above[np.argsort(-values[above], kind="stable")]
    return np.concatenate((above, np.flatnonzero(values == least)[: count - above.size]))


def _few_largest(values: Logits, count: int) -> NDArray[np.int64]:
    """The same for few of many: as many blocks have a value that is as large as the least of the
    largest values of their own, so that only what is not below that is sorted.
    """
    size = values.size // _FEW_BLOCKS
    whole = size * _FEW_BLOCKS
    tops = values[:whole].reshape(_FEW_BLOCKS, size).max(axis=1)
    least = np.partition(tops, _FEW_BLOCKS - count)[_FEW_BLOCKS - count]
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")[:count]]


def _head(
    weights: Logits, mass: float, least: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The likeliest tokens that hold ``mass``, or all that ``least`` (a fraction) lets pass.

    Guesses how many they are and sorts only those; a wrong guess costs another partition.
    """
    count = _FIRST_GUESS
    while count < weights.size:
        ids = largest(weights, count)
        head = weights[ids].astype(np.float64)
        if head.sum() >= mass or head[-1] < least:
            return ids, head
        count *= 8
    ids = np.argsort(-weights, kind="stable")
    return ids, weights[ids].astype(np.float64)


def _race(weights: Logits, state: SamplerState) -> int:
    """Draw in proportion to the weights: first a block, then a token of it."""
    of_blocks, of_tokens = state.race(weights.size)
    starts = np.arange(0, weights.size, _BLOCK)
    blocks = np.add.reduceat(weights, starts, dtype=np.float64)
    start = _BLOCK * int((blocks / of_blocks).argmax())
    part = weights[start : start + _BLOCK]
    return start + int((part / of_tokens[: part.size]).argmax())


def top_logprobs(logits: Logits, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of ``token``, and the ``count`` likeliest tokens with theirs."""
    top = float(logits.max())
    with np.errstate(over="ignore"):
        scale = top + float(np.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
    ids = largest(logits, min(count, logits.size)) if count else ()
    return float(logits[token]) - scale, [(int(i), float(logits[i]) - scale) for i in ids]
