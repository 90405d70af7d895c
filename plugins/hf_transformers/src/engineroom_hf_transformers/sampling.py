"""Choose the next tokens of a batch, each request by its own parameters, on the model's device.

The same seed draws the same tokens as :class:`~engineroom.engine.Sampler` does, a row at a time in
numpy. Sorting is what costs: only as many of the likeliest tokens are sorted as the truncations
turn out to need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from engineroom import EngineRoomError

if TYPE_CHECKING:
    import torch

    from engineroom.engine import Constraint, SamplerState

TokenIds = NDArray[np.int64]

__all__ = ["adjusted", "choose", "logprobs_of", "logprobs_of_rows"]

_FIRST_GUESS: Final = 256
"""So many of the likeliest tokens are sorted first where ``top_k`` does not say."""
_TIES: Final = 32
"""So many more where it does, so that those as likely as the last one are seldom cut apart."""
_ROWS: Final = 16
_HUGE: Final = float(np.finfo(np.float32).max)


def choose(
    logits: torch.Tensor, rows: Sequence[SamplerState]
) -> list[int | EngineRoomError | None]:
    """The next token of each row; under a constraint as :meth:`~engineroom.engine.Sampler.sample`.

    :param logits: rows × vocabulary, float32; not changed.
    :returns: ``None`` for a row that has no finite maximum: the model computed nonsense; an error
        for one whose constraint allows nothing.
    """
    if any(row.touches for row in rows):
        logits = adjusted(logits, rows)
    constraints = {i: row.constraint for i, row in enumerate(rows) if row.constraint is not None}
    if not constraints:
        tokens: list[int | EngineRoomError | None] = [*_choose(logits, rows)]
    else:
        tokens = _choose_allowed(logits, rows, constraints)
    for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if isinstance(token, int):
            try:
                row.take(token)
            except EngineRoomError as error:
                tokens[place] = error
    return tokens


def _choose_allowed(
    logits: torch.Tensor, rows: Sequence[SamplerState], constraints: Mapping[int, Constraint]
) -> list[int | EngineRoomError | None]:
    """Mask first where truncation has to see it, else only what was refused."""
    first = [i for i in constraints if rows[i].truncates and not rows[i].greedy]
    logits, errors = _masked(logits, {i: constraints[i] for i in first})
    tokens: list[int | EngineRoomError | None] = [*_choose(logits, rows)]
    for i, error in errors.items():
        tokens[i] = error
    refused = []
    for i, constraint in constraints.items():
        token = tokens[i]
        if isinstance(token, int) and not constraint.allows(token):
            refused.append(i)
    if refused:
        part, errors = _masked(
            _pick(logits, refused), {n: constraints[i] for n, i in enumerate(refused)}
        )
        again = _choose(part, [rows[i] for i in refused])
        for n, (i, token) in enumerate(zip(refused, again, strict=True)):
            tokens[i] = errors.get(n, token)
    return tokens


def _masked(
    logits: torch.Tensor, constraints: Mapping[int, Constraint]
) -> tuple[torch.Tensor, dict[int, EngineRoomError]]:
    """A copy in whose rows only what is allowed is possible, and rows that allow nothing."""
    import torch

    errors: dict[int, EngineRoomError] = {}
    if not constraints:
        return logits, errors
    logits = logits.clone()
    for place, constraint in constraints.items():
        try:
            allowed = constraint.allowed()[: logits.shape[-1]]
        except EngineRoomError as error:
            errors[place] = error
            continue
        if logits.device.type == "cpu":  # 30 µs a row, where torch takes 200
            np.copyto(logits[place].numpy(), -np.inf, where=~allowed)
        else:
            forbidden = torch.from_numpy(~allowed).to(logits.device)
            logits[place].masked_fill_(forbidden, -torch.inf)
    return logits, errors


def _choose(logits: torch.Tensor, rows: Sequence[SamplerState]) -> list[int | None]:
    import torch

    chosen: list[int | None] = [None] * len(rows)
    peaks = logits.amax(dim=-1)
    sound = torch.isfinite(peaks).tolist()
    greedy = [i for i, row in enumerate(rows) if row.greedy and sound[i]]
    drawn = [i for i, row in enumerate(rows) if not row.greedy and sound[i]]
    if greedy:
        for i, token in zip(greedy, _argmax(_pick(logits, greedy)), strict=True):
            chosen[i] = token
    whole = [i for i in drawn if not rows[i].truncates]
    cut = [i for i in drawn if rows[i].truncates]
    if whole:
        tokens = _draw_from_all(_pick(logits, whole), [rows[i] for i in whole])
        for i, token in zip(whole, tokens, strict=True):
            chosen[i] = token
    if cut:
        for i, token in zip(
            cut, _draw_cut(_pick(logits, cut), [rows[i] for i in cut]), strict=True
        ):
            chosen[i] = token
    return chosen


def _pick(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    import torch

    if len(rows) == logits.shape[0]:
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


def _argmax(logits: torch.Tensor) -> list[int]:
    if logits.device.type == "cpu":  # numpy's takes 9 µs a row, torch's 250
        return [int(row.argmax()) for row in logits.numpy()]
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def adjusted(logits: torch.Tensor, rows: Sequence[SamplerState]) -> torch.Tensor:
    """A copy with bias and penalties; what it changes is gathered over the rows first."""
    import torch

    logits = logits.clone()
    width = logits.shape[-1]
    flat = logits.view(-1)
    device = logits.device

    def on_device(parts: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    def places(chosen: Iterable[tuple[int, TokenIds]]) -> torch.Tensor:
        return on_device([ids + i * width for i, ids in chosen])

    if biased := [(i, row.bias_arrays) for i, row in enumerate(rows) if row.bias]:
        amounts = on_device([values for _, (_, values) in biased])
        flat[places((i, ids) for i, (ids, _) in biased)] += amounts
    if repeating := [(i, row) for i, row in enumerate(rows) if row.repetition != 1.0]:
        at = places((i, row.seen) for i, row in repeating)
        penalty = on_device(
            [np.full(row.seen.size, row.repetition, np.float32) for _, row in repeating]
        )
        values = flat[at]
        # Not to minus infinity, unless it was there: a token must stay possible.
        smaller = torch.maximum(values * penalty, values.clamp(max=-_HUGE))
        flat[at] = torch.where(values > 0, values / penalty, smaller)
    counted = [
        (i, row, *row.count_arrays)
        for i, row in enumerate(rows)
        if row.counts and (row.presence or row.frequency)
    ]
    if counted:
        amounts = on_device(
            [
                np.float32(row.presence) + np.float32(row.frequency) * counts
                for _, row, _, counts in counted
            ]
        )
        flat[places((i, ids) for i, _, ids, _ in counted)] -= amounts
    return logits


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision, where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def _weights(logits: torch.Tensor, rows: Sequence[SamplerState]) -> torch.Tensor:
    """Unnormalised probabilities after temperature; the likeliest has 1."""
    import torch

    temperature = torch.tensor(
        [row.temperature for row in rows], dtype=torch.float32, device=logits.device
    )[:, None]
    return torch.exp((logits - logits.amax(dim=-1, keepdim=True)) / temperature)


def _targets(rows: Sequence[SamplerState], mass: torch.Tensor) -> torch.Tensor:
    import torch

    drawn = torch.tensor([row.draw() for row in rows], dtype=mass.dtype, device=mass.device)
    return drawn[:, None] * mass


def _place(cumulative: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Where the targets fall: never where nothing is added, not even by rounding."""
    import torch

    places = torch.searchsorted(cumulative, targets, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)
    return torch.minimum(places, last)


