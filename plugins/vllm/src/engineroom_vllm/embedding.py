"""Which models make vectors of texts, and how: what a model's folder says of it. Pure.

Those are encoders, and any model whose folder says how its outputs become a vector, as the
library sentence-transformers writes it: ``modules.json`` and a folder for each module. What vLLM
cannot do of that is refused by name. A running vLLM either generates text or makes embeddings;
the option ``runner`` decides where the folder is not to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from engineroom import ConfigurationError
from engineroom.sources import read_json
from engineroom_vllm.folder import ModelFolder, tensors_of
from engineroom_vllm.options import VLLMOptions

__all__ = ["Recipe", "recipe_of", "runner_of"]

_MODULES: Final = frozenset({"Transformer", "Pooling", "Dense", "Normalize"})
_POOLINGS: Final = {
    "mean": "MEAN",
    "cls": "CLS",
    "lasttoken": "LAST",
    "mean_tokens": "MEAN",
    "cls_token": "CLS",
}
"""The words of sentence-transformers → vLLM's."""
_DENSE: Final = frozenset(
    {"sentence_transformers.models.Dense", "sentence_transformers.base.modules.dense.Dense"}
)
_ACTIVATIONS: Final = frozenset({"identity", "tanh", "relu", "gelu", "silu", "sigmoid"})
_HEADLESS: Final = frozenset({"Gemma2Model", "LlamaModel", "MistralModel", "Qwen2Model"})
"""Decoders without their head. Left to itself, vLLM would look for the head; others it knows."""
_PREFIX: Final = "pooling_mode_"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model's outputs become a vector.

    :param pooling: over the tokens of a text, in vLLM's words: ``MEAN``, ``CLS`` or ``LAST``.
    :param normalise: to length 1.
    """

    pooling: str = "MEAN"
    normalise: bool = False


def runner_of(folder: ModelFolder, options: VLLMOptions) -> Literal["auto", "generate", "pooling"]:
    """What the model is for: as the options say, else as the folder does, else as vLLM thinks."""
    if options.runner != "auto":
        return options.runner
    made_for_it = folder.encoder or folder.architectures[0] in _HEADLESS
    return "pooling" if made_for_it or _listing(folder).is_file() else "auto"


def _listing(folder: ModelFolder) -> Path:
    return folder.path / "modules.json"


def recipe_of(folder: ModelFolder) -> Recipe:
    """What a model's folder says. Where it says nothing, the mean, as with the other runtimes.

    :raises ConfigurationError: it says something that vLLM cannot do, or is damaged.
    """
    listing = _listing(folder)
    if not listing.is_file():
        return Recipe()
    modules = read_json(listing, list)
    if not all(isinstance(module, Mapping) for module in modules):
        raise ConfigurationError(f"{str(listing)!r} is no list of modules")
    found = Recipe()
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _MODULES:
            raise ConfigurationError(
                f"{str(listing)!r} asks for a module {kind!r}; vLLM knows "
                f"{', '.join(sorted(_MODULES))}"
            )
        if kind == "Dense":
            _check_dense(folder.path, module)
        elif kind == "Pooling":
            found = replace(found, pooling=_pooling(folder.path, str(module.get("path", ""))))
        elif kind == "Normalize":
            found = replace(found, normalise=True)
    return found


def _settings(folder: Path, name: str) -> Path:
    """The file with the settings of a module."""
    place = (folder / name / "config.json").resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise ConfigurationError(
            f"{str(folder)!r} has no {name}/config.json, as its modules.json says"
        )
    return place


def _check_dense(folder: Path, module: Mapping[str, Any]) -> None:
    """Refuse a layer that vLLM would leave out in silence, because it cannot read it."""
    place = _settings(folder, str(module.get("path", "")))
    settings = read_json(place, dict)
    activation = str(settings.get("activation_function", "")).rpartition(".")[2].lower()
    sizes = [settings.get(name) for name in ("in_features", "out_features")]
    known = (
        module.get("type") in _DENSE
        and all(type(size) is int and size > 0 for size in sizes)
        and activation in _ACTIVATIONS
        and "linear.weight" in tensors_of(place.with_name("model.safetensors"))
    )
    if not known:
        raise ConfigurationError(
            f"{str(place.parent)!r} holds no dense layer that vLLM can read: in_features, "
            f"out_features, an activation_function of {', '.join(sorted(_ACTIVATIONS))}, and "
            "linear.weight in model.safetensors are needed; save the model again with "
            "sentence-transformers"
        )


def _pooling(folder: Path, name: str) -> str:
    place = _settings(folder, name)
    asked = _asked(read_json(place, dict))
    known = [_POOLINGS[mode] for mode in asked if mode in _POOLINGS]
    if len(asked) != 1 or len(known) != 1:
        raise ConfigurationError(
            f"{str(place)!r} asks for {' and '.join(asked) or 'no known'} pooling; vLLM does one "
            "of mean, cls and lasttoken; use hf_transformers"
        )
    return known[0]


def _asked(settings: Mapping[str, Any]) -> list[str]:
    """The names of the poolings that are asked for."""
    modes = [
        key.removeprefix(_PREFIX)
        for key, value in settings.items()
        if key.startswith(_PREFIX) and value is True
    ]
    said = settings.get("pooling_mode")
    return modes or ([said] if isinstance(said, str) else [])
