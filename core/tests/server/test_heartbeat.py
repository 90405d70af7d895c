"""When a stream is given a sign of life; over sockets, see ``test_clients.py``."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("msgspec")

from engineroom.server.http.heartbeat import PING, Heartbeat


class Sent:
    """Stands for a call: notes what is sent."""

    def __init__(self) -> None:
        self.started = True
        self.bodies: list[bytes] = []
        self.context: Any = SimpleNamespace(settings=SimpleNamespace(heartbeat_s=3600.0))

    async def send(self, message: Any) -> None:
        self.bodies.append(message["body"])


async def test_only_silence_is_broken_and_nothing_comes_after_the_end() -> None:
    call = Sent()
    heartbeat = Heartbeat(call)  # type: ignore[arg-type]
    for _ in range(12):
        heartbeat.spoke = True
        heartbeat._tick()
    assert heartbeat._sending is None
    for _ in range(3):  # of four ticks: the silence may have begun just after one
        assert heartbeat._sending is None
        heartbeat._tick()
    assert heartbeat._sending is not None
    await heartbeat._sending
    assert call.bodies == [PING]
    heartbeat._tick()
    timer = heartbeat._timer
    assert timer is not None and not timer.cancelled()
    await heartbeat.stop()
    assert timer.cancelled() and heartbeat._timer is None


@pytest.mark.parametrize("cut", [False, True])
async def test_one_that_is_being_sent_is_sent_first_unless_nobody_reads(cut: bool) -> None:
    call = Sent()
    heartbeat = Heartbeat(call)  # type: ignore[arg-type]
    for _ in range(3):
        heartbeat._tick()
    sending = heartbeat._sending
    assert sending is not None and not call.bodies
    if cut:
        heartbeat.cut()
        await asyncio.wait([sending])
    else:
        await heartbeat.stop()
    assert heartbeat._timer is None
    assert sending.cancelled() == cut and call.bodies == ([] if cut else [PING])
