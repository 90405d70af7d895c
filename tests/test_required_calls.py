"""Calls and forms of a real model at temperature 1, on each runtime: valid whatever the seed, and
the same alone as beside others.

All is computed in 32 bits: with fewer, near ties may part beside others.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from benchmarks.smollm2 import FLOAT32, float32_file, float32_folder

from engineroom import (
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
    ToolCall,
)

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.nightly,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's own code warns of what is to come in torch and in Python.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]
pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

RUNTIMES: dict[str, tuple[str, dict[str, Any]]] = {
    # Beside other work, two threads would wait for each other.
    "llamacpp": ("llama_cpp", {"n_ctx": 8192, "n_parallel": 8, "n_threads": 1}),
    "hf_transformers": ("transformers", {"max_context": 1024, "max_batch_size": 8}),
    "vllm": ("vllm", {"n_ctx": 1024, "n_parallel": 8}),
}
"""Runtime → what it needs, and its options: eight requests at a time."""
# A small model at temperature 1 now and then babbles in a string without a bound up to the limit.
CITY = {"city": {"type": "string", "maxLength": 40}}
UNIT = {"unit": {"enum": ["celsius", "fahrenheit"]}}
TOOLS = [
    {
        "name": name,
        "description": f"The {name} in a city",
        "parameters": {"type": "object", "properties": properties, "required": ["city"]},
    }
    for name, properties in (("weather", CITY | UNIT), ("time", CITY))
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain", "jazz"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
SEEDS = 50


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=RUNTIMES)
async def service(request: pytest.FixtureRequest) -> AsyncIterator[LLMInferenceService]:
    """SmolLM2 on one of the runtimes."""
    runtime: str = request.param
    needed, options = RUNTIMES[runtime]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}, which the runtime {runtime} runs on")
    source = float32_file() if runtime == "llamacpp" else float32_folder("")
    options |= FLOAT32[runtime]
    model = ModelConfig(model_id="m", source=str(source), runtime=runtime, options=options)
    async with LLMInferenceService(LLMModelManager(config=[model])) as service:
        yield service


def request_of(question: str, seed: int, **fields: Any) -> InferenceRequest:
    params = {"temperature": 1.0, "seed": seed, "max_new_tokens": 600, **fields.pop("params", {})}
    messages = [{"role": "user", "content": question}]
    return InferenceRequest(model_id="m", messages=messages, params=params, **fields)


def call(seed: int, question: str = "What is the weather in Bern?") -> InferenceRequest:
    return request_of(question, seed, tools=TOOLS, tool_choice="required")


def person(seed: int, question: str = "Who are you? Answer in JSON.") -> InferenceRequest:
    return request_of(question, seed, params={"structured_output": {"json_schema": PERSON}})


def written(response: InferenceResponse) -> list[Any]:
    calls = response.tool_calls or []
    return [response.generated_text, *((one.name, one.arguments) for one in calls)]


def check(call: ToolCall) -> None:
    arguments = json.loads(call.arguments)
    known = {tool["name"]: tool["parameters"]["properties"] for tool in TOOLS}
    assert {"city"} <= arguments.keys() <= known[call.name].keys()
    assert isinstance(arguments["city"], str)
    assert arguments.get("unit", "celsius") in UNIT["unit"]["enum"]


async def answers(
    service: LLMInferenceService, requests: Sequence[InferenceRequest]
) -> list[InferenceResponse]:
    responses = await asyncio.gather(*map(service.infer, requests))
    for response in responses:
        response.raise_for_error()
    return responses


@pytest.mark.parametrize("parallel", [None, False])
async def test_fifty_seeds_give_fifty_valid_calls(
    service: LLMInferenceService, parallel: bool | None
) -> None:
    asked = [
        call(seed).model_copy(update={"parallel_tool_calls": parallel}) for seed in range(SEEDS)
    ]
    for response in await answers(service, asked):
        assert response.tool_calls and not response.generated_text.strip(), response
        if parallel is False:  # else the limit may come in a later call
            assert (response.finish_reason, len(response.tool_calls)) == ("tool_calls", 1)
        for one in response.tool_calls:
            check(one)


@pytest.mark.parametrize("ask", [call, person])
async def test_a_seed_gives_the_same_alone_as_beside_seven_others(
    service: LLMInferenceService, ask: Any
) -> None:
    (alone,) = await answers(service, [ask(3)])
    others = [
        (call if seed % 2 else person)(seed, f"Tell me of city number {seed}, and of its people.")
        for seed in range(7)
    ]
    beside = (await answers(service, [*others[:4], ask(3), *others[4:]]))[4]
    assert written(alone) == written(beside)
    assert alone.finish_reason == beside.finish_reason
    if ask is person:
        assert json.loads(alone.generated_text).keys() == PERSON["properties"].keys()
