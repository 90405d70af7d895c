"""Whatever third parties raise, over HTTP with real sockets: it is the failure of one request.

Beside each of them a neighbour streams, whose text stays what it is alone; the request after it is
answered; and ``/readyz`` tells the truth. The server's loop runs without the guard that ``serve``
has around it: nothing may get that far.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("prometheus_client", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hostile_doubles import (
    HOOKS,
    HostileHandler,
    HostileLogHandler,
    HostileObserver,
    HostileSteps,
    Menu,
)
from raisers import RAISERS
from server_doubles import TalkHandler
from server_running import Running, running

CHAT = "/v1/chat/completions"
PROMPT = " ".join(f"word{number}" for number in range(150)) + " !drip"
ALONE = PROMPT[: PROMPT.index(" !drip")]
MODELS = [
    {"model_id": "m", "source": "talk:"},
    {"model_id": "bad", "source": "hostile:"},
    {"model_id": "steps", "source": "hostile-steps:"},
]


class Hostile:
    """A server with a hostile runtime beside a good one, and a neighbour that streams from that."""

    def __init__(self, run: Running, menu: Menu, client: httpx.Client) -> None:
        self.run, self.menu, self.client = run, menu, client

    def chat(self, model: str = "bad", stream: bool = False, **more) -> httpx.Response:
        messages = [{"role": "user", "content": "one"}]
        body = {"model": model, "messages": messages, "stream": stream, **more}
        return self.client.post(CHAT, json=body)

    def text(self, model: str = "bad", stream: bool = False) -> str:
        return text_of(self.chat(model, stream))

    def embed(self) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"model": "bad", "input": "one"})

    def ready(self) -> bool:
        answer = self.client.get("/readyz")
        assert answer.status_code in (200, 503)
        assert (answer.status_code == 200) == (answer.json()["status"] == "ready")
        return answer.status_code == 200

    def forget(self) -> None:
        """Unload the hostile model, and let it be asked for everything again."""
        self.run.call(lambda: self.run.manager.unload("bad"))
        self.run.manager._table.find("bad").known.clear()
        self.run.service.registry._choices.clear()
        self.run.service._capabilities.clear()

    @contextmanager
    def raising(self, name: str, *places: str) -> Iterator[None]:
        self.menu.reached.clear()
        self.menu.at = dict.fromkeys(places, RAISERS[name])
        try:
            yield
        finally:
            self.menu.at = {}
        assert set(places) <= self.menu.reached, f"nobody came by {places}"


def text_of(answer: httpx.Response) -> str:
    """The text of an answer, whole or streamed; a failure begins with ``!``."""
    kind = answer.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        found = answer.json()
        assert ("error" in found) == (answer.status_code >= 400)
        if "error" in found:
            assert answer.status_code in (500, 503) and found["error"]["message"]
            return f"!{found['error']['code']}"
        return found["choices"][0]["message"]["content"]
    events = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    parsed = [json.loads(event) for event in events[:-1]]
    if failed := [event["error"] for event in parsed if "error" in event]:
        return f"!{failed[0]['code']}"
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in parsed if e["choices"])


@pytest.fixture(scope="module")
def shared_hostile() -> Iterator[Hostile]:
    menu = Menu()
    handlers = [TalkHandler(), HostileHandler(menu), HostileSteps(menu)]
    log = HostileLogHandler(menu)
    logging.getLogger("engineroom").addHandler(log)
    try:
        with running(models=MODELS, handler=handlers) as run:
            run.service.registry.register_plugin(HostileObserver(menu), name="hostile-observer")
            with httpx.Client(base_url=run.url, timeout=20) as client:
                yield Hostile(run, menu, client)
            assert run.thread.is_alive()
    finally:
        logging.getLogger("engineroom").removeHandler(log)


@pytest.fixture
def hostile(shared_hostile: Hostile) -> Iterator[Hostile]:
    """With a neighbour that streams as long as the test runs, again and again."""
    run = shared_hostile.run
    streamed: list[str] = []
    done = threading.Event()

    def stream() -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "stream": True}
        with httpx.Client(base_url=run.url, timeout=20) as client:
            while True:
                streamed.append(text_of(client.post(CHAT, json={**body, "max_tokens": 150})))
                if done.is_set():
                    return

    neighbour = threading.Thread(target=stream)
    neighbour.start()
    try:
        yield shared_hostile
    finally:
        shared_hostile.menu.at = {}
        done.set()
        neighbour.join(20)
    assert streamed and set(streamed) == {ALONE}
    assert run.thread.is_alive()
    shared_hostile.forget()
    run.until(lambda: run.service.num_requests == 0 and run.server.context.limiter.running == 0)


FEW = ("panic", "leave", "interrupt", "cancel", "stop", "mute_by_panic")
"""Of the menu: what has a way of its own through the loop, or none but the border's."""


def for_each(
    hostile: Hostile,
    places: tuple[str, ...],
    check: Callable[[str], None],
    names: Iterable[str] = RAISERS,
) -> None:
    for name in names:
        with hostile.raising(name, *places):
            check(name)
        assert hostile.text() == "one two", f"after {name}"
        assert hostile.ready(), f"after {name}"


# ── a request ────────────────────────────────────────────────────────────────────────────────────


def test_infer(hostile, caplog):
    def check(name):
        caplog.clear()
        expected = "!unavailable" if name == "no_memory" else "!failed"
        assert hostile.text() == expected
        assert hostile.ready()
        assert f"in {name}" in caplog.text and len(caplog.text) < 100_000

    for_each(hostile, ("infer",), check)


