"""Texts that are computed in batches, a batch a step: nothing of one is needed for the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engineroom import TokenStep
from engineroom_hf_transformers.attention import StepStoppedError

if TYPE_CHECKING:
    import torch

__all__ = ["BatchedWork", "padded"]


class BatchedWork(ABC):
    """One call with several texts on its way through the engine: a batch of them a step.

    :param lengths: tokens of each text.
    :param most: tokens of a batch, padding included, unless one text alone has more.
    """

    def __init__(self, lengths: Sequence[int], most: int) -> None:
        # Alike in length side by side: less padding.
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self._batches: list[list[int]] = []
        for index in order:
            batch = self._batches[-1] if self._batches else []
            if batch and (len(batch) + 1) * lengths[batch[0]] <= most:
                batch.append(index)
            else:
                self._batches.append([index])
        self._batches.reverse()
        self.vectors: list[list[float]] = [[] for _ in lengths]
        """What the texts come to, in their order."""

    @abstractmethod
    def compute(self, batch: Sequence[int]) -> list[list[float]]:
        """What the texts of a batch come to, by their numbers.

        :raises StepStoppedError: the step is given up.
        """

    def advance(self, _: Any) -> TokenStep | None:
        """Do the next batch; a step that ends the work with the last."""
        if self._batches:
            batch = self._batches[-1]
            try:
                vectors = self.compute(batch)
            except StepStoppedError:
                return None
            self._batches.pop()
            for index, vector in zip(batch, vectors, strict=True):
                self.vectors[index] = vector
        return None if self._batches else TokenStep(finish="eos_token")

    def close(self) -> None:
        """Nothing to give back."""


def padded(
    texts: Sequence[Sequence[int]], device: torch.device, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of several texts as one tensor, filled up on the right, and where they are."""
    import torch

    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(texts), longest), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids.to(device), mask.to(device)
