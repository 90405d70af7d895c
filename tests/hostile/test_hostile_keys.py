"""What keys can see and delay of each other, on real runtimes, over HTTP with real sockets.

The sentences of "Who can do what to whom" in docs/operations.md that need a runtime to be true; for
those of the server alone see ``core/tests/server``.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("numpy", reason="the models are made with numpy")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hostile_models import deployment
from test_hostile_engines import OWN_WARNINGS, Running, served
from test_hostile_requests import NEEDED

from engineroom import LLMModelManager
from engineroom.handlers.base import HandlerHealth
from engineroom.server.keys import KeyRing, KeySpec

ANN, BOB, LOW = "the key of ann, who asks", "the key of bob, who asks", "the key of one who waits"
ENDLESS = {"temperature": 0, "logit_bias": {str(special): -100 for special in range(5)}}
LONG = 4000
"""Tokens of a prompt that takes far longer to read than to find again."""
RUNTIMES = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"hostile-{name}"))
    for name in NEEDED
    if name != "vllm"
]
RUNTIMES += [pytest.param("vllm", marks=[OWN_WARNINGS, pytest.mark.nightly])]


@dataclass
class Stage(Running):
    """A server with ``m`` and ``shared``, which talk, ``one``, which does one at a time, ``e``."""

    client: httpx.Client

    def post(self, key: str, route: str = "completions", **body: Any) -> httpx.Response:
        return self.client.post(f"/v1/{route}", json=body, headers=bearer(key))

    @contextmanager
    def streaming(self, key: str, **body: Any) -> Iterator[None]:
        """Somebody streams, as long as the block lasts."""
        body = {"stream": True, **ENDLESS, **body}
        with self.client.stream(
            "POST", "/v1/completions", json=body, headers=bearer(key)
        ) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()  # which is kept: without it the response is closed
            next(lines)
            yield

    def cached(self, key: str, prompt: list[int], model: str = "m", **more: Any) -> int:
        """How many tokens of a prompt the server says it has found again."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
        answer = self.post(key, **body)
        assert answer.status_code == 200, answer.text
        details = answer.json()["usage"].get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    def health(self, model: str) -> HandlerHealth:
        """That of the model's engine."""
        handler = self.manager.registry.get(self.runtime)
        loaded = self.manager.get_loaded_model(model)
        assert loaded is not None and handler is not None
        health: HandlerHealth = self.call(lambda: handler.health(loaded))
        return health

    def running(self, model: str) -> int:
        return self.health(model).num_requests_running

    def waiting(self, model: str) -> int:
        return self.health(model).num_requests_waiting

    def until(self, predicate: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not predicate():
            assert time.monotonic() < end, self.health("one")
            time.sleep(0.005)

    @contextmanager
    def plugged(self) -> Iterator[None]:
        """Somebody has the one place of ``one``, as long as the block lasts."""
        engine = self.engine("one")
        with self.streaming(BOB, model="one", prompt=[9], max_tokens=2000):
            self.until(lambda: self.running("one") == 1)
            if self.runtime != "vllm":  # whose steps are slow enough
                engine.step = lambda: (time.sleep(0.01), type(engine).step(engine))
            yield
        vars(engine).pop("step", None)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module", params=RUNTIMES)
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    runtime = request.param
    for module in NEEDED[runtime]:
        pytest.importorskip(module)
    talks, _, vectors, *_ = deployment(Path(tmp_path_factory.mktemp(runtime)), runtime, 8192)[
        "models"
    ]
    small = {**talks["options"], "n_ctx": 2048, "n_parallel": 1, "max_queue": 4}
    # Transformers keeps as many prompts as it has places: room for all of a test's.
    wide = {**talks["options"], "n_parallel": 8 if runtime == "hf_transformers" else 2}
    talks = {**talks, "options": wide, "aliases": []}
    models = [
        talks,
        {**talks, "model_id": "shared", "prefix_cache_scope": "shared"},
        {**talks, "model_id": "one", "options": small},
        {**vectors, "options": {**vectors["options"], "n_parallel": 1}},
    ]
    keys = KeyRing([KeySpec("ann", ANN), KeySpec("bob", BOB), KeySpec("low", LOW, -1)])
    manager = LLMModelManager(config={"models": models})
    with (
        served(manager, keys=keys) as (url, loop),
        httpx.Client(base_url=url, timeout=120, limits=httpx.Limits()) as client,
    ):
        made = Stage(runtime, manager, url, loop, client)
        made.until(lambda: made.reasons() is None, 120)
        yield made


_drawn = random.Random(14)


def prompt_of(length: int) -> list[int]:
    """One that nobody has sent before."""
    return [_drawn.randrange(10, 1000) for _ in range(length)]


# ── prompts of others ────────────────────────────────────────────────────────────────────────


def test_no_key_finds_what_another_had_computed(stage: Stage) -> None:
    prompt = prompt_of(600)
    assert stage.cached(ANN, prompt) == 0
    assert stage.cached(ANN, prompt) > 500
    for guessed in (600, 400, 200, 64):  # of which none is the guesser's own, either
        guess = [*prompt[:guessed], *prompt_of(20)]
        assert stage.cached(BOB, guess, cache_salt=f"{guessed}") == 0, guessed
    assert stage.cached(BOB, prompt) == 0
    assert stage.cached(ANN, prompt) > 500, "and it is still its own"


def test_nor_while_the_other_is_running(stage: Stage) -> None:
    prompt = prompt_of(600)
    with stage.streaming(ANN, model="m", prompt=prompt, max_tokens=2000):
        assert stage.cached(BOB, prompt) == 0
        assert stage.cached(ANN, prompt) > 500


def test_a_salt_parts_the_requests_of_one_key(stage: Stage) -> None:
    prompt = prompt_of(600)
    assert stage.cached(ANN, prompt, cache_salt="a") == 0
    assert stage.cached(ANN, prompt, cache_salt="b") == 0
    assert stage.cached(ANN, prompt) == 0
    assert stage.cached(ANN, prompt, cache_salt="a") > 500


def test_a_deployment_may_give_that_up(stage: Stage) -> None:
    prompt = prompt_of(600)
    assert stage.cached(ANN, prompt, "shared") == 0
    assert stage.cached(BOB, prompt, "shared") > 500
    assert stage.cached(BOB, prompt, "shared", cache_salt="b") == 0


def test_the_time_to_the_first_token_tells_no_more(stage: Stage) -> None:
    """What is found again takes less than half of what is read; load makes reading longer only."""
    prompt, warm, cold = prompt_of(LONG), [], []
    stage.cached(ANN, prompt)
    for number in range(2):
        began = time.perf_counter()
        assert stage.cached(ANN, prompt) > LONG - 100
        warm.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert stage.cached(BOB, prompt, cache_salt=f"guess {number}") == 0
        cold.append(time.perf_counter() - began)
    assert min(cold) > 2 * min(warm), (warm, cold)


def test_what_others_push_out_is_read_again(stage: Stage) -> None:
    if stage.runtime == "vllm":
        pytest.skip("its cache has room for all that goes there in a test's time")
    prompt = prompt_of(600)
    body = {"model": "one", "prompt": prompt, "max_tokens": 20, "temperature": 0}
    first = stage.post(ANN, **body).json()["choices"][0]["text"]
    for _ in range(3):
        assert stage.cached(BOB, prompt_of(1500), "one") == 0
    assert stage.post(ANN, **body).json()["choices"][0]["text"] == first


# ── places, priority, the queue ──────────────────────────────────────────────────────────────


def test_keys_take_turns_however_many_requests_one_has_waiting(stage: Stage) -> None:
    ended: list[str] = []

    def ask(key: str) -> None:
        answer = stage.post(key, model="one", prompt=[9], max_tokens=40, temperature=0)
        assert answer.status_code == 200, answer.text
        ended.append(key)

    with ThreadPoolExecutor(8) as pool:
        with stage.plugged():
            asked = [pool.submit(ask, ANN) for _ in range(3)]
            stage.until(lambda: stage.waiting("one") == 3)
            asked.append(pool.submit(ask, BOB))
            stage.until(lambda: stage.waiting("one") == 4)
        for future in asked:
            future.result(60)
    # vLLM has one of them at hand already.
    assert ended.index(BOB) <= (2 if stage.runtime == "vllm" else 1), ended


def test_a_full_queue_of_one_key_makes_room_for_another(stage: Stage) -> None:
    def ask(key: str) -> int:
        return stage.post(key, model="one", prompt=[9], max_tokens=2).status_code

    with ThreadPoolExecutor(8) as pool:
        with stage.plugged():
            many = [pool.submit(ask, ANN) for _ in range(4)]
            stage.until(lambda: stage.waiting("one") == 4)
            assert ask(ANN) == 429
            other = pool.submit(ask, BOB)
            stage.until(lambda: any(future.done() for future in many))
        assert other.result(60) == 200
        assert sorted(future.result(60) for future in many) == [200, 200, 200, 429]


def test_waiting_grows_into_priority(stage: Stage) -> None:
    """A step lower is two seconds of waiting: it is served in the midst of those before it."""
    over, counted = threading.Event(), itertools.count()
    statuses: set[int] = set()

    def flood() -> None:
        while not over.is_set():
            answer = stage.post(ANN, model="one", prompt=[9], max_tokens=30, temperature=0)
            statuses.add(answer.status_code)
            next(counted)

    with ThreadPoolExecutor(4) as pool:
        flooding = [pool.submit(flood) for _ in range(3)]
        try:
            stage.until(lambda: stage.waiting("one") >= 1)
            before, began = next(counted), time.monotonic()
            answer = stage.post(LOW, model="one", prompt=[9], max_tokens=2)
            took, served = time.monotonic() - began, next(counted) - before
            assert not over.is_set() and answer.status_code == 200
        finally:
            over.set()
        for future in flooding:
            future.result(60)
    assert statuses == {200}
    assert took > 1 and served > 3, "it did not wait, so this shows nothing"


def test_texts_for_vectors_go_by_priority(stage: Stage) -> None:
    ended: list[str] = []

    def ask(key: str, count: int) -> None:
        texts = [f"{number} of {count}, and some words more" for number in range(count)]
        answer = stage.post(key, "embeddings", model="e", input=texts, encoding_format="base64")
        assert answer.status_code == 200, answer.text[:500]
        ended.append(key)

    ask(ANN, 2)
    ended.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, BOB, 150)]
        stage.until(lambda: stage.running("e") == 1)
        asked.append(pool.submit(ask, LOW, 20))
        stage.until(lambda: stage.waiting("e") == 1)
        asked.append(pool.submit(ask, ANN, 20))
        for future in asked:
            future.result(120)
    assert ended.index(ANN) < ended.index(LOW), ended


