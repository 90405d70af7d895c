"""Ollama's own client: a conversation, tools, forms, streams, and the models."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("ollama", reason="needs Ollama's client")

import ollama
from client_tasks import ASK, FUNCTION, OTHER, RESULT, Weather, fits

SAY = [{"role": "user", "content": ASK}]
TOOLS = [{"type": "function", "function": function} for function in (FUNCTION, OTHER)]
HOW = {"model": "default", "options": {"temperature": 0, "num_predict": 24}}


@pytest.fixture(scope="module")
def client(url):
    with ollama.Client(url) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_and_what_it_took(client, stream):
    answer = client.chat(**HOW, messages=SAY, stream=stream, think=False)
    parts = list(answer) if stream else [answer]
    assert "".join(part.message.content for part in parts)
    last = parts[-1]
    assert last.done and last.done_reason in ("stop", "length")
    assert last.prompt_eval_count > 5 and 0 < last.eval_count <= 24
    spent = [last.load_duration, last.prompt_eval_duration, last.eval_duration]
    assert all(part > 0 for part in spent) and sum(spent) <= last.total_duration


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_raw_and_not(client, stream):
    for raw in (False, True):
        answer = client.generate(**HOW, prompt="The capital of France is", raw=raw, stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(part.response for part in parts) and parts[-1].done


@pytest.mark.parametrize("stream", [False, True])
def test_a_form(client, stream):
    asked = {**HOW, "options": {"temperature": 0, "num_predict": 200}}
    schema = Weather.model_json_schema()
    answer = client.chat(**asked, messages=SAY, format=schema, stream=stream)
    text = "".join(p.message.content for p in answer) if stream else answer.message.content
    Weather.model_validate_json(text)
    answer = client.generate(**asked, prompt=f"{ASK} As JSON.", format="json")
    if answer.done_reason == "stop":
        assert isinstance(json.loads(answer.response), dict)


def test_calls_and_their_results(client):
    def weather(city: str) -> str:
        """How the weather is.

        Args:
          city: where
        """
        return city

    answer = client.chat(**HOW, messages=SAY, tools=[weather])  # the client describes it
    for made in answer.message.tool_calls or ():
        assert isinstance(made.function.arguments, dict)
    call = {"function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
    assert fits("weather", call["function"]["arguments"])
    history = [
        *SAY,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": RESULT},
    ]
    answer = client.chat(**HOW, messages=history, tools=TOOLS)
    assert answer.message.content or answer.message.tool_calls


def test_log_probabilities(client):
    answer = client.generate(**HOW, prompt=ASK, logprobs=True, top_logprobs=3)
    assert len(answer.logprobs) == answer.eval_count
    assert len(answer.logprobs[0].top_logprobs) == 3


def test_the_models(client):
    listed = client.list().models
    assert "default:latest" in [each.model for each in listed]
    known = next(each for each in listed if each.model == "default:latest")
    assert known.size > 90_000_000 and known.details.family == "llama"
    assert known.details.quantization_level == "Q4_1"
    shown = client.show("default")
    assert {"completion", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo["llama.context_length"] == 8192  # of the server, not of the file
    assert "messages" in shown.template


def test_texts_into_vectors_are_refused_where_the_model_makes_none(client):
    with pytest.raises(ollama.ResponseError, match="makes no embeddings"):
        client.embed("default", "hello")


async def test_the_asynchronous_client(url):
    async with ollama.AsyncClient(url) as client:
        parts = [part async for part in await client.chat(**HOW, messages=SAY, stream=True)]
    assert parts[-1].done and "".join(part.message.content for part in parts)


def test_it_is_unloaded_and_loaded_again(client):
    assert client.generate("default", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    assert client.generate("default").done_reason == "load"
    (loaded,) = client.ps().models
    assert loaded.name and loaded.expires_at
