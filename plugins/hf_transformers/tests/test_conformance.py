"""The conformance kit over Transformers: tiny models of several kinds, and SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engineroom import ChatMessage, LoadedModel, ModelConfig
from engineroom.testing import HandlerConformance
from engineroom.testing.conformance.runner import Job, run_suite
from engineroom_hf_transformers import HuggingFaceTransformersHandler

# Random weights magnify rounding; and the models are too small to share between threads.
EXACT = {"device": "cpu", "dtype": "float32", "n_threads": 1, "max_context": 512}
# Of a model that wants a beginning, the template writes it.
BEGINS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class HfTransformersConformance(HandlerConformance):
    handler_class = HuggingFaceTransformersHandler
    runtime_modules = ("torch", "transformers", "tokenizers", "safetensors", "jinja2")
    queue_options: ClassVar[dict[str, Any]] = {"max_batch_size": 1, "max_queue": 1}
    kind: ClassVar[str]
    options: ClassVar[dict[str, Any]] = EXACT

    def render_chat(self, loaded_model: LoadedModel, messages: list[ChatMessage]) -> str | None:
        """The option ``chat_template`` counts, too."""
        rendered: str = loaded_model.model_object.codec.render(messages)
        return rendered

    @pytest.fixture
    def model_config(self, tiny: Callable[[str], Path]) -> ModelConfig:
        return ModelConfig(model_id="tiny", source=str(tiny(self.kind)), options=self.options)

    @pytest.fixture
    def embedding_config(self, tiny: Callable[[str], Path]) -> ModelConfig:
        return ModelConfig(model_id="bert", source=str(tiny("bert")), options=EXACT)

    @pytest.fixture
    def ranking_config(self, tiny: Callable[[str], Path]) -> ModelConfig:
        return ModelConfig(model_id="ranker", source=str(tiny("bert-ranker")), options=EXACT)


class TestLlama(HfTransformersConformance):
    """Grouped heads, tied weights, a beginning."""

    kind = "llama"
    options: ClassVar[dict[str, Any]] = {**EXACT, "chat_template": BEGINS}


@pytest.mark.long
class TestQwen2(HfTransformersConformance):
    """Untied weights, no beginning; one slot."""

    kind = "qwen2"
    options: ClassVar[dict[str, Any]] = {**EXACT, "max_batch_size": 1}


@pytest.mark.long
class TestGemma(HfTransformersConformance):
    """One head of keys; proposals from the text."""

    kind = "gemma"
    options: ClassVar[dict[str, Any]] = {**EXACT, "prompt_lookup": True, "chat_template": BEGINS}


@pytest.mark.long
class TestGpt2(HfTransformersConformance):
    """Learned positions, no grouped heads; steps of few tokens."""

    kind = "gpt2"
    options: ClassVar[dict[str, Any]] = {
        **EXACT,
        "max_batch_size": 3,
        "max_batch_tokens": 24,
        "prefill_chunk": 8,
    }


@pytest.mark.long
class TestMamba(HfTransformersConformance):
    """By generate(), one request at a time."""

    kind = "mamba"


def test_a_model_that_thinks_with_room_for_tools(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_checkpoint("llama", tmp_path / "roomy", max_position_embeddings=2048)
    thinks = BEGINS.replace("assistant\n", "assistant\n<think>\n")
    options = {**EXACT, "max_context": 2048, "chat_template": thinks}
    config = ModelConfig(model_id="tiny", source=str(source), options=options)
    job = Job(HuggingFaceTransformersHandler, config)
    results = run_suite(job, "reasoning_apart or tool_calls")
    assert "".join(r.reason for r in results) == ""
    assert [r.outcome for r in results] == ["passed", "passed"]


@pytest.mark.kit_real
@pytest.mark.real_model
class TestSmolLM2(HfTransformersConformance):
    timeout_s = 300
    load_cycles = 8
    # Whole batches of numbers are added up in another order than one: the last digits change.
    batch_invariant = False

    @pytest.fixture
    def model_config(self, smollm2: Path) -> ModelConfig:
        # One thread: the event loop needs a processor, too, and a machine of two may be busy.
        options = {"device": "cpu", "max_context": 512, "n_threads": 1}
        return ModelConfig(model_id="smollm2", source=str(smollm2), options=options)
