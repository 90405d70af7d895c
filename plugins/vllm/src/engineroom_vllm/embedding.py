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
from engineroom_vllm.folder import ModelFolder, read_json
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
    return "pooling" if folder.encoder or _listing(folder).is_file() else "auto"


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
        if kind == "Pooling":
            found = replace(found, pooling=_pooling(folder.path, str(module.get("path", ""))))
        elif kind == "Normalize":
            found = replace(found, normalise=True)
    return found


def _pooling(folder: Path, name: str) -> str:
    place = (folder / name / "config.json").resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise ConfigurationError(f"{str(folder)!r} has no {name}/config.json for its pooling")
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
