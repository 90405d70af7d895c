"""Two hundred clients that stream, for a minute at least, and the whole corpus beside them.

What :mod:`test_hostile_requests` sends part by part and in little goes there at once, in an order
that mixes it: no neighbour reads anything but its own text, no more memory is in use after the
rounds that follow than after the first one, and in the end nothing is held.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("psutil", reason="needs psutil")
pytest.importorskip("numpy", reason="the models are made with numpy")

import corpus
from corpus_base import CANARY, WHOLE, Visit
from hostile_models import deployment
from hostile_room import Room, neighbours_of, opened
from test_hostile_requests import CONTEXT, CONTROLS, CROWD, MORE_BYTES, NEEDED, is_broken

VISITORS: Final = 16
SECONDS: Final = float(os.environ.get("ENGINEROOM_CROWD_SECONDS", "60"))
"""Of each round, at least."""
ROUNDS: Final = 3

pytestmark = [pytest.mark.nightly, pytest.mark.asyncio]


def visits(seed: int) -> list[tuple[str, Callable[[], Visit]]]:
    """The whole corpus, mixed; each is made when it goes, for bodies are large."""
    makers = [
        (f"{route}/{row.name}", make)
        for row in itertools.chain(*corpus.PARTS.values())
        for route, make in row.visits(WHOLE)
    ]
    random.Random(seed).shuffle(makers)
    return makers


async def visited(
    room: Room, makers: Iterator[tuple[str, Callable[[], Visit]]], end: float | None
) -> tuple[Counter[int], list[str]]:
    """What the visitors were answered, and what of it was the server's own failure.

    :param end: when they stop; ``None``: when all is sent.
    """
    statuses: Counter[int] = Counter()
    broken: list[str] = []

    async def visitor() -> None:
        for name, make in makers:
            visit = await asyncio.to_thread(make)  # a body of megabytes would hold all others up
            for answer in await visit(room.port):
                statuses[answer.status] += 1
                if is_broken(answer):
                    broken.append(f"{name}: {answer.status} {answer.body[:200]!r}")
            if end is not None and time.monotonic() > end:
                return

    await asyncio.gather(*(visitor() for _ in range(VISITORS)))
    return statuses, broken


@pytest.mark.parametrize(
    "runtime",
    [pytest.param(n, marks=pytest.mark.xdist_group(f"hostile-{n}")) for n in NEEDED],
)
async def test_two_hundred_streams_beside_the_whole_corpus(
    runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first round is all of the corpus; those after it are as much as goes in their time."""
    for module in NEEDED[runtime]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps(deployment(tmp_path, runtime, CONTEXT)), encoding="utf-8")
    sizes: list[int] = []
    async with opened(file, tmp_path, WHOLE.patience_s) as room:
        neighbours = await neighbours_of(room.port, 8, WHOLE.patience_s)
        for number in range(ROUNDS):
            began, done = time.monotonic(), neighbours.done
            async with neighbours.about(CROWD):
                end = began + SECONDS if number else None
                statuses, broken = await visited(room, iter(visits(number)), end)
                await asyncio.sleep(max(0.0, began + SECONDS - time.monotonic()))
            before = (await room.settled())["rss"]
            room.tell("trim")
            told = await room.settled()
            sizes.append(told["rss"])
            with capsys.disabled():
                print(
                    f"\n{runtime}: {time.monotonic() - began:.0f} s, "
                    f"{neighbours.done - done} streams ({neighbours.late} began late), "
                    f"{sum(statuses.values())} visits "
                    f"{dict(statuses)}; {before >> 20} MiB, and "
                    f"{told['rss'] >> 20} without what the allocator keeps"
                )
            assert not broken
            assert not neighbours.wrong
            assert told["held"] == {} and told["healthy"]
        log = room.log.read_text(encoding="utf-8", errors="replace")
    assert "in the loop:" not in log, log[-4000:]
    # What a template raises is a request's own failure, and told at DEBUG alone.
    records = re.split(r"\n(?=[A-Z]+ [\w.]+ )", log)
    assert not [r for r in records if "Traceback" in r and not r.startswith("DEBUG ")]
    assert CANARY not in log
    assert not CONTROLS.search(log)
    assert max(sizes[1:]) < sizes[0] + MORE_BYTES
