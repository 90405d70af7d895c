"""Bytes of bodies in flight: bounded over all connections, and shared fairly."""

from __future__ import annotations

import json
import socket
from collections import Counter

import pytest
from hypothesis import example, given, strategies as st

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx

from engineroom import ConfigurationError
from engineroom.server.http.bodies import FREE_BYTES, BodyBudget, BodyShare
from engineroom.server.http.errors import ApiError
from engineroom.server.keys import KeyRing, KeySpec
from engineroom.server.settings import ServerSettings

MIB = 1 << 20
CHAT, OWN = "/v1/chat/completions", "/v1/inference"

# ── the rule ─────────────────────────────────────────────────────────────────────────────────────

LIMIT = 100 * FREE_BYTES
OWNERS = "abcdef"
SIZES = st.integers(0, LIMIT)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.sampled_from(OWNERS), st.lists(SIZES, max_size=4)),
        st.tuples(st.just("end"), st.integers(0, 30), st.none()),
    ),
    max_size=40,
)


def newcomer(budget: BodyBudget, size: int) -> bool:
    share = budget.share("newcomer")
    try:
        share.announce(size)
        share.add(size)
    except ApiError:
        return False
    finally:
        share.release()
    return True


@given(st.integers(1, 6), st.integers(FREE_BYTES // 16, FREE_BYTES))
def test_those_who_come_together_have_as_much_as_is_left(count, piece):
    budget = BodyBudget(LIMIT)
    going = {owner: budget.share(owner) for owner in OWNERS[:count]}
    shares = list(going.values())
    for share in shares:
        share.add(FREE_BYTES)
    while going:
        for owner, share in list(going.items()):
            size = share.size
            try:
                share.add(piece)
            except ApiError:
                share.size = size
                del going[owner]
    fair = LIMIT / (count + 1)
    for part in (*(share.counted for share in shares), LIMIT - budget.held):
        assert abs(part - fair) <= (count + 1) * piece


HALF, QUARTER = (LIMIT // part + FREE_BYTES for part in (2, 4))


@given(EVENTS)
@example([("send", "a", [HALF]), ("send", "b", [QUARTER])])
@example([("send", "a", [2 * LIMIT // 3])])
def test_all_together_keep_the_limit_and_leave_room_for_the_next_one(events):
    refused: list[None] = []
    budget = BodyBudget(LIMIT, lambda: refused.append(None))
    running: list[BodyShare] = []
    for kind, who, parts in events:
        if kind == "end":
            if running:
                running.pop(who % len(running)).release()
            continue
        share = budget.share(who)
        before = len(refused)
        try:
            for part in parts:
                share.add(part)
            running.append(share)
        except ApiError:
            share.release()
            assert len(refused) == before + 1
        held: Counter[str] = Counter()
        for share in running:
            held[share.owner] += share.counted
            assert share.counted == max(0, share.size - FREE_BYTES)
        free = LIMIT - budget.held
        assert budget.held == held.total()
        # Whoever came last has no more than is left, the one before no more than both, and so on:
        # that they hold half, a quarter, an eighth is the worst of it.
        assert free << sum(1 for count in held.values() if count) >= LIMIT
        assert newcomer(budget, FREE_BYTES + free // 2), "whoever comes next finds room"
        assert newcomer(budget, FREE_BYTES), "and a small request always does"
    for share in running:
        share.release()
        share.release()
    assert budget.held == 0 and not budget._by_owner


@given(st.integers(1, 8))
def test_the_greedy_come_to_equal_shares(owners):
    budget = BodyBudget(LIMIT)
    step = 1024
    greedy = [budget.share(str(number)) for number in range(owners)]
    for share in greedy:
        share.add(FREE_BYTES)
    grew = True
    while grew:
        grew = False
        for share in greedy:
            try:
                share.add(step)
            except ApiError:
                share.size -= step
            else:
                grew = True
    fair = LIMIT // (owners + 1)
    assert all(abs(share.counted - fair) <= 2 * step * owners for share in greedy)


def test_who_only_says_that_much_will_come_takes_nothing():
    budget = BodyBudget(LIMIT)
    for _ in range(100):
        budget.share("a").announce(LIMIT // 2)
    assert budget.held == 0
    with pytest.raises(ApiError):
        budget.share("a").announce(LIMIT)


def test_the_limit_must_let_the_largest_body_in():
    with pytest.raises(ConfigurationError, match="--max-body-total"):
        ServerSettings(max_body_bytes=10 * MIB, max_body_total_bytes=20 * MIB - 1)
    budget = BodyBudget(ServerSettings(max_body_total_bytes=8 * MIB).max_body_total_bytes)
    budget.share("a").announce(4 * MIB)


# ── the server ───────────────────────────────────────────────────────────────────────────────────


def body(size: int, word: str = "!wait") -> bytes:
    data = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"{word} "}]})
    return data.replace(f"{word} ", f"{word} " + "x" * (size - len(data))).encode()


def head(length: int | None, key: str = "", path: str = CHAT, more: str = "") -> bytes:
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"x-api-key: {key}\r\n{more}{framing}\r\n\r\n"
    ).encode()


def status(connection: socket.socket) -> int:
    line = b""
    while not line.endswith(b"\r\n"):
        line += connection.recv(1)
    return int(line.split()[1])


def held(run) -> int:
    return run.call(lambda: run.server.context.bodies.held)


@pytest.fixture
def narrow(start, each_parser):
    keys = {name: f"{name}-key-0123456789" for name in ("ann", "bob")}
    ring = KeyRing([KeySpec(name, key, all_metrics=True) for name, key in keys.items()])
    limits = {"max_body_bytes": 2 * MIB, "max_body_total_bytes": 6 * MIB, "body_timeout_s": 2}
    with start(keys=ring, **limits) as run:
        run.keys = keys
        yield run


def wait_with_body(run, key: str, size: int) -> socket.socket:
    """A request whose body the server keeps, for its answer waits."""
    begun = run.handler.begun
    connection = run.connect()
    data = body(size)
    connection.sendall(head(len(data), run.keys[key]) + data)
    run.until(lambda: run.handler.begun > begun)
    return connection


@pytest.mark.parametrize("path", [CHAT, OWN, "/v1/messages"])
def test_a_caller_who_has_much_in_flight_is_told_to_come_again_and_others_are_not(narrow, path):
    run = narrow
    first = wait_with_body(run, "ann", 2 * MIB)
    assert held(run) == 2 * MIB - FREE_BYTES
    big = body(MIB + 200_000, "one")
    with httpx.Client(base_url=run.url) as client:
        headers = {"x-api-key": run.keys["ann"], "content-type": "application/json"}
        refused = client.post(path, content=big, headers=headers)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        problem = refused.json()["error"]
        assert "send this one again later" in problem["message"]
        kind = "overloaded_error" if path == "/v1/messages" else "service_unavailable_error"
        assert problem["type"] == kind
        if path != "/v1/messages":
            assert problem["code"] == "too_many_bytes"
        # The connection goes on; a smaller one gets through, and so does what others send.
        small = body(FREE_BYTES, "one")
        assert client.post(CHAT, content=small, headers=headers).status_code == 200
        headers["x-api-key"] = run.keys["bob"]
        assert client.post(CHAT, content=big, headers=headers).status_code == 200
        lines = client.get("/metrics", headers=headers).text.splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(told["engineroom_server_body_bytes"]) == 2 * MIB - FREE_BYTES
    labels = '{key_name="-",reason="body_bytes"}'
    assert float(told[f"engineroom_admission_rejections_total{labels}"]) == 1
    run.call(run.handler.gate.set)
    assert status(first) == 200
    first.close()
    run.until(lambda: run.server.context.bodies.held == 0)


def test_what_a_refused_request_took_is_given_back_before_its_answer_is_read(narrow):
    run = narrow
    data = body(MIB, "!refuse")
    with run.connect() as connection:
        connection.sendall(head(len(data), run.keys["ann"]) + data)
        assert status(connection) == 400
        assert held(run) == 0


def test_a_body_of_unknown_length_is_refused_when_it_has_become_too_much(narrow):
    run = narrow
    first = wait_with_body(run, "ann", 2 * MIB)
    with run.connect() as connection:
        connection.sendall(head(None, run.keys["ann"]))
        part = b"%x\r\n%b\r\n" % (200_000, b" " * 200_000)
        for _ in range(7):
            connection.sendall(part)
        assert status(connection) == 503
        run.until(lambda: run.server.context.bodies.held == 2 * MIB - FREE_BYTES)
    first.close()
    run.until(lambda: run.server.context.bodies.held == 0)


def test_who_asks_before_sending_is_refused_before(narrow):
    run = narrow
    first = wait_with_body(run, "ann", 2 * MIB)
    with run.connect() as connection:
        connection.sendall(head(MIB + 200_000, run.keys["ann"], more="expect: 100-continue\r\n"))
        assert status(connection) == 503
    with run.connect() as connection:
        connection.sendall(head(MIB, run.keys["bob"], more="expect: 100-continue\r\n"))
        assert status(connection) == 100
    first.close()


def test_a_body_that_trickles_holds_what_has_come_and_no_longer_than_its_time(narrow):
    run = narrow
    slow = [run.connect() for _ in range(3)]
    for connection in slow:
        connection.sendall(head(2 * MIB, run.keys["ann"]) + b" " * 500_000)
    run.until(lambda: run.server.context.bodies.held > 3 * 300_000)
    data = body(MIB, "one")
    headers = {"x-api-key": run.keys["bob"], "content-type": "application/json"}
    assert httpx.post(run.url + CHAT, content=data, headers=headers).status_code == 200
    assert [status(connection) for connection in slow] == [408] * 3
    assert held(run) == 0
    for connection in slow:
        connection.close()


def test_clients_that_go_away_while_they_send_give_back_what_they_took(narrow):
    run = narrow
    for _ in range(2):
        with run.connect() as connection:
            connection.sendall(head(2 * MIB, run.keys["ann"]) + b" " * MIB)
            run.until(lambda: run.server.context.bodies.held > 0)
        run.until(lambda: run.server.context.bodies.held == 0)


def test_without_keys_addresses_share(start):
    with start(max_body_bytes=2 * MIB, max_body_total_bytes=6 * MIB) as run:
        data = body(2 * MIB)
        with run.connect() as connection:
            connection.sendall(head(len(data)) + data)
            run.until(lambda: run.handler.running == 1)
            again = httpx.post(
                run.url + CHAT,
                content=body(2 * MIB, "one"),
                headers={"content-type": "application/json"},
            )
            assert again.status_code == 503
        other = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=other, base_url=run.url) as client:
            run.until(lambda: run.handler.running == 0)
            answer = client.post(
                CHAT,
                content=body(2 * MIB, "one"),
                headers={"content-type": "application/json"},
            )
            assert answer.status_code == 200
