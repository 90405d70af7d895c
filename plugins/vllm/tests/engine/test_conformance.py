"""The conformance kit over vLLM: a tiny model with real loads, and SmolLM2 with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from engineroom import LoadedModel, ModelConfig
from engineroom.handler import InferenceHandler
from engineroom.testing import HandlerConformance
from engineroom.testing.conformance import overrides
from engineroom_vllm import VLLMHandler

SMALL = {"n_ctx": 512, "n_parallel": 8, "kv_cache_memory": "256MiB", "keep_ready_s": 60}


class VLLMConformance(HandlerConformance):
    handler_class = VLLMHandler
    runtime_modules = ("vllm", "torch", "transformers", "tokenizers", "jinja2")
    timeout_s = 240
    max_stall_s = 2.5
    # Many more of them are made in test_cycles.py.
    load_cycles = 6


class TestTinyModel(VLLMConformance):
    @pytest.fixture(scope="class")
    def model_config(self, tiny_model: Path) -> ModelConfig:
        return ModelConfig(model_id="tiny", source=str(tiny_model), options=SMALL)


class OneEngine(VLLMHandler):
    """Starts one engine and gives it to every load; it ends when the suite does."""

    def __init__(self) -> None:
        self._first: LoadedModel | None = None

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        if self._first is None or config.options != self._first.config.options:
            self._first = await super().load_model(config)
            return self._first
        return self._first.model_copy(update={"config": config, "model_id": config.model_id})

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        if loaded_model is self._first:
            await super().unload_model(loaded_model)


@pytest.mark.real_model
class TestSmolLM2(VLLMConformance):
    load_cycles = 0
    queue_options = None
    # What else is in a batch changes the last digits.
    batch_invariant = False

    def make_handler(self) -> InferenceHandler:
        return OneEngine()

    @overrides("OneEngine is not what is installed; the suite above looks at the entry point")
    def test_entry_point(self) -> None:
        pass

    @pytest.fixture(scope="class")
    def model_config(self, smollm2: Path) -> ModelConfig:
        # A short context makes the kit's long answers short: some tokens a second is all it has.
        options = {**SMALL, "n_ctx": 160}
        return ModelConfig(model_id="smollm2", source=str(smollm2), options=options)
