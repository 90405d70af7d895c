"""A prompt that is too long, in the words by which clients and routers of each API know it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from server_doubles import TalkHandler

from engineroom import ConfigurationError, ContextLengthExceededError, Embeddings
from engineroom.prompts.limits import prompt_too_long, text_too_long

LONG = "so long"
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": LONG}]},
    "/v1/completions": {"model": "m", "prompt": LONG},
    "/v1/responses": {"model": "m", "input": LONG},
    "/v1/inference": {"model_id": "m", "prompt": LONG},
}
MESSAGES = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": LONG}]}


class NarrowHandler(TalkHandler):
    def capabilities(self) -> Any:
        return replace(super().capabilities(), embeddings=True)

    async def generate_tokens(self, loaded_model: Any, request: Any) -> Any:
        text = request.prompt or request.messages[-1].content
        if text == "wrong":
            raise ConfigurationError("the colour of the prompt is wrong")
        if text == "placed":
            raise ConfigurationError("there is no place for them", field="messages")
        if text == LONG:
            raise prompt_too_long(4196, 4096, "set the option n_ctx higher")
        async for step in super().generate_tokens(loaded_model, request):
            yield step

    async def embed(self, loaded_model: Any, texts: Any) -> Embeddings:
        raise text_too_long(1, 4196, 4096)


@pytest.fixture(scope="module")
def run(start):
    with start(handler=NarrowHandler()) as run:
        yield run


def refusal(run: Any, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """The status, and the error; of a stream that had begun, that of its event."""
    answer = httpx.post(run.url + path, json=body)
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PROMPTS)
def test_openais_clients_are_told_its_code_and_its_words(run, path, stream):
    status, error = refusal(run, path, stream=stream, **PROMPTS[path])
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(
        "This model's maximum context length is 4096 tokens. However, your prompt has 4196 tokens"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_clients_are_told_its_words(run, stream):
    status, error = refusal(run, "/v1/messages", stream=stream, **MESSAGES)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == "prompt is too long: 4196 tokens > 4095 maximum"


def test_a_text_that_is_too_long_to_be_embedded_is_told_alike(run):
    status, error = refusal(run, "/v1/embeddings", model="m", input=["a", "b"])
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 4096 tokens. However, text 1 has 4196" in error["message"]


@pytest.mark.parametrize("path", [*PROMPTS, "/v1/messages"])
def test_a_clients_mistake_is_no_configuration_error(run, path):
    body = json.loads(
        json.dumps({**PROMPTS, "/v1/messages": MESSAGES}[path]).replace(LONG, "wrong")
    )
    status, error = refusal(run, path, **body)
    assert status == 400
    assert error["message"].startswith("the colour of the prompt is wrong")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_what_is_wrong_with_messages_has_the_apis_name(run, path):
    body = json.loads(json.dumps(PROMPTS[path]).replace(LONG, "placed"))
    _, error = refusal(run, path, **body)
    name = "input" if path == "/v1/responses" else "messages"
    assert error["param"] == name and error["message"].startswith(f"{name}: there is no place")


def test_in_process_it_is_an_error_of_its_own_with_the_numbers():
    error = prompt_too_long(5, 4, "set the option n_ctx higher")
    assert isinstance(error, ConfigurationError) and isinstance(error, ContextLengthExceededError)
    assert (error.tokens, error.most) == (5, 3)
