"""Names, texts and errors from anywhere, and arguments of every kind: nothing harms a terminal."""

from __future__ import annotations

import json
import sys

import pytest

EVIL = "a\x1b[2J\x9b31m\u202egpj.exe\u2066\u200b\u2028\x85\x07\ufeff"


@pytest.fixture
def echo(command, site):
    site.echo()
    return command


def harm(text: str) -> set[str]:
    return {character for character in text if not character.isprintable()} - {"\n", "\t"}


@pytest.fixture
def evil(echo, site, tmp_path, monkeypatch):
    """The command, where a plugin, a deployment and a model's file are as hostile as can be."""
    site.module("evil_plugin", f"raise RuntimeError({EVIL!r})")
    site.plugin("evil", "evil_plugin:Handler")
    folder = tmp_path / EVIL
    folder.mkdir()
    (folder / "d.yaml").write_text(
        json.dumps({"models": [{"model_id": "m\u200b", "source": f"echo:{EVIL}", EVIL: 1}]})
    )
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 99)
    return echo, folder


@pytest.mark.parametrize(
    "words",
    [
        ["plugins"],
        ["plugins", "--why", EVIL],
        ["doctor"],
        ["--log-level", "debug", "doctor"],
        ["doctor", "--config", "{folder}/d.yaml"],
        ["run", EVIL, "x"],
        ["--debug", "run", EVIL, "x"],
        ["--debug", "run", "{folder}/model.gguf", "x"],
        ["run", "echo:", "x", "-o", f"{EVIL}=1"],
        ["run", "echo:", "x", "--stop", EVIL, f"--{EVIL}"],
        ["run", "echo:", "x", "--file", "{folder}/none"],
        ["models", "--config", "{folder}/d.yaml"],
        ["models", "show", "{folder}/model.gguf"],
        ["models", "plan", "--config", "{folder}"],
        ["models", "load", EVIL, "--url", "http://127.0.0.1:1"],
        ["models", "rm-cache", EVIL],
        ["new-key", EVIL],
        ["new-plugin", EVIL],
        ["conformance", EVIL],
        ["serve", "--model", EVIL, "--port", "0"],
        ["serve", "--host", EVIL, "--model", "echo:"],
        ["chat", EVIL],
        [EVIL],
    ],
    ids=lambda words: " ".join(words[:2]).replace(EVIL, "EVIL").replace("{folder}", "F"),
)
def test_no_name_and_no_error_reaches_the_terminal_raw(evil, words):
    command, folder = evil
    result = command(*(word.replace("{folder}", str(folder)) for word in words))
    assert harm(result.out + result.err) == set()
    assert result.status in (0, 1, 2)


def test_json_says_the_same_without_them(echo):
    result = echo("run", "echo:", EVIL, "--json")
    assert harm(result.out) == set()
    assert json.loads(result.out)["generated_text"] == EVIL


@pytest.mark.parametrize("words", [["run", "echo:", f"one {EVIL}\r\ntwo\rthree"]])
def test_a_models_text_rewrites_no_terminal(echo, monkeypatch, capsys, words):
    raw = echo(*words).out
    assert raw == f"one {EVIL}\r\ntwo\rthree\n"  # not a terminal: as it is
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    shown = echo(*words).out
    assert harm(shown) == {"\u200b", "\u2028", "\ufeff"}  # a part of the text, which is not obeyed
    assert shown.endswith("\ntwothree\n")
