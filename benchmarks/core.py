"""Bars of the core alone: what the service costs when the runtime costs nothing."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

from benchmarks.harness import (
    Bars,
    Measurement,
    Pair,
    Settings,
    UnavailableError,
    at_most,
    collect,
    interleave,
)
from engineroom import GenerationParams, InferenceRequest, InferenceResponse, TokenStep

bar = Bars()

STREAMS: Final = 8
STREAM_TOKENS: Final = 512
STOPS: Final = ["</s>", "\n\nUser:", "日本書紀"]
_TEXT: Final = "日本語の naïve 🙂 text, <b>half</b> a stop: </ or \n\nUs. "


def _request(tokens: int | None, stops: list[str] | None = None) -> InferenceRequest:
    return InferenceRequest(
        model_id="fake",
        prompt="Hello",
        params=GenerationParams(max_new_tokens=tokens),
        stop_sequences=stops,
    )


@bar(1)
def overhead_per_token(settings: Settings) -> Iterator[Measurement]:
    """CPU time a token that the service and its stream add, with eight streams at once.

    An engine's task gives each of eight mailboxes one item a step. A: eight streams of
    ``process_inference`` read them, through the service, its handler and the text pipeline.
    B: eight tasks read the same mailboxes themselves. The value is (A − B) ÷ tokens, in
    microseconds of the process's CPU time; it includes each request's own fixed cost, divided
    by 512 tokens. The second line is the same with three stop sequences to look for.
    """
    from benchmarks.fake import FakeEngine, SteppedHandler, serve
    from engineroom import Mailbox

    repeats = 2 if settings.quick else 8
    steps = [TokenStep((number,), b" token") for number in range(STREAM_TOKENS)]
    steps[-1] = TokenStep((0,), b" token", finish="length")
    handler = SteppedHandler()

    async def read(mailbox: Mailbox) -> None:
        while (await mailbox.get()).finish is None:
            pass

    async def bare() -> None:
        engine = FakeEngine(STREAMS, steps)
        await asyncio.gather(engine.run(), *(read(engine.open()) for _ in range(STREAMS)))

    with asyncio.Runner() as runner:
        service = runner.run(serve(handler))

        async def answer(request: InferenceRequest) -> None:
            stream = service.stream(request)
            async for _ in stream:
                pass
            assert stream.response is not None
            assert stream.response.generated_tokens == STREAM_TOKENS, stream.response

        async def served(requests: list[InferenceRequest]) -> None:
            engine = handler.engine = FakeEngine(STREAMS, steps)
            await asyncio.gather(engine.run(), *map(answer, requests))

        def cost_of_bare() -> float:
            began = time.process_time()
            for _ in range(repeats):
                runner.run(bare())
            return time.process_time() - began

        for what, stops in (
            ("service overhead per token, 8 streams, CPU", None),
            ("the same with 3 stop sequences", STOPS),
        ):
            requests = [[_request(None, stops) for _ in range(STREAMS)] for _ in range(repeats)]

            def cost_of_service(requests: list[list[InferenceRequest]] = requests) -> float:
                began = time.process_time()
                for eight in requests:
                    runner.run(served(eight))
                return time.process_time() - began

            cost_of_service(), cost_of_bare()
            pairs = interleave(cost_of_service, cost_of_bare, settings.rounds)
            scale = 1e6 / (repeats * STREAMS * STREAM_TOKENS)
            yield Measurement(
                what,
                at_most(10, " µs"),
                pairs.values(lambda a, b, scale=scale: (a - b) * scale),  # type: ignore[misc]
                pairs.discarded,
                f"{pairs.median_a() * scale:.2f} µs a token with the service, "
                f"{pairs.median_b() * scale:.2f} µs without",
            )
        runner.run(service.close())


@bar(12)
def dispatch(settings: Settings) -> Iterator[Measurement]:
    """CPU time of ``process_inference`` on a handler that answers at once.

    A: the median over many requests of one call's CPU time: the lease of a loaded model from
    the real manager, the choice of the handler, the checks, the observers, the response. There
    is no B. Requests are made before, by the caller; nothing is tokenised.
    """
    from benchmarks.fake import InstantHandler, serve

    count = 500 if settings.quick else 3000
    requests = [_request(16) for _ in range(count)]

    with asyncio.Runner() as runner:
        service = runner.run(serve(InstantHandler()))

        async def each() -> list[int]:
            taken = []
            clock = time.thread_time_ns
            for request in requests:
                began = clock()
                response = await service.process_inference(request)
                taken.append(clock() - began)
                assert isinstance(response, InferenceResponse)
                assert response.generated_text == "yes", response
            return taken

        runner.run(each())
        pairs = collect(
            lambda: Pair(statistics.median(runner.run(each())) / 1000, 0.0), settings.rounds
        )
        runner.run(service.close())
    yield Measurement(
        "dispatch per request without tokenising, CPU",
        at_most(60, " µs"),
        [pair.a for pair in pairs.kept],
        pairs.discarded,
    )


@bar(14)
def import_time(settings: Settings) -> Iterator[Measurement]:
    """CPU time of ``import engineroom`` ÷ ``import llm``, each in a new process.

    A: ``import engineroom``. B: ``import llm``, the PyPI package. Both in the same interpreter
    (``--llm-python``, or this one), bytecode compiled before; Python's own start is not counted.
    """
    python = settings.llm_python or sys.executable

    def cost_of(module: str) -> float:
        code = (
            "import time; began = time.process_time(); "
            f"import {module}; print(time.process_time() - began)"
        )
        done = subprocess.run(
            [python, "-P", "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise UnavailableError(
                f"import {module} failed there ({reason}); pip install llm beside engineroom, "
                "or name an interpreter that has both with --llm-python"
            )
        return float(done.stdout)

    cost_of("llm"), cost_of("engineroom")
    pairs = interleave(
        lambda: cost_of("engineroom"),
        lambda: cost_of("llm"),
        settings.rounds if settings.quick else max(settings.rounds, 9),
    )
    yield Measurement(
        "import engineroom ÷ import llm, CPU",
        at_most(0.25),
        pairs.ratios(),
        pairs.discarded,
        f"{pairs.median_a() * 1000:.0f} ms and {pairs.median_b() * 1000:.0f} ms",
    )


@bar(18)
def constant_cost(settings: Settings) -> Iterator[Measurement]:
    """CPU time a token in the last quarter of a 512-token stream ÷ in the first.

    A: tokens 384 to 511. B: tokens 0 to 127 of the same stream. Each token is three bytes, cut
    where they fall, often inside of a character; every quarter has the same bytes. The text
    often begins one of three stop sequences and never completes one. The handler never waits.
    A round's value is the median over many streams.
    """
    from benchmarks.fake import MarkedHandler, serve

    quarter = STREAM_TOKENS // 4
    data = (_TEXT.encode() * 99)[: 3 * quarter]
    data = data.decode(errors="ignore").encode()
    data = data.ljust(3 * quarter, b".")
    pieces = [data[at : at + 3] for at in range(0, len(data), 3)] * 4
    steps = [TokenStep((number,), piece) for number, piece in enumerate(pieces)]
    steps.append(TokenStep((0,), b".", finish="eos_token"))  # where the last quarter's end is seen
    handler = MarkedHandler(steps, (0, quarter, 3 * quarter, 4 * quarter))
    count = 20 if settings.quick else 150
    costs: list[float] = []

    with asyncio.Runner() as runner:
        service = runner.run(serve(handler))

        async def one() -> float:
            stream = service.stream(_request(None, STOPS))
            async for _ in stream:
                pass
            assert stream.response is not None
            assert stream.response.generated_tokens == STREAM_TOKENS + 1, stream.response
            begin, first, third, end = handler.times
            costs.append((end - begin) / STREAM_TOKENS / 1000)
            return (end - third) / (first - begin)

        async def many() -> float:
            return statistics.median([await one() for _ in range(count)])

        runner.run(many())
        costs.clear()
        pairs = collect(lambda: Pair(runner.run(many()), 1.0), settings.rounds)
        runner.run(service.close())
    yield Measurement(
        "CPU per token, last ÷ first quarter of a stream",
        at_most(1.1),
        pairs.ratios(),
        pairs.discarded,
        f"{statistics.median(costs):.2f} µs a token, stop search and decoding included",
    )