@pytest.mark.parametrize("model", ["bad", "steps"])
@pytest.mark.parametrize("place", ["before the first", "midway"])
def test_a_stream(hostile, model, place, caplog):
    def check(name):
        caplog.clear()
        expected = "!unavailable" if name == "no_memory" else "!failed"
        for stream in (True, False) if model == "steps" else (True,):
            assert hostile.text(model, stream) == expected, name
        assert hostile.ready()
        assert f"in {name}" in caplog.text

    for_each(hostile, (place,), check)


@pytest.mark.parametrize("model", ["bad", "steps"])
def test_the_end_of_a_stream_whose_client_goes_away(hostile, model):
    handler = hostile.run.service.registry.get("hostile" if model == "bad" else "hostile-steps")

    def check(name):
        hostile.menu.at["hang"] = lambda: None
        body = {"model": model, "messages": [{"role": "user", "content": "one"}], "stream": True}
        with httpx.stream("POST", hostile.run.url + CHAT, json=body) as answer:
            next(answer.iter_raw())
        hostile.run.until(lambda: not handler.running)
        assert hostile.ready()

    for_each(hostile, ("at the end",), check, FEW)


def test_embed(hostile):
    def check(name):
        answer = hostile.embed()
        assert answer.status_code == (503 if name == "no_memory" else 500)
        assert answer.json()["error"]["message"] and len(answer.content) < 10_000

    for_each(hostile, ("embed",), check)


# ── what a handler is asked ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("load_model", "!model_not_loaded"),
        ("import_runtime", "!model_not_loaded"),
        ("can_load", "!model_not_loaded"),
        ("can_handle", "!model_not_loaded"),
        ("capabilities", "!failed"),
        ("estimate_memory", "one two"),
        ("runtime_processes", "one two"),
    ],
)
def test_what_a_handler_is_asked_on_the_way(hostile, place, expected):
    def check(name):
        hostile.forget()
        assert hostile.text() == expected, name
        assert hostile.ready()

    for_each(hostile, (place,), check, RAISERS if place == "load_model" else FEW)


def test_unload_model(hostile):
    def check(name):
        assert hostile.text() == "one two"
        with pytest.raises(Exception, match="unload_model failed"):
            hostile.run.call(lambda: hostile.run.manager.unload("bad"))
        assert hostile.ready()

    for_each(hostile, ("unload_model",), check, FEW)


def test_health(hostile):
    """A handler that cannot say how its model is has one that is not well."""

    def check(name):
        assert hostile.text() == "one two"
        assert not hostile.ready()
        assert hostile.client.get("/metrics").status_code == 200

    for_each(hostile, ("health",), check)


# ── who looks on ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hook", [*HOOKS, "traceparent_of"])
def test_an_observer(hostile, hook):
    def check(name):
        hostile.forget()
        for stream in (False, True):
            assert hostile.text(stream=stream) == "one two"
        hostile.forget()
        assert hostile.ready()

    for_each(hostile, (hook,), check, FEW)


def test_a_log_handler(hostile, capfd):
    """Whatever is logged on the way, of what goes well and of what fails."""
    for name in FEW:
        with hostile.raising(name, "log"):
            hostile.forget()
            assert hostile.text() == "one two"
            hostile.menu.at["infer"] = RAISERS["panic"]
            assert hostile.text() == "!failed"
            hostile.menu.at["load_model"] = RAISERS["leave"]
            hostile.forget()
            assert hostile.text() == "!model_not_loaded"
            del hostile.menu.at["infer"], hostile.menu.at["load_model"]
        assert hostile.text() == "one two" and hostile.ready()
    assert "Logging error" in capfd.readouterr().err


# ── the program itself ───────────────────────────────────────────────────────────────────────────

PROGRAM = """
import asyncio, logging, sys
from hostile_doubles import HostileHandler, Menu
from raisers import RAISERS
from engineroom import LLMInferenceService, LLMModelManager
from engineroom.server.runner import serve
from engineroom.server.settings import ServerSettings


class Handler(HostileHandler):
    async def infer(self, loaded_model, request):
        where, _, name = request.messages[0].content.partition(" ")
        if where == "here":
            RAISERS[name]()
        if where == "thread":
            await asyncio.to_thread(RAISERS[name])
        if where == "callback":
            asyncio.get_running_loop().call_soon(RAISERS[name])
        if where == "task":

            async def library():
                RAISERS[name]()

            await asyncio.wait([asyncio.create_task(library())])
        return await super().infer(loaded_model, request)


logging.basicConfig()
manager = LLMModelManager(config={"models": [{"model_id": "bad", "source": "hostile:"}]})
service = LLMInferenceService(manager, handlers=[Handler(Menu())])
serve(service, ServerSettings(port=0), started=lambda url: print(url, flush=True))
print("ended in good order", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_program_in_whose_main_thread_libraries_raise_what_ends_programs():
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(folder)])}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        try:
            assert program.stdout is not None
            url = program.stdout.readline().strip()
            with httpx.Client(base_url=url, timeout=20) as client:
                for where in ("here", "thread", "task", "callback"):
                    for name in ("leave", "interrupt", "panic"):
                        messages = [{"role": "user", "content": f"{where} {name}"}]
                        answer = client.post(CHAT, json={"model": "bad", "messages": messages})
                        own = where in ("here", "thread")
                        assert text_of(answer) == ("!failed" if own else "one two")
                        assert client.get("/readyz").status_code == 200
            program.send_signal(signal.SIGINT)
            out, err = program.communicate(timeout=20)
        except BaseException:
            program.kill()
            raise
    assert program.returncode == 0 and "ended in good order" in out
    assert err.count("would have ended the program") == 4  # two errors, of a task and a callback
