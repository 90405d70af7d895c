"""Pydantic AI: tools, and outputs by a tool and by a form."""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic_ai", reason="needs pydantic-ai")

from client_tasks import ASK, CITIES, RESULT, Weather
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

HOW = {"temperature": 0.0, "max_tokens": 300}


def chat(url):
    return OpenAIChatModel("default", provider=_provider(url))


def responses(url):
    return OpenAIResponsesModel("default", provider=_provider(url))


def _provider(url):
    return OpenAIProvider(base_url=f"{url}/v1", api_key="none")


@pytest.mark.parametrize("kind", [chat, responses])
@pytest.mark.parametrize("output", [ToolOutput(Weather), NativeOutput(Weather)])
async def test_an_output_is_parsed(url, kind, output):
    agent = Agent(kind(url), output_type=output, model_settings=HOW)
    assert isinstance((await agent.run(ASK)).output, Weather)


async def test_an_output_is_streamed(url):
    agent = Agent(chat(url), output_type=NativeOutput(Weather), model_settings=HOW)
    async with agent.run_stream(ASK) as result:
        assert isinstance(await result.get_output(), Weather)


async def test_a_tool_is_run_and_its_result_goes_back(url):
    """First there is only the tool, then only the output: so small a model would go on for ever."""
    ran: list[str] = []

    async def before(_context, definition):
        return None if ran else definition

    async def after(_context, definitions):
        return definitions if ran else []

    agent = Agent(
        chat(url),
        output_type=ToolOutput(Weather),
        model_settings=HOW,
        capabilities=[PrepareOutputTools(after)],
    )

    @agent.tool_plain(prepare=before)
    def weather(sunny: bool) -> str:
        """How the weather is."""
        ran.append(str(sunny))
        return RESULT

    result = await agent.run(ASK)
    assert ran and isinstance(result.output, Weather)
    assert result.output.city in CITIES
