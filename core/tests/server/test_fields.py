"""Every field that the APIs have: honoured, refused by name, or of no effect by what it means."""

from __future__ import annotations

import typing

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("openai", reason="needs OpenAI's client")
pytest.importorskip("anthropic", reason="needs Anthropic's client")

import httpx
from anthropic.types import message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from engineroom.server.apis.anthropic_messages import MessagesRequest
from engineroom.server.apis.openai_chat import ChatRequest
from engineroom.server.apis.openai_completions import CompletionRequest
from engineroom.server.apis.openai_embeddings import EmbeddingsRequest
from engineroom.server.apis.openai_responses import ResponsesRequest

CHAT = {"messages": [{"role": "user", "content": "one"}]}
APIS = {
    "/v1/chat/completions": (
        ChatRequest, chat_create_params.CompletionCreateParamsBase, CHAT,
    ),
    "/v1/completions": (
        CompletionRequest, completion_create_params.CompletionCreateParamsBase, {"prompt": "one"},
    ),
    "/v1/embeddings": (
        EmbeddingsRequest, embedding_create_params.EmbeddingCreateParams, {"input": "one"},
    ),
    "/v1/responses": (
        ResponsesRequest, response_create_params.ResponseCreateParamsBase, {"input": "one"},
    ),
    "/v1/messages": (
        MessagesRequest, message_create_params.MessageCreateParamsBase, {**CHAT, "max_tokens": 9},
    ),
}  # fmt: skip
"""Route → our schema, what the makers' own client can send, and the least that is a request."""

ASKING = {
    "background": True,
    "best_of": 2,
    "tool_choice": "required",
    "reasoning": {"effort": "high"},
    "text": {"format": {"type": "json_object"}},
}
"""Values that ask for something; elsewhere any will do."""


@pytest.mark.parametrize("route", APIS)
def test_every_field_of_the_makers_client_is_known(route):
    schema, theirs, _ = APIS[route]
    known = {*schema.model_fields, *schema.REFUSED, *schema.IGNORED, *schema.WITHOUT_EFFECT}
    assert set(typing.get_type_hints(theirs)) - known == set()


@pytest.mark.parametrize("route", APIS)
def test_no_field_is_in_two_places(route):
    schema, _, _ = APIS[route]
    known = [*schema.model_fields, *schema.REFUSED, *schema.IGNORED, *schema.WITHOUT_EFFECT]
    assert len(known) == len(set(known))


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route in APIS for name in APIS[route][0].REFUSED]
)
def test_what_is_not_honoured_is_refused_by_name(shared, route, name):
    _, _, least = APIS[route]
    body = {"model": "m", **least, name: ASKING.get(name, "something")}
    answer = httpx.post(shared.url + route, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(f"{name} is not supported by this server")
    # What asks for nothing is let pass, and so is a null.
    for value in [None, *APIS[route][0].REFUSED[name]]:
        if route != "/v1/embeddings":  # this server's model makes none
            body[name] = value
            answer = httpx.post(shared.url + route, json=body)
            assert answer.status_code == 200, answer.text
        if isinstance(value, bool):  # 0 and 1 ask for something, who knows what
            answer = httpx.post(shared.url + route, json=body | {name: int(value)})
            assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route in APIS for name in APIS[route][0].INSTEAD]
)
def test_what_another_api_calls_otherwise_is_refused_with_its_name_here(shared, route, name):
    schema, _, least = APIS[route]
    answer = httpx.post(shared.url + route, json={"model": "m", **least, name: {"a": 1}})
    _, _, instead = answer.json()["error"]["message"].partition("; ")
    assert instead.startswith("use ")
    for other in instead.removeprefix("use ").split(" and "):
        assert other.partition(".")[0].partition(":")[0] in schema.model_fields


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
def test_a_form_is_never_left_out_in_silence(shared, route):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    body = {"model": "m", **APIS[route][2], "response_format": form}
    assert httpx.post(shared.url + route, json=body).status_code == 400


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route in APIS for name in APIS[route][0].WITHOUT_EFFECT]
)
def test_what_can_have_no_effect_is_no_unknown_field(start, route, name):
    _, _, least = APIS[route]
    with start(unknown_fields="refuse") as run:
        answer = httpx.post(run.url + route, json={"model": "m", **least, name: "something"})
        assert answer.status_code == 200, answer.text
        answer = httpx.post(run.url + route, json={"model": "m", **least, "nonsense": "something"})
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_chunks_of_hidden_length_are_refused_by_name(shared, route):
    body = {"model": "m", **APIS[route][2], "stream": True}
    for asked, status in ((True, 400), (False, 200), (None, 200)):
        body["stream_options"] = {"include_obfuscation": asked}
        answer = httpx.post(shared.url + route, json=body)
        assert answer.status_code == status, answer.text
        if status == 400:
            error = answer.json()["error"]
            assert "include_obfuscation: is not supported by this server" in error["message"]


@pytest.mark.parametrize("name", ["user", "safety_identifier"])
def test_observers_are_told_who_asks(shared, name):
    for route in ("/v1/chat/completions", "/v1/responses"):
        body = {"model": "m", **APIS[route][2], name: "ann"}
        assert httpx.post(shared.url + route, json=body).status_code == 200
        assert shared.handler.seen[-1].metadata[name] == "ann"


def test_a_response_says_that_it_is_not_kept(shared):
    body = {"model": "m", "input": "one", "parallel_tool_calls": False}
    answer = httpx.post(shared.url + "/v1/responses", json=body).json()
    assert (answer["store"], answer["parallel_tool_calls"]) == (False, False)
