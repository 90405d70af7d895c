"""An engine that dies of whatever its step raises, on real threads, over HTTP with real sockets.

Two models of a runtime share its thread (or the event loop, with vLLM). One is made to raise what
is no ``Exception``: whoever runs or waits on it is told at once, ``/readyz`` says so as long as it
is there, its neighbour's stream has the text that it has alone, and the next request has the model
loaded anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("numpy", reason="the models are made with numpy")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hostile_models import deployment

from engineroom import LLMInferenceService, LLMModelManager
from engineroom.server.runner import EngineRoomServer, bind, loop_factory
from engineroom.server.settings import ServerSettings

NEEDED = {
    "llamacpp": ("llama_cpp", "gguf"),
    "hf_transformers": ("torch", "transformers"),
    "vllm": ("vllm",),
}
OWN_WARNINGS = pytest.mark.filterwarnings("default")  # of vLLM's code: of what is to come in torch
RUNTIMES = [
    pytest.param(
        name,
        marks=[
            pytest.mark.xdist_group(f"hostile-{name}"),
            *([OWN_WARNINGS] if name == "vllm" else []),
        ],
    )
    for name in NEEDED
]
PATH = "/v1/completions"


class PanicException(BaseException):
    """Stands for pyo3's: a panic in Rust."""


class Mute(BaseException):
    """Gives no words away."""

    def __str__(self) -> str:
        raise PanicException


RAISED: dict[str, BaseException] = {
    "panic": PanicException("a Rust panic"),
    "exit": SystemExit(3),
    "interrupt": KeyboardInterrupt(),
    "cancelled": asyncio.CancelledError(),
    "generator exit": GeneratorExit(),
    "group": BaseExceptionGroup("several", [SystemExit(4), PanicException()]),
    "mute": Mute(),
}
TRIED = {"hf_transformers": ("panic", "exit", "mute"), "vllm": ("panic", "exit")}


@dataclass
class Running:
    """A server that runs in a thread, and its manager."""

    runtime: str
    manager: LLMModelManager
    url: str
    loop: asyncio.AbstractEventLoop

    def call(self, work: Callable[[], Any]) -> Any:
        """Run something on the server's loop."""

        async def run() -> Any:
            result = work()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(60)

    def state(self, model: str = "bad") -> str:
        return next(s.state for s in self.manager.list_models() if s.model_id == model)

    def reasons(self) -> list[str] | None:
        """Why it is not ready; ``None``: it is."""
        answer = httpx.get(f"{self.url}/readyz")
        body = answer.json()
        assert (answer.status_code == 200) == (body["status"] == "ready")
        return None if answer.status_code == 200 else list(body["reasons"])

    def engine(self, model: str = "bad") -> Any:
        loaded = self.manager.get_loaded_model(model)
        assert loaded is not None
        return loaded.model_object


@dataclass
class Stage(Running):
    """A server, and what its runtime's steps are made to raise."""

    raised: dict[int, BaseException] = field(default_factory=dict)  # by the engine's id

    def ready(self) -> bool:
        reasons = self.reasons()
        assert reasons in (None, ["the engine of bad is not well"])
        return reasons is None

    def break_it(self, error: BaseException) -> None:
        """From the next step on, the engine of ``bad`` raises this."""
        engine = self.engine()
        if self.runtime == "vllm":
            self.raised[id(engine.lifecycle.llm.output_processor)] = error
            return

        def step() -> None:
            raise error

        engine.step = step


def ask(model: str, tokens: int, stream: bool) -> dict[str, Any]:
    return {
        "model": model, "prompt": "once upon a time", "max_tokens": tokens, "stream": stream,
        "temperature": 0, "logit_bias": {"1": -100},
    }  # fmt: skip


