"""Instructor, LlamaIndex and LiteLLM: forms and tools."""

from __future__ import annotations

import json

import pytest
from client_tasks import ASK, CITIES, FUNCTION, OTHER, RESULT, Place, Weather, fits

SAY = [{"role": "user", "content": ASK}]
TOOLS = [{"type": "function", "function": function} for function in (FUNCTION, OTHER)]
HOW = {"temperature": 0, "max_tokens": 200}

# ── instructor ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def instructed(url):
    """What makes a client of Instructor's, by its mode."""
    instructor = pytest.importorskip("instructor", reason="needs instructor")
    from openai import OpenAI

    plain = OpenAI(base_url=f"{url}/v1", api_key="none")
    return lambda mode: instructor.from_openai(plain, mode=instructor.Mode[mode])


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor_makes_a_form(instructed, mode):
    to = {"model": "default", "messages": SAY, "max_retries": 0, **HOW}
    assert isinstance(instructed(mode).create(response_model=Weather, **to), Weather)


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT"])
def test_instructor_hears_of_the_result_of_its_call(instructed, mode):
    """It runs no tools: whoever uses it sends the call and its result, as in OpenAI's client."""
    client, to = instructed(mode), {"model": "default", "max_retries": 0, **HOW}
    place, whole = client.create_with_completion(response_model=Place, messages=SAY, **to)
    assert place.city in CITIES
    message = whole.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "Place"
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    made = {"content": "", **message.model_dump(exclude_none=True)}  # it takes none without
    said = [*SAY, made, result]
    assert isinstance(client.create(response_model=Weather, messages=said, **to), Weather)
    plain = client.create(response_model=None, messages=said, **to)
    assert plain.choices[0].message.content


# ── LlamaIndex ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def llama_index(url):
    like = pytest.importorskip("llama_index.llms.openai_like", reason="needs llama-index")
    return like.OpenAILike(
        model="default",
        api_base=f"{url}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        **HOW,
    )


def test_llama_index_calls_a_tool_and_hears_of_its_result(llama_index):
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    def weather(sunny: bool, days: int) -> str:
        """How the weather is."""
        return RESULT

    tool = FunctionTool.from_defaults(weather)
    first = llama_index.chat_with_tools([tool], user_msg=ASK, tool_required=True)
    calls = llama_index.get_tool_calls_from_response(first)
    assert calls and all(call.tool_name == "weather" for call in calls)
    results = [
        ChatMessage(role="tool", content=RESULT, additional_kwargs={"tool_call_id": call.tool_id})
        for call in calls
    ]
    said = [ChatMessage(role="user", content=ASK), first.message, *results]
    assert llama_index.chat(said).message.content


def test_llama_index_makes_a_form(llama_index):
    from llama_index.core.prompts import PromptTemplate

    answer = llama_index.structured_predict(Weather, PromptTemplate(ASK))
    assert isinstance(answer, Weather)


# ── LiteLLM ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def litellm():
    module = pytest.importorskip("litellm", reason="needs litellm")
    module.telemetry = False
    return module


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai", "anthropic"])
@pytest.mark.parametrize("stream", [False, True])
def test_litellm_calls_a_tool_and_hears_of_its_result(url, litellm, provider, stream):
    base = url if provider == "anthropic" else f"{url}/v1"
    to = {"model": f"{provider}/default", "api_base": base, "api_key": "none", **HOW}
    asked = {"messages": SAY, "tools": TOOLS, "tool_choice": "required", "stream": stream}
    answer = litellm.completion(**to, **asked)
    if stream:
        answer = litellm.stream_chunk_builder([*answer], messages=SAY)
    message = answer.choices[0].message
    assert message.tool_calls
    results = []
    for call in message.tool_calls:
        assert fits(call.function.name, json.loads(call.function.arguments))
        results.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})
    said = [*SAY, message.model_dump(exclude_none=True), *results]
    assert litellm.completion(**to, messages=said, tools=TOOLS).choices[0].message


def test_litellm_makes_a_form(url, litellm):
    to = {"model": "openai/default", "api_base": f"{url}/v1", "api_key": "none", **HOW}
    answer = litellm.completion(**to, messages=SAY, response_format=Weather)
    Weather.model_validate_json(answer.choices[0].message.content)
