"""Whatever a runtime raises, on each thread that works for it, over HTTP with real sockets.

The threads are those of a real runtime with a real tiny model: ``…-load``, where models are loaded;
``engineroom-prompts``, where templates, tokenizers and grammars are worked on; ``engineroom-cpu``,
where vectors are computed (for the steps of texts see ``test_hostile_engines``);
``hf_transformers-generate``; the event loop's, where short prompts are read; and those of the
loop's pool, where runtimes are imported and freed. Beside each failure a neighbour streams, whose
text stays what it is alone.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("numpy", reason="the models are made with numpy")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hostile_models import deployment
from test_hostile_engines import RUNTIMES, Asking, PanicException, Running, ask, held, read, served
from test_hostile_requests import NEEDED

from engineroom import EngineRoomError, LLMModelManager
from engineroom.hangs import STUCK_VARIABLE

RAISED: dict[str, Callable[[], BaseException]] = {
    "panic": lambda: PanicException("a Rust panic"),
    "exit": lambda: SystemExit(3),
    "interrupt": KeyboardInterrupt,
}
PROMPTS, CPU, GENERATE, POOL, LOOP = (
    "engineroom-prompts", "engineroom-cpu", "hf_transformers-generate", ("asyncio_", "uvloop_"),
    "Thread-",
)  # fmt: skip


@dataclass
class Stage(Running):
    """A server with ``m``, which streams, ``bad``, which fails, and ``e``, which makes vectors."""

    alone: str = ""
    threads: list[str] = field(default_factory=list)
    """Those on which something was raised."""

    def ready(self) -> bool:
        return self.reasons() is None

    @property
    def handler(self) -> Any:
        return self.manager.registry.get(self.runtime)

    def post(self, path: str, **body: Any) -> httpx.Response:
        body = {"model": "bad", "max_tokens": 4, "temperature": 0, **body}
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def text(self, **more: Any) -> httpx.Response:
        return self.post("/v1/completions", **{"prompt": "once upon a time", **more})

    def talk(self) -> httpx.Response:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": "one"}])

    def form(self) -> httpx.Response:
        return self.text(structured_outputs={"choice": ["one", "two"]}, max_tokens=None)

    def vectors(self) -> httpx.Response:
        body = {"model": "e", "input": ["one", "two"]}
        return httpx.post(f"{self.url}/v1/embeddings", json=body, timeout=60)

    def unload(self) -> None:
        self.call(lambda: self.manager.unload("bad"))

    def failing(self, error: Callable[[], BaseException]) -> Callable[..., Any]:
        """What stands in for something of the runtime's."""

        def fail(*_: Any, **__: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            raise error()

        return fail


@pytest.fixture(scope="module", params=RUNTIMES)
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    runtime = request.param
    for module in NEEDED[runtime]:
        pytest.importorskip(module)
    talks, _, vectors, *_ = deployment(Path(tmp_path_factory.mktemp(runtime)), runtime, 1024)[
        "models"
    ]
    talks = {**talks, "aliases": []}
    models = [talks, {**talks, "model_id": "bad"}]
    if runtime != "vllm":
        asked = {k: v for k, v in talks.items() if k != "runtime"}  # so that handlers are
        free = [{**asked, "model_id": f"free {name}", "preload": False} for name in RAISED]
        models += [vectors, *free]
    manager = LLMModelManager(config={"models": models})
    with served(manager) as (url, loop):
        made = Stage(runtime, manager, url, loop)
        end = time.monotonic() + 60
        while not made.ready() and time.monotonic() < end:  # until all are loaded
            time.sleep(0.05)
        assert made.ready()
        made.alone = read(url, ask("m", NEIGHBOUR, True))
        assert made.alone and not made.alone.startswith("!")
        yield made


NEIGHBOUR = 200
"""Tokens of the neighbour's answer."""


@contextmanager
def neighbour(stage: Stage) -> Iterator[None]:
    """Somebody streams from the first to the last moment."""
    streams = [Asking(stage.url, ask("m", NEIGHBOUR, True))]
    assert streams[0].begun.wait(60)
    ended = threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            streams[-1].join(60)
            streams.append(Asking(stage.url, ask("m", NEIGHBOUR, True)))

    keeper = threading.Thread(target=go_on, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join(60)
    assert {stream.answer() for stream in streams} == {stage.alone}


def refused(answer: httpx.Response, status: int = 500) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"] and len(answer.content) < 10_000


def for_each(
    stage: Stage,
    where: tuple[Callable[[], Any], str],
    works: Callable[[], httpx.Response],
    thread: str | tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
    *,
    status: int = 500,
    again: bool = False,
) -> None:
    """Have something raise each of what there is, while a neighbour streams.

    :param where: whose it is, asked each time, and its name.
    :param works: a request that comes by there.
    :param thread: how the name of the thread begins.
    :param again: the model is unloaded before each.
    """
    expected = works()
    assert expected.status_code == 200, expected.text
    with neighbour(stage):
        for name, error in RAISED.items():
            caplog.clear()
            stage.threads.clear()
            if again:
                stage.unload()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(where[0](), where[1], stage.failing(error))
                refused(works(), status)
                assert stage.ready(), name  # it was one request's, and no model is unwell
            assert stage.threads and all(t.startswith(thread) for t in stage.threads), stage.threads
            assert "Traceback" in caplog.text and type(error()).__name__ in caplog.text
            after = works()
            assert after.status_code == 200, f"after {name}: {after.text}"
            assert _content(after) == _content(expected)


def _content(answer: httpx.Response) -> Any:
    told = answer.json()
    return told.get("data") or [{**choice} for choice in told["choices"]]


def test_a_template(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    for_each(stage, (lambda: stage.engine().codec, "chat"), stage.talk, PROMPTS, caplog)


def test_a_tokenizer(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    for_each(stage, (lambda: stage.engine().codec, "read"), stage.talk, PROMPTS, caplog)


def test_a_tokenizer_that_hangs(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Its request is told, its model is unwell and answers others, and no neighbour notices."""
    expected, codec = stage.talk(), stage.engine().codec
    goes_on, read_text, hung = threading.Event(), codec.read, list[str]()

    def hang(text: str) -> Any:
        if not hung:
            hung.append(threading.current_thread().name)
            assert goes_on.wait(60)
        return read_text(text)

    with neighbour(stage), pytest.MonkeyPatch.context() as patch:
        patch.setenv(STUCK_VARIABLE, "1.5")
        patch.setattr(codec, "read", hang)
        try:
            refused(stage.talk())
            assert hung == [PROMPTS] and not stage.ready()
            assert _content(stage.talk()) == _content(expected)
            assert "reading a prompt has not come to an end after 1.5 s" in caplog.text
        finally:
            goes_on.set()
        end = time.monotonic() + 30
        while not stage.ready() and time.monotonic() < end:
            time.sleep(0.01)
        assert stage.ready()


def test_a_tokenizer_of_short_prompts(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    for_each(stage, (lambda: stage.engine().codec, "read"), stage.text, LOOP, caplog)


def test_the_thread_that_long_texts_have(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Where llama.cpp's tokenizer needs a stack as deep as the text is long."""
    if stage.runtime != "llamacpp":
        pytest.skip("only llama.cpp has one")

    def long() -> httpx.Response:
        return stage.text(prompt="once upon a time, " * 80)

    with pytest.MonkeyPatch.context() as patch:
        for model in ("m", "bad"):
            patch.setattr(stage.engine(model).codec, "_has_expressions", True)
        where = (lambda: stage.engine().codec, "_array")
        for_each(stage, where, long, "llamacpp-tokenize", caplog)


@pytest.mark.parametrize("question", ["generate_tokens", "traits", "health"])
def test_what_a_handler_is_asked_about_one_model(
    stage: Stage, question: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the event loop. A model of which it cannot say how it is, is not well until it can."""
    if (stage.runtime, question) == ("vllm", "traits"):
        pytest.skip("a plain text makes it ask no such thing")
    expected, asked = stage.text(), getattr(stage.handler, question)
    with neighbour(stage):
        for name, error in RAISED.items():
            fail = stage.failing(error)
            caplog.clear()
            stage.threads.clear()

            def about_bad(
                loaded: Any, *more: Any, fail: Callable[..., Any] = fail, **named: Any
            ) -> Any:
                return (fail if loaded.model_id == "bad" else asked)(loaded, *more, **named)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage.handler, question, about_bad)
                if question == "health":
                    assert stage.reasons() == ["the engine of bad is not well"], name
                    assert httpx.get(f"{stage.url}/metrics").status_code == 200
                else:
                    refused(stage.text())
                    assert stage.ready(), name
                assert stage.text(model="m", max_tokens=2).status_code == 200
            assert stage.threads and all(t.startswith(LOOP) for t in stage.threads), stage.threads
            assert "Traceback" in caplog.text
            assert stage.ready() and _content(stage.text()) == _content(expected), name


def test_a_grammar(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("llguidance")
    constraints = importlib.import_module("engineroom.engine.constraints")

    def forget() -> Any:  # what was compiled is kept
        if getattr(stage.engine(), "grammars", None) is not None:
            stage.engine().grammars = None
        return constraints

    for_each(stage, (forget, "_matcher"), stage.form, PROMPTS, caplog)


def test_a_tokenizer_of_texts_for_vectors(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    if stage.runtime == "vllm":
        pytest.skip("one engine more would take a minute")
    assert stage.vectors().status_code == 200
    for_each(stage, (lambda: stage.engine("e").codec, "whole"), stage.vectors, PROMPTS, caplog)


LOADING = {
    "llamacpp": [("engineroom_llamacpp.model", "load_adapters"),
                 ("engineroom_llamacpp.engine", "LlamaContext")],
    "hf_transformers": [("engineroom_hf_transformers.engine", "neutral")],
    "vllm": [("engineroom_vllm.loading", "engine_arguments")],
}  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
def test_a_load(stage: Stage, number: int, caplog: pytest.LogCaptureFixture) -> None:
    if number >= len(LOADING[stage.runtime]):
        pytest.skip("one place is enough")
    module, name = LOADING[stage.runtime][number]
    for_each(
        stage, (lambda: importlib.import_module(module), name), stage.text,
        f"{stage.runtime}-load", caplog, status=503, again=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
def test_what_a_handler_is_asked_before_a_load(
    stage: Stage, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if stage.runtime == "vllm":
        pytest.skip("its engines take a minute each, and it is core that asks")
    model, fail = f"free {name}", stage.failing(RAISED[name])
    with neighbour(stage):
        for question, status in (("can_load", 503), ("estimate_memory", 200)):
            stage.threads.clear()
            caplog.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage.handler, question, fail)
                answer = stage.text(model=model)
                assert answer.status_code == status, answer.text
                assert stage.ready(), question
            assert stage.threads and "Traceback" in caplog.text, question
        assert stage.text(model=model).status_code == 200
        stage.call(lambda: stage.manager.unload(model))


@pytest.mark.parametrize("place", ["import_runtime", "free_engine"])
def test_the_threads_of_the_pool(
    stage: Stage, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    if stage.runtime == "vllm":
        pytest.skip("its engines take a minute each")
    if place == "import_runtime":
        for_each(
            stage, (lambda: stage.handler, place), stage.text, POOL, caplog, status=503, again=True
        )
        return
    expected, free = stage.text(), stage.handler.free_engine
    with neighbour(stage):
        for error in RAISED.values():
            fail = stage.failing(error)

            def freed(engine: Any, fail: Callable[..., Any] = fail) -> None:
                free(engine)
                fail()

            stage.threads.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage.handler, "free_engine", freed)
                with pytest.raises(EngineRoomError):
                    stage.unload()
                assert stage.ready() and stage.threads[0].startswith(POOL)
            assert _content(stage.text()) == _content(expected)


def _dies_and_comes_back(
    stage: Stage, model: str, break_it: Callable[[Callable[..., Any]], None],
    works: Callable[[], httpx.Response], thread: str,
) -> None:  # fmt: skip
    expected = works()
    assert expected.status_code == 200
    with neighbour(stage):
        for error in RAISED.values():
            stage.threads.clear()
            lease = held(stage.manager, model)  # so that the dead engine stays to be looked at
            stage.call(lease.__aenter__)
            try:
                break_it(stage.failing(error))
                refused(works(), 503)
                assert not stage.ready() and stage.state(model) == "draining"
            finally:
                stage.call(lambda lease=lease: lease.__aexit__(None, None, None))
            assert stage.threads == [thread]
            assert _content(works()) == _content(expected)
            end = time.monotonic() + 30
            while not stage.ready() and time.monotonic() < end:
                time.sleep(0.01)
            assert stage.ready()


def test_the_thread_that_computes_vectors(stage: Stage) -> None:
    if stage.runtime == "vllm":
        pytest.skip("its engines are processes; see its own tests")

    def break_it(fail: Callable[..., Any]) -> None:
        engine = stage.engine("e")
        if stage.runtime == "hf_transformers":
            engine.parts.model.base_model.forward = fail
        else:
            stage.handler.embedder(engine).step = fail

    stage.vectors()
    _dies_and_comes_back(stage, "e", break_it, stage.vectors, CPU)


def test_the_thread_of_generate(stage: Stage) -> None:
    if stage.runtime != "hf_transformers":
        pytest.skip("only Transformers has one")

    def break_it(fail: Callable[..., Any]) -> None:
        stage.engine().parts.model.generate = fail

    def beams() -> httpx.Response:
        return stage.text(num_beams=2)

    _dies_and_comes_back(stage, "bad", break_it, beams, GENERATE)
