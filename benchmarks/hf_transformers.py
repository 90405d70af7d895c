"""Bars of the Transformers runtime, with SmolLM2-135M in 32 bits on two threads of the CPU.

Held against what the library itself has: ``generate()``, its continuous batching, and its server
(:mod:`benchmarks.bare_transformers`). Greedy, the same fixed prompts on both sides, end of text
not reached: ``generate()`` is told to ignore it, and for the others prompts are left out whose
answer would end early. All times are wall-clock times, prompts included. Each side has a process
of its own (see :mod:`benchmarks.workers`); the service's is asked without HTTP.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import (
    Bars,
    Measurement,
    Pair,
    Settings,
    UnavailableError,
    at_least,
    at_most,
    collect,
    interleave,
    repeat,
)
from benchmarks.latency import WARM, LatencySide
from benchmarks.llamacpp import PROMPTS
from benchmarks.service import EIGHT
from benchmarks.smollm2 import float32_folder
from benchmarks.workers import Peak, Worker

bar = Bars()

THREADS: Final = 2
OPTIONS: Final[dict[str, Any]] = {
    "device": "cpu",
    "dtype": "float32",
    "max_context": 2048,
    "n_threads": THREADS,
}
CHUNK: Final = 128
"""``prefill_chunk`` where it matters, which is its default."""
LONG_PROMPT: Final = 1024
SHARED: Final = 512
HOW: Final = "nox -s bench -- hf_transformers installs it"
BESIDE: Final = 48
"""Tokens that requests need to have which decode beside something."""
SHORT: Final = "The capital of Norway is Oslo, and the capital of Sweden is"


class Side(LatencySide):
    """The model behind the service, in this process.

    :param changes: other options than the usual ones.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        super().__init__(folder, "hf_transformers", OPTIONS | changes)

    def resident(self, prompts: list[str], count: int) -> float:
        """Most memory that the process had while it answered all of them at once, in MiB."""
        with Peak() as peak:
            self.at_once(prompts, count)
        return peak.mib


class ForgetfulSide(Side):
    """Nothing is kept of the prompts, which come again and again."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        super().__init__(folder, prefix_cache=False, **changes)


class NinePlacesSide(ForgetfulSide):
    """Room for a ninth. Alone, a prompt is read in steps as large as those beside eight others."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            max_batch_size=EIGHT + 1,
            prefill_chunk=CHUNK,
            max_batch_tokens=CHUNK + EIGHT,
        )


def model_folder() -> Path:
    """SmolLM2 in 32 bits.

    :raises UnavailableError: the plugin, or something that the conversion needs, is missing.
    """
    for name in ("engineroom_hf_transformers", "torch", "transformers", "psutil"):
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(f"{name} is not installed; {HOW}")
    return float32_folder(HOW)


def _count(settings: Settings) -> int:
    return 24 if settings.quick else 64


def _eight(side: Worker, count: int) -> list[str]:
    prompts: list[str] = side.call("long_answers", PROMPTS, count)
    if len(prompts) < EIGHT:
        raise UnavailableError(
            f"only {len(prompts)} of {len(PROMPTS)} prompts get an answer of {count} tokens from "
            "this build of the model; add some to PROMPTS"
        )
    return prompts[:EIGHT]


def _against(
    what: str,
    target: float,
    sides: tuple[Callable[[], float], Callable[[], float]],
    tokens: int,
    settings: Settings,
) -> Measurement:
    """Tokens per second of the first side ÷ of the second."""
    pairs = interleave(*sides, settings.rounds)
    return Measurement(
        what,
        at_least(target),
        pairs.values(lambda a, b: b / a),
        pairs.discarded,
        f"{tokens / pairs.median_a():.1f} tokens/s against {tokens / pairs.median_b():.1f}",
    )


