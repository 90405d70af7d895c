"""Bars of the llama.cpp runtime, with SmolLM2-135M: what the service leaves of its speed.

Greedy, the same fixed prompts on both sides, end of text not reached on either: prompts whose
answer would end early are left out before anything is measured, and a round in which one does
nevertheless is discarded. All times are wall-clock times of whole requests, prompts included.
Each side has a process of its own (see :mod:`benchmarks.workers`).
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
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
from benchmarks.latency import WARM
from benchmarks.llamacpp_servers import NativeServerSide, PythonServerSide
from benchmarks.llamacpp_sides import (
    CHUNK,
    BareSide,
    ForgetfulSide,
    NinePlacesSide,
    Side,
    model_path,
)
from benchmarks.service import EIGHT
from benchmarks.workers import Worker

bar = Bars()

PROMPTS: Final = (
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "The following is a long list of animals: cat, dog, horse, cow, sheep,",
    "2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22,",
    "Chapter 1. The morning was cold and bright, and the clocks in the square",
    "import math\n\n\ndef area(radius):\n    return",
    "a b c d e f g a b c d e f g a b c d",
    "Monday, Tuesday, Wednesday, Thursday, Friday,",
    "The history of the Roman Empire begins with",
    "Water is made of hydrogen and oxygen. It",
    "one two three one two three one two three one",
    "100, 99, 98, 97, 96, 95, 94, 93, 92,",
    "There are many kinds of trees in the forest. The first",
    "5 + 1 = 6\n5 + 2 = 7\n5 + 3 = 8\n5 + 4 =",
    "A, B, C, D, E, F, G, A, B, C, D, E,",
    "She opened the letter, read it twice, and then",
)
LONG_PROMPT: Final = 1024
SHARED: Final = 512
BESIDE: Final = 48
"""Tokens that requests need to have which decode beside something."""
SHORT: Final = "The capital of Norway is Oslo, and the capital of Sweden is"


def _through_service(settings: Settings, requests: int) -> tuple[list[float], int, str]:
    count = _count(settings)
    path = model_path("Q4_0")
    with Worker(ForgetfulSide, path) as service, Worker(BareSide, path) as bare:
        prompts = _prompts(service, count)[:requests]
        tokens = service.call("tokens", prompts)
        note = bare.call("choose_sampling", tokens, count)
        service.call("at_once", prompts, count)
        pairs = interleave(
            lambda: float(service.call("at_once", prompts, count)),
            lambda: float(bare.call("generate", tokens, count)),
            settings.rounds,
        )
    total = requests * count
    note = (
        f"{total / pairs.median_a():.0f} tokens/s through the service, "
        f"{total / pairs.median_b():.0f} bare; {note}"
    )
    return pairs.values(lambda a, b: b / a), pairs.discarded, note


@bar(2)
def one_request(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of one streamed request through the service ÷ in the bare loop, Q4_0.

    A: ``service.stream``, from the request to the last chunk: tokenising, prompt, 128 tokens,
    their text. B: :class:`~benchmarks.bare_llamacpp.BareLoop` from token ids to token ids, no
    text, with the same context parameters.
    """
    values, discarded, note = _through_service(settings, 1)
    yield Measurement(
        "llamacpp service ÷ bare loop, 1 request, Q4_0", at_least(0.97), values, discarded, note
    )


@bar(3)
def eight_requests(settings: Settings) -> Iterator[Measurement]:
    """The same as bar 2 with eight requests at once, Q4_0.

    A: eight streams through the service at one time. B: the bare loop with all eight in one
    batch, whose first step reads the eight prompts.
    """
    values, discarded, note = _through_service(settings, EIGHT)
    yield Measurement(
        "llamacpp service ÷ bare loop, 8 at once, Q4_0", at_least(0.95), values, discarded, note
    )


