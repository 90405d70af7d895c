"""A line in the log for each HTTP request, none of them twice, and never a word of a body."""

from __future__ import annotations

import json
import logging

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx

from engineroom.server.keys import KeyRing

ANN, BOSS = "ann-key-0123456789", "boss-key-0123456789"
CANARY = "canary-song-of-a-secret-7f3a"
CHAT = "/v1/chat/completions"


def talk(text="one two", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def locked(start):
    with start(keys=KeyRing([("ann", ANN)], [("boss", BOSS)])) as run:
        yield run


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, logger="engineroom")
    return caplog


def ours(log):
    return [r for r in log.records if r.name.startswith("engineroom")]


def told(log):
    """What is written of requests from INFO on."""
    models = ("engineroom.manager", "engineroom.loading")
    records = [r for r in ours(log) if r.levelno >= logging.INFO and r.name not in models]
    return [(r.levelname, r.getMessage()) for r in records]


def send(run, path, body, key=ANN, **more):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers |= {"content-type": "application/json", **more}
    return httpx.post(run.url + path, content=content, headers=headers, timeout=20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_answered_has_one_line_with_its_key(locked, log, stream):
    send(locked, CHAT, talk(stream=stream), **{"x-request-id": "mine"})
    locked.until(lambda: not locked.service.num_requests)
    (entry,) = told(log)
    level, line = entry
    assert level == "INFO" and line.startswith("request mine-") and "key ann" in line
    of_it = [r for r in ours(log) if getattr(r, "request_id", "").startswith("mine-")]
    assert {r.key_name for r in of_it} == {"ann"} and len(of_it) >= 3


@pytest.mark.parametrize(
    ("body", "level", "said"),
    [
        (b"{", "WARNING", "was refused: 400 invalid_json, the client's mistake"),
        (
            talk(temperature=9),
            "WARNING",
            "was refused: 400 invalid_value (temperature), the client's",
        ),
        (
            talk(tools=[{}]),
            "WARNING",
            "was refused: 400 invalid_value (tools), the client's",
        ),
        (talk(model="no"), "WARNING", "the client's mistake, ModelNotFoundError"),
        (talk("!refuse"), "WARNING", "the client's mistake, ConfigurationError"),
        (talk("!dead"), "ERROR", "the runtime's mistake, EngineDeadError"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_one_that_is_refused_has_one_line_with_whose_mistake_it_was(
    locked, log, body, level, said, stream
):
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    answer = send(locked, CHAT, body)
    assert answer.status_code >= 400
    locked.until(lambda: not locked.service.num_requests)
    ((written, line),) = told(log)
    assert written == level and said in line and ("key 'ann'" in line or "key ann" in line)
    assert not any(r.exc_info for r in ours(log))


@pytest.mark.parametrize("body", [talk("!fail"), talk("!leak"), talk("x !break y z", stream=True)])
def test_one_that_nobody_foresaw_has_its_traceback_once(locked, log, body):
    send(locked, CHAT, body)
    locked.until(lambda: not locked.service.num_requests)
    failed, ended = told(log)
    assert (failed[0], ended[0]) == ("ERROR", "WARNING")
    assert len([r for r in ours(log) if r.exc_info]) == 1
    assert all(r.key_name == "ann" for r in ours(log) if hasattr(r, "request_id"))


def test_a_limit_that_turns_away_is_told_once(start, log):
    with start(tokens_per_minute=10, keys=KeyRing([("ann", ANN)])) as run:
        send(run, CHAT, talk(max_tokens=10))
        log.clear()
        assert send(run, CHAT, talk(max_tokens=10)).status_code == 429
        ((level, line),) = told(log)
        assert level == "WARNING" and "was turned away: tokens_per_minute (key ann)" in line


def test_what_is_asked_for_in_vain_has_a_line_without_its_path(locked, log):
    httpx.get(f"{locked.url}/v1/{CANARY}", headers={"authorization": f"Bearer {ANN}"})
    httpx.get(f"{locked.url}/v1/admin/models", headers={"authorization": f"Bearer {ANN}"})
    (_, nowhere), (_, forbidden) = told(log)
    assert "was refused: 404 not_found" in nowhere
    assert "GET /v1/admin/models" in forbidden and "403 admin_key_needed" in forbidden
    assert CANARY not in log.text


def bodies(text):
    """Every text field of every route, each with the canary in it."""
    yield CHAT, talk(text)
    yield (
        CHAT,
        {
            "model": "m",
            "messages": [{"role": "system", "content": [{"type": "text", "text": text}]}],
        },
    )
    yield CHAT, talk("a", stop=[text], user=text, metadata={"note": text}, safety_identifier=text)
    yield CHAT, {"model": "m", "messages": [{"role": "user", "content": "a", "name": text}]}
    yield CHAT, {"model": "m", "messages": [{"role": text, "content": "a"}]}
    yield CHAT, talk("a", temperature=text)
    yield CHAT, talk("a", tools=[{"type": "function", "function": {"description": text}}])
    yield CHAT, talk("a", response_format={"type": "json_schema", "json_schema": {"name": text}})
    yield CHAT, {**talk("a"), f"{text} is unknown": 1, text: text}
    yield CHAT, text
    yield "/v1/completions", {"model": "m", "prompt": text, "suffix": None}
    yield "/v1/completions", {"model": "m", "prompt": [text, 3]}
    yield "/v1/completions", {"model": "m", "prompt": "a", "suffix": text}
    yield "/v1/responses", {"model": "m", "input": text, "instructions": text}
    yield "/v1/responses", {"model": "m", "input": [{"role": "user", "content": text}]}
    yield "/v1/responses", {"model": "m", "input": [{"type": text}]}
    yield "/v1/messages", {**talk(text), "system": text, "max_tokens": 3, "stop_sequences": [text]}
    yield "/v1/messages", {**talk("a"), "max_tokens": text}
    yield "/v1/inference", {"model_id": "m", "prompt": text, "stop_sequences": [text]}
    yield "/v1/inference", {"model_id": "m", "prompt": text, text: text}
    yield "/v1/inference", {"model_id": "m", "prompt": {text: text}}
    yield (
        "/v1/inference",
        {"model_id": "m", "prompt": "a", "tools": [{"x": text}], "tool_choice": text},
    )
    yield (
        "/v1/inference",
        {
            "model_id": "m",
            "prompt": "a",
            "params": {"structured_output": {"regex": text}},
        },
    )
    yield "/v1/embeddings", {"model": "m", "input": [text]}
    yield "/v1/embeddings", {"model": "m", "input": [[text]]}


@pytest.mark.parametrize("word", ["", "!fail", "!break", "!refuse", "!dead"])
@pytest.mark.parametrize("stream", [False, True])
def test_no_word_of_a_body_is_in_the_log(locked, log, stream, word):
    statuses = set()
    for path, body in bodies(f"{CANARY} {CANARY} {word}"):
        if isinstance(body, dict) and path != "/v1/embeddings":
            body["stream"] = stream
        statuses.add(send(locked, path, body).status_code)
        statuses.add(send(locked, path, body, key=None).status_code)
        statuses.add(send(locked, path, json.dumps(body).encode()[:-1]).status_code)
    locked.until(lambda: not locked.service.num_requests)
    assert {200, 400, 401} <= statuses
    formatter = logging.Formatter()
    for record in ours(log):
        assert CANARY not in formatter.format(record), record
        assert CANARY not in str(vars(record)), record
