"""Over HTTP: what one key had computed is of use to no other, and nobody can say otherwise."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from toy_runtime import ToyHandler

from engineroom.server.keys import KeyRing

ANN, BOB = "ann-key-0123456789", "bob-key-0123456789"
TEXT = "the same words for everybody who comes along, at some length"
TOY = {"model_id": "m", "source": "toy:"}
ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 2},
    "/v1/completions": {"prompt": TEXT, "max_tokens": 2},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 2},
    "/v1/inference": {"prompt": TEXT, "params": {"max_new_tokens": 2}},
}


def cached(run, path, key=None, **fields):
    """Cached tokens as the API tells of them."""
    model = {"model_id": "m"} if path == "/v1/inference" else {"model": "m"}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = httpx.post(run.url + path, json={**model, **ROUTES[path], **fields}, headers=headers)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    usage = body.get("usage", body)
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
    names = ("cached_tokens", "cache_read_input_tokens", "cached_prompt_tokens")
    return next(details[name] for name in names if name in details) or 0


@pytest.fixture
def keyed(start):
    ring = KeyRing([("ann", ANN), ("bob", BOB)])
    with start([TOY], handler=ToyHandler(), keys=ring) as run:
        yield run


@pytest.mark.parametrize("path", ROUTES)
def test_a_key_finds_its_own_and_no_other_keys(keyed, path):
    cached(keyed, path, ANN)
    whole = cached(keyed, path, ANN)
    assert whole >= len(TEXT) - 1
    assert cached(keyed, path, BOB) == 0
    assert cached(keyed, path, BOB) == whole
    assert cached(keyed, path, BOB, metadata={"api_key": "ann"}, cache_salt=path) == 0
    assert cached(keyed, path, BOB, cache_salt=path) == whole
    assert cached(keyed, path, ANN, cache_salt=path) == 0


@pytest.mark.parametrize("path", ROUTES)
def test_without_keys_a_salt_alone_keeps_apart(start, path):
    with start([TOY], handler=ToyHandler()) as run:
        assert cached(run, path) == 0
        assert cached(run, path) > 0
        assert cached(run, path, cache_salt="a") == 0
        assert cached(run, path, cache_salt="a") > 0


def test_without_keys_it_is_what_the_application_itself_had_computed(start):
    from engineroom import InferenceRequest

    with start([TOY], handler=ToyHandler()) as run:
        run.call(lambda: run.service.infer(InferenceRequest(model_id="m", prompt=TEXT)))
        assert cached(run, "/v1/completions") == len(TEXT) - 1


def test_a_deployment_may_say_that_all_keys_share(start):
    ring = KeyRing([("ann", ANN), ("bob", BOB)])
    model = {**TOY, "prefix_cache_scope": "shared"}
    with start([model], handler=ToyHandler(), keys=ring) as run:
        assert cached(run, "/v1/completions", ANN) == 0
        assert cached(run, "/v1/completions", BOB) == len(TEXT) - 1
        assert cached(run, "/v1/completions", BOB, cache_salt="mine") == 0


@pytest.mark.parametrize("path", ROUTES)
def test_a_salt_that_is_none_is_refused_by_name(shared, path):
    model = {"model_id": "m"} if path == "/v1/inference" else {"model": "m"}
    for salt in ("", "x" * 129, 5):
        body = {**model, **ROUTES[path], "cache_salt": salt}
        answer = httpx.post(shared.url + path, json=body)
        assert answer.status_code == 400
        assert "cache_salt" in answer.text
