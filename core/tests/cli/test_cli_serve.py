"""``engineroom serve`` and ``engineroom new-key``, as processes and inside of this one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

MODELS = """
models:
  - model_id: one
    source: "echo:"
  - model_id: two
    source: "echo:"
    aliases: [second]
"""


def needs_server() -> None:
    pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
    pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")


def url_of(process: subprocess.Popen[bytes]) -> str:
    line = process.stderr.readline().decode()
    found = re.search(r" on (http://\S+) \(Ctrl-C stops it\)", line)
    assert found, line
    return found[1]


def ask(url: str, model: str) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": "one two"}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=20) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def test_a_source_is_served_as_default_and_sigterm_ends_it_well(site, spawn):
    needs_server()
    site.echo()
    process = spawn("serve", "--model", "echo:", "--port", "0")
    url = url_of(process)
    assert url.startswith("http://127.0.0.1:")
    assert models(url) == ["echo:", "default"]
    assert ask(url, "default")["choices"][0]["message"]["content"] == "one two"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stderr.read() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_it_well_and_streams_properly(site, spawn):
    needs_server()
    site.echo()
    process = spawn(
        "serve", "--model", "echo:", "--port", "0", "-o", "token_delay_s=0.05", "-o",
        "repeat=10000", "--drain-timeout", "0.3",
    )  # fmt: skip
    url = url_of(process)
    body = {"model": "default", "prompt": "a b", "stream": True, "max_tokens": 100_000}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.readline().startswith(b"data: {")
        process.send_signal(signal.SIGINT)
        rest = answer.read()
    assert b'"service_unavailable_error"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")
    assert process.wait(20) == 0


def test_a_deployment_is_served_whole_or_one_of_it(site, spawn, tmp_path):
    needs_server()
    site.echo()
    (tmp_path / "d.yaml").write_text(MODELS)
    process = spawn("serve", "-c", str(tmp_path / "d.yaml"), "--port", "0")
    assert models(url_of(process)) == ["one", "two", "second"]
    process = spawn("serve", "-c", str(tmp_path / "d.yaml"), "--port", "0", "-m", "second")
    assert models(url_of(process)) == ["two", "second", "default"]


def test_a_model_that_does_not_load_ends_it_with_a_message(site, spawn):
    needs_server()
    site.echo()
    process = spawn("serve", "--model", "echo:", "--port", "0", "-o", "fail=load")
    assert process.wait(20) == 1
    assert b"error: " in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0", "--model", "echo:"], "without keys"),
        (["--port", "70000", "--model", "echo:"], "port must be 0 to 65535"),
        (["--max-running", "0", "--model", "echo:"], "max_running must be more than 0"),
        (["--keys", "nowhere.txt", "--model", "echo:"], "nowhere.txt' cannot be read"),
        (["--host", "no such host", "--insecure", "--model", "echo:"], "cannot listen on"),
        (["--model", "nonsense.gguf"], "nonsense.gguf"),
        ([], "--model was not given, and no deployment file"),
        (["--runtime", "echo"], "give that, too"),
        (["--unknown-fields", "maybe", "--model", "echo:"], "--unknown-fields"),
    ],
)
def test_what_cannot_be_is_told(command, site, arguments, said):
    needs_server()
    site.echo()
    result = command("serve", *arguments)
    assert result.status in (1, 2)
    assert said in result.error


def test_a_port_in_use_is_told(command, site):
    needs_server()
    import socket

    site.echo()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = command("serve", "--model", "echo:", "--port", str(port))
    assert result.status == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.error and "--port" in result.error


def test_a_new_key_opens_what_its_line_locks(command, tmp_path):
    needs_server()
    from engineroom.server.keys import KeyRing

    result = command("new-key", "ann")
    assert result.status == 0
    key = re.fullmatch(r"key of ann: (\S+)\n", result.err)[1]
    assert key not in result.out
    (tmp_path / "keys").write_text(result.out)
    ring = KeyRing.read(tmp_path / "keys", None, {})
    assert ring.find(key).name == "ann"
    assert command("new-key", "a b").status == 1


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "msgspec", "prometheus_client"])
def test_without_the_extra_the_command_says_what_to_install(missing, environment):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from engineroom.cli import main; "
        "sys.exit(main(['serve', '--model', 'echo:']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'engineroom[server]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_extra_the_package_is_importable(environment):
    code = (
        "import sys; sys.modules['uvicorn'] = sys.modules['msgspec'] = None; "
        "import engineroom.server, engineroom.cli.serve; "
        "loaded = {m.partition('.')[0] for m in sys.modules}; "
        "assert not loaded & {'starlette', 'prometheus_client', 'opentelemetry'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
