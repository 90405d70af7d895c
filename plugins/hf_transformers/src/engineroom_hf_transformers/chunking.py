"""How many tokens of prompts a step reads beside requests that decode.

In a model's linear layers a token costs the same wherever it stands; its attention looks at all
that comes before. Chunks of equally many tokens take longer and longer: with SmolLM2-135M on two
cores in float32, 128 tokens beside eight that decode take 210 ms at the beginning of a prompt and
275 ms after 900 tokens. So a step has a budget of work instead: what ``prefill_chunk`` tokens
cost at the beginning of a prompt. Late chunks are smaller, and all steps take about the same time.

The work is counted, not measured, so that the same prompts are cut in the same places each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from engineroom_hf_transformers.kernels import Call

__all__ = ["ReadingCost", "cost_of"]

_RATE: Final = 0.75
"""How fast attention computes ÷ how fast linear layers do: 120 against 160 GFLOP/s, as above."""


class ReadingCost:
    """What it takes to read tokens of a prompt, in tokens that attend to nothing.

    :param attention: window of layers (``None``: the whole text) → what a token pays there for
        each position that it attends to.
    """

    def __init__(self, attention: Mapping[int | None, float]) -> None:
        self._attention = dict(attention)

    def __call__(self, start: int, count: int) -> float:
        """Of ``count`` tokens, the first of them at position ``start``."""
        paid = (
            price * (_attended(start + count, window) - _attended(start, window))
            for window, price in self._attention.items()
        )
        return count + sum(paid)

    def most(self, start: int, budget: float) -> int:
        """How many tokens can be read from position ``start`` on; 0: not even one."""
        low, high = 0, int(budget)
        while low < high:
            middle = (low + high + 1) // 2
            if self(start, middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low


def _attended(length: int, window: int | None) -> int:
    """Pairs of a token of a text and a position that it attends to."""
    near = length if window is None else min(length, window)
    return near * (near + 1) // 2 + (length - near) * near


def cost_of(model: Any, calls: Iterable[Call]) -> ReadingCost:
    """Count a model's work.

    :param calls: of the attention, one a layer.
    """
    once = 2.0 * max(1, _numbers(model))
    attention: Counter[int | None] = Counter()
    for call in calls:
        heads, key, value = call.query.shape[1], call.query.shape[-1], call.value.shape[-1]
        attention[call.window] += 2 * heads * (key + value)
    return ReadingCost({window: work / once / _RATE for window, work in attention.items()})


def _numbers(model: Any) -> int:
    """Weights that each token of a prompt is multiplied with: all but embeddings and the head.

    Of a mixture all experts are counted, and its late chunks are somewhat larger than they might.
    """
    numbers = int(model.num_parameters(exclude_embeddings=True))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        numbers -= head.weight.numel()
    return numbers