def _draw_from_all(logits: torch.Tensor, rows: Sequence[SamplerState]) -> list[int]:
    """A race of blocks, then of the tokens of one, as the core's sampler has it."""
    import torch

    weights = _weights(logits, rows)
    count, width = weights.shape
    times = [np.stack(part) for part in zip(*(row.race(width) for row in rows), strict=True)]
    kind = torch.float32 if logits.device.type == "mps" else torch.float64
    of_blocks, of_tokens = (torch.from_numpy(part).to(logits.device, kind) for part in times)
    blocks, size = of_blocks.shape[1], of_tokens.shape[1]
    parts = torch.nn.functional.pad(weights, (0, blocks * size - width)).view(count, blocks, size)
    block = (parts.sum(dim=-1, dtype=kind) / of_blocks).argmax(dim=-1)
    part = parts[torch.arange(count, device=logits.device), block]
    token = (part / of_tokens).argmax(dim=-1)
    tokens: list[int] = (block * size + token).tolist()
    return tokens


def _draw_cut(logits: torch.Tensor, rows: Sequence[SamplerState]) -> list[int]:
    """What ``top_k``, then ``top_p``, then ``min_p`` leave.

    Of tokens that are equally likely, as many are in half precision, the lower ids come first:
    else the neighbours, by which it depends how many are sorted, would change what a seed gives.
    """
    import torch

    width = logits.shape[-1]
    everything = _weights(logits, rows)
    device = logits.device
    top_k = torch.tensor([min(row.top_k or width, width) for row in rows], device=device)[:, None]
    only_k = all(row.top_k for row in rows)
    count = min(width, max(row.top_k for row in rows) + _TIES if only_k else _FIRST_GUESS)
    total = _precise(everything).sum(dim=-1, keepdim=True)
    top_p = torch.tensor([row.top_p for row in rows], dtype=total.dtype, device=device)[:, None]
    min_p = torch.tensor([row.min_p for row in rows], dtype=total.dtype, device=device)[:, None]
    while True:
        head, ids = everything.topk(count, dim=-1)
        if count == width:
            break
        weights = _precise(head)
        # Those as likely as the last one may go on beyond it: which of them are here is chance.
        surely = weights * (head > head[:, -1:])
        enough = (top_p < 1.0) & (surely.sum(dim=-1, keepdim=True) >= top_p * total)
        enough &= surely[:, :1] > 0  # the likeliest token stays, whatever top_p says
        enough |= weights[:, -1:] < min_p
        kth = surely.gather(1, top_k.clamp(max=count) - 1)
        enough_k = (top_k <= count) & ((kth > 0) | (weights[:, -1:] == 0))
        if bool(torch.where(top_k < width, enough_k, enough).all()):
            break
        count = min(width, count * 8)
    ids, order = ids.sort(dim=-1)
    head, order = head.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids, weights = ids.gather(1, order), _precise(head)
    weights = weights * (torch.arange(count, device=device)[None] < top_k)
    mass = torch.where(top_k < width, weights.sum(dim=-1, keepdim=True), total)
    before = weights.cumsum(dim=-1) - weights
    keep = (before < top_p * mass) | (top_p >= 1.0)
    keep[:, 0] = True
    keep &= weights >= min_p * weights[:, :1]
    cumulative = (weights * keep).cumsum(dim=-1)
    place = _place(cumulative, _targets(rows, cumulative[:, -1:]))
    tokens: list[int] = ids.gather(1, place).view(-1).tolist()
    return tokens


