"""Every answer and every event of a stream is what the official clients' types say it is.

The types are taken at their word: a field that is required is there, and what may be left out is
left out instead of being ``null``. In Python's types the two look alike (``Optional[…] = None``),
so those that are ``null`` are named here, each as its API has it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("openai", reason="needs OpenAI's client")
pytest.importorskip("anthropic", reason="needs Anthropic's client")
pytest.importorskip("httpx", reason="needs httpx")

import anthropic
import anthropic.types as theirs
import anthropic.types.shared as anthropic_shared
import httpx
import openai.types as types
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared.error_object import ErrorObject
from pydantic import BaseModel, TypeAdapter, ValidationError
from server_doubles import TalkHandler
from tool_doubles import CALL, SECOND, THOUGHT, TOOLS

from engineroom import TokenStep
from engineroom.generation.deltas import StreamDelta
from engineroom.testing import EchoHandler

NULLS = {
    # Required, and null where there is none (`field: T | null` in the clients of JavaScript).
    "chat_completion.Choice.logprobs",
    "chat_completion.ChoiceLogprobs.refusal",
    "chat_completion_chunk.Choice.finish_reason",
    "chat_completion_chunk.ChoiceLogprobs.refusal",
    "chat_completion_message.ChatCompletionMessage.content",
    "chat_completion_message.ChatCompletionMessage.refusal",
    "completion_choice.CompletionChoice.logprobs",
    "error_object.ErrorObject.code",
    "error_object.ErrorObject.param",
    "function_tool.FunctionTool.parameters",
    "function_tool.FunctionTool.strict",
    "message.Message.stop_reason",
    "message.Message.stop_sequence",
    "raw_message_delta_event.Delta.stop_reason",
    "raw_message_delta_event.Delta.stop_sequence",
    "response.Response.error",
    "response.Response.incomplete_details",
    "response.Response.instructions",
    "response_error_event.ResponseErrorEvent.code",
    "response_error_event.ResponseErrorEvent.param",
    # Nullable, and sent as null by OpenAI.
    "chat_completion_chunk.Choice.logprobs",
    "chat_completion_chunk.ChoiceDelta.refusal",
    "chat_completion_chunk.ChatCompletionChunk.usage",
    "completion.Completion.usage",
    "reasoning.Reasoning.effort",
    "reasoning.Reasoning.summary",
    "response.Response.max_output_tokens",
    "response.Response.previous_response_id",
    "response.Response.usage",
    "response.Response.user",
}
BEYOND = {
    # What the types do not know, and clients of other servers read.
    "chat_completion_chunk.ChoiceDelta.reasoning",
    "chat_completion_chunk.ChoiceDelta.reasoning_content",
    "chat_completion_message.ChatCompletionMessage.reasoning",
    "chat_completion_message.ChatCompletionMessage.reasoning_content",
    "model.Model.max_model_len",
    "model.Model.root",
    # As OpenAI sends it.
    "response_function_call_arguments_done_event.ResponseFunctionCallArgumentsDoneEvent.name",
    "response_text_delta_event.Logprob.bytes",
    "response_text_delta_event.LogprobTopLogprob.bytes",
    "response_text_done_event.Logprob.bytes",
    "response_text_done_event.LogprobTopLogprob.bytes",
    "response.Response.store",
}


def hold(kind: Any, value: Any) -> list[str]:
    """Where a value is not of a type; whatever is null or unknown without being named above."""
    try:
        known = TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        places = [".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors()]
        return [f"{place} in {json.dumps(value)[:300]}" for place in places[:5]]
    return list(strange(known))


def strange(value: Any) -> Any:
    if isinstance(value, BaseModel):
        of = f"{type(value).__module__.rpartition('.')[2]}.{type(value).__name__}"
        for name in value.model_fields_set:
            item = getattr(value, name)
            if name not in type(value).model_fields:
                if f"{of}.{name}" not in BEYOND:
                    yield f"{of}.{name} is not known"
                elif item is None:
                    yield f"{of}.{name} is null"
            elif item is None and f"{of}.{name}" not in NULLS:
                yield f"{of}.{name} is null"
            yield from strange(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strange(item)


def test_the_test_sees_what_is_null_missing_and_unknown():
    model = {"id": "m", "created": 1, "object": "model", "owned_by": "e"}
    assert hold(types.Model, model) == []
    assert hold(types.Model, {**model, "max_model_len": None}) == [
        "model.Model.max_model_len is null"
    ]
    assert hold(types.Model, {**model, "other": 1}) == ["model.Model.other is not known"]
    del model["owned_by"]
    assert "Field required" in hold(types.Model, model)[0]
    block = {"type": "text", "text": "a", "citations": None}
    assert hold(theirs.ContentBlock, block) == ["text_block.TextBlock.citations is null"]


# ── what is asked ────────────────────────────────────────────────────────────────────────────

SAY = [{"role": "user", "content": "one two three"}]
ITEM_TOOLS = [{"type": "function", "name": "weather"}, {"type": "function", "name": "time"}]
THEIR_TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("weather", "time")]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": SAY},
        {"messages": SAY, "max_tokens": 2, "n": 2, "user": "ann"},
        {"messages": SAY, "tools": TOOLS},
        {"messages": SAY, "stream_options": {"include_usage": True}},
    ],
    "/v1/completions": [
        {"prompt": "one two three"},
        {"prompt": ["one", "two three"], "max_tokens": 2, "echo": True},
        {"prompt": "one two", "stream_options": {"include_usage": True}},
    ],
    "/v1/responses": [
        {"input": "one two three"},
        {"input": "one two", "tools": ITEM_TOOLS, "tool_choice": "auto", "metadata": {"a": "b"}},
        {"input": "one two", "instructions": "be brief", "user": "ann", "max_output_tokens": 2},
        {
            "input": "one",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        },
        {"input": "one", "reasoning": {"effort": "low"}},
    ],
    "/v1/messages": [
        {"messages": SAY, "max_tokens": 9},
        {"messages": SAY, "max_tokens": 9, "tools": THEIR_TOOLS, "system": "be brief"},
    ],
}
MORE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAY, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {"prompt": "one two", "logprobs": 2},
    "/v1/responses": {
        "input": "one", "include": ["message.output_text.logprobs"], "top_logprobs": 2,
    },
    "/v1/messages": {"messages": SAY, "max_tokens": 9, "stop_sequences": ["three"]},
}  # fmt: skip
WHOLE = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": types.Completion,
    "/v1/responses": Response,
    "/v1/messages": theirs.Message,
}
EVENTS = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/completions": types.Completion,
    "/v1/responses": ResponseStreamEvent,
    "/v1/messages": theirs.RawMessageStreamEvent,
}
SCRIPTS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "text": (["one", " two"], {"finish": "length"}),
    "nothing": ([], {}),
    "calls": (["I ask. ", *CALL, *SECOND], {}),
    "thoughts": ([*THOUGHT, "well"], {}),
    "thoughts and a call": ([*THOUGHT, *CALL], {}),
    "a cut call": ([*THOUGHT, *CALL[:2]], {"finish": "length", "cut": True}),
}
PATHS = pytest.mark.parametrize("path", BODIES)


def ask(url: str, path: str, body: dict[str, Any], stream: bool) -> list[str]:
    """What is not as the types say; of a stream's events, all of it."""
    answer = httpx.post(url + path, json={"model": "m", **body, "stream": stream}, timeout=60)
    assert answer.status_code == 200, answer.text
    if not stream:
        return hold(WHOLE[path], answer.json())
    found: list[str] = []
    for text in answer.text.split("\n\n"):
        data = text.partition("data: ")[2]
        if not data or data == "[DONE]":
            continue
        value = json.loads(data)
        if "error" in value:
            found += hold_error(path, value)
        elif value.get("type") == "ping":
            assert value == {"type": "ping"}
        elif path == "/v1/completions":
            for choice in value["choices"]:  # the type is that of a whole one
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            found += hold(types.Completion, value)
        else:
            found += hold(EVENTS[path], value)
    return found


