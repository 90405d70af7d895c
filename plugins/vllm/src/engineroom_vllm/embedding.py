"""Which models make vectors of texts, and how: what a model's folder says of it. Pure.

Those are encoders, and any model whose folder says how its outputs become a vector, as the
library sentence-transformers writes it: ``modules.json`` and a folder for each module. What vLLM
cannot do of that is refused by name. A running vLLM either generates text or makes embeddings;
the option ``runner`` decides where the folder is not to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from engineroom import ConfigurationError
from engineroom.sources import PoolingRecipe, read_json, read_pooling
from engineroom_vllm.folder import ModelFolder, tensors_of
from engineroom_vllm.options import VLLMOptions

__all__ = ["recipe_of", "runner_of"]

_POOLINGS: Final = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
"""The words of sentence-transformers → vLLM's."""
_DENSE: Final = frozenset(
    {"sentence_transformers.models.Dense", "sentence_transformers.base.modules.dense.Dense"}
)
_ACTIVATIONS: Final = frozenset({"identity", "tanh", "relu", "gelu", "silu", "sigmoid"})
_HEADLESS: Final = frozenset({"Gemma2Model", "LlamaModel", "MistralModel", "Qwen2Model"})
"""Decoders without their head. Left to itself, vLLM would look for the head; others it knows."""


def runner_of(folder: ModelFolder, options: VLLMOptions) -> Literal["auto", "generate", "pooling"]:
    """What the model is for: as the options say, else as the folder does, else as vLLM thinks."""
    if options.runner != "auto":
        return options.runner
    made_for_it = folder.encoder or folder.architectures[0] in _HEADLESS
    return "pooling" if made_for_it or (folder.path / "modules.json").is_file() else "auto"


def recipe_of(folder: ModelFolder) -> PoolingRecipe:
    """What a model's folder says. Where it says nothing, the mean, as with the other runtimes.

    :raises ConfigurationError: it says something that vLLM cannot do, or is damaged.
    """
    recipe = read_pooling(folder.path, _POOLINGS, "vLLM", check_dense=_check_dense)
    return recipe or PoolingRecipe("MEAN")


def _check_dense(kind: str, file: Path) -> None:
    """Refuse a layer that vLLM would leave out in silence, because it cannot read it."""
    settings = read_json(file, dict)
    activation = str(settings.get("activation_function", "")).rpartition(".")[2].lower()
    sizes = [settings.get(name) for name in ("in_features", "out_features")]
    readable = (
        kind in _DENSE
        and all(type(size) is int and size > 0 for size in sizes)
        and activation in _ACTIVATIONS
        and "linear.weight" in tensors_of(file.with_name("model.safetensors"))
    )
    if not readable:
        raise ConfigurationError(
            f"{str(file.parent)!r} holds no dense layer that vLLM can read: in_features, "
            f"out_features, an activation_function of {', '.join(sorted(_ACTIVATIONS))}, and "
            "linear.weight in model.safetensors are needed; save the model again with "
            "sentence-transformers"
        )
