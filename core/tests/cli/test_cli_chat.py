"""``engineroom chat``: in process, with a server, and stopped in the middle of an answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def talk(command, *lines: str, args=("echo:",)):
    return command("chat", *args, stdin="".join(f"{line}\n" for line in lines).encode())


@pytest.fixture(autouse=True)
def _echo(site, request):
    if "seen" not in request.fixturenames:  # the recorder's models would be echo's, too
        site.echo()


def test_what_is_said_is_answered(command):
    result = talk(command, "one two", "", "three")
    assert (result.status, result.out, result.err) == (0, "one two\nthree\n", "")


def test_the_conversation_is_remembered_and_saved(command, seen):
    result = talk(
        command, "one", "two", "/save talk.json", "/new", "three",
        args=("recorder:", "--system", "Be brief.", "--temperature", "0.5", "--seed", "3"),
    )  # fmt: skip
    assert result.out == "one\ntwo\nthree\n"
    saved = json.loads(Path("talk.json").read_text())
    assert [(m["role"], m["content"]) for m in saved["messages"]] == [
        ("system", "Be brief."), ("user", "one"), ("assistant", "one"), ("user", "two"),
        ("assistant", "two"),
    ]  # fmt: skip
    assert saved["params"] == {"max_new_tokens": 1024, "temperature": 0.5, "seed": 3}
    last = seen()
    assert [m.content for m in last.messages] == ["Be brief.", "three"]  # after /new
    assert (last.params.temperature, last.params.seed) == (0.5, 3)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (['"""', "a", "", "/b", '"""'], "a\n\n/b"),
        (['"""', "a"], "a"),
        (["a\\"], "a"),
    ],
)
def test_messages_of_several_lines(command, lines, said):
    assert talk(command, *lines).out.rstrip("\n") == said


def test_parameters_are_set_and_shown(command, seen):
    result = talk(
        command, "/params", "/params temperature=0.2 max_new_tokens=2", "a b c",
        "/params temperature=none max_new_tokens=none", "d", args=("recorder:",),
    )  # fmt: skip
    assert result.err.splitlines() == [
        "max_new_tokens=1024",
        "max_new_tokens=2 temperature=0.2",
        "max_new_tokens=None",
    ]
    assert result.out == "a b\nd\n"
    assert seen().params.temperature == 0.7 and seen().params.max_new_tokens is None


def test_the_system_message_and_the_model(command, seen, tmp_path):
    (tmp_path / "d.yaml").write_text(
        "models:\n  - {model_id: x, source: 'recorder:'}\n"
        "  - {model_id: y, source: 'recorder:', aliases: [why]}\n"
    )
    result = talk(
        command, "/system Be kind.", "/model", "/model why", "hello", "/system", "/model z", "bye",
        args=("x", "-c", str(tmp_path / "d.yaml")),
    )  # fmt: skip
    assert result.out == "hello\nbye\n"
    assert "* x\n  y\n  why" in result.err and "model: why" in result.err
    assert "error: there is no model 'z'" in result.err
    last = seen()
    assert last.model_id == "why"
    assert [m.role for m in last.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/quitt", "there is no /quitt"),
        ("/sav", "did you mean 'save'"),
        ("/save", "/save wants the name of a file"),
        ("/params temprature=1", "did you mean 'temperature'"),
        ("/params temperature=9", "--temperature"),
        ("/params nonsense", "KEY=VALUE"),
        ("/save no-such-folder/file", "No such file"),
    ],
)
def test_mistakes_are_told_and_the_conversation_goes_on(command, line, said):
    result = talk(command, line, "still here")
    assert said in result.err
    assert (result.status, result.out) == (0, "still here\n")


def test_a_file_that_exists_is_kept(command):
    Path("talk.json").write_text("mine")
    assert "exists" in talk(command, "a", "/save talk.json").err
    assert Path("talk.json").read_text() == "mine"


def test_an_answer_that_fails_is_told_and_forgotten(command):
    result = talk(command, "a b c", "/save talk.json", args=("echo:", "-o", "fail=during"))
    assert "error: Inference error" in result.err
    assert json.loads(Path("talk.json").read_text())["messages"] == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give a MODEL, or a server"),
        (["nonsense.gguf"], "nonsense.gguf"),
        (["--url", "ftp://x"], "is no http:// or https:// URL"),
        (["--url", "http://x", "--runtime", "echo"], "do not go with --url"),
        (["echo:", "--temperature", "9"], "--temperature"),
    ],
)
def test_what_cannot_be_is_told(command, args, said):
    if "--url" in args:
        pytest.importorskip("httpx", reason="needs the extra engineroom[chat]")
    assert said in talk(command, "a", args=args).error


def test_a_server_is_talked_to(command, start_server, monkeypatch):
    monkeypatch.setenv("ENGINEROOM_API_KEY", "ann-key-0123456789")
    url = start_server()
    result = talk(
        command, "one two", "/model", "/params max_new_tokens=1", "three four", "/model m",
        "!fail", "five", "!break a b", args=("--url", f"{url}/v1/"),
    )  # fmt: skip
    assert result.out.startswith("one two\nthree\nfive\n")
    assert "* default" in result.err
    assert "error: Inference error: the server says: the model failed" in result.err


def test_a_server_that_is_not_there_or_wants_a_key(command, start_server):
    url = start_server()
    result = talk(command, "one", args=("--url", url))
    assert "this server needs a key" in result.err
    result = talk(command, "one", args=("--url", "http://127.0.0.1:9"))
    assert "does not answer" in result.err and result.status == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_stops_the_answer_and_not_the_conversation(spawn, tmp_path):
    process = spawn(
        "chat", "echo:", "-o", "token_delay_s=0.05", "-o", "repeat=10000", "-n", "none",
        stdin=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    process.stdin.write(b"a b\n")
    process.stdin.flush()
    assert process.stdout.read(1) == b"a"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == b"(stopped)\n"
    process.stdin.write(b"/save talk-stopped.json\n")
    process.stdin.flush()
    line = process.stderr.readline()
    assert line == b"saved to talk-stopped.json\n"
    saved = json.loads((tmp_path / "talk-stopped.json").read_text())
    assert saved["messages"][1]["content"].startswith("a")
    process.communicate(timeout=20)
    assert process.returncode == 0
