"""``engineroom serve`` and ``engineroom new-key``, as processes and inside of this one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
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
    said = process.stderr.read().decode()
    assert re.fullmatch(r"loading echo:\necho: is ready after \d+\.\d s\n", said), said


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
    (tmp_path / "keys").write_text(command("new-key", "bob", "--priority", "-5", "--metrics").out)
    bob = KeyRing.read(tmp_path / "keys", None, {}).owners["bob"]
    assert (bob.max_priority, bob.all_metrics) == (-5, True)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
def test_sighup_has_the_keys_read_anew(site, spawn, tmp_path, environment):
    needs_server()
    site.echo()
    ann, bob, extra = (f"{name}-key-0123456789" for name in ("ann", "bob", "extra"))
    (tmp_path / "keys").write_text(f"ann {ann}\n")
    environment["ENGINEROOM_API_KEYS"] = extra
    keys = str(tmp_path / "keys")
    process = spawn(
        "--log-level", "info", "serve", "-m", "echo:", "--port", "0", "--keys", keys
    )  # fmt: skip
    url = re.search(r" on (http://\S+) \(", read_until(process, "(Ctrl-C stops it)")[-1])[1]

    def opens(key: str) -> bool:
        header = {"authorization": f"Bearer {key}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=header)):
                return True
        except urllib.error.HTTPError as error:
            return error.code != 401

    assert [opens(key) for key in (ann, bob, extra)] == [True, False, True]
    (tmp_path / "keys").write_text(f"bob {bob}\n")
    process.send_signal(signal.SIGHUP)
    assert "added: bob; removed: ann" in read_until(process, "the keys were read anew")[-1]
    assert [opens(key) for key in (ann, bob, extra)] == [False, True, True]
    (tmp_path / "keys").write_text("bob short\n")
    process.send_signal(signal.SIGHUP)
    read_until(process, "the old ones go on")
    assert [opens(key) for key in (ann, bob, extra)] == [False, True, True]


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


# ── a deployment that changes, and the command that asks for it ──────────────────────────────


@pytest.fixture
def deployed(site, spawn, tmp_path, command):
    """A server of a deployment file, and ``engineroom models`` to ask it with."""
    needs_server()
    site.echo()
    file = tmp_path / "d.yaml"
    file.write_text(MODELS)
    made = {}

    def serve(*args: str, log: tuple[str, ...] = ()):
        process = made["process"] = spawn(*log, "serve", "-c", str(file), "--port", "0", *args)
        url = url_of(process)
        read_until(process, "two is ready")
        return process, file, lambda *words: command("models", *words, "--url", url)

    yield serve
    made["process"].terminate()
    assert made["process"].wait(20) == 0 or sys.platform == "win32"


def read_until(process, wanted: str) -> list[str]:
    lines = []
    while not lines or wanted not in lines[-1]:
        line = process.stderr.readline().decode()
        assert line, lines
        lines.append(line)
    return lines


def test_models_of_a_server_are_listed_planned_loaded_and_unloaded(deployed):
    _, _, models_of = deployed()
    assert "two" in models_of("ls").out and "ready" in models_of("ls").out
    assert models_of("unload", "second").out == "two: unloaded\n"
    states = {m["id"]: m["state"] for m in json.loads(models_of("ls", "--json").out)}
    assert states == {"one": "ready", "two": "unloaded"}
    planned = {
        m["model_id"]: m["action"] for m in json.loads(models_of("plan", "--json").out)["models"]
    }
    assert planned["two"] == "preload" != planned["one"]
    assert "UNLOADS FIRST" in models_of("plan").out
    assert models_of("load", "two").out == "two: ready\n"
    missing = models_of("load", "three")
    assert missing.status == 1 and "'three' is not a model of this deployment" in missing.error


def test_a_deployment_is_reloaded_on_demand(deployed):
    process, file, models_of = deployed()
    assert models_of("reload").out == "nothing changed\n"
    file.write_text(MODELS + "  - {model_id: three, source: 'echo:'}\n")
    assert models_of("reload").out == "added: three\n"
    read_until(process, "the deployment was reloaded: added: three")
    assert "three" in models_of("ls").out
    file.write_text("models: 3\n")
    wrong = models_of("reload")
    assert wrong.status == 1 and "models" in wrong.error
    assert "three" in models_of("ls").out


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
@pytest.mark.parametrize("log", [(), ("--log-level", "info")])
def test_sighup_reloads_the_deployment(deployed, log):
    process, file, models_of = deployed(log=log)
    file.write_text(MODELS + "  - {model_id: three, source: 'echo:'}\n")
    process.send_signal(signal.SIGHUP)
    read_until(process, "the deployment was reloaded: added: three")
    file.write_text("models: 3\n")
    process.send_signal(signal.SIGHUP)
    lines = read_until(process, "was not reloaded")
    assert "the old one goes on" in lines[-1]
    assert not any("was reloaded" in line for line in lines), "it is told once"
    assert "three" in models_of("ls").out


def test_a_deployment_is_watched(deployed):
    pytest.importorskip("watchfiles", reason="watching needs engineroom[watch]")
    process, file, _ = deployed("--watch")
    file.write_text(MODELS + "  - {model_id: three, source: 'echo:'}\n")
    read_until(process, "the deployment was reloaded: added: three")


def test_a_certificate_that_is_not_there_is_told(command, site):
    needs_server()
    site.echo()
    said = command("serve", "-m", "echo:", "--tls-cert", "none.pem", "--port", "0").error
    assert "--tls-cert: cannot read 'none.pem'" in said


def test_to_watch_takes_a_deployment(command):
    needs_server()
    assert "--watch is for a whole deployment" in command("serve", "-m", "echo:", "--watch").error


# ── flags are made of the server's settings ──────────────────────────────────────────────────


def serve_command():
    import typer.main

    from engineroom.cli.app import app

    return typer.main.get_command(app).commands["serve"]


def test_each_setting_is_a_flag_that_says_its_text_and_default(command, site):
    import dataclasses

    from engineroom.server.settings import ServerSettings

    shown = " ".join(command("serve", "--help").out.split())
    parameters = {parameter.name: parameter for parameter in serve_command().params}
    settings = [f for f in dataclasses.fields(ServerSettings) if f.metadata.get("flag")]
    assert len(settings) == 25
    for setting in settings:
        parameter = parameters[setting.name]
        name = parameter.opts[0].removeprefix("--").replace("-", "_")
        assert setting.name.startswith(name)
        assert setting.metadata["text"] in shown
        if isinstance(setting.default, str | float | int) and setting.default not in (True, False):
            number = setting.default
            said = f"{number:g}" if isinstance(number, float) else str(number)
            assert f"{setting.metadata['text']} [default: {said}]" in shown
    left = {f.name for f in dataclasses.fields(ServerSettings)} - {f.name for f in settings}
    assert left.intersection(parameters) == {"keys"}  # a file, there


def test_flags_become_settings_and_absent_ones_leave_the_default():
    from engineroom.cli.server_flags import settings_of
    from engineroom.server.settings import ServerSettings

    context = serve_command().make_context(
        "serve",
        [
            "--port", "0", "--max-body", "9", "--request-timeout", "2.5", "--insecure",
            "--unknown-fields", "refuse", "--cors-origin", "http://a", "--cors-origin", "http://b",
        ],
    )  # fmt: skip
    names = ServerSettings.__dataclass_fields__.keys() - {"keys"}
    flags = {name: value for name, value in context.params.items() if name in names}
    settings = ServerSettings(**settings_of(flags))
    assert (settings.port, settings.max_body_bytes, settings.request_timeout_s) == (0, 9, 2.5)
    assert settings.insecure and settings.unknown_fields == "refuse"
    assert settings.cors_origins == ("http://a", "http://b")
    untouched = ServerSettings()
    assert (settings.host, settings.max_queued, settings.allowed_hosts, settings.log_prompts) == (
        untouched.host, untouched.max_queued, (), False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("port", 65536, "port must be 0 to 65535, not 65536"),
        ("port", -1, "port must be at least 0, not -1"),
        ("heartbeat_s", -0.5, "heartbeat_s must be at least 0, not -0.5"),
        ("key_max_queued", -1, "key_max_queued must be at least 0, not -1"),
        ("max_messages", 0, "max_messages must be more than 0, not 0"),
    ],
)
def test_ranges_are_those_of_the_fields(field, value, said):
    from engineroom.errors import ConfigurationError
    from engineroom.server.settings import ServerSettings

    with pytest.raises(ConfigurationError, match=re.escape(said)):
        ServerSettings(**{field: value})


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_crash_of_native_code_says_where_it_was(site, spawn):
    site.module(
        "command_test_crash",
        "import os, signal\n"
        "from engineroom.testing import EchoHandler\n"
        "class Crash(EchoHandler):\n"
        "    name = 'echo'\n"
        "    async def load_model(self, config):\n"
        "        os.kill(os.getpid(), signal.SIGBUS)\n",
    )
    site.plugin("echo", "command_test_crash:Crash")
    process = spawn("serve", "--model", "echo:", "--port", "0")
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGBUS
    assert b"Fatal Python error: Bus error" in err
    assert b"in load_model" in err
