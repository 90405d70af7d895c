"""What a model's folder says of the vectors that it makes; no engine is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engineroom import ConfigurationError
from engineroom.sources import PoolingRecipe as Recipe
from engineroom_vllm.embedding import recipe_of, runner_of
from engineroom_vllm.folder import ModelFolder
from engineroom_vllm.options import VLLMOptions


def folder(path: Path, *, encoder: bool = True, kind: str = "XModel") -> ModelFolder:
    return ModelFolder(
        path=path,
        architectures=(kind,),
        weight_bytes=1,
        trained=512,
        token_values=1,
        dtype="float32",
        end_tokens=frozenset(),
        encoder=encoder,
    )


def declare(path: Path, *modules: str, pooling: dict[str, Any] | None = None) -> ModelFolder:
    """Write what sentence-transformers would."""
    listing = [{"type": f"sentence_transformers.models.{name}", "path": name} for name in modules]
    (path / "modules.json").write_text(json.dumps(listing), encoding="utf-8")
    for name in modules:
        (path / name).mkdir(exist_ok=True)
        if name == "Pooling":
            content = json.dumps(pooling or {})
            (path / name / "config.json").write_text(content, encoding="utf-8")
    return folder(path)


@pytest.mark.parametrize(
    ("modules", "pooling", "recipe"),
    [
        (["Pooling"], {"pooling_mode_mean_tokens": True}, Recipe("MEAN", normalise=False)),
        (
            ["Pooling", "Normalize"],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            Recipe("CLS", normalise=True),
        ),
        (["Pooling"], {"pooling_mode_lasttoken": True, "include_prompt": True}, Recipe("LAST")),
        (["Pooling"], {"pooling_mode": "cls"}, Recipe("CLS")),
        (["Normalize"], None, Recipe("MEAN", normalise=True)),
        ([], None, Recipe("MEAN")),
    ],
)
def test_a_folder_says_how_to_pool(
    tmp_path: Path, modules: list[str], pooling: dict[str, Any] | None, recipe: Recipe
) -> None:
    assert recipe_of(declare(tmp_path, "Transformer", *modules, pooling=pooling)) == recipe


def test_without_a_word_it_is_the_mean_as_with_the_other_runtimes(tmp_path: Path) -> None:
    assert recipe_of(folder(tmp_path)) == Recipe("MEAN", normalise=False)


@pytest.mark.parametrize(
    ("modules", "pooling", "problem"),
    [
        (["WordEmbeddings"], {}, "a module 'WordEmbeddings'; vLLM knows Dense"),
        (["Pooling"], {}, "no known pooling"),
        (["Pooling"], {"pooling_mode_max_tokens": True}, "asks for max_tokens pooling; vLLM does"),
        (["Pooling"], {"pooling_mode": "weightedmean"}, "asks for weightedmean pooling"),
        (
            ["Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "cls_token and mean_tokens pooling",
        ),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(
    tmp_path: Path, modules: list[str], pooling: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        recipe_of(declare(tmp_path, *modules, pooling=pooling))


DENSE = {
    "in_features": 4,
    "out_features": 2,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
WEIGHTS = json.dumps({"linear.weight": EMPTY, "linear.bias": EMPTY})


@pytest.mark.parametrize(
    ("settings", "weights", "fine"),
    [
        (DENSE, WEIGHTS, True),
        ({**DENSE, "activation_function": "torch.nn.modules.linear.Identity"}, WEIGHTS, True),
        ({**DENSE, "activation_function": "torch.nn.modules.activation.Mish"}, WEIGHTS, False),
        ({**DENSE, "in_features": "4"}, WEIGHTS, False),
        (DENSE, json.dumps({"w": EMPTY}), False),
        (DENSE, "", False),
        ({}, WEIGHTS, False),
    ],
)
def test_a_dense_layer_that_would_be_left_out_in_silence_is_refused(
    tmp_path: Path, settings: dict[str, Any], weights: str, fine: bool
) -> None:
    found = declare(tmp_path, "Transformer", "Pooling", "Dense", pooling={"pooling_mode": "cls"})
    (tmp_path / "Dense" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    header = len(weights).to_bytes(8, "little") + weights.encode()
    (tmp_path / "Dense" / "model.safetensors").write_bytes(header)
    if fine:
        assert recipe_of(found) == Recipe("CLS")
    else:
        with pytest.raises(ConfigurationError, match="no dense layer that vLLM can read"):
            recipe_of(found)


@pytest.mark.parametrize(
    ("listing", "problem"),
    [
        ("{}", "holds no list"),
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
        recipe_of(folder(tmp_path))


def test_the_option_decides_before_the_folder_and_the_folder_before_vllm(tmp_path: Path) -> None:
    auto, generate, pooling = (
        VLLMOptions.model_validate({"runner": name}) for name in ("auto", "generate", "pooling")
    )
    for encoder in (True, False):
        assert runner_of(folder(tmp_path, encoder=encoder), generate) == "generate"
        assert runner_of(folder(tmp_path, encoder=encoder), pooling) == "pooling"
    assert runner_of(folder(tmp_path), auto) == "pooling"
    assert runner_of(folder(tmp_path, encoder=False), auto) == "auto"
    assert runner_of(folder(tmp_path, encoder=False, kind="LlamaModel"), auto) == "pooling"
    (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    assert runner_of(folder(tmp_path, encoder=False), auto) == "pooling"
