"""Many clients at once, of which some are rude: nobody gets wrong bytes, and nothing is left.

The second test runs for 12 seconds; ``ENGINEROOM_LOAD_SECONDS=60`` has it run for longer. It prints
how long the server's loop stood still at most (``pytest -s``), and asserts no times.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("psutil", reason="needs psutil")

import psutil
from load_clients import KINDS

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
CLIENTS = 40
ROUNDS = 4
SECONDS = float(os.environ.get("ENGINEROOM_LOAD_SECONDS", "12"))
AT_ONCE = 200
MORE_OBJECTS = 3000
MORE_BYTES = 48 << 20


@pytest.mark.parametrize("max_running", [None, 8])
async def test_nothing_is_left_of_a_crowd(start, max_running):
    with start(max_running=max_running, max_queued=1000) as run:
        me = psutil.Process()

        async def crowd(round_: int) -> None:
            work = [KINDS[i % len(KINDS)](run.port, f"c{round_}x{i}") for i in range(CLIENTS)]
            await asyncio.gather(*work)

        def calm() -> bool:
            server = run.server
            return not (
                server.server_state.connections
                or server.server_state.tasks
                or server.context.limiter.running
                or server.context.limiter.queued
                or run.handler.running
                or run.service.num_requests
            )

        async def settled() -> tuple[int, int]:
            await asyncio.to_thread(run.until, calm, "all is calm")
            gc.collect()
            tasks = await asyncio.to_thread(run.call, lambda: len(asyncio.all_tasks()))
            return me.num_fds() if hasattr(me, "num_fds") else me.num_handles(), tasks

        await crowd(0)  # what is made once is made now
        before = await settled()
        for round_ in range(1, ROUNDS):
            await crowd(round_)
        assert await settled() == before
        state = await asyncio.to_thread(run.call, lambda: run.manager.list_models()[0].leases)
        assert state == 0


class Served:
    """``load_server.py`` in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "load_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.port = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server has ended: {self.process.wait(20)}"
        return line

    def settled(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self._line())


@pytest.fixture
def served():
    made = Served()
    try:
        yield made
        made.process.stdin.close()
        assert made.process.wait(60) == 0
    finally:
        if made.process.poll() is None:
            made.process.kill()
        made.process.communicate() if not made.process.stdin.closed else made.process.wait()
        made.process.stdout.close()


def load(port: int, seconds: float, seed: int) -> dict:
    command = [sys.executable, str(HERE / "load_clients.py")]
    command += [str(port), str(AT_ONCE), str(seconds), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_crowd_of_all_kinds_leaves_nothing_and_gets_no_wrong_bytes(served, capsys):
    assert load(served.port, SECONDS / 4, 0)["wrong"] == []  # what is made once is made now
    before = served.settled()
    came = load(served.port, SECONDS, 1)
    after = served.settled()
    with capsys.disabled():
        print(f"\n{AT_ONCE} clients for {SECONDS:g} s: {came['done']}")
        print(f"before: {before}\nafter: {after}")
    assert came["wrong"] == []
    assert came["done"]["polite"] > 0
    assert before["held"] == after["held"] == {}
    assert after["tasks"] == before["tasks"]
    assert after["files"] <= before["files"]
    assert after["threads"] <= before["threads"]
    assert after["objects"] < before["objects"] + MORE_OBJECTS
    assert after["bytes"] < before["bytes"] + MORE_BYTES