@bar(6)
def batching(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of eight requests at once ÷ one after another.

    A: eight streams at one time through the service. B: the same eight, each begun when the one
    before has ended; in the second line by ``model.generate()`` alone, without any service.
    """
    from benchmarks.bare_transformers import GenerateSide

    folder, count = model_folder(), _count(settings)
    with Worker(Side, folder) as service, Worker(GenerateSide, folder, THREADS) as bare:
        prompts = _eight(service, count)
        bare.call("one_by_one", prompts[:1], 4)

        def at_once() -> float:
            return float(service.call("at_once", prompts, count))

        for what, other in (("one after another", service), ("generate() one by one", bare)):
            yield _against(
                f"hf_transformers 8 at once ÷ {what}",
                3.0,
                (at_once, lambda: float(other.call("one_by_one", prompts, count))),  # noqa: B023
                EIGHT * count,
                settings,
            )


@bar(7)
def against_serve(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of eight at once ÷ what the library's own servers and batching give.

    A: eight streams at one time through the service, in its process. B: eight HTTP clients, each
    with a streamed request, ask ``transformers serve``, which runs them one after another; then
    the same with its continuous batching; then ``generate_batch`` in process, whose manager is
    kept from round to round. Their caches are sized to what is needed here.
    """
    from benchmarks.bare_transformers import BatchSide, ServeSide

    folder, count = model_folder(), _count(settings)
    with Worker(Side, folder) as service:
        prompts = _eight(service, count)

        def at_once() -> float:
            return float(service.call("at_once", prompts, count))

        for what, target, batching in (
            ("transformers serve", 3.0, False),
            ("transformers serve, continuous batching", 1.2, True),
        ):
            with ServeSide(folder, THREADS, batching=batching) as server:
                server.at_once(prompts[:2], 4)
                yield _against(
                    f"hf_transformers ÷ {what}, 8 at once",
                    target,
                    (at_once, lambda: server.at_once(prompts, count)),
                    EIGHT * count,
                    settings,
                )
        with Worker(BatchSide, folder, THREADS) as batch:
            batch.call("at_once", prompts, count)
            yield _against(
                "hf_transformers ÷ generate_batch, 8 at once",
                1.2,
                (at_once, lambda: float(batch.call("at_once", prompts, count))),
                EIGHT * count,
                settings,
            )


@bar(9)
def ninth_request(settings: Settings) -> Iterator[Measurement]:
    """Time to the first token of a short request that comes while eight decode.

    A: that time, the median of four arrivals at different places of a step. B: the median step of
    the eight decoding requests, plus the same request's time to the first token when alone.
    """
    with Worker(NinePlacesSide, model_folder()) as service:
        prompts = _eight(service, BESIDE)
        steps: list[float] = []

        def measure() -> Pair:
            first, step, alone = service.call("ninth", prompts, SHORT)
            steps.append(step)
            return Pair(first, step + alone)

        pairs = collect(measure, settings.rounds)
    yield Measurement(
        "hf_transformers first token of a ninth ÷ (step + its prefill)",
        at_most(2.0),
        pairs.ratios(),
        pairs.discarded,
        f"{1000 * pairs.median_a():.0f} ms against {1000 * pairs.median_b():.0f}; "
        f"a step took {1000 * min(steps):.0f} ms at best",
    )


@bar(10)
def long_prompt_beside(settings: Settings) -> Iterator[Measurement]:
    """The longest gap of eight decoding requests while a prompt of 1024 tokens is read.

    A: the longest of all gaps between chunks of the eight. B: one step of the eight, plus one
    chunk's time: of 128 tokens, as the mean of reading the same prompt alone in such chunks.
    """
    with Worker(NinePlacesSide, model_folder()) as service:
        prompts = _eight(service, BESIDE)
        long = service.call("text", LONG_PROMPT, 0)
        chunks: list[float] = []

        def measure() -> Pair:
            longest, step, alone = service.call("gap", prompts, long)
            chunk = alone * CHUNK / LONG_PROMPT
            chunks.append(longest / chunk)
            return Pair(longest, step + chunk)

        pairs = collect(measure, settings.rounds)
    yield Measurement(
        "hf_transformers longest gap beside a 1k prompt ÷ (step + chunk)",
        at_most(1.0),
        pairs.ratios(),
        pairs.discarded,
        f"{1000 * pairs.median_a():.0f} ms against {1000 * pairs.median_b():.0f}; ÷ a chunk "
        f"without the step of the eight: {sorted(chunks)[len(chunks) // 2]:.2f}",
    )


@bar(11)
def shared_prefix(settings: Settings) -> Iterator[Measurement]:
    """Time to the first token with 512 tokens of the prompt in the cache ÷ with none.

    A: a request whose first 512 tokens an earlier one had, too. B: that earlier one. Every round
    has words of its own.
    """
    with Worker(Side, model_folder()) as service:
        seeds = itertools.count(1)
        service.call("shared_prefix", SHARED, 0)
        pairs = collect(
            lambda: Pair(*service.call("shared_prefix", SHARED, next(seeds))), settings.rounds
        )
    yield Measurement(
        "hf_transformers first token with a shared prefix, warm ÷ cold",
        at_most(0.15),
        pairs.ratios(),
        pairs.discarded,
        f"{1000 * pairs.median_a():.0f} ms warm, {1000 * pairs.median_b():.0f} cold",
    )


@bar(15)
def cancelling(settings: Settings) -> Iterator[Measurement]:
    """Milliseconds from cancelling a request until its slot can be used again.

    A: four of eight decoding requests are cancelled, one after another, at different places of a
    step; the longest counts, less the step that was under way. Below zero: the slot was free
    before as much as the whole step had passed. Second line: a prompt of 1024 tokens, alone, is
    cancelled while it is read, at three places; the longest counts. There is no other side.
    """
    with Worker(ForgetfulSide, model_folder()) as service:
        prompts = _eight(service, BESIDE)
        found, refused = repeat(lambda: float(service.call("freed", prompts)), settings.rounds)
        yield Measurement(
            "hf_transformers cancel → slot free, less the step", at_most(5, " ms"), found, refused
        )
        long = service.call("text", LONG_PROMPT, 0)
        alone = min(float(service.call("first", long)) for _ in range(2))
        found, refused = repeat(
            lambda: float(service.call("freed_prefill", long, alone)), settings.rounds
        )
    yield Measurement(
        "hf_transformers cancel → slot free, lone prefill",
        at_most(25, " ms"),
        found,
        refused,
        f"the whole prompt takes {1000 * alone:.0f} ms",
    )


@bar(16)
def survivor(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of the one that is left when seven of eight are cancelled ÷ alone.

    A: from the third step after the cancelling. B: the same tokens of the same request when
    nobody else was there from its beginning.
    """
    with Worker(Side, model_folder()) as service:
        length = 16 if settings.quick else 40
        prompts = _eight(service, WARM + length + 8)
        pairs = collect(lambda: Pair(*service.call("survivor", prompts, length)), settings.rounds)
    yield Measurement(
        "hf_transformers survivor of eight ÷ alone",
        at_least(0.9),
        pairs.values(lambda a, b: b / a),
        pairs.discarded,
        f"{length / pairs.median_a():.1f} tokens/s against {length / pairs.median_b():.1f}",
    )


@bar(17)
def memory(settings: Settings) -> Iterator[Measurement]:
    """Resident memory while eight sequences are generated ÷ ``generate()`` with a batch of eight.

    A: a fresh process with the service. B: a fresh process with the library alone. Of each the
    most that it had during the generation, not while the model was loaded.
    """
    from benchmarks.bare_transformers import GenerateSide

    folder, count = model_folder(), _count(settings)
    with Worker(Side, folder) as service:
        prompts = _eight(service, count)

    def resident(*side: Any) -> float:
        with Worker(*side) as fresh:
            return float(fresh.call("resident", prompts, count))

    pairs = interleave(
        lambda: resident(Side, folder),
        lambda: resident(GenerateSide, folder, THREADS),
        min(settings.rounds, 3),
    )
    yield Measurement(
        "hf_transformers resident memory ÷ generate(), 8 sequences",
        at_most(1.05),
        pairs.ratios(),
        pairs.discarded,
        f"{pairs.median_a():.0f} MiB against {pairs.median_b():.0f}",
    )