def hold_error(path: str, value: dict[str, Any]) -> list[str]:
    if path == "/v1/messages":
        return hold(anthropic_shared.ErrorResponse, value)
    assert value.keys() == {"error"}
    return hold(ErrorObject, value["error"])


@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_are_what_the_types_say(run, path, stream, script):
    chunks, how = SCRIPTS[script]
    if path == "/v1/completions":  # a prompt that is taken as it stands has neither
        chunks = [chunk for chunk in chunks if not isinstance(chunk, StreamDelta)]
        how = {}
    run.handler.say(*chunks, **how)
    for body in BODIES[path]:
        assert ask(run.url, path, body, stream) == []


@PATHS
@pytest.mark.parametrize("stream", [False, True])
def test_what_only_some_runtimes_have_is_as_well(shared, path, stream):
    assert ask(shared.url, path, MORE[path], stream) == []


@PATHS
def test_errors_are_what_the_types_say_also_at_the_end_of_a_stream(shared, path):
    for body in ({}, {"model": "none", **BODIES[path][0]}):
        answer = httpx.post(shared.url + path, json=body)
        assert answer.status_code in (400, 404)
        assert hold_error(path, answer.json()) == []
    failing = json.loads(json.dumps(BODIES[path][0]).replace("one two three", "a b !break c"))
    assert ask(shared.url, path, failing, stream=True) == []


