"""What many loads leave behind: nothing.

A cycle takes about three seconds; ``ENGINEROOM_LOAD_CYCLES=200`` says how many there are to be.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

CYCLES = int(os.environ.get("ENGINEROOM_LOAD_CYCLES", "12"))
SETTLED = max(3, min(20, CYCLES // 4))
"""Cycles before the first look: libraries are loaded, and pools filled."""
GROWTH_BYTES = 48 << 20


def files() -> dict[str, str]:
    """Open files of this process, by number."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except OSError:  # the one that lists them
            continue
    return found


def threads() -> list[str]:
    """Names of threads without those of the event loop's pool: it grows as work overlaps."""
    names = (thread.name for thread in threading.enumerate())
    return sorted(name for name in names if not name.startswith("asyncio_"))


def segments() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def children() -> list[str]:
    return sorted(" ".join(child.cmdline())[:60] for child in psutil.Process().children())


@pytest.mark.long
def test_many_loads_leave_nothing_behind(temporary: Path, make: Callable[..., Any]) -> None:
    bench = make(keep_ready_s=60)
    shared = segments()
    settled: tuple[dict[str, str], list[str], list[str], int] | None = None
    for cycle in range(1, CYCLES + 1):
        bench.load()
        if cycle in (1, CYCLES):
            assert bench.answer(max_new_tokens=4).generated_tokens == 4
            assert list(temporary.rglob("*")), "sockets are not where they are looked for"
        bench.run(bench.manager.unload("m"))
        assert list(temporary.iterdir()) == []
        if cycle in (SETTLED, CYCLES):
            gc.collect()
            seen = files(), threads(), children(), psutil.Process().memory_info().rss
            counts = f"{len(seen[0])} files, {len(seen[1])} threads, {seen[3] >> 20} MiB"
            print(f"cycle {cycle}: {counts}")
            if settled is None:
                settled = seen
    assert settled is not None
    more = {number: name for number, name in seen[0].items() if number not in settled[0]}
    assert len(seen[0]) <= len(settled[0]), more
    assert len(seen[1]) <= len(settled[1]), (settled[1], seen[1])
    assert seen[2] == settled[2]
    assert seen[3] - settled[3] < GROWTH_BYTES
    assert segments() <= shared
