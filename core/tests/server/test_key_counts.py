"""What is counted and logged of keys, by their names, and who may read it."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("prometheus_client", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from prometheus_client.parser import text_string_to_metric_families

from engineroom import InferenceRequest, InferenceResponse
from engineroom.server.http.key_failures import LINES, WINDOW_S, KeyFailures
from engineroom.server.keys import KeyRing, KeySpec
from engineroom.server.metrics import MOST_KEYS, OTHER_KEYS
from engineroom.server.routes import all_routes

ANN, BOB, BOSS, PROM = (f"{name}-key-0123456789" for name in ("ann", "bob", "boss", "prom"))
CHAT = "/v1/chat/completions"


def talk(text="one two", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def locked(start):
    keys = [KeySpec("ann", ANN), KeySpec("bob", BOB), KeySpec("prom", PROM, all_metrics=True)]
    with start(keys=KeyRing(keys, [("boss", BOSS)]), max_running=1, max_queued=0) as run:
        yield run


def samples(run, key):
    text = httpx.get(run.url + "/metrics", headers=bearer(key)).text
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def test_what_is_counted_of_a_request_has_the_name_of_its_key(locked):
    for key in (ANN, ANN, BOB):
        body = talk("a b c d", stream=key == ANN)
        assert httpx.post(locked.url + CHAT, json=body, headers=bearer(key)).status_code == 200
    locked.until(lambda: locked.server.context.limiter.running == 0)
    drip = {"json": talk("!drip", stream=True), "headers": bearer(ANN)}
    with httpx.stream("POST", locked.url + CHAT, **drip) as one:
        lines = one.iter_lines()
        next(lines)
        assert httpx.post(locked.url + CHAT, json=talk(), headers=bearer(BOB)).status_code == 429
    locked.until(lambda: not locked.service.num_requests)
    of_all = samples(locked, BOSS)
    by_key = {s.name: {} for s in of_all if "key_name" in s.labels}
    for sample in of_all:
        if sample.name in by_key and sample.labels.get("le") in (None, "+Inf"):
            counts = by_key[sample.name]
            counts[sample.labels["key_name"]] = (
                counts.get(sample.labels["key_name"], 0) + sample.value
            )
    expected = {
        "request_success_total": {"ann": 3, "bob": 1},
        "requests_total": {"ann": 3, "bob": 1},
        "requests_cancelled_total": {"ann": 1},
        "admission_rejections_total": {"bob": 1},
        "request_queue_time_seconds_count": {"ann": 3, "bob": 1},
        "e2e_request_latency_seconds_count": {"ann": 3, "bob": 1},
    }
    for name, counts in expected.items():
        assert by_key[f"engineroom_{name}"] == counts
    for name in ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
                 "prefix_cache_hits_total", "time_to_first_token_seconds_count",
                 "request_prompt_tokens_count", "request_generation_tokens_count"):  # fmt: skip
        assert by_key[f"engineroom_{name}"].keys() == {"ann", "bob"}
    assert by_key["engineroom_inter_token_latency_seconds_count"].keys() == {"ann"}


def test_a_key_reads_its_own_metrics_and_nothing_of_others(locked):
    for key in (ANN, BOB):
        httpx.post(locked.url + CHAT, json=talk(), headers=bearer(key))
    mine = samples(locked, BOB)
    assert mine and all(s.labels["key_name"] == "bob" for s in mine)
    for key in (BOSS, PROM):
        of_all = samples(locked, key)
        assert {s.labels["key_name"] for s in of_all if "key_name" in s.labels} == {"ann", "bob"}
        assert "engineroom_num_requests_running" in {s.name for s in of_all}


def test_no_other_route_tells_a_key_of_anothers_requests(locked):
    """Neither while they run nor afterwards, and none of them can be asked for by its id."""
    routes = {route.path.replace("{model:path}", "m") for route in all_routes()}
    assert len(routes) > 10
    secret = "a word that only one says"

    def look(request_id):
        kinds = ("responses", "chat/completions", "messages", "requests")
        of_one = {f"/v1/{kind}/{request_id}" for kind in kinds}
        for path in routes | of_one:
            answer = httpx.get(locked.url + path, headers=bearer(BOB))
            assert answer.status_code in (200, 401, 403, 404, 405), path
            assert answer.status_code != 200 or path not in of_one
            assert request_id not in answer.text.replace(path, ""), path
            assert secret not in answer.text and not re.search(r"\bann\b", answer.text), path

    body = talk(f"{secret} !drip", stream=True)
    with httpx.stream("POST", locked.url + CHAT, json=body, headers=bearer(ANN)) as one:
        next(one.iter_lines())
        look(one.headers["x-request-id"])
    locked.until(lambda: not locked.service.num_requests)
    look(one.headers["x-request-id"])


def test_without_keys_there_are_no_names_of_them(shared):
    assert not [s for s in samples(shared, "any") if "key_name" in s.labels]


def test_more_keys_than_can_be_told_apart_are_counted_together(locked):
    metrics = locked.server.context.metrics
    response = InferenceResponse(request_id="r", model_id="m", finish_reason="length")

    def count():
        for number in range(MOST_KEYS + 50):
            request = InferenceRequest(model_id="m", prompt="a", metadata={"api_key": f"k{number}"})
            metrics.engineroom_request_finished(request, response)

    locked.call(count)
    counts = {
        s.labels["key_name"]: s.value
        for s in samples(locked, BOSS)
        if s.name == "engineroom_request_success_total"
    }
    assert len(counts) == MOST_KEYS + 1 and counts[OTHER_KEYS] == 50


def test_who_is_no_key_does_not_learn_which_models_there_are(locked, shared):
    for run, named in ((locked, False), (shared, True)):
        run.handler.ok = False
        try:
            answer = httpx.get(run.url + "/readyz")
        finally:
            run.handler.ok = True
        assert answer.status_code == 503
        assert ("of m is" in answer.text) == named


# ── failed keys ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "reason", "said"),
    [({}, "missing", "no key"), (bearer("wrong-key-0123456789"), "unknown", "an unknown key")],
)
def test_a_failed_key_is_counted_and_logged_with_its_address(locked, headers, reason, said, caplog):
    answer = httpx.get(locked.url + "/v1/models", headers=headers)
    (record,) = [r for r in caplog.records if r.name.startswith("engineroom")]
    assert record.levelname == "WARNING"
    assert f"a request with {said} came from 127.0.0.1 (request " in record.getMessage()
    assert record.request_id == answer.headers["x-request-id"]
    counts = {s.labels["reason"]: s.value for s in samples(locked, BOSS)
              if s.name == "engineroom_api_key_failures_total"}  # fmt: skip
    assert counts == {reason: 1}
    assert "wrong-key" not in caplog.text


async def test_of_many_failed_keys_a_few_are_written_and_the_number_of_the_rest(caplog):
    now, counted = [1000.0], []
    failures = KeyFailures(counted.append, lambda: now[0])

    def fail(times, address):
        for _ in range(times):
            failures.add("unknown", address, "r")

    def lines():
        told = [r.getMessage() for r in caplog.records]
        caplog.clear()
        return told

    fail(500, "10.0.0.1")
    fail(500, "10.0.0.2")
    assert len(lines()) == LINES and len(counted) == 1000
    now[0] += WINDOW_S
    fail(1, "10.0.0.3")
    more, one = lines()
    assert more.startswith(f"{1000 - LINES} more requests") and more.endswith("from 2 addresses")
    assert "10.0.0.3" in one
    failures.summarise()
    assert lines() == []
    fail(LINES, "10.0.0.4")  # the last one is not written, and is told when the minute is over
    assert len(lines()) == LINES - 1
    assert failures._summary is not None
    failures._summary._run()
    assert lines() == [
        "1 more requests with no or an unknown key came within a minute, from 1 addresses"
    ]
    fail(5000, "10.0.0.5")
    for number in range(5000):
        failures.add("missing", f"10.1.{number >> 8}.{number & 255}", "r")
    assert len(failures._addresses) == 1000
    failures.summarise()
    await asyncio.sleep(0)


def test_a_flood_of_failed_keys_is_a_few_lines(locked, caplog):
    caplog.set_level(logging.DEBUG, logger="engineroom")
    with httpx.Client(base_url=locked.url) as client:
        for _ in range(40):
            assert client.get("/v1/models").status_code == 401
    assert len([r for r in caplog.records if r.name.startswith("engineroom")]) == LINES
