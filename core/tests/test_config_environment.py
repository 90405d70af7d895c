"""What the values of a deployment file take from the environment, and what keeps its secrets."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import example, given, strategies as st
from pydantic import BaseModel, ConfigDict

from engineroom import (
    ConfigurationError,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    parse_options,
)
from engineroom.config.deployment import DeploymentConfig, parse_deployment
from engineroom.config.interpolation import FromEnvironment, as_written
from engineroom.testing import EchoHandler

SECRET = "hunter2 is 9secret9"


def parsed(text: str, **environ: str) -> DeploymentConfig:
    return parse_deployment(dedent(text), "d.yaml", environ=environ)


def option(text: str, **environ: str) -> Any:
    """What a value of ``options:`` is read as, in a line of its own."""
    (model,) = parsed(
        f"models:\n- model_id: m\n  source: s\n  options:\n    key: {text}\n", **environ
    ).models
    return model.options["key"]


def mistakes(text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parsed(text, **environ)
    assert SECRET not in str(caught.value)
    return caught.value.message.splitlines()


# ── values ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${A}", "one"),
        ("x${A}y${A}z", "xoneyonez"),
        ("${NONE:-two}", "two"),
        ("${EMPTY:-two}", "two"),
        ("${A:-two}", "one"),
        ("x${EMPTY}y", "xy"),
        ("${NONE:-}x", "x"),
        ("$A and $$A and {A}", "$A and $$A and {A}"),
        ("$${A}", "${A}"),
        ("$${A}${A}", "${A}one"),
        ("'${A}'", "one"),
        ('"${A}\\n"', "one\n"),
        # Alone and without quotes it is what YAML reads.
        ("${N}", 8),
        ("${NONE:-8}", 8),
        ("${HEX}", 16),
        ("${F}", 0.5),
        ("${E}", 1e-3),
        ("${T}", True),
        ("${EMPTY}", None),
        ("${NULL}", None),
        ("${DATE}", "2024-01-01"),
        ("${LIST}", "[1, 2]"),
        ("${TAG}", "!!python/name:os.system"),
        ("${YES}", "yes"),
        # With quotes, or beside other characters, it is text.
        ("'${N}'", "8"),
        ('"${T}"', "true"),
        ("${N}${N}", "88"),
        ("n${N}", "n8"),
    ],
)
def test_references_are_followed(text: str, value: object) -> None:
    environ = {
        "A": "one", "EMPTY": "", "N": "8", "HEX": "0x10", "F": "0.5", "E": "1e-3", "T": "true",
        "NULL": "null", "DATE": "2024-01-01", "LIST": "[1, 2]", "YES": "yes",
        "TAG": "!!python/name:os.system",
    }  # fmt: skip
    read = option(text, **environ)
    assert read == value
    assert isinstance(read, type(value))


@given(value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example(value="} ${B}\n- {a: b}\n&x *y")
@example(value="a: [b, {c: d}]")
@example(value="1" * 5000)
def test_a_variable_changes_nothing_around_it(value: str) -> None:
    config = parsed(
        """
        models:
        - model_id: m
          source: s
          options: {quoted: "${V}", list: ["<${V}>"]}
          aliases: [a]
        """,
        V=value,
    )
    (model,) = config.models
    assert model.options == {"quoted": value, "list": [f"<{value}>"]}
    assert model.aliases == ["a"]
    assert isinstance(option("${V}", V=value), str | int | float | None)


def test_keys_are_what_they_are() -> None:
    config = parsed("models: [{model_id: m, source: s, options: {'${A}': 1}}]", A="x")
    assert config.models[0].options == {"${A}": 1}


def test_every_value_may_refer_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ID", "m")
    config = parse_deployment(
        dedent("""
        handlers: ["${H:-echo}"]
        fallback: ${NONE:-false}
        memory: {cpu: "${SIZE:-16GiB}"}
        keep_alive: ${NONE:-5m}
        models:
          - model_id: ${ID}
            source: ${NONE:-/models}/m.gguf
            priority: ${NONE:-3}
            aliases: ["${ID}-latest"]
        """)
    )
    (model,) = config.models
    assert (config.handlers, config.fallback, config.keep_alive) == (["echo"], False, 300)
    assert config.memory == {"cpu": 16 << 30}
    assert (model.model_id, model.source, model.priority) == ("m", "/models/m.gguf", 3)
    assert model.aliases == ["m-latest"]


def test_what_cannot_be_followed_is_told_with_its_line_and_key() -> None:
    assert mistakes(
        """
        handlers: ["${WHICH}"]
        models:
          - model_id: m
            source: ${HOME-DIR}/x
            pinned: ${P}
            sauce: 1
            options:
              deep: [1, {a: "${A} ${B:-${C}}"}]
        """
    ) == [
        (
            "d.yaml:2: handlers.0: the environment has no variable WHICH; set it, or give a "
            "default: ${WHICH:-default}"
        ),
        (
            "d.yaml:5: models.0.source: '${HOME-DIR}/x' is no reference to a variable; write "
            "${NAME} or ${NAME:-default}, or $${ for the characters themselves"
        ),
        (
            "d.yaml:6: models.0.pinned: the environment has no variable P; set it, or give a "
            "default: ${P:-default}"
        ),
        "d.yaml:7: models.0.sauce: unknown key; did you mean 'source'?",
        (
            "d.yaml:9: models.0.options.deep.1.a: the environment has no variable A; set it, or "
            "give a default: ${A:-default}"
        ),
    ]
    assert "'${B:-${C}}' is no reference" in mistakes('handlers: ["${B:-${C}}"]')[0]


def test_what_variables_hold_is_bounded() -> None:
    values = ", ".join(['"${V}"'] * 50)
    text = f"models: [{{model_id: m, source: s, options: {{k: [{values}]}}}}]"
    assert mistakes(text, V="x" * (1 << 17)) == [
        "d.yaml: what its variables hold has more than 4194304 characters together"
    ]


def test_a_variable_that_is_no_text_is_refused() -> None:
    assert mistakes('handlers: ["${V}"]', V="\udcff")[0].endswith("V holds is no valid text")


# ── secrets ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "line",
    [
        "keep_alive: ${S}", "load_timeout_s: ${S}", "fallback: ${S}", "on_unsupported: ${S}",
        "models: ${S}", 'memory: {cpu: "${S}"}', 'memory: {cpu: "5 ${S}"}', "handlers: ${S}",
        'models: [{model_id: "a\\n${S}", source: s}]', "models: [{model_id: m, variants: '${S}'}]",
        "${S}", "models: [{model_id: m, source: s, aliases: ['${S}', '${S}']}]",
        "models: [{model_id: m, source: s, aliases: ['${S}']}, {model_id: '${S}', source: s}]",
    ],
)  # fmt: skip
def test_a_mistake_does_not_show_what_the_environment_says(line: str) -> None:
    (mistake,) = mistakes(line, S=SECRET)
    assert not any(word in mistake for word in SECRET.split() if word != "is")
    assert mistake.startswith("d.yaml:1: ") and "FromEnvironment" not in mistake


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    token: str
    size: int = 0


def secretive(**options: str) -> Any:
    said = ", ".join(f'{key}: "{value}"' for key, value in options.items())
    text = f"models: [{{model_id: m, source: 'echo:', options: {{{said}}}}}]"
    return parsed(text, S=SECRET).models[0]


def test_options_keep_what_they_hold_to_themselves() -> None:
    model = secretive(token="Bearer ${S}", size="${S}")
    assert parse_options(Options, secretive(token="Bearer ${S}")).token == f"Bearer {SECRET}"
    with pytest.raises(ConfigurationError, match="size: Input should be a valid integer") as caught:
        parse_options(Options, model)
    shown = f"{caught.value}{caught.value.__cause__}{model!r}{as_written(model.options)}"
    assert SECRET not in shown
    assert "Bearer ${S}" in shown
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied == model
        assert isinstance(copied.options["token"], FromEnvironment)
        assert SECRET not in repr(copied)


async def test_a_runtimes_errors_do_not_show_them() -> None:
    class Talkative(EchoHandler):
        name = "echo"

        async def load_model(self, config: Any) -> Any:
            raise ConfigurationError(f"the hub refuses {str(config.options['token'])!r}")

    manager = LLMModelManager(config=[secretive(token="Bearer ${S}")])
    async with LLMInferenceService(manager, handlers=[Talkative()]) as service:
        response = await service.infer(InferenceRequest(model_id="m", prompt="x"))
        (status,) = manager.list_models()
    assert "the hub refuses 'Bearer ${S}'" in (response.error_message or "")
    assert SECRET not in f"{response!r}{status!r}"


# ── keys of the file's own ───────────────────────────────────────────────────────────────────


def test_keys_that_begin_with_x_are_the_files_own() -> None:
    config = parsed(
        """
        x-common: &common
          runtime: echo
          options: &options {n_ctx: 4096, token: "${TOKEN:-none}"}
          x-note: merged in as well
        x-unused: "${NOBODY_SETS_THIS} !"
        models:
          - <<: *common
            model_id: a
            source: s
            x-owner: ann
          - model_id: b
            variants:
              - {<<: *common, source: t, x-why: [fast]}
              - source: u
                options: {<<: *options, n_ctx: 8}
        """
    )
    a, b = config.models
    assert (a.runtime, a.options) == ("echo", {"n_ctx": 4096, "token": "none"})
    assert [v.options for v in b.variants] == [a.options, {"n_ctx": 8, "token": "none"}]


def test_elsewhere_such_keys_mean_what_they_say() -> None:
    (model,) = parsed("models: [{model_id: m, source: s, options: {x-y: 1}}]").models
    assert model.options == {"x-y": 1}
    assert mistakes("memory: {x-cpu: 1}") == [
        "d.yaml:1: memory: 'x-cpu' is no device; write cpu, or cuda:0 for the first GPU"
    ]
    assert mistakes("X-models: []")[0].startswith("d.yaml:1: X-models: unknown key")


def test_merges_and_aliases_that_multiply_are_bounded() -> None:
    lines = ["x-0: &a0 {k0: [1, 1, 1, 1]}"]
    for level in range(1, 30):
        before = f"*a{level - 1}"
        lines.append(
            f"x-{level}: &a{level} {{<<: [{before}, {before}], k{level}: [{before}, {before}]}}"
        )
    lines.append("models: [{model_id: m, source: s, options: {bomb: *a29}}]")
    assert mistakes("\n".join(lines)) == ["d.yaml: expands to more than 100000 values"]
    assert parsed("\n".join(lines[:-1])) == DeploymentConfig()  # nobody uses it


# ── the command ──────────────────────────────────────────────────────────────────────────────


def test_the_command_shows_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engineroom.cli import main

    monkeypatch.setenv("S", SECRET)
    file = tmp_path / "d.yaml"
    file.write_text(
        'models: [{model_id: m, variants: [{source: "echo:", options: {a: ["${S}"]}}]},'
        ' {model_id: n, source: "echo:", options: {a: "x ${S}"}}]'
    )
    for model, written in (("m", "${S}"), ("n", "x ${S}")):
        assert main(["models", "show", model, "--config", str(file), "--json"]) == 0
        out = capsys.readouterr().out
        assert SECRET not in out and json.dumps(written) in out
        assert main(["--debug", "models", "show", model, "--config", str(file)]) == 0
        told = capsys.readouterr()
        assert SECRET not in told.out + told.err
