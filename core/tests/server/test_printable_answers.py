"""What a client sends comes back, and into the log, without control characters."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import json
import logging

import httpx

EVIL = "\x1b[2J\u202egpj\u200b\u2028\x9b\r\n"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "one"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "model": EVIL}),
        ("/v1/chat/completions", {**CHAT, EVIL: 1, "stop": {EVIL: 1}}),
        ("/v1/chat/completions", {**CHAT, "user": EVIL, "temperature": EVIL}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": EVIL, EVIL: EVIL}]}),
        ("/v1/completions", {"model": "m", "prompt": "one", EVIL: EVIL}),
        ("/v1/embeddings", {"model": EVIL, "input": "one"}),
        ("/v1/responses", {"model": "m", "input": [{"type": EVIL}], EVIL: 1}),
        ("/v1/messages", {**CHAT, "max_tokens": EVIL, EVIL: 1}),
        ("/v1/inference", {"model_id": EVIL, "prompt": "one", "request_id": EVIL, EVIL: 1}),
        ("/v1/inference", {"model_id": "m", "prompt": "one", "params": {EVIL: 1}, "adapter": EVIL}),
        ("/v1/models/%1b%5b2J%e2%80%ae", None),
        ("/v1/%1b%5b2J%e2%80%ae%0a", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_answer_and_no_record_carries_them(shared, caplog, path, body):
    caplog.set_level(logging.DEBUG, "engineroom")
    headers = {"x-request-id": b"a\x1bb"}
    if body is None:
        answer = httpx.get(shared.url + path, headers=headers)
    else:
        answer = httpx.post(shared.url + path, json=body, headers=headers)
    assert 400 <= answer.status_code < 500
    told = json.dumps(answer.json(), ensure_ascii=False)
    logged = "".join(record.getMessage() for record in caplog.records)
    for text in (told, json.loads(told)["error"]["message"], logged, str(answer.headers)):
        assert not set(EVIL[:1] + "\u202e\u200b\u2028\x9b") & set(text)
        assert text.isprintable() or text == logged
