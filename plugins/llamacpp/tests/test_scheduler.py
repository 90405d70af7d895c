"""Whatever comes, in whatever order: each greedy answer is that of the request alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from llama_benches import EXACT, NO_END, ask, move_eagerly, no_leak

from engineroom import (
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
    StreamError,
)
from engineroom_llamacpp import LlamaCppHandler, context as context_module

_letters = random.Random(7)
FAMILIES = ["".join(_letters.choice("abcdefgh ") for _ in range(120)) for _ in range(3)]
"""What prompts begin with."""
NARROW = dict.fromkeys(range(100, 103), 4.0)


@dataclass(frozen=True)
class Arrival:
    """One request of the stream.

    :param family: which beginning it has, and how much of it.
    :param own: letters of its own after that.
    :param new: tokens that it asks for.
    :param narrow: its text has few letters, so that proposals are often right.
    :param close: chunks after which its reader goes away; ``None``: it stays.
    :param pause: turns of the event loop before it comes.
    """

    family: tuple[int, int]
    own: int
    new: int
    beams: int
    narrow: bool
    close: int | None
    priority: int
    pause: int

    def request(self, **kw: Any) -> InferenceRequest:
        # Beams that do not have room for all that they ask for end sooner.
        new = self.new if self.beams == 1 else min(self.new, 40)
        which, length = self.family
        prompt = FAMILIES[which][:length] + f"{self.own}" * self.own
        if self.narrow:
            kw["logit_bias"] = NO_END | NARROW
        return ask(prompt, max_new_tokens=new, num_beams=self.beams, **kw)


arrivals = st.builds(
    Arrival,
    family=st.tuples(st.integers(0, 2), st.sampled_from([1, 17, 60, 119, 120])),
    own=st.integers(0, 9),
    new=st.integers(1, 60),
    beams=st.sampled_from([1, 1, 1, 1, 2, 3]),
    narrow=st.booleans(),
    close=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    priority=st.integers(-1, 1),
    pause=st.sampled_from([0, 0, 1, 30]),
)
choices = st.fixed_dictionaries(
    {
        "n_ctx": st.sampled_from([256, 256, 512]),
        "n_parallel": st.sampled_from([1, 3, 8]),
        "prefix_cache": st.sampled_from([True, True, False]),
        "prompt_lookup": st.booleans(),
        "prefill_chunk": st.sampled_from([16, 128]),
        "n_batch": st.sampled_from([32, 64, 512]),
        "prompt_cache_memory": st.sampled_from([0, "100KiB", "1GiB"]),
        "eager": st.booleans(),
        "kv_unified": st.sampled_from([True, "auto", False]),
        "tile": st.sampled_from([0, 8]),
    }
)


class Alone:
    """Answers of requests that have a fresh, roomy context for themselves, without any reuse."""

    def __init__(self, model: Path) -> None:
        self._runner = asyncio.Runner()
        self._service, _ = serve(model, n_ctx=512, n_parallel=1, prefix_cache=False)
        self._known: dict[tuple[Any, ...], str] = {}

    def __call__(self, arrival: Arrival) -> str:
        key = (arrival.family, arrival.own, arrival.new, arrival.beams, arrival.narrow)
        if key not in self._known:
            response = self._runner.run(self._service.infer(arrival.request()))
            assert response.error_message is None
            self._known[key] = response.generated_text or ""
        return self._known[key]

    def close(self) -> None:
        self._runner.run(self._service.close())
        self._runner.close()


def serve(model: Path, **options: Any) -> tuple[LLMInferenceService, LLMModelManager]:
    config = ModelConfig(model_id="m", source=str(model), options={**EXACT, **options})
    manager = LLMModelManager(config=[config])
    return LLMInferenceService(manager, handlers=[LlamaCppHandler()]), manager


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Iterator[Alone]:
    found = Alone(tiny_model)
    yield found
    found.close()


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plan=st.lists(arrivals, min_size=1, max_size=12), options=choices)
def test_each_greedy_answer_is_that_of_the_request_alone(
    tiny_model: Path, alone: Alone, plan: list[Arrival], options: dict[str, Any]
) -> None:
    expected = [alone(arrival) for arrival in plan]
    tile = options.pop("tile")
    if not options["kv_unified"]:  # a beam needs a sequence
        options["n_parallel"] = max(3, options["n_parallel"])
    with pytest.MonkeyPatch.context() as patch:
        # Small streams, whose cells llama.cpp rounds up to more.
        patch.setattr(context_module, "_ROUNDED", 16)
        patch.setattr(context_module, "_LEAST_STREAM", 16)
        if options.pop("eager"):
            move_eagerly(patch)
        found = asyncio.run(drive(tiny_model, plan, options, tile))
    for wanted, (text, whole) in zip(expected, found, strict=True):
        assert text == wanted if whole else wanted.startswith(text)


async def drive(
    model: Path, plan: list[Arrival], options: dict[str, Any], tile: int
) -> list[tuple[str, bool]]:
    """The texts, and whether they are whole; at the end nothing is left in the engine."""
    service, manager = serve(model, **options)

    async def one(arrival: Arrival) -> tuple[str, bool]:
        for _ in range(arrival.pause):
            await asyncio.sleep(0)
        stream = service.stream(arrival.request(priority=arrival.priority, stream=True))
        chunks: list[str] = []
        async for chunk in stream:
            assert not isinstance(chunk, StreamError), chunk
            chunks.append(chunk)
            if arrival.close is not None and len(chunks) > arrival.close:
                await stream.aclose()
                return "".join(chunks), False
        response = stream.response
        assert (response.cached_prompt_tokens or 0) < (response.prompt_tokens or 1)
        return "".join(chunks), True

    async with asyncio.timeout(60), service:
        await manager.load("m")
        loaded = manager.get_loaded_model("m")
        assert loaded is not None
        engine = loaded.model_object
        engine._context.tile = tile
        statuses: set[int] = set()
        decode: Callable[[], int] = engine._context.decode

        def noted() -> int:
            status = decode()
            statuses.add(status)
            return status

        engine._context.decode = noted
        found = await asyncio.gather(*map(one, plan))
        while (health := engine.health()).num_requests_running or health.num_requests_waiting:
            await asyncio.sleep(0.001)
        # Cells that the account takes for free are free: llama.cpp has never been without.
        assert statuses <= {0, 2}
        no_leak(engine)
    return found
