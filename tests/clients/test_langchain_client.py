"""LangChain over OpenAI's and Anthropic's APIs: tools bound, forms by each of its methods."""

from __future__ import annotations

import pytest

pytest.importorskip("langchain_openai", reason="needs langchain-openai")

from client_tasks import ASK, FUNCTION, OTHER, RESULT, Weather, fits
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

TOOLS = [{"type": "function", "function": function} for function in (FUNCTION, OTHER)]


def over_chat(url):
    return ChatOpenAI(
        model="default", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=200
    )


def over_responses(url):
    return ChatOpenAI(
        model="default",
        base_url=f"{url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=200,
        use_responses_api=True,
    )


def over_messages(url):
    anthropic = pytest.importorskip("langchain_anthropic", reason="needs langchain-anthropic")
    return anthropic.ChatAnthropic(
        model="default", base_url=url, api_key="none", temperature=0, max_tokens=200
    )


WAYS = [over_chat, over_responses, over_messages]


@pytest.mark.parametrize("way", WAYS)
def test_a_call_its_result_and_the_answer(url, way):
    model = way(url)
    said = model.bind_tools(TOOLS, tool_choice="any").invoke(ASK)
    assert said.tool_calls and not said.invalid_tool_calls
    results = []
    for call in said.tool_calls:
        assert fits(call["name"], call["args"])
        results.append(ToolMessage(RESULT, tool_call_id=call["id"]))
    answer = model.invoke([HumanMessage(ASK), said, *results])
    assert answer.text


@pytest.mark.parametrize("way", WAYS)
def test_calls_are_streamed(url, way):
    whole = None
    for chunk in way(url).bind_tools(TOOLS, tool_choice="any").stream(ASK):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls
    assert all(fits(call["name"], call["args"]) for call in whole.tool_calls)


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_a_form_is_parsed(url, way, method):
    model = way(url).with_structured_output(Weather, method=method)
    assert isinstance(model.invoke(ASK), Weather)


def test_any_object_is_parsed(url):
    model = over_chat(url).with_structured_output(None, method="json_mode")
    assert isinstance(model.invoke('Say this in JSON: {"sunny": true}'), dict)
