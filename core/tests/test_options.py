"""What a runtime's options and a deployment may say: every unknown key is told with its remedy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from engineroom import ConfigurationError, LLMModelManager, ModelConfig, parse_options
from engineroom.config.suggestions import known_keys


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Adapter(Strict):
    path: str = ""
    scale: float = 1.0


class Local(Strict):
    kind: Literal["local"] = "local"
    threads: int = 1


class Remote(Strict):
    kind: Literal["remote"] = "remote"
    address: str = ""


class Options(Strict):
    n_ctx: int = 16
    adapter: Adapter | None = None
    adapters: list[Adapter] = []
    by_name: dict[str, Adapter] = {}
    pairs: tuple[tuple[Adapter, int], ...] = ()
    where: Annotated[Local | Remote, Field(discriminator="kind")] = Local()
    either: Adapter | Local | None = None
    free: dict[str, int] = {}


def refusal(options: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse_options(Options, ModelConfig(model_id="m", source="s", options=options))
    return caught.value.message.removeprefix("options of model 'm': ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nctx": 1}, "nctx: there is no such key; did you mean 'n_ctx'?"),
        (
            {"adapter": {"pth": "x"}},
            "adapter.pth: there is no such key; did you mean 'path'?",
        ),
        (
            {"adapters": [{}, {"scales": 2.0}]},
            "adapters.1.scales: there is no such key; did you mean 'scale'?",
        ),
        (
            {"by_name": {"path": {"scal": 2.0}}},
            "by_name.path.scal: there is no such key; did you mean 'scale'?",
        ),
        (
            {"pairs": [[{"pathh": "x"}, 1]]},
            "pairs.0.0.pathh: there is no such key; did you mean 'path'?",
        ),
        (
            {"where": {"kind": "local", "thread": 2}},
            "where.local.thread: there is no such key; did you mean 'threads'?",
        ),
        (
            {"adapter": {"zzz": 1}},
            "adapter.zzz: there is no such key; there are path, scale",
        ),
    ],
)
def test_the_nearest_key_is_that_of_the_same_place(options, said):
    assert refusal(options) == said


def test_a_union_tells_of_each_model_its_own_keys():
    said = refusal({"either": {"thread": 1}})
    assert "either.Adapter.thread: there is no such key; there are path, scale" in said
    assert "either.Local.thread: there is no such key; did you mean 'threads'?" in said


def test_where_no_model_stands_there_are_no_keys():
    assert known_keys(Options, ("free", "x", "y")) == []
    assert known_keys(Options, ("n_ctx", "y")) == []


def test_a_deployment_given_as_a_mapping_says_it_too():
    model = {"model_id": "m", "variants": [{"source": "s", "runtme": "x"}]}
    with pytest.raises(
        ConfigurationError, match=r"models\.0\.variants\.0\.runtme: .*did you mean 'runtime'"
    ):
        LLMModelManager(config={"models": [model]})
