"""A server of the tests as a process of its own, which tells how long its loop stood still.

    python hostile_server.py DEPLOYMENT PATIENCE_S

It waits so long for what clients send and read. It prints its port once its models are loaded.
Then it reads lines. ``mark``: it forgets what it has measured. ``settle N``: it waits until at most
``N`` requests are there, and prints what it has measured and what is held. ``trim``: the allocator
gives back what it keeps, where it can. ``hold S``: it holds its loop for so many seconds. ``keep
S``: a thread beside it keeps the interpreter. It ends when its standard input does. Its log is its
standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import psutil

from engineroom import LLMInferenceService, LLMModelManager
from engineroom.server.runner import EngineRoomServer, bind, loop_factory
from engineroom.server.settings import ServerSettings
from engineroom.stacks import stacks

logger = logging.getLogger("hostile_server")

CALM_S: Final = 60.0
LATE_S: Final = 0.03
"""So late, and a thread looks what the loop is at."""


class Waits:
    """How long the thread that makes this was kept waiting by the machine, all in all.

    That it was ready to run and others had the cores, as the kernel counts it for each thread. Who
    waits for the interpreter is asleep: that counts as held, but for what a busy machine adds
    each time it wakes up to ask for it.
    """

    def __init__(self) -> None:
        path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._file = os.open(path, os.O_RDONLY) if path.exists() else None

    def so_far_s(self) -> float:
        """Seconds until now; none where the kernel does not count."""
        if self._file is None:
            return 0.0
        _, waited_ns, _ = os.pread(self._file, 100, 0).split()
        return int(waited_ns) / 1e9


WAITING: Final = ("wait", "_worker", "get", "main", "accept", "select")


class Beat:
    """The longest time for which the loop did nothing else, and where it was then."""

    TICK_S: Final = 0.005

    def __init__(self, loop_thread: int) -> None:
        self._loop_thread = loop_thread
        self._last = time.perf_counter()
        self._seen: tuple[float, str] = (0.0, "")
        self._collecting = 0.0
        self.forget()
        gc.callbacks.append(self._on_collection)
        threading.Thread(target=self._watch, daemon=True).start()

    def forget(self) -> None:
        self.longest = self.in_all = self.collected = 0.0
        self.where = ""
        self._seen = (0.0, "")

    async def run(self) -> None:
        waits = Waits()
        while True:
            self._last = began = time.perf_counter()
            waited = waits.so_far_s()
            await asyncio.sleep(self.TICK_S)
            late = time.perf_counter() - began - self.TICK_S
            held = late - (waits.so_far_s() - waited)
            self.in_all = max(self.in_all, late)
            if held > self.longest:
                self.longest = held
                self.where = self._seen[1] if self._seen[0] == began else ""

    def _watch(self) -> None:
        while True:
            time.sleep(0.01)
            last = self._last
            if time.perf_counter() - last > LATE_S and self._seen[0] != last:
                self._seen = (last, self._stacks())

    def _stacks(self) -> str:
        threads = stacks()
        threads.pop(threading.get_ident(), None)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        shown = []
        for ident, calls in threads.items():
            if ident == self._loop_thread:
                shown.insert(0, " < ".join(map(str, calls[:8])))
            elif calls and calls[0].function not in WAITING:
                shown.append(f"{names.get(ident)}: {calls[0]}")
        return " | ".join(shown)

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = time.perf_counter()
        else:
            self.collected = max(self.collected, time.perf_counter() - self._collecting)


def hold(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def keep_the_interpreter(seconds: float) -> None:
    """In a call into C that does not let go of it."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def held(server: EngineRoomServer) -> dict[str, int]:
    """What requests and connections hold."""
    directory = server.context.directory
    engines = [health for _, _, health in directory.health()]
    return {
        "connections": len(server.server_state.connections),
        "tasks": len(server.server_state.tasks),
        "running": server.context.limiter.running,
        "queued": server.context.limiter.queued,
        "in_service": server.context.service.num_requests,
        "leases": sum(status.leases for status in directory.models()),
        "in_engines": sum(health.num_requests_running or 0 for health in engines),
        "waiting": sum(health.num_requests_waiting or 0 for health in engines),
    }


async def marked(server: EngineRoomServer, beat: Beat) -> None:
    """What is told from now on has come since."""
    beat.forget()
    server.context.loop_meter.reset()


async def settled(server: EngineRoomServer, beat: Beat, most: int) -> dict[str, Any]:
    end = time.monotonic() + CALM_S
    while max(held(server).values()) > most and time.monotonic() < end:
        await asyncio.sleep(0.005)
    await asyncio.sleep(2 * beat.TICK_S)
    return {
        "longest": beat.longest,
        "in_all": beat.in_all,
        "by_the_meter": server.context.loop_meter.largest_since_reset(),
        "where": beat.where,
        "collected": beat.collected,
        "held": {what: count for what, count in held(server).items() if count},
        "rss": psutil.Process().memory_info().rss,
        "healthy": all(health.ok for _, _, health in server.context.directory.health()),
    }


async def serve(deployment: str, patience_s: float) -> None:
    settings = ServerSettings(
        port=0,
        header_timeout_s=patience_s,
        body_timeout_s=patience_s,
        write_timeout_s=patience_s,
        drain_timeout_s=0,
    )
    bound = bind(settings)
    manager = LLMModelManager(deployment)
    server = EngineRoomServer(LLMInferenceService(manager), settings)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: logger.error(
            "in the loop: %s", context["message"], exc_info=context.get("exception")
        )
    )
    beat = Beat(threading.get_ident())

    def obey() -> None:
        for line in sys.stdin:
            match line.split():
                case ["mark"]:  # done before the next line, which may hold the loop
                    asyncio.run_coroutine_threadsafe(marked(server, beat), loop).result()
                case ["trim"] if sys.platform == "linux":
                    with contextlib.suppress(AttributeError):  # of glibc
                        ctypes.CDLL(None).malloc_trim(0)
                case ["hold", seconds]:
                    loop.call_soon_threadsafe(hold, float(seconds))
                case ["keep", seconds]:
                    keep_the_interpreter(float(seconds))
                case ["settle", most]:
                    told = asyncio.run_coroutine_threadsafe(
                        settled(server, beat, int(most)), loop
                    ).result()
                    print(json.dumps(told), flush=True)
        loop.call_soon_threadsafe(server.stop)

    async def announce() -> None:
        while server.context.starting:
            await asyncio.sleep(0.02)
        print(bound.getsockname()[1], flush=True)
        threading.Thread(target=obey, daemon=True).start()

    tasks = [asyncio.create_task(work) for work in (beat.run(), announce())]
    try:
        await server.run_until_stopped([bound])
    finally:
        for task in tasks:
            task.cancel()


def come_first() -> None:
    """Where that is allowed: a thread that has the interpreter, and loses its core to another
    process, keeps the loop waiting for what is not ours.
    """
    with contextlib.suppress(OSError):
        os.nice(-15)


if __name__ == "__main__":
    faulthandler.enable()
    come_first()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("engineroom").setLevel(logging.DEBUG)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(sys.argv[1], float(sys.argv[2])))
