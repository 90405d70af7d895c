"""No request, whatever is in it, holds the event loop, a neighbour, a place or memory.

Each row of the corpus goes to each route that it applies to, on a real server of a real tiny model,
while a neighbour has a stream. What is measured is the longest time for which the loop did nothing
else; that its thread was ready to run and others had the cores is taken off it, and of a row that
is over the bound the smallest of three tries counts: the machine's noise does not come back, a loop
that is held does.

The small corpus runs with every change, the whole one in ``nightly``; the table is printed
(``pytest -s`` is not needed).
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
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from fnmatch import filter as filter_names, fnmatchcase
from itertools import islice
from typing import Any, Final

import pytest
import pytest_asyncio

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("psutil", reason="needs psutil")
pytest.importorskip("numpy", reason="the models are made with numpy")

import corpus
from corpus_base import CANARY, SMALL, WHOLE, Visit
from hostile_models import deployment
from hostile_room import Measured, Neighbours, Room, neighbours_of, opened
from hostile_wire import LONG_S, Answer, at_once, head
from known_gaps import KNOWN

BOUND_S: Final = 0.05
TRIES: Final = 3
CONTEXT: Final = 16_384
NEEDED: Final = {
    "llamacpp": ("llama_cpp", "gguf"),
    "hf_transformers": ("torch", "transformers"),
    "vllm": ("vllm",),
}
MORE_BYTES: Final = 128 << 20
MOST_REFUSED: Final = 8000
"""Bytes of a refusal."""
CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
RECORD: Final = re.compile(r"^(?=(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) )", re.MULTILINE)
ORIGIN: Final = "DEBUG engineroom.service request failed: "
CROWD, SMALL_CROWD, VISITORS = 200, 24, 8
PARTS_OF: Final = {**{part: (part,) for part in corpus.PARTS}, "everything": tuple(corpus.PARTS)}
SECONDS: Final = float(os.environ.get("ENGINEROOM_LOAD_SECONDS", "2"))


def _stages() -> Iterator[Any]:
    for name in NEEDED:
        group = pytest.mark.xdist_group(f"hostile-{name}")  # one server for all of its tests
        if name != "vllm":
            yield pytest.param((name, "small"), id=f"{name}-small", marks=group)
        yield pytest.param((name, "whole"), id=f"{name}-whole", marks=[group, pytest.mark.nightly])


@dataclass
class Stage:
    """A room, and how much of the corpus goes there."""

    runtime: str
    whole: bool
    room: Room
    neighbours: Neighbours

    def visits(self, part: str, *, shuffled: bool = False) -> Iterator[tuple[str, Visit]]:
        """Their names, and what they do; made one by one, since bodies are large."""
        makers = [
            (f"{self.runtime}/{route or 'all'}/{row.name}", make)
            for row in itertools.chain(*(corpus.PARTS[name] for name in PARTS_OF[part]))
            if self.whole or row.small
            for route, make in row.visits(WHOLE if self.whole else SMALL)
        ]
        if shuffled:
            random.Random(part).shuffle(makers)
        yield from ((name, make()) for name, make in makers)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=_stages())
async def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stage]:
    runtime, which = request.param
    for module in NEEDED[runtime]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    folder = tmp_path_factory.mktemp(runtime)
    file = folder / "deployment.json"
    file.write_text(json.dumps(deployment(folder, runtime, CONTEXT)), encoding="utf-8")
    patience_s = 3.0 if which == "whole" else 1.5
    async with opened(file, folder, patience_s) as room:
        yield Stage(runtime, which == "whole", room, await neighbours_of(room.port, 8, patience_s))


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("how", ["hold", "keep"])
async def test_a_loop_that_is_held_is_seen(stage: Stage, how: str) -> None:
    async def hold(_: int) -> list[Any]:
        stage.room.tell(f"{how} 0.3")
        return []

    async with stage.neighbours.about(1):
        measured = await stage.room.measure(hold, 1)
    assert measured.gap_s > 0.1, measured
    assert measured.told["by_the_meter"] > 0.15, measured
    assert how == "keep" or "obey" not in measured.told["where"]


@pytest.mark.parametrize("part", corpus.PARTS)
async def test_no_request_holds_the_loop(
    stage: Stage, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps: dict[str, Measured] = {}
    wrong: list[str] = []
    async with stage.neighbours.about(1):
        for name, visit in stage.visits(part):
            for _ in range(1 if known(name) else TRIES):
                measured = await stage.room.measure(visit, 1)
                broken = [a.body[:200] for a in measured.answers if is_broken(a)]
                if broken or measured.left or not measured.told["healthy"]:
                    wrong.append(f"{name}: {broken}, left: {measured.left}, {measured}")
                if name not in gaps or measured.gap_s < gaps[name].gap_s:
                    gaps[name] = measured
                if measured.gap_s <= BOUND_S:
                    break
    with capsys.disabled():
        print("\n" + table(f"{stage.runtime}, {part}", gaps))
    assert not wrong
    assert not stage.neighbours.wrong
    over = {name: str(measured) for name, measured in gaps.items() if measured.gap_s > BOUND_S}
    assert not {name: why for name, why in over.items() if not known(name)}
    mended = {
        pattern: why
        for pattern, why in KNOWN.items()
        if filter_names(gaps, pattern) and not filter_names(over, pattern)
    }
    assert not mended, "take them out of known_gaps.py"


def is_broken(answer: Answer) -> bool:
    """A failure of the server's own, or a refusal that says all of a request back."""
    return answer.status in (500, 502) or (answer.status >= 400 and len(answer.body) > MOST_REFUSED)


