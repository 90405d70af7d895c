"""How a model's outputs become a vector, by what its folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engineroom import ConfigurationError
from engineroom.sources import PoolingRecipe, read_pooling

MODES = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}


def declare(path: Path, *modules: str, pooling: dict[str, Any] | None = None) -> Path:
    """Write what sentence-transformers would."""
    listing = [{"type": f"sentence_transformers.models.{name}", "path": name} for name in modules]
    (path / "modules.json").write_text(json.dumps(listing), encoding="utf-8")
    for name in modules:
        (path / name).mkdir(exist_ok=True)
        content = json.dumps((pooling or {}) if name == "Pooling" else {})
        (path / name / "config.json").write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("modules", "pooling", "recipe"),
    [
        (["Pooling"], {"pooling_mode_mean_tokens": True}, PoolingRecipe("MEAN")),
        (
            ["Pooling", "Normalize"],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            PoolingRecipe("CLS", normalise=True),
        ),
        (["Pooling"], {"pooling_mode_lasttoken": True}, PoolingRecipe("LAST")),
        (["Pooling"], {"pooling_mode": "cls"}, PoolingRecipe("CLS")),
        (["Pooling"], {"pooling_mode": "mean_tokens"}, PoolingRecipe("MEAN")),
        (["Normalize"], None, PoolingRecipe("MEAN", normalise=True)),
        ([], None, PoolingRecipe("MEAN")),
    ],
)
def test_a_folder_says_how_to_pool(
    tmp_path: Path, modules: list[str], pooling: dict[str, Any] | None, recipe: PoolingRecipe
) -> None:
    folder = declare(tmp_path, "Transformer", *modules, pooling=pooling)
    assert read_pooling(folder, MODES, "it") == recipe


def test_a_folder_may_say_nothing(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, MODES, "it") is None


@pytest.mark.parametrize(
    ("modules", "pooling", "problem"),
    [
        (["Dense"], {}, "a module 'Dense'; it knows Normalize, Pooling, Transformer"),
        (["Pooling"], {}, "asks for no known pooling; it does one of mean, cls, lasttoken"),
        (["Pooling"], {"pooling_mode": "median"}, "asks for median pooling"),
        (["Pooling"], {"pooling_mode_max_tokens": True}, "asks for max_tokens pooling"),
        (
            ["Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "cls_token and mean_tokens pooling",
        ),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, modules: list[str], pooling: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        read_pooling(declare(tmp_path, *modules, pooling=pooling), MODES, "it")


def test_dense_layers_are_the_runtimes_to_judge(tmp_path: Path) -> None:
    seen: list[tuple[str, Path]] = []
    folder = declare(tmp_path, "Transformer", "Dense")
    read_pooling(folder, MODES, "it", check_dense=lambda kind, file: seen.append((kind, file)))
    assert seen == [("sentence_transformers.models.Dense", tmp_path / "Dense" / "config.json")]


@pytest.mark.parametrize(
    ("listing", "problem"),
    [
        ("{}", "no list of modules"),
        ("[1]", "no list of modules"),
        ("[", "damaged"),
        ('[{"type": "x.Pooling", "path": "../../etc"}]', r"no \.\./\.\./etc/config\.json"),
        ('[{"type": "x.Pooling", "path": "none"}]', r"no none/config\.json"),
        ("[{}]", "a module ''"),
    ],
)
def test_a_hostile_listing_is_refused(tmp_path: Path, listing: str, problem: str) -> None:
    (tmp_path / "modules.json").write_text(listing, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=problem):
        read_pooling(tmp_path, MODES, "it")
