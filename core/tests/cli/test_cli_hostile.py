"""Names, texts and errors from anywhere, and arguments of every kind: nothing harms a terminal."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading

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


# ── arguments and surroundings of every kind ─────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["models", "ls", "--url", "http://[::1"], 2, "is no http:// or https:// URL"),
        (["models", "ls", "--url", "http://a b/"], 2, "is no http:// or https:// URL"),
        (["models", "ls", "--url", "http://a:99999"], 2, "is no http:// or https:// URL"),
        (["models", "ls", "--url", "http://"], 2, "is no http:// or https:// URL"),
        (["models", "load", "", "--url", "http://127.0.0.1:1"], 2, "MODEL is empty"),
        (["models", "unload", "", "--url", "http://127.0.0.1:1"], 2, "MODEL is empty"),
        (["models", "load", "\udcff", "--url", "http://127.0.0.1:1"], 1, "no server answers"),
        (["models", "rm-cache", ""], 1, "'': nothing of it is in the cache"),
        (["run", "echo:", "x", "--runtime", ""], 2, "--runtime is empty"),
        (["serve", "--model", "echo:", "--drain-timeout", "nan"], 1, "must be a finite number"),
        (["serve", "--model", "echo:", "--heartbeat", "inf"], 1, "must be a finite number"),
        (["--log-level", "loud", "doctor"], 2, "'--log-level': 'loud' is not one of"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_told_on_a_line(echo, tmp_path, monkeypatch, words, status, said):
    if words[0] == "serve":
        pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
        pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
    if "rm-cache" in words:
        pytest.importorskip("huggingface_hub", reason="needs the extra engineroom[hub]")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = echo(*words)
    assert (result.status, said in result.error) == (status, True), result
    assert "defect" not in result.error


@pytest.mark.parametrize("key", ["one two", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_may_have_is_not_shown(echo, monkeypatch, key):
    monkeypatch.setenv("ENGINEROOM_ADMIN_KEY", key)
    result = echo("models", "ls", "--url", "http://127.0.0.1:1")
    assert (result.status, key in result.error) == (2, False)
    assert "ENGINEROOM_ADMIN_KEY is no key" in result.error
    pytest.importorskip("httpx", reason="needs the extra engineroom[chat]")
    result = echo("chat", "--url", "http://127.0.0.1:1", "--key", key)
    assert (result.status, key in result.error) == (2, False)


def test_what_answers_without_http_is_told(echo):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(4096)

        thread = threading.Thread(target=greet)
        thread.start()
        result = echo("models", "ls", "--url", f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert result.status == 1
    assert "does not speak HTTP; check --url" in result.error


@pytest.mark.skipif(sys.platform == "win32", reason="encodings of POSIX")
@pytest.mark.parametrize(
    "surroundings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"HOME": "/nonexistent"},
        {"HOME": ""},
    ],
    ids=str,
)
def test_any_surroundings_will_do(site, environment, surroundings):
    site.echo()
    for words in (["run", "echo:", "--json", "--file", "-"], ["doctor"], ["models", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "engineroom", *words], env={**environment, **surroundings},
            input="é 你\u202e".encode(), capture_output=True, check=False,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr and b"defect" not in done.stderr, done.stderr
        if words[0] == "run":
            assert json.loads(done.stdout)["generated_text"] == "é 你\u202e"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize(
    "words", [["plugins", "--json"], ["doctor"], ["run", "echo:", "x"], ["models", "plan"]], ids=str
)
def test_a_pipe_that_nobody_reads_ends_it_quietly(site, environment, tmp_path, words):
    site.echo()
    (tmp_path / "d.yaml").write_text("models: [{model_id: m, source: 'echo:'}]")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "engineroom", *words], stdout=writer, stderr=subprocess.PIPE,
        env={**environment, "ENGINEROOM_CONFIG": str(tmp_path / "d.yaml")}, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