def test_long_answers_of_one_key_take_every_place_unless_its_own_are_fewer(stage: Stage) -> None:
    if stage.runtime == "vllm":
        pytest.skip("an engine more takes a minute, and it is the server that counts")
    places = 2
    configured = next(m for m in stage.manager.config.models if m.model_id == "one")
    model = {
        "model_id": "one", "source": configured.source, "runtime": stage.runtime,
        "options": {**configured.options, "n_parallel": places},
    }  # fmt: skip
    keys = KeyRing([KeySpec("ann", ANN), KeySpec("bob", BOB)])
    long = {"model": "one", "prompt": [9], "max_tokens": 1900}
    short = {"model": "one", "prompt": [9], "max_tokens": 2}

    for bound, at_work in ((None, places), (places - 1, places - 1)):
        manager = LLMModelManager(config={"models": [model]})
        with (
            served(manager, keys=keys, key_max_running=bound) as (url, loop),
            httpx.Client(base_url=url, timeout=120) as client,
            ThreadPoolExecutor(4) as pool,
        ):
            room = Stage(stage.runtime, manager, url, loop, client)
            room.until(lambda room=room: room.reasons() is None, 120)
            engine = room.engine("one")
            with room.streaming(ANN, **long):
                second = pool.submit(room.post, ANN, **{**short, "max_tokens": 1900, **ENDLESS})
                room.until(lambda room=room, count=at_work: room.running("one") == count)
                engine.step = lambda engine=engine: (time.sleep(0.01), type(engine).step(engine))
                other = pool.submit(room.post, BOB, **short)
                if bound:
                    assert other.result(60).status_code == 200
                    assert room.running("one") == 1
                else:
                    room.until(lambda room=room: room.waiting("one") == 1)
                    assert not other.done()
                assert not second.done()
            vars(engine).pop("step", None)
            assert other.result(60).status_code == 200
            assert second.result(60).status_code == 200