def read(url: str, body: dict[str, Any], begun: Callable[[], None] = lambda: None) -> str:
    """The text of an answer; a failure is ``!`` and its code."""
    if not body["stream"]:
        answer = httpx.post(url + PATH, json=body, timeout=120)
        content = answer.json()
        if "error" in content:
            assert answer.status_code == 503
            return f"!{content['error']['code']}"
        return str(content["choices"][0]["text"])
    text = ""
    with httpx.stream("POST", url + PATH, json=body, timeout=120) as answer:
        if answer.status_code != 200:
            answer.read()
            return f"!{answer.json()['error']['code']}"
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line.endswith("[DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return f"!{event['error']['code']}"
            if event["choices"]:
                text += event["choices"][0]["text"]
                begun()
    return text


class Asking(threading.Thread):
    """A client in a thread of its own."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, body
        self.begun = threading.Event()
        self.text: str | None = None
        self.start()

    def run(self) -> None:
        self.text = read(self._url, self._body, self.begun.set)

    def answer(self) -> str:
        self.join(120)
        assert self.text is not None, "no answer came"
        return self.text


@contextlib.contextmanager
def served(
    manager: LLMModelManager, **more: Any
) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """A server whose loop runs without the guard that ``serve`` has around it.

    :param more: of its settings.
    """
    settings = ServerSettings(port=0, drain_timeout_s=0, **more)
    bound = bind(settings)
    server = EngineRoomServer(LLMInferenceService(manager), settings)
    started, loops = threading.Event(), []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.run_until_stopped([bound], started=started.set)

    def work() -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(main())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", loops[0]
        assert thread.is_alive(), "the server's loop has ended"
    finally:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(server.stop)
        thread.join(60)


@pytest.fixture(scope="module", params=RUNTIMES)
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    runtime = request.param
    for module in NEEDED[runtime]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    first = deployment(Path(tmp_path_factory.mktemp(runtime)), runtime, 1024)["models"][0]
    del first["aliases"]
    manager = LLMModelManager(config={"models": [first, {**first, "model_id": "bad"}]})
    raised: dict[int, BaseException] = {}
    with pytest.MonkeyPatch.context() as patch:
        if runtime == "vllm":
            _hostile_outputs(patch, raised)
        with served(manager) as (url, loop):
            stage = Stage(runtime, manager, url, loop, raised)
            for name in ("m", "bad"):
                assert read(url, ask(name, 2, False))
            yield stage


def _hostile_outputs(patch: pytest.MonkeyPatch, raised: dict[int, BaseException]) -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    process: Any = OutputProcessor.process_outputs

    def process_outputs(self: Any, *arguments: Any, **options: Any) -> Any:
        if id(self) in raised:
            raise raised.pop(id(self))
        return process(self, *arguments, **options)

    patch.setattr(OutputProcessor, "process_outputs", process_outputs)


@contextlib.asynccontextmanager
async def held(manager: LLMModelManager, model: str = "bad") -> AsyncIterator[None]:
    async with manager.lease(model):
        yield


NEIGHBOUR = 300
"""Tokens of the neighbour's answer."""


@pytest.mark.parametrize("name", RAISED)
def test_an_engine_that_dies_is_told_of_and_loaded_anew(
    stage: Stage, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name not in TRIED.get(stage.runtime, RAISED):
        pytest.skip("what is of the same kind is tried, and loads take time")
    alone = read(stage.url, ask("m", NEIGHBOUR, True))
    expected = read(stage.url, ask("bad", 20, False))
    assert not alone.startswith("!") and not expected.startswith("!") and stage.ready()
    neighbour = Asking(stage.url, ask("m", NEIGHBOUR, True))
    assert neighbour.begun.wait(60)
    lease = held(stage.manager)  # so that the dead engine stays to be looked at
    stage.call(lease.__aenter__)
    try:
        victims = [Asking(stage.url, ask("bad", 900, True)) for _ in range(2)]
        assert all(victim.begun.wait(60) for victim in victims)
        stage.break_it(RAISED[name])
        assert [victim.answer() for victim in victims] == ["!engine_dead"] * 2
        assert not stage.ready() and stage.state() == "draining"
    finally:
        stage.call(lambda: lease.__aexit__(None, None, None))
    assert read(stage.url, ask("bad", 20, False)) == expected
    end = time.monotonic() + 30
    while not stage.ready() and time.monotonic() < end:
        time.sleep(0.01)
    assert stage.ready() and stage.state() == "ready"
    assert neighbour.answer() == alone
    assert type(RAISED[name]).__name__ in caplog.text and "Traceback" in caplog.text
