"""The conformance kit over vLLM: a tiny model with real loads, and SmolLM2 with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engineroom import LoadedModel, ModelConfig
from engineroom.handlers.base import InferenceHandler
from engineroom.testing import HandlerConformance
from engineroom.testing.conformance import overrides
from engineroom.testing.conformance.runner import Job, run_suite
from engineroom_vllm import VLLMHandler

SMALL = {"n_ctx": 512, "n_parallel": 8, "kv_cache_memory": "256MiB", "keep_ready_s": 60}
THINKS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] <think>\n{% endif %}"
)


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
    """Starts one engine for each model and gives it to every load; they end with the suite."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str | None, str], LoadedModel] = {}
        self._own: LoadedModel | None = None

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        key = (config.source, repr(config.options))
        if key not in self._engines:
            self._engines[key] = await super().load_model(config)
        if self._own is None:
            self._own = self._engines[key]
            return self._own
        update = {"config": config, "model_id": config.model_id}
        return self._engines[key].model_copy(update=update)

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        if loaded_model is self._own:
            for engine in self._engines.values():
                await super().unload_model(engine)


class VLLMOneEngine(VLLMConformance):
    load_cycles = 0
    queue_options = None

    def make_handler(self) -> InferenceHandler:
        return OneEngine()

    @overrides("OneEngine is not what is installed; TestTinyModel looks at the entry point")
    def test_entry_point(self) -> None:
        pass


@pytest.mark.one_engine
class TestOneEngine(VLLMOneEngine):
    """What continuous integration has time for."""

    @pytest.fixture(scope="class")
    def model_config(self, tiny_model: Path) -> ModelConfig:
        return ModelConfig(model_id="tiny", source=str(tiny_model), options=SMALL)


@pytest.mark.nightly
def test_a_model_that_thinks_with_room_for_tools(
    make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_tiny_model(tmp_path / "roomy", context=1024)
    options = {**SMALL, "n_ctx": 1024, "chat_template": THINKS}
    config = ModelConfig(model_id="tiny", source=str(source), options=options)
    settings = {"timeout_s": 240, "load_cycles": 0}
    results = run_suite(Job(OneEngine, config, settings), "reasoning_apart or tool_calls")
    assert "".join(r.reason for r in results) == ""
    assert [r.outcome for r in results] == ["passed", "passed"]


@pytest.mark.real_model
class TestSmolLM2(VLLMOneEngine):
    # What else is in a batch changes the last digits.
    batch_invariant = False

    @pytest.fixture(scope="class")
    def model_config(self, smollm2: Path) -> ModelConfig:
        # A short context makes the kit's long answers short: some tokens a second is all it has.
        options = {**SMALL, "n_ctx": 160}
        return ModelConfig(model_id="smollm2", source=str(smollm2), options=options)

    @pytest.fixture(scope="class")
    def embedding_config(self, encoder: Path) -> ModelConfig:
        return ModelConfig(model_id="encoder", source=str(encoder))
