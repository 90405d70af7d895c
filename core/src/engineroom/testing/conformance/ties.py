"""Texts that part where two tokens are nearly as likely.

Quantised and half-precision weights have log probabilities whose last digits depend on what else
is in a batch: with SmolLM2's Q4_1 weights llama.cpp's differ by 0.06 nats in the middle and by 0.2
for one in twenty, with float32 weights by less than 0.0001. A greedy text then parts from the one
that its request has alone where two tokens are as close as that. A request that takes something of
another's differs by more, or chooses a token that is not the likeliest by its own numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from engineroom.schemas import GenerationParams, InferenceResponse, TokenLogprob

__all__ = ["LEAST_BOUND", "MOST_BOUND", "TOP", "bound_of", "differences", "parting"]

TOP: Final = 20
"""Alternatives that are asked for with each token."""
LEAST_BOUND: Final = 0.02
"""Nats that are a near tie everywhere: what half-precision weights differ by."""
MOST_BOUND: Final = 0.5
"""Nats that are no near tie anywhere."""
_LIKELY: Final = -5.0
_SHARE: Final = 0.95
_TIMES: Final = 3.0


def differences(alone: InferenceResponse, beside: InferenceResponse) -> Iterator[float]:
    """How far apart the log probabilities of likely tokens are while the texts are the same.

    :param alone: of a greedy request without others, with its log probabilities.
    :param beside: of the same request beside others.
    """
    for one, other in zip(alone.logprobs or (), beside.logprobs or (), strict=False):
        theirs = _table(other)
        for token, logprob in _table(one).items():
            if logprob > _LIKELY and token in theirs:
                yield abs(logprob - theirs[token])
        if one.token_id != other.token_id:
            return


def bound_of(noise: Sequence[float]) -> float:
    """The nats up to which two tokens are as likely, by the :func:`differences` of answers."""
    if not noise:
        return LEAST_BOUND
    usual = sorted(noise)[min(int(len(noise) * _SHARE), len(noise) - 1)]
    return min(max(_TIMES * usual, LEAST_BOUND), MOST_BOUND)


def parting(
    params: GenerationParams, alone: InferenceResponse, beside: InferenceResponse, bound: float
) -> str | None:
    """What is wrong where the tokens of two greedy answers part; ``None``: it is a near tie.

    In each answer the chosen token must be the likelier one, by penalties and bias as
    :class:`~engineroom.schemas.GenerationParams` describes them, and by no more than ``bound``.

    :param alone: of the request without others; both have their log probabilities.
    :param beside: of the same request beside others.
    """
    ours, theirs = alone.logprobs or [], beside.logprobs or []
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one.token_id == other.token_id:
            continue
        before = [entry.token_id for entry in ours[:place]]
        margins = [
            _margin(params, one, other.token_id, before),
            _margin(params, other, one.token_id, before),
        ]
        known = [margin for margin in margins if margin is not None]
        if len(known) == 2 and _signs_matter(params):
            # What it does to either token is the same in both answers: it drops out of the sum.
            known = [sum(known) / 2] * 2
        if len(known) == 2 and all(-LEAST_BOUND <= margin <= bound for margin in known):
            return None
        told = " and ".join("unknown" if m is None else f"{m:.3f}" for m in margins)
        return (
            f"token {place} is {one.token!r} alone and {other.token!r} beside others, and the one "
            f"taken is likelier by {told} nats, where up to {bound:.3f} are a near tie"
        )
    return _ended(params, alone, beside, bound)


def _ended(
    params: GenerationParams, alone: InferenceResponse, beside: InferenceResponse, bound: float
) -> str | None:
    """Where one text goes on after the other has ended: the end was nearly as likely."""
    longer, shorter = sorted((alone, beside), key=lambda r: len(r.logprobs or ()), reverse=True)
    entries, place = longer.logprobs or [], len(shorter.logprobs or ())
    if place == len(entries):
        return "the tokens are the same, and the texts are not"
    if shorter.finish_reason == "eos_token":
        before = [entry.token_id for entry in entries[:place]]
        entry = entries[place]
        others = (token for token in _table(entry) if token != entry.token_id)
        margins = [_margin(params, entry, token, before) for token in others]
        close = any(margin is not None and abs(margin) <= bound for margin in margins)
        if close or _signs_matter(params):
            return None
    return f"one has {place} tokens ({shorter.finish_reason}), the other {len(entries)}"


def _signs_matter(params: GenerationParams) -> bool:
    """Whether logits are changed by their sign, which log probabilities do not tell."""
    return params.repetition_penalty not in (None, 1.0)


def _table(entry: TokenLogprob) -> dict[int, float]:
    return {**{token: logprob for token, _, logprob in entry.top}, entry.token_id: entry.logprob}


def _margin(
    params: GenerationParams, entry: TokenLogprob, other: int, before: Sequence[int]
) -> float | None:
    """By how much the chosen token is likelier than another; ``None``: that is not known."""
    table = _table(entry)
    if other not in table:
        return None
    counts = Counter(before)

    def adjusted(token: int) -> float:
        count = counts[token]
        return (
            table[token]
            + (params.logit_bias or {}).get(token, 0.0)
            - (params.presence_penalty or 0.0) * (count > 0)
            - (params.frequency_penalty or 0.0) * count
        )

    return adjusted(entry.token_id) - adjusted(other)
