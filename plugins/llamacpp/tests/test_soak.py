"""Thousands of mixed requests: not one wrong answer, and memory stays as it is after warm-up.

Every answer is compared with that of the same request alone. ``ENGINEROOM_SOAK_REQUESTS=20000``
has it run for minutes instead of seconds; what was done is printed (``pytest -s``).
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest
from llama_benches import EXACT, NO_END, no_leak
from llama_bert import LETTERS, write_bert

from engineroom import (
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
    StreamError,
)
from engineroom_llamacpp import LlamaCppHandler

pytestmark = pytest.mark.long

REQUESTS: Final = int(os.environ.get("ENGINEROOM_SOAK_REQUESTS", "600"))
WARM_UP: Final = max(200, REQUESTS // 10)
CLIENTS: Final = 24
"""Three times as many as there are places: some always wait."""
CONTEXT: Final = 256
"""Cells: eight of the longest requests would need five times as many, so that some give way."""
MORE_BYTES: Final = 3 << 20
"""What memory may grow by after the warm-up. 20,000 requests were seen to take 0.3 MiB, which the
allocators keep; with so many, 180 bytes lost by each are too much."""
MOST_OFF: Final = 2e-4
"""How much a component of a vector of length 1 may depend on who else is in the batch. In 3,000
batches it was 2.8e-5 at most (5.5e-4 with flash attention, which reads halves), and nothing
between two runs of the same batch; vectors of two different texts are 0.04 apart or more."""
MODELS: Final[dict[str, dict[str, Any]]] = {
    "shared": {"n_parallel": 8, "prefill_chunk": 32, "n_batch": 64},
    "lookup": {"n_parallel": 8, "prefix_cache": False, "prompt_lookup": True},
    "single": {"n_parallel": 1},
}
"""Three ways to run the same weights."""


@dataclass(frozen=True)
class Kind:
    """A request that is sent again and again; ``expected`` is what it gives alone."""

    prompt: str
    params: GenerationParams
    stop: list[str] | None
    expected: tuple[Any, ...] = ()

    def request(self, model: str, **more: Any) -> InferenceRequest:
        return InferenceRequest(
            model_id=model, prompt=self.prompt, params=self.params, stop_sequences=self.stop, **more
        )


@dataclass
class Seen:
    """What the load has done."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: int = REQUESTS


def make_kinds(chance: random.Random, count: int) -> list[Kind]:
    families = ["".join(chance.choice("abcdefgh ") for _ in range(110)) for _ in range(4)]
    kinds = []
    for _ in range(count):
        prompt = chance.choice(families)[: chance.choice((1, 20, 64, 100, 110))]
        prompt += "".join(chance.choice(LETTERS) for _ in range(chance.randrange(20)))
        bias = dict(NO_END) if chance.random() < 0.7 else {}
        if chance.random() < 0.3:  # a text of few letters, so that proposals are often right
            bias |= dict.fromkeys(range(100, 103), 9.0)
        params: dict[str, Any] = {
            "max_new_tokens": chance.randint(1, 40),
            "temperature": 0.0,
            "logit_bias": bias,
        }
        way = chance.random()
        if way < 0.35:
            params |= {
                "temperature": chance.choice((0.3, 1.0, 1.7)),
                "seed": chance.randrange(1000),
                "top_k": chance.choice((None, 5, 40)),
                "top_p": chance.choice((None, 0.7, 0.95)),
                "min_p": chance.choice((None, 0.02)),
            }
        elif way < 0.45:
            params["num_beams"] = chance.choice((2, 3))
        if params.get("num_beams") is None:
            if chance.random() < 0.3:
                params["repetition_penalty"] = 1.3
                params["presence_penalty"] = 0.5
            if chance.random() < 0.2:
                params["logprobs"] = 2
        kinds.append(Kind(prompt, GenerationParams(**params), None))
    return kinds


def serve(folder: Path, *, alone: bool = False) -> tuple[LLMInferenceService, LLMModelManager]:
    models: Sequence[tuple[str, dict[str, Any]]] = list(MODELS.items())
    if alone:
        models = [("shared", {"n_parallel": 1, "prefix_cache": False})]
    tiny = str(folder / "tiny.gguf")
    configs = [
        ModelConfig(
            model_id=name, source=tiny, options={**EXACT, "n_ctx": CONTEXT, "trial": False, **own}
        )
        for name, own in models
    ]
    options = {"n_threads": 1, "trial": False, "flash_attn": "off"}
    configs.append(
        ModelConfig(model_id="vectors", source=str(folder / "bert.gguf"), options=options)
    )
    manager = LLMModelManager(config=configs)
    return LLMInferenceService(manager, handlers=[LlamaCppHandler()]), manager


async def each_alone(
    folder: Path, kinds: list[Kind], texts: list[str], chance: random.Random
) -> tuple[list[Kind], list[Any]]:
    """The kinds with what they give, some with a stop sequence out of that; the texts' vectors."""
    service, _ = serve(folder, alone=True)
    done = []
    async with service:
        for kind in kinds:
            response = await service.infer(kind.request("shared"))
            text, stop = response.generated_text or "", None
            if text and kind.params.num_beams == 1 and chance.random() < 0.3:
                start = chance.randrange(len(text))
                stop = [text[start : start + chance.randint(1, 3)], "what nobody writes"]
                response = await service.infer(replace(kind, stop=stop).request("shared"))
            response.raise_for_error()
            done.append(replace(kind, stop=stop, expected=essence(response)))
        vectors = [(await service.embed("vectors", [text])).vectors[0] for text in texts]
    return done, vectors