@bar(4)
def batching(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of eight requests at once ÷ one after another, through the service.

    A: eight streams at one time. B: the same eight, each begun when the one before has ended.
    """
    count = _count(settings)
    for kind, target in (("Q4_1", 1.35), ("Q8_0", 1.9), ("Q4_0", 2.0)):
        with Worker(ForgetfulSide, model_path(kind)) as service:
            prompts = _prompts(service, count)
            pairs = interleave(
                lambda: float(service.call("at_once", prompts, count)),  # noqa: B023
                lambda: float(service.call("one_by_one", prompts, count)),  # noqa: B023
                settings.rounds,
            )
        total = EIGHT * count
        yield Measurement(
            f"llamacpp 8 at once ÷ one after another, {kind}",
            at_least(target),
            pairs.values(lambda a, b: b / a),
            pairs.discarded,
            f"{total / pairs.median_a():.0f} tokens/s at once, "
            f"{total / pairs.median_b():.0f} one after another",
        )


@bar(5)
def against_the_native_server(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of eight requests at once ÷ the servers that there are, Q4_0 and Q8_0.

    A: eight streams at one time through the service. B: eight clients that stream from a server
    by HTTP on the loopback interface, with the same model, threads and context: llama.cpp's own,
    with as many slots; then llama-cpp-python's, which has one. None reuses what it has read. The
    wheel of llama.cpp's server is compiled for more processors than this one; to compare with a
    library that is compiled alike, name its folder in ``LLAMA_CPP_LIB_PATH``.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UnavailableError("llama.cpp's server is not installed; pip install xllamacpp")
    from engineroom import default_threads

    count = _count(settings)
    for kind in ("Q4_0", "Q8_0"):
        path = model_path(kind)
        with (
            Worker(ForgetfulSide, path) as service,
            Worker(NativeServerSide, path, default_threads()) as server,
        ):
            prompts = _prompts(service, count)
            server.call("at_once", prompts, count)
            built = f"{server.call('built_for')} against {service.call('built_for')} here"
            pairs = interleave(
                lambda: float(service.call("at_once", prompts, count)),  # noqa: B023
                lambda: float(server.call("at_once", prompts, count)),  # noqa: B023
                settings.rounds,
            )
        total = EIGHT * count
        yield Measurement(
            f"llamacpp 8 at once ÷ llama.cpp's own server, {kind}",
            at_least(1.0),
            pairs.values(lambda a, b: b / a),
            pairs.discarded,
            f"{total / pairs.median_a():.0f} tokens/s, {total / pairs.median_b():.0f} there; "
            f"its library uses {built}",
        )
    for kind in ("Q4_0", "Q8_0"):
        path = model_path(kind)
        with (
            Worker(ForgetfulSide, path) as service,
            PythonServerSide(path, default_threads(), service.call("ends")) as python_server,
        ):
            prompts = _prompts(service, count)
            python_server.at_once(prompts[:2], count)
            pairs = interleave(
                lambda: float(service.call("at_once", prompts, count)),  # noqa: B023
                lambda: python_server.at_once(prompts, count),  # noqa: B023
                settings.rounds,
            )
        total = EIGHT * count
        yield Measurement(
            f"llamacpp 8 at once ÷ llama-cpp-python's server, {kind}",
            at_least(1.0),
            pairs.values(lambda a, b: b / a),
            pairs.discarded,
            f"{total / pairs.median_a():.0f} tokens/s, {total / pairs.median_b():.0f} there",
        )


@bar(9)
def ninth_request(settings: Settings) -> Iterator[Measurement]:
    """Time to the first token of a short request that comes while eight decode, Q4_0.

    A: that time, the median of four arrivals at different places of a step. B: the median step of
    the eight decoding requests, plus the same request's time to the first token when alone.
    """
    with Worker(NinePlacesSide, model_path("Q4_0")) as service:
        prompts = _prompts(service, BESIDE)
        steps: list[float] = []

        def measure() -> Pair:
            first, step, alone = service.call("ninth", prompts, SHORT)
            steps.append(step)
            return Pair(first, step + alone)

        pairs = collect(measure, settings.rounds)
    yield Measurement(
        "llamacpp first token of a ninth ÷ (step + its prefill)",
        at_most(2.0),
        pairs.ratios(),
        pairs.discarded,
        f"{1000 * pairs.median_a():.0f} ms against {1000 * pairs.median_b():.0f}; "
        f"a step took {1000 * min(steps):.0f} ms at best",
    )


@bar(10)
def long_prompt_beside(settings: Settings) -> Iterator[Measurement]:
    """The longest gap of eight decoding requests while a prompt of 1024 tokens is read, Q4_0.

    A: the longest of all gaps between chunks of the eight. B: one step of the eight, plus one
    chunk's time: of 128 tokens, as the mean of reading the same prompt alone in such chunks.
    """
    with Worker(NinePlacesSide, model_path("Q4_0")) as service:
        prompts = _prompts(service, BESIDE)
        long = service.call("text", LONG_PROMPT, 0)
        chunks: list[float] = []

        def measure() -> Pair:
            longest, step, alone = service.call("gap", prompts, long)
            chunk = alone * CHUNK / LONG_PROMPT
            chunks.append(longest / chunk)
            return Pair(longest, step + chunk)

        pairs = collect(measure, settings.rounds)
    yield Measurement(
        "llamacpp longest gap beside a 1k prompt ÷ (step + chunk)",
        at_most(1.0),
        pairs.ratios(),
        pairs.discarded,
        f"{1000 * pairs.median_a():.0f} ms against {1000 * pairs.median_b():.0f}; ÷ a chunk "
        f"without the step of the eight: {sorted(chunks)[len(chunks) // 2]:.2f}",
    )


@bar(11)
def shared_prefix(settings: Settings) -> Iterator[Measurement]:
    """Time to the first token with 512 tokens of the prompt in the cache ÷ with none, Q4_0.

    A: a request whose first 512 tokens an earlier one had, too. B: that earlier one. Every round
    has words of its own.
    """
    with Worker(Side, model_path("Q4_0")) as service:
        seeds = itertools.count(1)
        service.call("shared_prefix", SHARED, 0)
        pairs = collect(
            lambda: Pair(*service.call("shared_prefix", SHARED, next(seeds))), settings.rounds
        )
    yield Measurement(
        "llamacpp first token with a shared prefix, warm ÷ cold",
        at_most(0.15),
        pairs.ratios(),
        pairs.discarded,
        f"{1000 * pairs.median_a():.0f} ms warm, {1000 * pairs.median_b():.0f} cold",
    )


@bar(15)
def cancelling(settings: Settings) -> Iterator[Measurement]:
    """Milliseconds from cancelling a request until its slot can be used again, Q4_0.

    A: four of eight decoding requests are cancelled, one after another, at different places of a
    step; the longest counts, less the step that was under way. Below zero: the slot was free
    before as much as the whole step had passed. Second line: a prompt of 1024 tokens, alone, is
    cancelled while it is read, at three places; the longest counts. There is no other side.
    """
    with Worker(ForgetfulSide, model_path("Q4_0")) as service:
        prompts = _prompts(service, BESIDE)
        found, refused = repeat(lambda: float(service.call("freed", prompts)), settings.rounds)
        yield Measurement(
            "llamacpp cancel → slot free, less the step", at_most(5, " ms"), found, refused
        )
        long = service.call("text", LONG_PROMPT, 0)
        alone = min(float(service.call("first", long)) for _ in range(2))
        found, refused = repeat(
            lambda: float(service.call("freed_prefill", long, alone)), settings.rounds
        )
    yield Measurement(
        "llamacpp cancel → slot free, lone prefill",
        at_most(25, " ms"),
        found,
        refused,
        f"the whole prompt takes {1000 * alone:.0f} ms",
    )


@bar(16)
def survivor(settings: Settings) -> Iterator[Measurement]:
    """Tokens per second of the one that is left when seven of eight are cancelled ÷ alone, Q4_0.

    A: from the third step after the cancelling; what the others have left stays in the cache. B:
    the same tokens of the same request when nobody else was there from its beginning.
    """
    with Worker(Side, model_path("Q4_0")) as service:
        length = 16 if settings.quick else 40
        prompts = _prompts(service, WARM + length + 8)
        pairs = collect(lambda: Pair(*service.call("survivor", prompts, length)), settings.rounds)
    yield Measurement(
        "llamacpp survivor of eight ÷ alone",
        at_least(0.9),
        pairs.values(lambda a, b: b / a),
        pairs.discarded,
        f"{length / pairs.median_a():.1f} tokens/s against {length / pairs.median_b():.1f}",
    )


@bar(17)
def memory(settings: Settings) -> Iterator[Measurement]:
    """Resident memory while eight sequences are generated ÷ the bare loop's, Q4_0.

    A: a fresh process with the service. B: a fresh process with the library alone and the same
    context. Of each the most that it had during the generation, not while the model was loaded.
    """
    path, count = model_path("Q4_0"), _count(settings)
    with Worker(Side, path) as service:
        prompts = _prompts(service, count)
        tokens = service.call("tokens", prompts)

    def resident(side: Any, given: Any) -> float:
        with Worker(side, path) as fresh:
            return float(fresh.call("resident", given, count))

    pairs = interleave(
        lambda: resident(Side, prompts),
        lambda: resident(BareSide, tokens),
        min(settings.rounds, 3),
    )
    yield Measurement(
        "llamacpp resident memory ÷ bare loop, 8 sequences",
        at_most(1.05),
        pairs.ratios(),
        pairs.discarded,
        f"{pairs.median_a():.0f} MiB against {pairs.median_b():.0f}",
    )


def _count(settings: Settings) -> int:
    return 32 if settings.quick else 128


def _prompts(service: Worker, count: int) -> list[str]:
    prompts: list[str] = service.call("long_answers", PROMPTS, count)
    if len(prompts) < EIGHT:
        raise UnavailableError(
            f"only {len(prompts)} of {len(PROMPTS)} prompts get an answer of {count} tokens from "
            "this build of the model; add some to PROMPTS"
        )
    return prompts[:EIGHT]
