"""Texts as vectors, with models that are made for it.

Those are encoders, and any model whose folder says how its outputs become a vector, as the
library sentence-transformers writes it: ``modules.json`` and a folder for each module. What is
known here of that are pooling and normalising; a model that needs more is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engineroom.sources import PoolingRecipe, read_pooling
from engineroom_hf_transformers.attention import stopping
from engineroom_hf_transformers.batched_work import BatchedWork, padded

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from engineroom_hf_transformers.loading import Parts

__all__ = ["EmbeddingJob", "recipe_of"]

_MODES: Final = {mode: mode for mode in ("mean", "cls", "max", "lasttoken", "mean_sqrt_len")}


def recipe_of(folder: Path, parts: Parts) -> PoolingRecipe | None:
    """What a model's folder says; ``None``: it makes no embeddings.

    :raises ConfigurationError: it says something that is not known here, or is damaged.
    """
    recipe = read_pooling(folder, _MODES, "this runtime")
    if recipe is None and parts.kind == "embedding":
        return PoolingRecipe("mean")
    return recipe


class EmbeddingJob(BatchedWork):
    """One call of ``embed`` on its way through the engine.

    :param tokens: of each text.
    :param most: tokens of a batch.
    :param stopped: asked at each layer; true: give up.
    """

    def __init__(
        self,
        parts: Parts,
        recipe: PoolingRecipe,
        tokens: Sequence[Sequence[int]],
        most: int,
        stopped: Callable[[], bool],
    ) -> None:
        super().__init__([len(text) for text in tokens], most)
        self._parts = parts
        self._recipe = recipe
        self._tokens = tokens
        self._stopped = stopped

    def compute(self, batch: Sequence[int]) -> list[list[float]]:
        """The vectors of a batch's texts."""
        import torch

        ids, mask = padded([self._tokens[index] for index in batch], self._parts.device)
        model = self._parts.model
        if self._parts.kind == "causal":
            model = model.base_model  # without the head over the vocabulary
        with torch.inference_mode(), stopping(self._stopped):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            vectors = _pool(hidden, mask, self._recipe.pooling)
            if self._recipe.normalise:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            numbers: list[list[float]] = vectors.tolist()
            return numbers


def _pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Texts × tokens × numbers → texts × numbers; padding, on the right, does not count."""
    import torch

    if pooling == "cls":
        return hidden[:, 0]
    counts = mask.sum(dim=1)
    if pooling == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), counts - 1]
    seen = mask[:, :, None].bool()
    if pooling == "max":
        return hidden.masked_fill(~seen, float("-inf")).amax(dim=1)
    total = hidden.masked_fill(~seen, 0.0).sum(dim=1)
    divisor = counts[:, None].float()
    return total / (divisor.sqrt() if pooling == "mean_sqrt_len" else divisor)
