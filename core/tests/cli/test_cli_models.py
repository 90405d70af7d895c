"""`engineroom models plan`, `show`, and the commands that ask a running server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

DEPLOYMENT = """\
memory: {cpu: 10GiB}
models:
  - {model_id: chat, source: "echo:", memory: {cpu: 6GiB}, aliases: [default]}
  - model_id: code
    variants:
      - {source: "echo:", runtime: absent}
      - {source: "echo:", memory: {cpu: 5GiB}}
  - {model_id: huge, source: "echo:", memory: {cpu: 12GiB}, preload: false}
"""


@pytest.fixture
def deployment(tmp_path):
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT, encoding="utf-8")
    return str(path)


@pytest.fixture
def echo(site, command):
    site.echo()
    return command


# ── plan and show ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", [("plan", "--config", "FILE"), ("--config", "FILE", "plan")])
def test_the_plan_as_tables(echo, deployment, order):
    result = echo("models", *(deployment if a == "FILE" else a for a in order))
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].split() == ["MODEL", "ACTION", "RUNTIME", "MEMORY", "UNLOADS", "FIRST"]
    assert lines[1].split() == ["chat", "preload", "echo", "6.0", "GiB", "on", "cpu", "-"]
    assert "on demand" in lines[2] and lines[2].endswith("chat")
    assert "impossible" in lines[3]
    assert "code: it does not fit beside the others" in result.out
    assert "code, variant 1 (absent, echo:): refused: model 'code': handler 'absent'" in result.out
    assert "huge: there is no room for model 'huge': it needs 12.0 GiB on cpu" in result.out
    assert lines[-1].split() == ["cpu", "10.0", "GiB", "6.0", "GiB", "-", "4.0", "GiB"]


def test_the_plan_as_json(echo, deployment, monkeypatch):
    monkeypatch.setenv("ENGINEROOM_CONFIG", deployment)
    found = json.loads(echo("models", "plan", "--json").out)
    assert [m["action"] for m in found["models"]] == ["preload", "on demand", "impossible"]
    assert found["models"][1]["evicts"] == ["chat"]
    assert found["devices"][0]["free"] == 4 << 30


def test_a_plan_needs_a_deployment(echo):
    result = echo("models", "plan")
    assert result.status == 1 and "ENGINEROOM_CONFIG" in result.error


def test_a_model_is_shown(echo, deployment):
    result = echo("models", "show", "default", "--config", deployment)
    assert result.status == 0 and ["model_id", "chat"] in map(str.split, result.out.splitlines())
    assert "6.0 GiB on cpu" in result.out and "deployment" in result.out
    found = json.loads(echo("models", "show", "code", "--config", deployment, "--json").out)
    assert [v["verdict"] for v in found["plan"]["variants"]] == ["refused", "chosen"]
    assert found["config"]["prefix_cache_scope"] == "key"
    assert "prefix_cache_scope" in result.out
    source = echo("models", "show", "echo:")
    assert source.status == 0 and "unknown memory" in source.out
    wrong = echo("models", "show", "cat", "--config", deployment)
    assert wrong.status == 1 and "did you mean 'chat'" in wrong.error


# ── a running server ─────────────────────────────────────────────────────────────────────────────


class FakeServer:
    """Stands for the server's admin routes, over real HTTP."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str | None]] = []
        self.answer: tuple[int, object] | None = None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.reply()

            do_POST = do_GET

            def reply(self):
                path = unquote(self.path)
                fake.seen.append((self.command, path, self.headers.get("Authorization")))
                status, body = fake.answer or (200, fake.known(path))
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def known(self, path: str) -> object:
        chat = {"id": "a/chat", "state": "ready", "aliases": ["default"], "runtime": "echo",
                "leases": 2, "memory_bytes": 3 << 30}  # fmt: skip
        if path.endswith("/reload"):
            return {"reload": {"added": ["new"], "removed": [], "changed": ["a/chat"]}}
        if path.endswith("/plan"):
            model = {"model_id": "a/chat", "action": "loaded", "runtime": "echo", "source": "echo:",
                     "memory": {"cpu": 3 << 30}, "evicts": [], "reason": "",
                     "variants": []}  # fmt: skip
            device = {"device": "cpu", "budget": None, "detected": False, "held": 3 << 30,
                      "reserved": 0, "not_returned": 1 << 30, "free": None}  # fmt: skip
            return {"plan": {"models": [model], "devices": [device]}}
        return {"models": [chat]} if path.endswith("/models") else chat

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.close()


def test_a_servers_models_are_listed(command, server, monkeypatch):
    monkeypatch.setenv("ENGINEROOM_ADMIN_KEY", "secret")
    result = command("models", "ls", "--url", server.url)
    assert result.out.splitlines()[1].split() == [
        "a/chat", "default", "echo", "ready", "2", "3.0", "GiB",
    ]  # fmt: skip
    assert server.seen == [("GET", "/v1/admin/models", "Bearer secret")]
    assert json.loads(command("models", "ls", "--url", f"{server.url}/v1/", "--json").out)


@pytest.mark.parametrize("what", ["load", "unload"])
def test_a_servers_model_is_loaded_and_unloaded(command, server, monkeypatch, what):
    monkeypatch.setenv("ENGINEROOM_URL", server.url)
    result = command("models", what, "a/chat")
    assert (result.status, result.out) == (0, "a/chat: ready\n")
    assert server.seen == [("POST", f"/v1/admin/models/a/chat/{what}", None)]
    assert json.loads(command("models", what, "a/chat", "--json").out)["leases"] == 2


def test_a_servers_plan_and_reload(command, server):
    result = command("models", "plan", "--url", server.url)
    assert "a/chat" in result.out and "unlimited" in result.out
    assert "1.0 GiB" in result.out  # what unloads did not give back
    result = command("models", "reload", "--url", server.url)
    assert result.out == "added: new\nchanged: a/chat\n"


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, {"error": {"message": "no such model"}}, "answers 404: no such model"),
        (503, {"error": {"message": "no room"}}, "answers 503: no room"),
        (401, {"error": {"message": "no key"}}, "set ENGINEROOM_ADMIN_KEY to an admin key"),
        (500, b"<html>", "answers 500: it does not say why"),
        (200, b"hello", "is no server of engineroom"),
    ],
)
def test_what_a_server_refuses_is_told(command, server, status, body, said):
    server.answer = (status, body)
    result = command("models", "load", "chat", "--url", server.url)
    assert result.status == 1 and said in result.error


def test_no_server_and_no_address(command):
    result = command("models", "load", "chat", "--url", "http://127.0.0.1:9")
    assert result.status == 1 and "engineroom serve" in result.error
    result = command("models", "load", "chat", "--url", "localhost:8000")
    assert result.status == 2 and "write http://host:port" in result.error
