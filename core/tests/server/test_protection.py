"""Keys, limits, and requests that mean no good."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx

from engineroom import ConfigurationError
from engineroom.server.keys import KeyRing, new_key
from engineroom.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
USER, OTHER, ADMIN = "user-key-0123456789", "other-key-0123456789", "admin-key-0123456789"
RING = {"keys": KeyRing([("ann", USER), ("bob", OTHER)], [("root", ADMIN)])}


def talk(text="one two", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# ── keys ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def locked(start):
    with start(**RING) as run:
        yield run


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "missing_api_key"),
        ({"authorization": "Bearer"}, 401, "missing_api_key"),
        (bearer("wrong-key-0123456789"), 401, "invalid_api_key"),
        (bearer(USER[:-1]), 401, "invalid_api_key"),
        ({"authorization": f"Basic {USER}"}, 401, "missing_api_key"),
        (bearer(USER), 200, None),
        ({"authorization": f"bearer  {USER}"}, 200, None),
        ({"x-api-key": OTHER}, 200, None),
        (bearer(ADMIN), 200, None),
    ],
)
def test_a_key_is_needed(locked, headers, status, code):
    for method, path, body in (("POST", CHAT, talk()), ("GET", "/metrics", None)):
        answer = httpx.request(method, locked.url + path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        if code:
            assert answer.json()["error"]["code"] == code
            assert answer.headers["www-authenticate"] == "Bearer"


def test_what_load_balancers_ask_needs_none(locked):
    for path in ("/healthz", "/health", "/ping", "/readyz"):
        assert httpx.get(locked.url + path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/nonsense", "/v1/admin/models", "/v1", "/openapi.json"])
def test_without_a_key_nothing_is_told(locked, path):
    assert httpx.get(locked.url + path).status_code == 401


@pytest.mark.parametrize(("key", "status"), [(USER, 403), (ADMIN, 200)])
def test_the_admin_routes_need_an_admin_key(locked, key, status):
    assert httpx.get(locked.url + "/v1/admin/models", headers=bearer(key)).status_code == status


def test_the_admin_routes_of_a_server_without_admin_key_are_shut(start):
    with start(keys=KeyRing([("ann", USER)])) as run:
        answer = httpx.get(run.url + "/v1/admin/models", headers=bearer(USER))
        assert answer.status_code == 403
        assert "--admin-keys" in answer.json()["error"]["message"]


def test_an_open_server_with_no_keys_has_no_admin_routes(start):
    with start(insecure=True, host="0.0.0.0") as run:
        assert httpx.get(f"http://127.0.0.1:{run.port}/v1/models").status_code == 200
        answer = httpx.get(f"http://127.0.0.1:{run.port}/v1/admin/models")
        assert answer.status_code == 403


def test_keys_are_kept_as_hashes():
    ring = KeyRing([("ann", USER)])
    assert USER not in repr(vars(ring)) and USER.encode() not in repr(vars(ring)).encode()
    key, hashed = new_key()
    ring = KeyRing([("x", hashed)])
    assert ring.find(key).name == "x"
    assert ring.find(hashed) is None


def test_keys_come_from_files_and_the_environment(tmp_path):
    key, hashed = new_key()
    (tmp_path / "keys").write_text(f"# who\n\nann {USER}\nbob {hashed}\n")
    environ = {"ENGINEROOM_API_KEYS": f"{OTHER}, ", "ENGINEROOM_ADMIN_KEYS": ADMIN}
    ring = KeyRing.read(tmp_path / "keys", None, environ)
    assert [ring.find(k).name for k in (USER, key, OTHER, ADMIN)] == [
        "ann", "bob", "key-1", "admin-1",
    ]  # fmt: skip
    assert [ring.find(k).admin for k in (USER, key, OTHER, ADMIN)] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ann short\n", "shorter than 16"),
        ("ann\n", "keys:1: a line is NAME KEY"),
        ("ann secret-secret-secret oops\n", "keys:1: a line is NAME KEY"),
        ("an/n secret-secret-secret\n", "is no name"),
        ("a secret-secret-secret\na secret-secret-secreT\n", "two keys are called 'a'"),
        ("# nobody\n", "has no key"),
        ("a sha256:0123\n", "no sha256:HEX"),
    ],
)
def test_mistakes_in_a_key_file_are_told_and_the_key_is_not(tmp_path, text, said):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        KeyRing.read(tmp_path / "keys", None, {})
    assert said in caught.value.message
    assert "secret-secret" not in caught.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_to_listen_for_others_takes_keys_or_the_word(host):
    with pytest.raises(ConfigurationError, match="without keys"):
        ServerSettings(host=host)
    ServerSettings(host=host, insecure=True)
    ServerSettings(host=host, **RING)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1", "[::1]"])
def test_to_listen_for_oneself_takes_nothing(host):
    assert ServerSettings(host=host).local


@pytest.mark.parametrize(
    "wrong", [{"port": 70_000}, {"max_running": 0}, {"max_body_bytes": -1}, {"unknown_fields": "?"}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        ServerSettings(**wrong)


# ── web pages ────────────────────────────────────────────────────────────────────────────────


def test_a_name_of_somebody_elses_does_not_reach_an_open_local_server(shared):
    answer = httpx.get(shared.url + "/v1/models", headers={"host": "evil.example:80"})
    assert answer.status_code == 421
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "a.localhost"):
        assert httpx.get(shared.url + "/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_may_not_post(shared, start):
    for path in (CHAT, "/v1/admin/models/m/unload"):
        answer = httpx.post(
            shared.url + path, json=talk(), headers={"origin": "http://evil.example"}
        )
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    same = {"origin": shared.url}
    assert httpx.post(shared.url + CHAT, json=talk(), headers=same).status_code == 200


def test_cors_is_for_the_origins_that_are_named(start):
    with start(cors_origins=("http://good.example",)) as run:
        good = {"origin": "http://good.example"}
        answer = httpx.post(run.url + CHAT, json=talk(), headers=good)
        assert answer.headers["access-control-allow-origin"] == "http://good.example"
        evil = {"origin": "http://evil.example"}
        assert httpx.post(run.url + CHAT, json=talk(), headers=evil).status_code == 403
        preflight = {**good, "access-control-request-method": "POST"}
        assert httpx.options(run.url + CHAT, headers=preflight).status_code == 200


# ── limits ───────────────────────────────────────────────────────────────────────────────────


def hold(run, **headers):
    connection = run.connect()
    data = json.dumps(talk("!drip", stream=True)).encode()
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    connection.sendall(
        b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n%b"
        b"content-length: %d\r\n\r\n%b" % (CHAT.encode(), lines.encode(), len(data), data)
    )
    return connection


def test_what_does_not_fit_the_queue_is_refused_at_once(start):
    with start(max_running=1, max_queued=1) as run:
        limiter = run.server.context.limiter
        first = hold(run)
        run.until(lambda: limiter.running == 1)
        second = hold(run)
        run.until(lambda: limiter.queued == 1)
        answer = httpx.post(run.url + CHAT, json=talk())
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        first.close()
        run.until(lambda: limiter.queued == 0 and limiter.running == 1)
        second.close()
        run.until(lambda: limiter.running == 0)
        assert httpx.post(run.url + CHAT, json=talk()).status_code == 200


def test_a_key_has_limits_of_its_own(start):
    with start(key_max_running=1, key_max_queued=0, **RING) as run:
        first = hold(run, authorization=f"Bearer {USER}")
        run.until(lambda: run.handler.running == 1)
        assert httpx.post(run.url + CHAT, json=talk(), headers=bearer(USER)).status_code == 429
        assert httpx.post(run.url + CHAT, json=talk(), headers=bearer(OTHER)).status_code == 200
        first.close()


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute(start, stream):
    with start(key_tokens_per_minute=30, **RING) as run:
        body = talk("a b c d e f", max_tokens=10, stream=stream)
        statuses = [
            httpx.post(run.url + CHAT, json=body, headers=bearer(USER)).status_code
            for _ in range(3)
        ]
        assert statuses == [200, 200, 429]  # 12 used, 24 used, 6 left for 10
        answer = httpx.post(run.url + CHAT, json=body, headers=bearer(USER))
        assert answer.json()["error"]["code"] == "tokens_per_minute"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert httpx.post(run.url + CHAT, json=body, headers=bearer(OTHER)).status_code == 200


def test_the_service_is_full(start):
    with start(max_requests=1) as run:
        first = hold(run)
        run.until(lambda: run.handler.running == 1)
        for stream in (False, True):
            answer = httpx.post(run.url + CHAT, json=talk(stream=stream))
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
        first.close()


def test_a_deadline_is_kept(start):
    with start(request_timeout_s=0.2) as run:
        answer = httpx.post(run.url + CHAT, json=talk("!hang"))
        assert answer.status_code == 408
        assert answer.json()["error"]["code"] == "request_timeout"
        answer = httpx.post(run.url + CHAT, json=talk("!hang", timeout_s=3600))
        assert answer.status_code == 408
        run.until(lambda: run.handler.running == 0)


def test_waiting_for_a_place_counts(start):
    with start(max_running=1, request_timeout_s=60) as run:
        first = hold(run)
        run.until(lambda: run.handler.running == 1)
        for stream in (False, True):
            answer = httpx.post(run.url + CHAT, json=talk(stream=stream, timeout_s=0.1))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (408, "request_timeout"), answer.text
            assert "its turn did not come within 0.1 s" in error["message"]
        assert run.server.context.limiter.queued == 0
        first.close()
        run.until(lambda: run.handler.running == 0)
        assert httpx.post(run.url + CHAT, json=talk(timeout_s=60)).status_code == 200


def test_a_request_has_what_its_wait_left_of_its_time(start):
    with start(max_running=1, request_timeout_s=60) as run, ThreadPoolExecutor() as pool:
        first = hold(run)
        run.until(lambda: run.handler.running == 1)
        second = pool.submit(httpx.post, run.url + CHAT, json=talk(timeout_s=50))
        run.until(lambda: run.server.context.limiter.queued == 1)
        first.close()
        assert second.result().status_code == 200
        assert run.handler.seen[-1].timeout_s < 50


def test_embeddings_have_a_deadline_too(start):
    from engineroom.testing import EchoHandler

    models = [{"model_id": "m", "source": "echo:", "options": {"token_delay_s": 60}}]
    with start(models, EchoHandler(), request_timeout_s=0.2) as run:
        answer = httpx.post(run.url + "/v1/embeddings", json={"model": "m", "input": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "m"',
        b'{"model": NaN}',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\udc00"}]}',
        b'{"model": "m\\u0000", "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "m", "messages": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": 1e999}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": 1'
        + b"0" * 500
        + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1.5}',
        b"\x00" * 100,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_no_request(shared, body):
    with httpx.Client(base_url=shared.url) as client:
        headers = {"content-type": "application/json"}
        for path in (CHAT, "/v1/completions", "/v1/inference"):
            answer = client.post(path, content=body, headers=headers)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert client.get("/healthz").status_code == 200  # the connection is usable


def test_nul_bytes_are_text(shared):
    answer = httpx.post(shared.url + CHAT, json=talk("a\x00b"))
    assert answer.json()["choices"][0]["message"]["content"] == "a\x00b"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "Application/JSON; charset=utf-8"}, 200),
    ],
)
def test_the_body_must_be_json(shared, headers, status):
    content = json.dumps(talk()).encode()
    assert httpx.post(shared.url + CHAT, content=content, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
        ("GET", "/none", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("POST", CHAT + "/", 404),
        ("HEAD", "/healthz", 200),
        ("HEAD", CHAT, 405),
        ("BREW", "/healthz", None),
    ],
)
def test_what_is_not_there_is_told_so(shared, method, path, status):
    answer = httpx.request(method, shared.url + path)
    assert answer.status_code == status or (status is None and answer.status_code in (400, 405))
    if method != "HEAD" and answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.usefixtures("each_parser")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_too_many(start, chunked):
    data = b'{"model": "' + b"x" * 100_000_000 + b'"}'
    content = (data[i : i + 65536] for i in range(0, len(data), 65536)) if chunked else data
    with start() as run:
        answer = httpx.post(
            run.url + CHAT, content=content, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert answer.headers["connection"] == "close"


@pytest.mark.usefixtures("each_parser")
def test_a_client_that_sends_before_it_reads_can_send_all_and_then_read(start):
    with start() as run, run.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 60000000\r\n\r\n"
        )
        for _ in range(60):
            connection.sendall(b" " * 1_000_000)  # raises where the connection was closed
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and answer.count(b"HTTP/1.1") == 1


@pytest.mark.usefixtures("each_parser")
def test_a_body_that_does_not_end_is_not_waited_for(start):
    with start(body_timeout_s=0.3) as run, run.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n"
        )
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in answer
        run.until(lambda: not run.server.server_state.connections)


@pytest.mark.usefixtures("each_parser")
def test_a_chunked_body_that_never_ends_is_too_large_in_the_end(start):
    with start(max_body_bytes=10_000, body_timeout_s=20) as run, run.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(11):
            connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_too_many_messages(start):
    with start(max_messages=3) as run:
        answer = httpx.post(
            run.url + CHAT,
            json={"model": "m", "messages": [{"role": "user", "content": "x"}] * 4},
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_unknown_fields_are_refused_where_that_is_wanted(start):
    with start(unknown_fields="refuse") as run:
        answer = httpx.post(run.url + CHAT, json=talk(temprature=1))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "temprature"
        assert httpx.post(run.url + CHAT, json=talk(temperature=1)).status_code == 200


# ── below HTTP ───────────────────────────────────────────────────────────────────────────────


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.usefixtures("each_parser")
def test_garbage_is_answered_and_closed(start):
    with start() as run:
        send_garbage(run)


def send_garbage(shared):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"\x00" * 1000,
        b"hello\r\n\r\n",
    ):
        with shared.connect() as connection:
            connection.sendall(garbage)
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 400 "), garbage
            assert b'"invalid_http"' in answer
    assert httpx.get(shared.url + "/healthz").status_code == 200


@pytest.mark.usefixtures("each_parser")
def test_headers_that_do_not_come_are_not_waited_for(start):
    with start(header_timeout_s=0.3, keep_alive_s=0.3) as run:
        with run.connect() as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nhost: local")
            assert read_all(slow).startswith(b"HTTP/1.1 408 ")
        with run.connect() as silent:
            assert read_all(silent) == b""
        with run.connect() as second:
            second.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            while not second.recv(65536).endswith(b'"ok"}'):
                pass
            second.sendall(b"GET /hea")
            assert read_all(second).startswith(b"HTTP/1.1 408 ")
        with run.connect() as pipelined:
            pipelined.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea")
            assert read_all(pipelined).startswith(b"HTTP/1.1 200 ")
        run.until(lambda: not run.server.server_state.connections)


@pytest.mark.parametrize("ended", [False, True])
def test_headers_that_are_too_large(start, ended):
    with start(max_header_bytes=8000) as run, run.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n")
        for i in range(20):
            connection.sendall(b"x-%d: %b\r\n" % (i, b"y" * 500))
            time.sleep(0.005)  # so that they arrive apart; right in any case
        if ended:
            connection.sendall(b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 431 ")


@pytest.mark.usefixtures("each_parser")
def test_there_may_be_only_so_many_connections(start):
    with start(max_connections=3) as run:
        held = [run.connect() for _ in range(3)]
        run.until(lambda: len(run.server.server_state.connections) == 3)
        with run.connect() as further:
            answer = read_all(further)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer and b"\r\nx-request-id: " in answer
        for connection in held:
            connection.close()
        run.until(lambda: not run.server.server_state.connections)
        assert httpx.get(run.url + "/healthz").status_code == 200


@pytest.mark.usefixtures("each_parser")
def test_a_connection_is_closed_when_it_is_not_used(start):
    with start(keep_alive_s=0.2) as run, run.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


# ── what is told ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123", True),
        ("0af7651916cd43dd", True),
        ("x" * 200, False),
        ("a b", False),
        ("a\x01b", False),
        ('"><script>', False),
        ("", False),
    ],
)
def test_request_ids_are_kept_if_they_are_harmless(shared, given, kept):
    with shared.connect() as connection:
        connection.sendall(
            b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: %b"
            b"\r\n\r\n" % given.encode()
        )
        answer = read_all(connection).decode()
    if answer.startswith("HTTP/1.1 400"):  # the parser's own view of control characters
        assert not kept
        return
    (line,) = [each for each in answer.split("\r\n") if each.startswith("x-request-id: ")]
    value = line.removeprefix("x-request-id: ")
    assert value.startswith(f"{given}-") == (kept and bool(given))
    assert set(value) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_two_requests_of_one_id_are_two(shared):
    ids = set()
    for _ in range(2):
        httpx.post(shared.url + CHAT, json=talk(), headers={"x-request-id": "same"})
        ids.add(shared.handler.seen[-1].request_id)
    assert len(ids) == 2 and all(each.startswith("same-") for each in ids)


def test_prompts_are_in_the_log_only_where_that_was_asked(start, caplog):
    caplog.set_level("DEBUG", logger="engineroom")
    with start() as run:
        httpx.post(run.url + CHAT, json=talk("a-secret !fail"))
        httpx.post(run.url + CHAT, json=talk("a-secret"))
    assert "a-secret" not in caplog.text
    with start(log_prompts=True) as run:
        httpx.post(run.url + CHAT, json=talk("a-secret"))
    assert "a-secret" in caplog.text


def test_keys_are_never_in_the_log(locked, caplog):
    caplog.set_level("DEBUG")
    httpx.post(locked.url + CHAT, json=talk("!fail"), headers=bearer(USER))
    httpx.post(locked.url + CHAT, json=talk(), headers=bearer("wrong-key-0123456789"))
    assert USER not in caplog.text and "wrong-key" not in caplog.text
