"""How a model's outputs become a vector, as its folder says it.

The library sentence-transformers writes ``modules.json`` and a folder for each module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engineroom.errors import ConfigurationError
from engineroom.sources.json_file import read_json

__all__ = ["PoolingRecipe", "read_pooling"]

_PREFIX: Final = "pooling_mode_"
_TOKENS: Final = re.compile(r"_tokens?$")


@dataclass(frozen=True, slots=True)
class PoolingRecipe:
    """How a model's outputs become a vector.

    :param pooling: over the tokens of a text, in the runtime's word.
    :param normalise: to length 1.
    """

    pooling: str
    normalise: bool = False


def read_pooling(
    folder: Path,
    modes: Mapping[str, str],
    runtime: str,
    *,
    check_dense: Callable[[str, Path], object] | None = None,
) -> PoolingRecipe | None:
    """What a model's folder says; where it names no pooling, the mean. Blocks.

    :param modes: poolings that the runtime does: sentence-transformers' word without ``_token`` or
        ``_tokens`` (``mean``, ``cls``, ``lasttoken``) → its own.
    :param runtime: what to call it in messages.
    :param check_dense: refuses a dense layer that the runtime cannot read: its type, and the
        file with its settings. ``None``: it can read none.
    :returns: ``None``: it says nothing.
    :raises ConfigurationError: it says something that the runtime cannot do, or is damaged.
    """
    listing = folder / "modules.json"
    if not listing.is_file():
        return None
    known = {"Transformer", "Pooling", "Normalize"} | ({"Dense"} if check_dense else set())
    pooling, normalise = modes["mean"], False
    for module in read_json(listing, list, what="list of modules"):
        if not isinstance(module, dict):
            raise ConfigurationError(f"{str(listing)!r} is no list of modules")
        kind, name = str(module.get("type", "")), str(module.get("path", ""))
        match kind.rpartition(".")[2]:
            case "Pooling":
                pooling = _mode(_settings(folder, name), modes, runtime)
            case "Normalize":
                normalise = True
            case "Dense" if check_dense is not None:
                check_dense(kind, _settings(folder, name))
            case "Transformer":
                pass
            case other:
                raise ConfigurationError(
                    f"{str(listing)!r} asks for a module {other!r}; {runtime} knows "
                    f"{', '.join(sorted(known))}"
                )
    return PoolingRecipe(pooling, normalise)


def _settings(folder: Path, name: str) -> Path:
    """The file with the settings of a module."""
    place = (folder / name / "config.json").resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise ConfigurationError(
            f"{str(folder)!r} has no {name}/config.json, as its modules.json says"
        )
    return place


def _mode(file: Path, modes: Mapping[str, str], runtime: str) -> str:
    settings = read_json(file, dict)
    asked = [
        key.removeprefix(_PREFIX)
        for key, value in settings.items()
        if key.startswith(_PREFIX) and value is True
    ]
    if not asked and isinstance(mode := settings.get("pooling_mode"), str):
        asked = [mode]
    mode = _TOKENS.sub("", asked[0]) if len(asked) == 1 else ""
    if mode not in modes:
        raise ConfigurationError(
            f"{str(file)!r} asks for {' and '.join(asked) or 'no known'} pooling; {runtime} does "
            f"one of {', '.join(modes)}"
        )
    return modes[mode]
