"""Scores of pairs of texts, with models that are made for it (cross-encoders).

Those are models for sequence classification with one label. What becomes of their number is said by
``config.json``, as the library sentence-transformers writes it, and is else the sigmoid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engineroom import ConfigurationError
from engineroom.prompts import PairTokens
from engineroom_hf_transformers.attention import stopping
from engineroom_hf_transformers.batched_work import BatchedWork, padded

if TYPE_CHECKING:
    from engineroom_hf_transformers.loading import Parts

__all__ = ["RankingJob", "uses_sigmoid"]


def uses_sigmoid(config: Mapping[str, Any]) -> bool:
    """Whether the model's number goes through the sigmoid.

    :param config: its ``config.json``.
    :raises ConfigurationError: it is to go through something that is not known here.
    """
    own = config.get("sentence_transformers")
    stated = own.get("activation_fn") if isinstance(own, Mapping) else None
    stated = stated or config.get("sbert_ce_default_activation_function")
    match str(stated or "Sigmoid").rpartition(".")[2]:
        case "Sigmoid":
            return True
        case "Identity":
            return False
        case _:
            raise ConfigurationError(
                f"config.json asks for the activation {str(stated)[:80]!r}; this runtime ranks "
                "with Sigmoid or Identity"
            )


class RankingJob(BatchedWork):
    """One call of ``rank`` on its way through the engine.

    ``vectors`` have one number each.

    :param most: tokens of a batch.
    :param stopped: asked at each layer; true: give up.
    :param sigmoid: the model's number goes through it.
    """

    def __init__(
        self,
        parts: Parts,
        pairs: Sequence[PairTokens],
        most: int,
        stopped: Callable[[], bool],
        *,
        sigmoid: bool,
    ) -> None:
        self._pad: int | None = getattr(parts.model.config, "pad_token_id", None)
        # Without a token to fill up with, some find the end of a text only where it stands alone.
        super().__init__([len(pair) for pair in pairs], 1 if self._pad is None else most)
        self._parts = parts
        self._pairs = pairs
        self._stopped = stopped
        self._sigmoid = sigmoid
        # Tokenizers name it that were saved without a word on what their model takes.
        self._takes_types = (
            "token_type_ids" in getattr(parts.tokenizer, "model_input_names", ())
            and "token_type_ids" in inspect.signature(parts.model.forward).parameters
        )

    def compute(self, batch: Sequence[int]) -> list[list[float]]:
        """The scores of a batch's pairs."""
        import torch

        device = self._parts.device
        pairs = [self._pairs[index] for index in batch]
        ids, mask = padded([pair.tokens for pair in pairs], device, self._pad or 0)
        more: dict[str, Any] = {}
        if self._takes_types:
            more["token_type_ids"], _ = padded([pair.types for pair in pairs], device)
        with torch.inference_mode(), stopping(self._stopped):
            model = self._parts.model
            logits = model(input_ids=ids, attention_mask=mask, **more).logits.float()
            numbers: list[list[float]] = (logits.sigmoid() if self._sigmoid else logits).tolist()
            return numbers
