"""What requests leave in memory on real engines, in process: nothing, and without the collector.

Requests of every kind end in every way there is. What only the garbage collector would free is
found by :func:`engineroom.testing.uncollected`; then megabytes of refused prompts, with the
collector off, and the process must not have grown.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import psutil
import pytest
import pytest_asyncio

pytest.importorskip("numpy", reason="the models are made with numpy")

from hostile_models import deployment
from test_hostile_requests import NEEDED

from engineroom import EngineRoomError, InferenceRequest, LLMInferenceService, LLMModelManager
from engineroom.testing import uncollected

CONTEXT: Final = 512
LONG: Final = "a long text of no use, " * 2_000
HUGE: Final = LONG * 85
"""3.9 MB, as in the largest body."""
ROUNDS: Final = 20
MORE_BYTES: Final = 128 << 20
"""What the process may have grown by, for allocators keep what threads have freed: as much was seen
of llama.cpp's tokenizer. Refusals that are kept would take twice as much at least."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Bench:
    """A service over the models of one runtime, and what was asked of it."""

    service: LLMInferenceService
    manager: LLMModelManager
    alive: list[weakref.ref[InferenceRequest]] = field(default_factory=list)

    def request(self, prompt: str | None = "hello", **fields: Any) -> InferenceRequest:
        params = {"max_new_tokens": 4, **fields.pop("params", {})}
        request = InferenceRequest(
            **{"model_id": "m", "prompt": prompt, "params": params, **fields}
        )
        self.alive.append(weakref.ref(request))
        return request

    def chat(self, text: str, **fields: Any) -> InferenceRequest:
        messages = [{"role": "user", "content": text}]
        return self.request(None, messages=messages, **fields)

    async def whole(self, request: InferenceRequest) -> str | None:
        return (await self.service.infer(request)).error_type

    async def streamed(self, request: InferenceRequest) -> str | None:
        stream = self.service.stream(request)
        async for _ in stream:
            pass
        assert stream.response is not None
        return stream.response.error_type

    async def embed(self, *texts: str, **fields: Any) -> str | None:
        try:
            await self.service.embed(**{"model_id": "e", "texts": texts, **fields})
        except EngineRoomError as error:
            return type(error).__name__
        return None


