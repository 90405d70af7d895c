"""A server of the tests as a process of its own, which tells what it holds when it is asked.

It prints its port; then, for each line that it reads, it waits until all is calm and prints what
is left. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from server_running import Running, running

CALM_S = 60.0


class Stalls:
    """The longest time for which the loop did nothing else."""

    TICK_S = 0.005

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(self.TICK_S)
            self.longest = max(self.longest, time.perf_counter() - began - self.TICK_S)


def held(run: Running) -> dict[str, int]:
    """What requests and connections hold."""
    server = run.server
    return {
        "connections": len(server.server_state.connections),
        "requests": len(server.server_state.tasks),
        "running": server.context.limiter.running,
        "queued": server.context.limiter.queued,
        "generating": run.handler.running,
        "in_service": run.service.num_requests,
        "leases": run.manager.list_models()[0].leases,
    }


async def settled(run: Running, stalls: Stalls) -> dict[str, object]:
    """What is left once all is calm, or after a long time."""
    end = time.monotonic() + CALM_S
    while any(held(run).values()) and time.monotonic() < end:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    for _ in range(3):
        gc.collect()
    process = psutil.Process()
    stall, stalls.longest = stalls.longest, 0.0
    return {
        "held": {what: count for what, count in held(run).items() if count},
        "tasks": sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks()),
        "files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
        "bytes": process.memory_info().rss,
        "begun": run.handler.begun,
        "longest_stall_s": stall,
    }


def main() -> None:
    with running(
        max_running=64, max_queued=1000, header_timeout_s=1, body_timeout_s=1, write_timeout_s=1
    ) as run:
        stalls = Stalls()
        watching = asyncio.run_coroutine_threadsafe(stalls.watch(), run.loop)
        print(run.port, flush=True)
        for _ in sys.stdin:
            left = asyncio.run_coroutine_threadsafe(settled(run, stalls), run.loop).result()
            print(json.dumps(left), flush=True)
        watching.cancel()


if __name__ == "__main__":
    main()
