"""What of a late loop is laid to the server, and what to the machine; and the corpus in itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("psutil", reason="needs psutil")
pytest.importorskip("numpy", reason="the models are made with numpy")

import corpus
from corpus_apis import EVERY
from corpus_base import SMALL, WHOLE
from hostile_server import Beat, keep_the_interpreter


async def _measured(beat: Beat, until: threading.Event) -> None:
    running = asyncio.create_task(beat.run())
    while not until.is_set():
        await asyncio.sleep(0.01)
    running.cancel()


def test_a_thread_that_keeps_the_interpreter_holds_the_loop_however_busy_the_machine_is():
    beat, over = Beat(threading.get_ident()), threading.Event()

    def keep() -> None:
        time.sleep(0.1)
        beat.forget()
        keep_the_interpreter(1.5)
        over.set()

    with _busy_neighbours():
        thread = threading.Thread(target=keep)
        thread.start()
        asyncio.run(_measured(beat, over))
        thread.join()
    # Its thread wakes every 5 ms to ask for it, and waits for a core each time.
    assert beat.longest > 0.1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the kernel must count the waits")
def test_a_neighbour_that_has_the_core_does_not():
    script = f"""
import asyncio, os, subprocess, sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
from hostile_server import Beat, hold

async def measured():
    os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
    busy = subprocess.Popen([sys.executable, "-S", "-E", "-c", "while True: pass"])
    os.nice(10)
    beat = Beat(threading.get_ident())
    running = asyncio.create_task(beat.run())
    asyncio.get_running_loop().call_later(0.2, hold, 0.03)
    await asyncio.sleep(0.3)
    print(beat.in_all, beat.longest, flush=True)
    busy.kill()

asyncio.run(measured())
"""
    told = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    in_all, longest = map(float, told.stdout.split())
    assert longest < in_all / 2


@contextlib.contextmanager
def _busy_neighbours() -> Iterator[None]:
    """More processes that work than there are cores."""
    busy = [sys.executable, "-S", "-E", "-c", "while True: pass"]
    neighbours = [subprocess.Popen(busy) for _ in range((os.cpu_count() or 1) + 1)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_every_place_in_a_body_is_json():
    for api in EVERY:
        for places, hole in (
            (api.texts, '"x"'), (api.lists, "1"), (api.objects, '"x":1'), (api.numbers, "1"),
        ):  # fmt: skip
            for name, template in places.items():
                assert template.count("%s") == 1, (api.name, name)
                json.loads(template.replace("%s", hole))


def test_rows_have_names_of_their_own_and_bodies_fit_the_server():
    rows = [row for part in corpus.PARTS.values() for row in part]
    names = [(row.name, route) for row in rows for route, _ in row.visits(WHOLE)]
    assert len(names) == len(set(names))
    assert 200 < sum(1 for row in rows if row.small for _ in row.visits(SMALL)) < 500
