"""Choose the next token of one request from its row of logits.

Written over numpy instead of llama.cpp's sampler chains because it is exact, the same on every
runtime (the order of the steps is the contract's), reproducible whatever the neighbours do, and
faster: greedy is one ``argmax`` over a view of the library's own buffer; sampling sorts only the
few candidates that truncation leaves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engineroom import GenerationParams

__all__ = ["Logits", "NoNumbersError", "Sampler", "largest", "top_logprobs"]

Logits: TypeAlias = NDArray[np.float32]

_BLOCK: Final = 1024
_FIRST_GUESS: Final = 256
_TINY: Final = float(np.finfo(np.float32).tiny)
_HUGE: Final = float(np.finfo(np.float32).max)


class NoNumbersError(Exception):
    """The model computed NaN or infinity for the next token."""


class Sampler:
    """The sampling state of one request: its penalties and its random generator.

    :param params: the request's parameters.
    :param prompt: token ids of the prompt, which ``repetition_penalty`` counts too.
    :param n_vocab: length of a row of logits.
    """

    __slots__ = (
        "_bias",
        "_counts",
        "_frequency",
        "_min_p",
        "_presence",
        "_random",
        "_repetition",
        "_seen",
        "_temperature",
        "_top_k",
        "_top_p",
        "_touches",
    )

    def __init__(self, params: GenerationParams, prompt: Sequence[int], n_vocab: int) -> None:
        temperature = 1.0 if params.temperature is None else params.temperature
        self._temperature = max(temperature, _TINY)
        self._top_k = min(params.top_k or n_vocab, n_vocab)
        self._top_p = 1.0 if params.top_p is None else params.top_p
        self._min_p = params.min_p or 0.0
        self._repetition = min(params.repetition_penalty or 1.0, _HUGE)
        self._presence = params.presence_penalty or 0.0
        self._frequency = params.frequency_penalty or 0.0
        self._counts: Counter[int] = Counter()
        self._seen: set[int] = set(prompt) if self._repetition != 1.0 else set()
        bias = params.logit_bias or {}
        self._bias = (
            np.fromiter(bias.keys(), np.int64, len(bias)),
            np.fromiter(bias.values(), np.float32, len(bias)),
        )
        self._touches = bool(bias or self._repetition != 1.0 or self._presence or self._frequency)
        self._random = None if params.greedy else np.random.Generator(np.random.PCG64(params.seed))

    def sample(self, logits: Logits) -> int:
        """The next token. ``logits`` is not changed, and not kept.

        :raises NoNumbersError: they have no finite maximum.
        """
        row = self._adjusted(logits) if self._touches else logits
        if self._random is None:
            token = int(row.argmax())  # of NaN, if there is one
            if not math.isfinite(row[token]):
                raise NoNumbersError
        else:
            token = self._draw(row, self._random)
        if self._touches:
            self._counts[token] += 1
            if self._repetition != 1.0:
                self._seen.add(token)
        return token

    def log_probabilities(self, logits: Logits, generated: Sequence[int]) -> Logits:
        """Log probabilities of the next token, with bias and penalties on them, for beam search.

        They are not normalised again, as in transformers.

        :param generated: the tokens after the prompt.
        :raises NoNumbersError: the logits have no finite maximum.
        """
        peak = logits.max()
        if not math.isfinite(peak):
            raise NoNumbersError
        row: Logits = logits - peak
        row -= np.float32(math.log(np.exp(row).sum(dtype=np.float64)))
        if not self._touches:
            return row
        self._counts = Counter(generated)
        prompt = self._seen
        if self._repetition != 1.0:
            self._seen = prompt.union(generated)
        try:
            return self._adjusted(row)
        finally:
            self._seen = prompt

    def _adjusted(self, logits: Logits) -> Logits:
        """A copy with bias and penalties."""
        row = logits.copy()
        ids, values = self._bias
        row[ids] += values
        if self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            values = row[ids]
            penalty = np.float32(self._repetition)
            with np.errstate(over="ignore"):
                smaller = values * penalty
            # Not to minus infinity, unless it was there: a token must stay possible.
            smaller = np.maximum(smaller, np.minimum(values, np.float32(-_HUGE)))
            row[ids] = np.where(values > 0, values / penalty, smaller)
        if self._counts and (self._presence or self._frequency):
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            row[ids] -= np.float32(self._presence) + np.float32(self._frequency) * counts
        return row

    def _draw(self, row: Logits, random: np.random.Generator) -> int:
        if self._top_k >= row.size and self._top_p >= 1.0 and self._min_p <= 0.0:
            return _draw_from_all(_weights(row, self._temperature), random)
        ids, weights = self._candidates(row)
        cumulative = np.cumsum(weights)
        return int(ids[_place(cumulative, random.random() * cumulative[-1])])

    def _candidates(self, row: Logits) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What top_k, top_p and min_p leave: ids, likeliest first, and their weights."""
        total: float | None = None
        if self._top_k < row.size:
            ids = largest(row, self._top_k)
            weights = _weights(row[ids], self._temperature).astype(np.float64)
        else:
            everything = _weights(row, self._temperature)
            total = float(everything.sum(dtype=np.float64))
            # Without top_p, min_p alone decides: the whole mass is there, to rounding, too early.
            mass = total * self._top_p if self._top_p < 1.0 else math.inf
            ids, weights = _head(everything, mass, self._min_p)
        if self._top_p < 1.0:
            before = np.cumsum(weights) - weights
            keep = before < self._top_p * (weights.sum() if total is None else total)
            keep[0] = True
            ids, weights = ids[keep], weights[keep]
        if self._min_p > 0.0:
            keep = weights >= self._min_p * weights[0]
            ids, weights = ids[keep], weights[keep]
        return ids, weights


def _weights(row: Logits, temperature: float) -> NDArray[np.float32]:
    """Unnormalised probabilities; the likeliest has 1."""
    peak = row.max()
    if not math.isfinite(peak):
        raise NoNumbersError
    with np.errstate(over="ignore"):  # to minus infinity, which is right
        weights: NDArray[np.float32] = (row - peak) / np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def _place(cumulative: NDArray[np.float64], target: float) -> int:
    """Where ``target`` falls: never where nothing is added, not even by rounding."""
    place = int(np.searchsorted(cumulative, target, side="right"))
    if place < cumulative.size:
        return place
    return int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first."""
    ids = np.argpartition(values, values.size - count)[values.size - count :]
    ordered: NDArray[np.int64] = ids[np.argsort(-values[ids], kind="stable")]
    return ordered


def _head(
    weights: NDArray[np.float32], mass: float, least: float
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


def _draw_from_all(weights: NDArray[np.float32], random: np.random.Generator) -> int:
    """Draw in proportion to the weights: first a block, then a token of the block."""
    starts = np.arange(0, weights.size, _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = random.random() * blocks[-1]
    block = _place(blocks, target)
    if block:
        target -= blocks[block - 1]
    start = block * _BLOCK
    part = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + _place(part, target)


def top_logprobs(logits: Logits, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of ``token``, and the ``count`` likeliest tokens with theirs."""
    top = float(logits.max())
    with np.errstate(over="ignore"):
        scale = top + float(np.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
    best = (
        []
        if count == 0
        else [(int(i), float(logits[i]) - scale) for i in largest(logits, min(count, logits.size))]
    )
    return float(logits[token]) - scale, best
