"""Texts as vectors, with models that are made for it.

Those are encoders, and any model whose folder says how its outputs become a vector, as the
library sentence-transformers writes it: ``modules.json`` and a folder for each module. What is
known here of that are pooling and normalising; a model that needs more is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from engineroom import ConfigurationError, TokenStep
from engineroom.sources import read_json
from engineroom_hf_transformers.attention import StepStoppedError, stopping

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from engineroom_hf_transformers.loading import Parts

__all__ = ["EmbeddingJob", "Recipe", "recipe_of"]

Pooling: TypeAlias = Literal["mean", "cls", "max", "lasttoken", "mean_sqrt_len"]

_MODES: Final[dict[str, Pooling]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model's outputs become a vector.

    :param pooling: over the tokens of a text.
    :param normalise: to length 1.
    """

    pooling: Pooling = "mean"
    normalise: bool = False


def recipe_of(folder: Path, parts: Parts) -> Recipe | None:
    """What a model's folder says; ``None``: it makes no embeddings.

    :raises ConfigurationError: it says something that is not known here, or is damaged.
    """
    listing = folder / "modules.json"
    if not listing.is_file():
        return Recipe() if parts.kind == "embedding" else None
    modules = read_json(listing, list, what="list of modules")
    if not all(isinstance(m, dict) for m in modules):
        raise ConfigurationError(f"{str(listing)!r} is no list of modules")
    pooling: Pooling | None = None
    normalise = False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(folder, str(module.get("path", "")))
        elif kind == "Normalize":
            normalise = True
        elif kind != "Transformer":
            raise ConfigurationError(
                f"{str(listing)!r} asks for a module {kind!r}; this runtime knows Transformer, "
                "Pooling and Normalize"
            )
    return Recipe(pooling or "mean", normalise)


def _pooling(folder: Path, name: str) -> Pooling:
    place = (folder / name / "config.json").resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise ConfigurationError(f"{str(folder)!r} has no {name}/config.json for its pooling")
    settings = read_json(place, dict)
    modes = [mode for key, mode in _MODES.items() if settings.get(key)]
    if "pooling_mode" in settings and not modes:
        modes = [mode for mode in _MODES.values() if mode == settings["pooling_mode"]]
    if len(modes) != 1:
        raise ConfigurationError(
            f"{str(place)!r} asks for {' and '.join(modes) or 'no known'} pooling; this runtime "
            f"does one of {', '.join(_MODES.values())}"
        )
    return modes[0]


class EmbeddingJob:
    """One call of ``embed`` on its way through the engine: a batch of texts a step.

    :param tokens: of each text.
    :param most: tokens of a batch, padding included, unless one text alone has more.
    :param stopped: asked at each layer; true: give up.
    """

    def __init__(
        self,
        parts: Parts,
        recipe: Recipe,
        tokens: Sequence[Sequence[int]],
        most: int,
        stopped: Callable[[], bool],
    ) -> None:
        self._parts = parts
        self._recipe = recipe
        self._tokens = tokens
        self._stopped = stopped
        # Alike in length side by side: less padding.
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        self._batches: list[list[int]] = []
        for index in order:
            batch = self._batches[-1] if self._batches else []
            if batch and (len(batch) + 1) * len(tokens[batch[0]]) <= most:
                batch.append(index)
            else:
                self._batches.append([index])
        self._batches.reverse()
        self.vectors: list[list[float]] = [[] for _ in tokens]

    def advance(self, _: Any) -> TokenStep | None:
        """Do the next batch; a step that ends the job with the last."""
        if self._batches:
            batch = self._batches[-1]
            try:
                found = self._compute([self._tokens[index] for index in batch])
            except StepStoppedError:
                return None
            self._batches.pop()
            for index, vector in zip(batch, found, strict=True):
                self.vectors[index] = vector
        return None if self._batches else TokenStep(finish="eos_token")

    def close(self) -> None:
        """Nothing to give back."""

    def _compute(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        import torch

        device = self._parts.device
        longest = max(map(len, texts))
        ids = torch.zeros((len(texts), longest), dtype=torch.long)
        mask = torch.zeros((len(texts), longest), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        ids, mask = ids.to(device), mask.to(device)
        model = self._parts.model
        if self._parts.kind == "causal":
            model = model.base_model  # without the head over the vocabulary
        with torch.inference_mode(), stopping(self._stopped):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            vectors = _pool(hidden, mask, self._recipe.pooling)
            if self._recipe.normalise:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            found: list[list[float]] = vectors.tolist()
            return found


def _pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
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