def test_a_count_of_tokens_is_what_the_types_say(shared):
    body = {"model": "m", "messages": SAY, "system": "be brief", "tools": THEIR_TOOLS}
    url = f"{shared.url}/v1/messages/count_tokens"
    counted = httpx.post(url, json=body)
    assert counted.json() == {"input_tokens": 3}
    assert hold(theirs.MessageTokensCount, counted.json()) == []
    refused = httpx.post(url, json={"model": "m"})
    assert refused.status_code == 400
    assert hold_error("/v1/messages", refused.json()) == []
    with anthropic.Anthropic(base_url=shared.url, api_key="x", max_retries=0) as client:
        assert client.messages.count_tokens(model="m", messages=SAY).input_tokens == 3


def test_models_and_embeddings_are_what_the_types_say(start):
    models = [{"model_id": "m", "source": "echo:"}, {"model_id": "n", "source": "echo:"}]
    models[1]["preload"] = False
    with start(models, EchoHandler()) as run:
        listed = httpx.get(f"{run.url}/v1/models").json()
        assert listed.keys() == {"object", "data"}
        assert ["max_model_len" in model for model in listed["data"]] == [True, False]
        for model in (*listed["data"], httpx.get(f"{run.url}/v1/models/n").json()):
            assert hold(types.Model, model) == []
        body = {"model": "m", "input": ["a", "b"], "encoding_format": "float"}
        answer = httpx.post(f"{run.url}/v1/embeddings", json=body).json()
        assert hold(types.CreateEmbeddingResponse, answer) == []


# ── what a runtime has not said ──────────────────────────────────────────────────────────────


class Silent(TalkHandler):
    """Says nothing of prompts that it found again."""

    async def _talk(self, request: Any) -> Any:
        async for step in super()._talk(request):
            if step.prompt_tokens is not None:
                step = TokenStep(prompt_tokens=step.prompt_tokens)  # noqa: PLW2901 - without it
            yield step


@pytest.fixture(scope="module")
def silent(start):
    with start(handler=Silent()) as run:
        yield run


@PATHS
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_runtime_does_not_say_of_its_cache_is_absent(silent, shared, path, stream):
    """But from responses, whose usage has no form without it."""
    body = {"model": "m", "stream": stream, **BODIES[path][0]}
    if stream and path.endswith("completions"):
        body["stream_options"] = {"include_usage": True}
    for run, said in ((silent, False), (shared, True)):
        text = httpx.post(run.url + path, json=body).text
        named = any(f'"{n}":' in text for n in ("cached_tokens", "cache_read_input_tokens"))
        assert named is (said or path == "/v1/responses"), text
