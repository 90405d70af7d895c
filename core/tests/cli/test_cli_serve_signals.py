"""Signals that end a server: each request is told, however many come and whenever."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no such signals for one process"
)

ENDLESS = ("-o", "token_delay_s=0.05", "-o", "repeat=100000", "--drain-timeout", "300")
TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.fixture
def pool(serve: Any) -> Iterator[ThreadPoolExecutor]:
    """Clients, which wait no longer than their server lives."""
    with ThreadPoolExecutor() as clients:
        yield clients
        for process in serve.started:
            process.kill()


@pytest.fixture
def serve(spawn: Any) -> Any:
    """Start a server of the echo; the process and its URL."""

    def start(*options: str) -> tuple[Any, str]:
        process = spawn("serve", "--model", "echo:", "--port", "0", *options)
        line = process.stderr.readline().decode()
        url = re.search(r" on (http://\S+) \(Ctrl-C stops it\)", line)
        assert url, line
        start.started.append(process)
        return process, url[1]

    start.started = []
    return start


def ask(url: str, begun: Callable[[], object] = int, **body: Any) -> tuple[int, bytes]:
    """Status and body of a completion.

    :param begun: is called once its first byte is there.
    """
    body = {"model": "default", "prompt": "a b", "max_tokens": 10**6, **body}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            first = answer.read(1)
            begun()
            return answer.status, first + answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to be")


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"engineroom_{name}"))


def reasons(url: str) -> list[str]:
    try:
        urllib.request.urlopen(f"{url}/readyz", timeout=20).close()
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error)["reasons"]
    return []


def unfinished(url: str) -> socket.socket:
    """A request of which the body has not come."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=60)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 50\r\n\r\n{"
    )
    return connection


@pytest.mark.parametrize("signals", [(TERM, TERM), (INT, INT), (TERM, INT)], ids=str)
def test_a_second_signal_tells_everyone_at_once(site, serve, pool, signals):
    site.echo()
    process, url = serve(*ENDLESS, "--max-running", "2")
    until(lambda: reasons(url) == [])
    begun = threading.Event()
    stream = pool.submit(ask, url, begun.set, stream=True)
    assert begun.wait(60)
    whole = pool.submit(ask, url)
    until(lambda: metric(url, "num_requests_running") == 2)
    waiting = [pool.submit(ask, url, stream=flag) for flag in (True, False)]
    until(lambda: metric(url, "server_requests_queued") == 2)
    with unfinished(url) as slow:
        process.send_signal(signals[0])
        if signals[0] == signals[1]:  # two of one kind that come together are one to the system
            until(lambda: reasons(url) == ["draining"])
        process.send_signal(signals[1])
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert (answer.status, json.load(answer)["error"]["code"]) == (503, "draining")
    status, body = stream.result()
    *texts, error, done, _ = body.decode().split("\n\n")
    assert (status, done) == (200, "data: [DONE]") and texts
    assert json.loads(error[6:])["error"]["type"] == "service_unavailable_error"
    for refused in (whole, *waiting):
        status, body = refused.result()
        assert status == 503 and json.loads(body)["error"]["message"], body
    assert process.wait(60) == 130
    said = process.stderr.read().decode()
    assert "Traceback" not in said and "never" not in said, said


@pytest.mark.parametrize("signals", [(TERM,), (TERM, INT)], ids=str)
def test_a_signal_while_models_load_tells_who_waits_for_them(site, serve, pool, signals):
    site.echo()
    options = ("-o", "load_delay_s=600", "--drain-timeout", "0.3", "--max-running", "2")
    process, url = serve(*options)
    answers = [pool.submit(ask, url, stream=flag) for flag in (True, False, True)]
    until(lambda: metric(url, "server_requests_queued") == 1)
    for number in signals:
        process.send_signal(number)
    for answer in answers:
        status, body = answer.result()
        assert status == 503 and json.loads(body)["error"]["message"], body
    assert process.wait(60) == (0 if len(signals) == 1 else 130)
    assert b"preload" not in process.stderr.read()  # it was stopped, and did not fail


OF_TYPER = """
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "typer":
            print("importing", file=sys.stderr, flush=True)
            time.sleep(0.5)


sys.meta_path.insert(0, Slow())
"""


OF_SOCKETS = """
def bind(self, address, bind=socket.socket.bind):
    if isinstance(address, tuple):
        print("importing", file=sys.stderr, flush=True)
        time.sleep(0.5)
    return bind(self, address)


socket.socket.bind = bind
"""


@pytest.mark.parametrize("what", ["command", "plugin", "sockets"])
def test_sigterm_before_it_listens_ends_it_well(site, spawn, what):
    if what == "plugin":
        site.module(
            "slow_to_come",
            "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(0.5)\n"
            "from engineroom.testing import EchoHandler\n",
        )
        site.plugin("echo", "slow_to_come:EchoHandler")
    else:
        site.echo()
        slow = OF_TYPER if what == "command" else OF_SOCKETS
        site.module("sitecustomize", f"import importlib.abc, socket, sys, time\n{slow}")
    process = spawn("serve", "--model", "echo:", "--port", "0")
    assert process.stderr.readline() == b"importing\n"
    process.send_signal(TERM)
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


def test_sigterm_means_what_it_meant_where_serve_is_only_a_word(site, spawn):
    site.echo()
    process = spawn("run", "echo:", "serve", "-n", "none", "-o", "repeat=1000000",
                    "-o", "token_delay_s=0.01")  # fmt: skip
    assert process.stdout.read(5) == b"serve"
    process.send_signal(TERM)
    assert process.wait(60) == -TERM


STUCK = """
import asyncio, sys, time
from engineroom.testing import EchoHandler


class Stuck(EchoHandler):
    async def unload_model(self, loaded_model):
        print("unloading", file=sys.stderr, flush=True)
        await asyncio.to_thread(time.sleep, 600)
"""


@pytest.fixture
def stuck(site: Any) -> None:
    """The echo, whose models are never unloaded."""
    site.module("never_unloads", STUCK)
    site.plugin("echo", "never_unloads:Stuck")


def unloading(process: subprocess.Popen[bytes]) -> None:
    for line in process.stderr:
        if line == b"unloading\n":
            return


@pytest.mark.usefixtures("stuck")
def test_a_third_signal_ends_the_process_where_it_stands(serve):
    process, url = serve()
    until(lambda: reasons(url) == [])
    process.send_signal(TERM)
    unloading(process)
    while process.poll() is None:
        process.send_signal(TERM)
        time.sleep(0.05)
    assert process.returncode == 128 + TERM


@pytest.mark.usefixtures("stuck")
def test_after_a_second_signal_nothing_holds_the_process_for_long(environment):
    code = (
        "import sys, engineroom.server.runner as runner; runner.PATIENCE_S = 0.3; "
        "from engineroom.cli import main; sys.exit(main(['serve', '-m', 'echo:', '--port', '0']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=-1) as process:
        while b"is ready" not in process.stderr.readline():
            pass
        process.send_signal(TERM)
        unloading(process)
        process.send_signal(INT)
        assert process.wait(60) == 130