def known(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in KNOWN)


def table(title: str, gaps: dict[str, Measured]) -> str:
    """The largest gap of each row, in milliseconds, and where it was."""
    rows: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, measured in gaps.items():
        _, route, row = name.split("/", 2)
        rows[row].append((measured.gap_s * 1000, route))
    lines = [
        f"{max(of)[0]:7.1f} ms  {max(of)[1]:12} {row}"
        for row, of in sorted(rows.items(), key=lambda item: max(item[1]), reverse=True)
    ]
    return "\n".join([f"Largest gaps of the loop on {title}, a line a row:", *lines])


@pytest.mark.parametrize(
    "part",
    [*(pytest.param(part, marks=pytest.mark.nightly) for part in corpus.PARTS), "everything"],
)
async def test_a_crowd_of_streams_beside_the_corpus(
    stage: Stage, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lasts as long as the corpus does, and at least ``ENGINEROOM_LOAD_SECONDS`` over all of its
    parts; then a second round of the same requests, after which there is no more memory in use than
    after the first.

    The small corpus is mixed, and as much of it is sent as there is time for.
    """
    if stage.whole == (part == "everything"):
        pytest.skip("the whole corpus goes there in parts")
    neighbours, port = stage.neighbours, stage.room.port
    before, sizes, count = neighbours.done, [], 0
    least_s = SECONDS / 2 / (len(corpus.PARTS) if stage.whole else 1)
    for again in (False, True):
        visits = stage.visits(part, shuffled=True)
        if again:
            visits = islice(visits, count)
        end = time.monotonic() + least_s
        async with neighbours.about(CROWD if stage.whole else SMALL_CROWD):
            while some := list(islice(visits, VISITORS)):
                await asyncio.gather(*(visit(port) for _, visit in some))
                count += len(some)
                if (again or not stage.whole) and time.monotonic() > end:
                    break
            await asyncio.sleep(max(0.0, end - time.monotonic()))
        told = await stage.room.settled()
        sizes.append(told["rss"])
        assert told["held"] == {} and told["healthy"]
    with capsys.disabled():
        shown = ", ".join(str(size >> 20) for size in sizes)
        done = neighbours.done - before
        print(f"\n{stage.runtime}, {part}: {done} streams; MiB after each round: {shown}")
    assert not neighbours.wrong
    assert sizes[1] < sizes[0] + MORE_BYTES


async def test_nothing_is_left(stage: Stage) -> None:
    told = await stage.room.settled()
    assert told["held"] == {} and told["healthy"]
    (answer,) = await at_once(head("GET", "/readyz"), patience_s=LONG_S)(stage.room.port)
    assert answer.status == 200
    log = stage.room.log.read_text(encoding="utf-8", errors="replace")
    assert "in the loop:" not in log, log[-4000:]
    records = [part for part in RECORD.split(log) if "Traceback" in part]
    # Where a typed error came from is told at DEBUG.
    assert [record for record in records if not record.startswith(ORIGIN)] == []
    assert CANARY not in log
    assert not CONTROLS.search(log)
