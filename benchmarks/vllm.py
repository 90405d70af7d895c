"""Bars of the vLLM runtime, with SmolLM2-135M in 32 bits: what the service leaves of its speed.

Both sides use the same engine, in turn: the service, and vLLM's own ``AsyncLLM`` without it. The
engine's processes compute; what differs is this process's part. Greedy, the same prompts on both
sides, end of text not reached on either.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import (
    Bars,
    DiscardError,
    Measurement,
    Settings,
    UnavailableError,
    at_least,
    at_most,
    interleave,
)
from benchmarks.llamacpp import PROMPTS
from benchmarks.smollm2 import float32_folder

bar = Bars()

HOW: Final = "nox -s bench -- vllm installs it"
OPTIONS: Final[dict[str, Any]] = {"n_ctx": 1024, "n_parallel": 16, "kv_cache_memory": "1GiB"}


class Sides:
    """One engine, asked through the service and without it."""

    def __init__(self, folder: Path) -> None:
        from engineroom import LLMInferenceService, LLMModelManager, ModelConfig

        self._runner = asyncio.Runner()
        model = ModelConfig(model_id="m", source=str(folder), runtime="vllm", options=OPTIONS)
        self._manager = LLMModelManager(config=[model])
        self._service = LLMInferenceService(self._manager, handlers=["vllm"])
        self._runner.run(self._manager.load_configured_models())
        loaded = self._manager.get_loaded_model("m")
        assert loaded is not None
        self._engine = loaded.model_object
        self._numbers = itertools.count()

    def prompts(self, count: int, wanted: int) -> list[str]:
        """Prompts whose answers have ``count`` tokens. Warms up, too."""
        counts = self._runner.run(self._gather([self._served(p, count) for p in PROMPTS]))
        found = [p for p, (n, _) in zip(PROMPTS, counts, strict=True) if n == count]
        if not found:
            raise UnavailableError(f"no prompt gets an answer of {count} tokens; add some")
        return [found[i % len(found)] for i in range(wanted)]

    def served(self, prompts: Sequence[str], count: int) -> tuple[float, float]:
        """Seconds until all have ended, and the mean until their first chunk; by the service."""
        return self._measured([self._served(p, count) for p in prompts], count)

    def bare(self, prompts: Sequence[str], count: int) -> tuple[float, float]:
        """The same of ``AsyncLLM`` alone, from token ids to text."""
        return self._measured([self._bare(p, count) for p in prompts], count)

    def _measured(self, work: list[Any], count: int) -> tuple[float, float]:
        began = time.perf_counter()
        found = self._runner.run(self._gather(work))
        took = time.perf_counter() - began
        if any(n != count for n, _ in found):
            raise DiscardError(f"answers of {[n for n, _ in found]} tokens instead of {count}")
        return took, sum(first for _, first in found) / len(found)

    async def _gather(self, work: list[Any]) -> list[tuple[int, float]]:
        return await asyncio.gather(*work)

    async def _served(self, prompt: str, count: int) -> tuple[int, float]:
        from engineroom import GenerationParams, InferenceRequest

        params = GenerationParams(temperature=0.0, max_new_tokens=count)
        stream = self._service.stream(InferenceRequest(model_id="m", prompt=prompt, params=params))
        began, first = time.perf_counter(), 0.0
        async for _ in stream:
            first = first or time.perf_counter() - began
        response = stream.response
        assert response is not None
        response.raise_for_error()
        return response.generated_tokens or 0, first

    async def _bare(self, prompt: str, count: int) -> tuple[int, float]:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0, max_tokens=count, output_kind=RequestOutputKind.DELTA
        )
        tokens = tokens_input(self._engine.codec.prompt(prompt, None))
        began, first, seen = time.perf_counter(), 0.0, 0
        outputs = self._engine._llm.generate(tokens, sampling, f"bare-{next(self._numbers)}")
        async for output in outputs:
            first = first or time.perf_counter() - began
            seen += len(output.outputs[0].token_ids)
        return seen, first

    def close(self) -> None:
        """Unload the model."""
        self._runner.run(self._service.close())
        self._runner.close()


def model_folder() -> Path:
    """SmolLM2 in 32 bits.

    :raises UnavailableError: something that this needs is not installed.
    """
    for name in ("vllm", "engineroom_vllm"):
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(f"{name} is not installed; {HOW}")
    return float32_folder(HOW)


@bar(8)
def service_over_async_llm(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second and time to the first token, through the service ÷ ``AsyncLLM`` alone.

    A: ``service.stream``, from the text of the prompt to the last chunk. B: ``AsyncLLM.generate``
    from token ids to the last text, on the same engine. At 1, 8 and 16 requests.
    """
    count = 16 if settings.quick else 48
    sides = Sides(model_folder())
    try:
        for requests in (1, 8, 16):
            prompts = sides.prompts(count, requests)
            firsts: list[float] = []

            def served(prompts: list[str] = prompts, firsts: list[float] = firsts) -> float:
                took, first = sides.served(prompts, count)
                firsts.append(first)
                return took

            bare_firsts: list[float] = []

            def bare(prompts: list[str] = prompts, firsts: list[float] = bare_firsts) -> float:
                took, first = sides.bare(prompts, count)
                firsts.append(first)
                return took

            pairs = interleave(served, bare, settings.rounds)
            total = requests * count
            yield Measurement(
                f"vllm service ÷ AsyncLLM, tokens/s, {requests} at once",
                at_least(0.95),
                pairs.values(lambda a, b: b / a),
                pairs.discarded,
                f"{total / pairs.median_a():.1f} tokens/s through the service, "
                f"{total / pairs.median_b():.1f} without",
            )
            both = list(zip(firsts, bare_firsts, strict=False))
            yield Measurement(
                f"vllm service ÷ AsyncLLM, first token, {requests} at once",
                at_most(1.1),
                [a / b for a, b in both],
                0,
                f"{1000 * min(firsts):.0f} ms at best through the service, "
                f"{1000 * min(bare_firsts):.0f} ms without",
            )
    finally:
        sides.close()
