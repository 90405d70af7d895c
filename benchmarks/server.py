"""The server's bar: what a chunk of a stream costs, down to the socket."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.harness import (
    Bars,
    Measurement,
    Settings,
    UnavailableError,
    at_most,
    interleave,
)
from benchmarks.workers import Worker

bar = Bars()


@bar(13)
def stream_cpu_per_chunk(settings: Settings) -> Iterator[Measurement]:
    """CPU of the server's process for 8 streams at once, a chunk a step each, over real sockets.

    A: engineroom's server and its service, on a handler that computes nothing. B: ASGI by hand
    with a queue a stream, the same frames, no routes, no checks and no service; then FastAPI with
    a pydantic model for each chunk. The same uvicorn under all of them.
    """
    for needed in ("uvicorn", "fastapi"):
        if importlib.util.find_spec(needed) is None:
            raise UnavailableError(f"it needs {needed}: pip install {needed}")
    from benchmarks.server_apps import STREAMS, Served, drive

    tokens = 400 if settings.quick else 2000
    with ExitStack() as stack:
        workers = {
            kind: stack.enter_context(Worker(Served, kind, tokens))
            for kind in ("engineroom", "raw", "fastapi")
        }

        def cost(kind: str) -> float:
            worker = workers[kind]
            port, before = worker.call("port"), worker.call("cpu")
            for _, chunks in asyncio.run(drive(port)):
                if not tokens <= chunks <= tokens + 1:
                    raise RuntimeError(f"{kind}: {chunks} chunks instead of {tokens}")
            spent: float = worker.call("cpu") - before
            return spent / (STREAMS * tokens)

        for kind in workers:
            cost(kind)  # warm
        for kind, words, limit in (
            ("raw", "raw ASGI with a queue", 1.3),
            ("fastapi", "FastAPI with pydantic per chunk", 0.5),
        ):
            pairs = interleave(
                lambda: cost("engineroom"), lambda kind=kind: cost(kind), settings.rounds
            )
            note = f"{pairs.median_a() * 1e6:.1f} µs ÷ {pairs.median_b() * 1e6:.1f} µs a chunk"
            yield Measurement(
                f"HTTP stream ÷ {words}, CPU per chunk",
                at_most(limit),
                pairs.ratios(),
                pairs.discarded,
                note,
            )
