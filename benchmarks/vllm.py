"""Bars of the vLLM runtime, with SmolLM2-135M in 32 bits: what the service leaves of its speed.

Service and bare side use the same engine, in turn: the service, and vLLM's own ``AsyncLLM``
without it. The engine's processes compute; what differs is this process's part. Then the service
and engineroom's server beside ``vllm serve``. Greedy, the same prompts on all sides, end of text
not reached on any.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from benchmarks.harness import (
    Bars,
    Measurement,
    Pair,
    Settings,
    Target,
    UnavailableError,
    at_least,
    at_most,
    collect,
)
from benchmarks.smollm2 import float32_folder
from benchmarks.vllm_sides import Sides, VLLMServe

bar = Bars()

HOW: Final = "nox -s bench -- vllm installs it"
REQUESTS: Final = (1, 8, 16)

Side: TypeAlias = Callable[[Sequence[str], int], tuple[float, float]]
"""A side of a comparison: prompts and tokens of each answer → seconds in all, and to the first."""


def model_folder() -> Path:
    """SmolLM2 in 32 bits.

    :raises UnavailableError: something that this needs is not installed.
    """
    for name in ("vllm", "engineroom_vllm"):
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(f"{name} is not installed; {HOW}")
    return float32_folder(HOW)


@bar(8)
def vllm_with_and_without(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second and time to the first token, at 1, 8 and 16 requests.

    A: ``service.stream``, from the text of the prompt to the last chunk; then engineroom's server
    over HTTP. B: ``AsyncLLM.generate`` from token ids to the last text, on the same engine; then
    ``vllm serve`` over HTTP, whose engine is another with the same arguments.
    """
    folder = model_folder()
    count = 16 if settings.quick else 64
    sides = Sides(folder)
    try:
        prompts = sides.prompts(count, max(REQUESTS))
        for requests in REQUESTS:
            few = prompts[:requests]
            yield from _compared(
                "service ÷ AsyncLLM",
                at_least(0.98),
                at_most(1.1),
                (sides.served, sides.bare),
                few,
                count,
                settings,
            )
        with VLLMServe(folder) as server:

            def theirs(prompts: Sequence[str], count: int) -> tuple[float, float]:
                return sides.over_http(prompts, count, server.port)

            theirs(prompts, count)  # warm
            for requests in REQUESTS:
                few = prompts[:requests]
                yield from _compared(
                    "service ÷ vllm serve",
                    at_least(1.0),
                    at_most(1.0),
                    (sides.served, theirs),
                    few,
                    count,
                    settings,
                )
            sides.over_http(prompts, count)  # warm
            yield from _compared(
                "engineroom serve ÷ vllm serve",
                at_least(1.0),
                at_most(1.0),
                (sides.over_http, theirs),
                prompts[:8],
                count,
                settings,
            )
    finally:
        sides.close()


def _compared(
    what: str,
    speed: Target,
    first: Target,
    sides: tuple[Side, Side],
    prompts: Sequence[str],
    count: int,
    settings: Settings,
) -> Iterator[Measurement]:
    """Two lines of the table: tokens per second, and time to the first token."""
    firsts: dict[Pair, Pair] = {}

    def measure() -> Pair:
        (a, first_a), (b, first_b) = (side(prompts, count) for side in sides)
        firsts[Pair(a, b)] = Pair(first_a, first_b)
        return Pair(a, b)

    pairs = collect(measure, settings.rounds)
    total = len(prompts) * count
    yield Measurement(
        f"vllm {what}, tokens/s, {len(prompts)} at once",
        speed,
        pairs.values(lambda a, b: b / a),
        pairs.discarded,
        f"{total / pairs.median_a():.1f} ÷ {total / pairs.median_b():.1f} tokens/s",
    )
    seen = [firsts[pair] for pair in pairs.kept]
    yield Measurement(
        f"vllm {what}, first token, {len(prompts)} at once",
        first,
        [a / b for a, b in seen],
        pairs.discarded,
        f"{1000 * min(a for a, _ in seen):.0f} ÷ {1000 * min(b for _, b in seen):.0f} ms at best",
    )