Ask = Callable[[Bench], InferenceRequest]
CASES: Final[dict[str, tuple[str | None, Ask]]] = {
    "answered": (None, lambda b: b.request()),
    "a conversation": (None, lambda b: b.chat("hello")),
    "a prompt that is too long": ("ContextLengthExceededError", lambda b: b.request(LONG)),
    "a conversation that is too long": ("ContextLengthExceededError", lambda b: b.chat(LONG)),
    "ids that are too many": (
        "ContextLengthExceededError",
        lambda b: b.request(None, prompt_token_ids=[7] * 5000),
    ),
    "an id that there is not": (
        "ConfigurationError",
        lambda b: b.request(None, prompt_token_ids=[2**31 - 1] * 400),
    ),
    "a bias that there is not": (
        "ConfigurationError",
        lambda b: b.request(LONG[:100], params={"logit_bias": {2**30: 1.0}}),
    ),
    "beams that cannot be": (
        "ConfigurationError",
        lambda b: b.request(LONG[:100], params={"num_beams": 3, "logprobs": 2}),
    ),
    "an adapter that there is not": (
        "ConfigurationError",
        lambda b: b.request(LONG[:100], adapter="nobody"),
    ),
    "a model for embeddings": (
        "ContextLengthExceededError",
        lambda b: b.request(LONG, model_id="e"),
    ),
    "no model": ("ModelNotFoundError", lambda b: b.request(LONG, model_id="nobody")),
    "a deadline that is over": ("RequestTimeoutError", lambda b: b.request(timeout_s=1e-9)),
    "a deadline while it works": (
        "RequestTimeoutError",
        lambda b: b.request(LONG[:800], timeout_s=0.03, params={"max_new_tokens": None}),
    ),
}


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """pytest keeps log records, and so all that they are about."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[
        *(pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in NEEDED if n != "vllm"),
        pytest.param("vllm", marks=[pytest.mark.engine, pytest.mark.nightly]),
    ],
)
async def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Bench]:
    for module in NEEDED[request.param]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    models = deployment(tmp_path_factory.mktemp("models"), request.param, CONTEXT)
    for model in models["models"]:
        if model["model_id"] == "m" and request.param != "vllm":
            model["options"]["max_queue"] = 4
    manager = LLMModelManager(config=models)
    async with LLMInferenceService(manager) as service:
        yield Bench(service, manager)


async def rest(bench: Bench) -> None:
    """Until threads have let go, too: an engine drops what was cancelled with its next turn."""
    for _ in range(500):
        if bench.service.num_requests == 0 and not any(ref() for ref in bench.alive):
            return
        await asyncio.sleep(0.01)


def kept_by(ref: weakref.ref[InferenceRequest]) -> list[str]:
    """What refers to a request, for the message of a test that fails."""
    return [f"{type(holder)}: {holder!r:.200}" for holder in gc.get_referrers(ref())]


async def leaves_nothing(bench: Bench, work: Callable[[], Awaitable[object]]) -> None:
    await work()  # what is made once is made
    await rest(bench)
    with uncollected() as left:
        bench.alive.clear()
        for _ in range(2):
            await work()
        await rest(bench)
        kept = [kept_by(ref) for ref in bench.alive if ref() is not None]
        assert not left()
        assert not kept


@pytest.mark.parametrize("way", ["whole", "streamed"])
async def test_a_request_leaves_nothing_however_it_ends(bench: Bench, way: str) -> None:
    for case, (error_type, make) in CASES.items():
        ended = await getattr(bench, way)(make(bench))
        if case != "a deadline while it works":  # which a quick machine may keep
            assert ended == error_type, case
        await leaves_nothing(bench, lambda make=make: getattr(bench, way)(make(bench)))


async def test_nor_one_that_is_given_up(bench: Bench) -> None:
    async def give_up() -> None:
        for turns in (1, 3, 8, 40):
            asked = bench.request(LONG[:800], params={"max_new_tokens": None})
            task = asyncio.create_task(bench.whole(asked))
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            task.cancel()
            await asyncio.wait([task])
        stream = bench.service.stream(bench.request(params={"max_new_tokens": None}))
        await anext(stream)
        await stream.aclose()

    await leaves_nothing(bench, give_up)


async def test_nor_those_that_a_full_queue_refuses(bench: Bench) -> None:
    async def crowd() -> set[str | None]:
        asked = [bench.request(LONG[:200], params={"max_new_tokens": 60}) for _ in range(40)]
        return set(await asyncio.gather(*map(bench.whole, asked)))

    await leaves_nothing(bench, crowd)


async def test_nor_texts_for_embeddings_and_for_counting(bench: Bench) -> None:
    for texts, fields, error_type in (
        ((LONG[:200], "b"), {}, None),
        ((LONG[:200], LONG), {}, "ContextLengthExceededError"),
        ((LONG, ""), {}, "ConfigurationError"),
        ((LONG,), {"model_id": "m"}, "ConfigurationError"),
        ((LONG,), {"timeout_s": 1e-9}, "RequestTimeoutError"),
    ):
        assert await bench.embed(*texts, **fields) == error_type
        await leaves_nothing(bench, lambda t=texts, f=fields: bench.embed(*t, **f))

    async def count() -> None:
        async with bench.manager.lease("m") as loaded:
            handler = bench.service.registry.select(loaded)
            await asyncio.to_thread(handler.count_tokens, loaded, LONG)
            with contextlib.suppress(Exception):
                handler.count_tokens(loaded, LONG + "\ud800")

    await leaves_nothing(bench, count)


@pytest.mark.nightly
async def test_megabytes_of_refused_prompts_come_back_without_the_collector(bench: Bench) -> None:
    process, sizes = psutil.Process(), list[int]()
    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS + 3):
            for ask in (bench.request, bench.chat):
                assert await bench.streamed(ask(HUGE)) == "ContextLengthExceededError"
            assert await bench.embed(HUGE) == "ContextLengthExceededError"
            sizes.append(process.memory_info().rss)
    finally:
        gc.enable()
    print("MiB after each round:", *(size >> 20 for size in sizes))
    assert sizes[-1] - sizes[2] < MORE_BYTES