def logprobs_of(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row the log probability of its token, and the likeliest tokens with theirs.

    :param logits: rows × vocabulary, as the model gave them.
    :param counts: how many of the likeliest each row wants.
    """
    import torch

    scaled = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    own = scaled.gather(1, torch.tensor(list(tokens), device=logits.device)[:, None])
    most = min(max(counts), logits.shape[-1])
    values, ids = scaled.topk(most, dim=-1)
    listed = zip(own.view(-1).tolist(), ids.tolist(), values.tolist(), counts, strict=True)
    return [
        (value, list(zip(row_ids[:count], row_values[:count], strict=True)))
        for value, row_ids, row_values, count in listed
    ]


def logprobs_of_rows(
    logits: torch.Tensor, tokens: Sequence[int], count: int
) -> list[tuple[float, list[tuple[int, float]]]] | None:
    """The same for many rows, some at a time: each is copied while it is looked at.

    :param count: how many of the likeliest tokens are wanted with each.
    :returns: ``None`` where a row has no finite maximum.
    """
    import torch

    scores: list[tuple[float, list[tuple[int, float]]]] = []
    for start in range(0, len(tokens), _ROWS):
        some = logits[start : start + _ROWS].float()
        if not bool(torch.isfinite(some.amax(dim=-1)).all()):
            return None
        chosen = tokens[start : start + _ROWS]
        scores += logprobs_of(some, chosen, [count] * len(chosen))
    return scores