def essence(response: Any) -> tuple[Any, ...]:
    likeliest = [entry.token_id for entry in response.logprobs or ()]
    return (
        response.generated_text,
        response.finish_reason,
        response.stop_sequence,
        response.prompt_tokens,
        response.generated_tokens,
        likeliest,
    )


class Load:
    """The clients."""

    def __init__(
        self,
        service: LLMInferenceService,
        kinds: list[Kind],
        texts: list[str],
        vectors: list[Any],
        seed: int,
    ) -> None:
        self.service, self.kinds, self.texts, self.vectors = service, kinds, texts, vectors
        self.seen = Seen()
        self._seed = seed

    async def send(self, count: int) -> None:
        """So many requests, by all clients together."""
        self.seen.left = count
        self._seed += 1
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(random.Random(1000 * self._seed + number)))

    async def _client(self, chance: random.Random) -> None:
        while self.seen.left > 0:
            self.seen.left -= 1
            if chance.random() < 0.05:
                await self._embed(chance)
                continue
            kind = chance.choice(self.kinds)
            model = chance.choice(("shared", "shared", "shared", "lookup", "single"))
            request = kind.request(model, priority=chance.choice((0, 0, 0, 1)))
            way = chance.random()
            if way < 0.45:
                response = await self.service.infer(request)
                self._compare(kind, request, response)
            elif way < 0.85:
                await self._stream(kind, request, None)
            elif way < 0.95:
                await self._stream(kind, request, chance.randrange(12))
            else:
                await self._give_up(request, chance.randrange(1, 40))

    async def _stream(self, kind: Kind, request: InferenceRequest, close: int | None) -> None:
        stream = self.service.stream(request)
        chunks: list[str] = []
        async for chunk in stream:
            if isinstance(chunk, StreamError):
                self.seen.wrong.append(f"{request}: {chunk}")
                return
            chunks.append(chunk)
            if len(chunks) == close:
                await stream.aclose()
                break
        text = "".join(chunks)
        response = stream.response
        if response is not None and response.finish_reason != "cancelled":
            self._compare(kind, request, response)
            if text != kind.expected[0]:
                self.seen.wrong.append(f"{request}: the stream gave {text!r}")
        else:
            self.seen.counts["cancelled"] += 1
            if not kind.expected[0].startswith(text):
                self.seen.wrong.append(f"{request}: until it was closed it gave {text!r}")

    async def _give_up(self, request: InferenceRequest, turns: int) -> None:
        task = asyncio.create_task(self.service.infer(request))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        self.seen.counts["cancelled" if task.cancelled() else "ended before"] += 1

    async def _embed(self, chance: random.Random) -> None:
        chosen = [chance.randrange(len(self.texts)) for _ in range(chance.randint(1, 6))]
        found = await self.service.embed("vectors", [self.texts[place] for place in chosen])
        self.seen.counts["embedded"] += 1
        for place, vector in zip(chosen, found.vectors, strict=True):
            off = float(np.abs(np.subtract(vector, self.vectors[place])).max())
            if off > MOST_OFF:
                self.seen.wrong.append(f"a vector for {self.texts[place]!r} that is {off:.2g} off")

    def _compare(self, kind: Kind, request: InferenceRequest, response: Any) -> None:
        self.seen.counts["answered"] += 1
        self.seen.counts[str(response.finish_reason)] += 1
        self.seen.counts["reused"] += bool(response.cached_prompt_tokens)
        if (found := essence(response)) != kind.expected:
            self.seen.wrong.append(
                f"{request}: {found}, {response.error_message}; alone: {kind.expected}"
            )


async def test_thousands_of_mixed_requests(tmp_path: Path, write_model: Any) -> None:
    write_model(tmp_path / "tiny.gguf")
    write_bert(tmp_path / "bert.gguf")
    chance = random.Random(20)
    texts = [
        " ".join(chance.choice(("the", "cat", "sat", "mat", "duck")) for _ in range(length))
        for length in range(1, 30)
    ]
    kinds = make_kinds(chance, max(100, min(1000, REQUESTS // 10)))
    kinds, vectors = await each_alone(tmp_path, kinds, texts, chance)

    me = psutil.Process()
    service, manager = serve(tmp_path)
    load = Load(service, kinds, texts, vectors, seed=1)
    async with service:
        await manager.load_configured_models()
        began = time.perf_counter()
        await load.send(WARM_UP)
        sizes = [settled(me)]
        for _ in range(4):
            await load.send((REQUESTS - WARM_UP) // 4)
            sizes.append(settled(me))
        took = time.perf_counter() - began
        engines = [manager.get_loaded_model(name).model_object for name in MODELS]
        for engine in engines:
            while (health := engine.health()).num_requests_running or health.num_requests_waiting:
                await asyncio.sleep(0.001)
            no_leak(engine)
        preempted = sum(engine.preemptions for engine in engines)
        accepted = sum(engine.scheduler.accepted for engine in engines)
    counts = load.seen.counts
    print(
        f"\n{REQUESTS} requests in {took:.0f} s, {len(kinds)} kinds: {dict(counts)}, "
        f"{preempted} gave way, {accepted} proposed tokens accepted; "
        f"resident MiB {', '.join(f'{size / 2**20:.1f}' for size in sizes)}"
    )
    assert not load.seen.wrong, (len(load.seen.wrong), load.seen.wrong[:3])
    assert preempted > 0
    assert accepted > 0
    for what in ("answered", "cancelled", "reused", "embedded", "stop_sequence", "length"):
        assert counts[what] > 0, counts
    assert sizes[-1] - sizes[0] < MORE_BYTES, sizes


def settled(process: psutil.Process) -> int:
    """Resident memory, without what only waits for the collector."""
    gc.collect()
    return int(process.memory_info().rss)
