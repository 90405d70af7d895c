"""Going away, draining, stopping: nothing is left open, and streams end properly."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from server_doubles import TalkHandler

from engineroom import EngineRoomError

CHAT = "/v1/chat/completions"


def talk(text: str, **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def post(connection: socket.socket, body: dict, path: str = CHAT) -> None:
    data = json.dumps(body).encode()
    connection.sendall(
        b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (path.encode(), len(data), data)
    )


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    got = b""
    while wanted not in got and (part := connection.recv(65536)):
        got += part
    return got


# ── going away ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("each_parser")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("where", ["!hang", "!drip"], ids=["prefill", "decoding"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_frees_its_slot(start, stream, where, how):
    with start() as run:
        connection = run.connect()
        post(connection, talk(where, stream=stream))
        run.until(lambda: run.handler.running == 1)
        if where == "!drip":
            run.until(lambda: run.handler.steps > 2)
        if how == "reset":
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        run.until(lambda: run.handler.running == 0, "the slot is free")
        run.until(lambda: run.server.context.limiter.running == 0)
        run.until(lambda: not run.server.server_state.tasks)
        assert run.call(lambda: run.service.num_requests) == 0


def test_one_who_waits_and_goes_away_leaves_the_queue(start):
    with start(max_running=1) as run:
        first, second = run.connect(), run.connect()
        post(first, talk("!drip", stream=True))
        run.until(lambda: run.handler.running == 1)
        post(second, talk("!drip", stream=True))
        run.until(lambda: run.server.context.limiter.queued == 1)
        second.close()
        run.until(lambda: run.server.context.limiter.queued == 0)
        assert run.handler.begun == 1
        third = run.connect()
        post(third, talk("one two"))
        run.until(lambda: run.server.context.limiter.queued == 1)
        first.close()
        assert b"one two" in read_until(third, b"one two")
        third.close()


def test_of_several_answers_all_are_stopped(start):
    with start() as run:
        connection = run.connect()
        post(connection, talk("!drip", stream=True, n=4))
        run.until(lambda: run.handler.running == 4)
        connection.close()
        run.until(lambda: run.handler.running == 0)


def test_a_neighbour_never_notices(start):
    with start() as run:
        connection = run.connect()
        post(connection, talk("!drip", stream=True))
        run.until(lambda: run.handler.running == 1)
        text = "a b c d " * 50
        with httpx.stream("POST", run.url + CHAT, json=talk(text, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            connection.close()
            got = [line for line in lines if line.startswith("data: {")]
        said = "".join(
            c["delta"].get("content") or "" for g in got for c in json.loads(g[6:])["choices"]
        )
        assert said == text


@pytest.mark.usefixtures("each_parser")
def test_a_reader_that_does_not_read_is_cut_off(start):
    with start(write_timeout_s=0.3) as run:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", run.port))
        post(connection, talk("word" * 20_000 + " !drip", stream=True))
        run.until(lambda: run.handler.running == 1)
        run.until(lambda: run.handler.running == 0, "the reader was cut off")
        run.until(lambda: not run.server.server_state.connections)
        connection.close()


# ── readiness ────────────────────────────────────────────────────────────────────────────────


def test_it_is_ready_once_the_models_are(start):
    handler = TalkHandler()
    handler.load_gate = asyncio.Event()
    with start(handler=handler, wait=False) as run:
        answer = httpx.get(run.url + "/readyz")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["models are loading"])
        assert httpx.get(run.url + "/healthz").status_code == 200
        run.call(handler.load_gate.set)
        run.until(lambda: not run.server.context.starting)
        assert httpx.get(run.url + "/readyz").json() == {"status": "ready", "reasons": []}


def test_it_is_not_ready_when_an_engine_is_dead(start):
    with start() as run:
        assert httpx.get(run.url + "/readyz").status_code == 200
        run.handler.ok = False
        answer = httpx.get(run.url + "/readyz")
        assert answer.status_code == 503
        assert answer.json()["reasons"] == ["the engine of m is not well"]


@pytest.mark.parametrize("who", ["/readyz", "/metrics"])
def test_an_engine_that_has_ended_while_nobody_used_it_is_unloaded_by_who_sees_it(start, who):
    """Else nobody would send the request that loads it anew."""
    with start() as run:
        run.handler.ok, run.handler.dead = False, True
        answer = httpx.get(run.url + who)
        assert answer.status_code == (503 if who == "/readyz" else 200)
        run.until(lambda: run.manager.list_models()[0].state == "unloaded")
        assert httpx.get(run.url + "/readyz").status_code == 200
        assert httpx.post(run.url + CHAT, json=talk("one")).status_code == 200
        assert run.manager.list_models()[0].state == "ready"


def test_a_server_none_of_whose_models_load_ends(start):
    bad = [{"model_id": "x", "source": "talk:bad"}]
    with pytest.raises(EngineRoomError, match="damaged"), start(bad):
        pass


def test_a_server_some_of_whose_models_load_goes_on(start):
    models = [{"model_id": "x", "source": "talk:bad"}, {"model_id": "y", "source": "talk:"}]
    with start(models) as run:
        assert httpx.get(run.url + "/readyz").status_code == 200
        assert httpx.post(run.url + CHAT, json={**talk("a"), "model": "y"}).status_code == 200
        answer = httpx.post(run.url + CHAT, json={**talk("a"), "model": "x"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_not_loaded"
        assert "/srv" not in answer.text


# ── stopping ─────────────────────────────────────────────────────────────────────────────────


def stopping(run):
    run.loop.call_soon_threadsafe(run.server.stop)


def test_draining_lets_what_runs_end(start):
    with start(drain_timeout_s=20) as run:
        text = "a b c d e f g h " * 100
        with httpx.stream("POST", run.url + CHAT, json=talk(text, stream=True)) as response:
            stopping(run)
            body = response.read().decode()
        assert body.endswith("data: [DONE]\n\n")
        assert '"error"' not in body
        run.thread.join(20)
        assert not run.thread.is_alive()


@pytest.mark.usefixtures("each_parser")
def test_what_does_not_end_in_time_is_told_so(start):
    with start(drain_timeout_s=0.2) as run:
        with httpx.stream("POST", run.url + CHAT, json=talk("!drip", stream=True)) as response:
            run.until(lambda: run.handler.steps > 2)
            stopping(run)
            body = response.read().decode()
        *_, error, done, _ = body.split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(error[6:])["error"]["type"] == "service_unavailable_error"
        run.thread.join(20)
        assert run.handler.running == 0


def test_while_it_drains_it_is_not_ready_and_takes_no_work(start):
    with start(drain_timeout_s=20, max_running=1) as run:
        holder = run.connect()
        post(holder, talk("!drip", stream=True))
        run.until(lambda: run.handler.running == 1)
        waiting = run.connect()
        post(waiting, talk("one"))
        run.until(lambda: run.server.context.limiter.queued == 1)
        stopping(run)
        assert b" 503 " in waiting.recv(65536).partition(b"\r\n")[0]
        ready = httpx.get(run.url + "/readyz")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["draining"])
        refused = httpx.post(run.url + CHAT, json=talk("new"))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert refused.headers["retry-after"] == "5"
        holder.close()
        waiting.close()
        run.thread.join(20)
        assert not run.thread.is_alive()


@pytest.mark.usefixtures("each_parser")
def test_a_silent_connection_does_not_keep_it(start):
    with start() as run:
        idle = run.connect()
        stopping(run)
        run.thread.join(20)
        assert not run.thread.is_alive()
        idle.close()
