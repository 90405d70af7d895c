"""The computing of attention: a layer's call of it, who may see what, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Call", "attend", "causal", "kernel", "plain"]


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's call of the attention: 1 × heads × tokens × numbers, and how to compute."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    kernel: str


def causal(
    call: Call, first: int, end: int, start: int = 0, *, triangle: bool = False
) -> torch.Tensor | None:
    """Who may see what: tokens at ``first`` to ``end``, over positions ``start`` to ``end``.

    :param triangle: write even the plain triangle out.
    :returns: a mask of tokens × positions, or ``None`` for the plain triangle.
    """
    import torch

    if first == 0 and not triangle and (call.window is None or call.window >= end):
        return None
    device = call.query.device
    token = torch.arange(first, end, device=device)[:, None]
    position = torch.arange(start, end, device=device)[None]
    seen = position <= token
    if call.window is not None:
        seen &= position > token - call.window
    return seen


def attend(
    call: Call,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """A chunk of one request; ``mask`` ``None``: the plain triangle."""
    import torch

    if call.kernel == "sdpa" and call.softcap is None and call.sinks is None:
        attended: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=call.scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return attended
    if mask is None:
        mask = causal(call, 0, query.shape[2], triangle=True)
    return plain(call, query, keys, values, mask)


def kernel(
    call: Call,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """One token a request, ``query`` by groups of heads that share their keys."""
    import torch

    if call.kernel == "sdpa" and call.softcap is None and call.sinks is None:
        attended: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=call.scaling
        )
        return attended
    count, groups, shared, width = query.shape
    alone = query.reshape(count, groups * shared, 1, width)
    return plain(call, alone, keys, values, mask)


def plain(
    call: Call,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by matrix products, with soft caps and sinks.

    Soft caps as in Gemma 2 (arXiv:2408.00118): ``cap · tanh(scores / cap)``. A sink is a score
    that takes part in the softmax and has no value.

    :param query: requests × heads × tokens × numbers.
    :param mask: what may be seen (boolean), or what is added.
    """
    import torch

    shared = query.shape[1] // keys.shape[1]
    if shared > 1:
        keys = keys.repeat_interleave(shared, dim=1)
        values = values.repeat_interleave(shared, dim=1)
    scores = torch.matmul(query, keys.transpose(2, 3)) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    if call.sinks is not None:
        count, heads, tokens, _ = scores.shape
        sinks = call.sinks.reshape(1, heads, 1, 1).expand(count, heads, tokens, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if call.sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, values)
