"""Connections are shared: no key has all of them, and who rests makes room for who asks."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hypothesis import given, settings, strategies as st
from server_running import Running

from engineroom.server.http.callers import Callers
from engineroom.server.http.errors import ApiError
from engineroom.server.keys import Identity, KeyRing
from engineroom.server.settings import ServerSettings

ANN, BOB = (f"{name}-key-0123456789" for name in ("ann", "bob"))
NAMES = ("ann", "bob", "carl", "dora")


class Call:
    """One request that is being answered."""

    def __init__(self, name: str) -> None:
        self.identity = Identity(name)

    def revoke(self, error: ApiError) -> None:
        raise AssertionError


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 40),
    st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), max_size=200),
)
def test_whatever_keys_do_there_is_one_left_for_the_next(most, steps):
    ring = KeyRing([(name, f"{name}-key-0123456789") for name in NAMES])
    callers = Callers(ServerSettings(keys=ring, max_connections=most))
    held = {name: [] for name in NAMES}
    for name, comes in steps:
        if not comes:
            if held[name]:
                callers.leave(held[name].pop())
            continue
        call, taken = Call(name), sum(map(len, held.values()))
        refused = None
        try:
            callers.enter(call)
        except ApiError as error:
            refused = error
        if refused is not None:
            assert (refused.status, refused.code) == (429, "key_connections")
            assert held[name] or taken + 1 == most
            callers.leave(call)  # as the application does, whatever became of it
        else:
            held[name].append(call)
            assert len(held[name]) <= most - taken - 1
    for name, calls in held.items():
        assert len(calls) < most, name


def test_a_key_that_is_alone_may_have_all_of_them():
    callers = Callers(ServerSettings(keys=KeyRing([("ann", ANN)]), max_connections=5))
    for _ in range(5):
        callers.enter(Call("ann"))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_that_streams_on_all_it_may_leaves_room_for_another(start):
    ring = KeyRing([("ann", ANN), ("bob", BOB)])
    with start(keys=ring, max_connections=8) as run:
        body = {"model": "m", "prompt": "!wait", "stream": True}

        def stream() -> None:
            httpx.post(run.url + "/v1/completions", json=body, headers=bearer(ANN), timeout=20)

        threads = [threading.Thread(target=stream) for _ in range(4)]
        for thread in threads:
            thread.start()
        run.until(lambda: run.handler.running == 4)
        refused = httpx.get(run.url + "/v1/models", headers=bearer(ANN))
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "key_connections"
        for _ in range(10):  # nor do those that were refused add up
            assert httpx.get(run.url + "/v1/models", headers=bearer(ANN)).status_code == 429
        for _ in range(3):
            assert httpx.get(run.url + "/v1/models", headers=bearer(BOB)).status_code == 200
        told = httpx.get(run.url + "/metrics", headers=bearer(BOB)).text
        assert "key_connections" not in told
        run.call(run.handler.gate.set)
        for thread in threads:
            thread.join(20)
        assert httpx.get(run.url + "/v1/models", headers=bearer(ANN)).status_code == 200


def asked(run: Running, connections: list[httpx.Client]) -> list[int]:
    statuses = []
    for client in connections:
        try:
            statuses.append(client.get(run.url + "/healthz").status_code)
        except httpx.TransportError:
            statuses.append(0)
    return statuses


@pytest.mark.usefixtures("each_parser")
def test_who_rests_makes_room_for_who_comes(start):
    with start(max_connections=3) as run:
        held = [httpx.Client() for _ in range(3)]
        assert asked(run, held) == [200] * 3  # each has a connection that is kept alive
        run.until(lambda: len(run.server.server_state.connections) == 3)
        working = threading.Thread(
            target=lambda: held[0].post(
                run.url + "/v1/completions", json={"model": "m", "prompt": "!wait"}, timeout=20
            )
        )
        working.start()
        run.until(lambda: run.handler.running == 1)
        with httpx.Client() as further:
            assert further.get(run.url + "/healthz").status_code == 200
            run.until(lambda: len(run.server.server_state.connections) == 3)
        assert run.handler.running == 1  # the one that worked was not cut
        run.call(run.handler.gate.set)
        working.join(20)
        for client in held:
            client.close()
