"""A tiny model with random weights that the tests make: real CTranslate2, in milliseconds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ctranslate2.specs import common_spec, transformer_spec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from engineroom import GenerationParams, LLMInferenceService, LLMModelManager, ModelConfig
from engineroom.prompts import byte_alphabet
from engineroom_ctranslate2 import CTranslate2Handler

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'forbidden' %}{{ raise_exception('not that here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = [*SPECIAL, *(character for _, character in sorted(byte_alphabet().items()))]
"""Every byte is a token: the model can write anything."""


def write_tiny_model(folder: Path, *, seed: int = 13, layers: int = 2, context: int = 512) -> Path:
    """A llama with random weights, in a folder as the converter writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    width, heads, kv_heads, hidden = 64, 4, 2, 96
    random = np.random.default_rng(seed)

    def weights(*shape: int, scale: float = 0.4) -> Any:
        return random.normal(0, scale, shape).astype(np.float32)

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers,
        heads,
        activation=common_spec.Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        num_heads_kv=kv_heads,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights(len(VOCABULARY), width, scale=1.0)
    decoder.projection.weight = weights(len(VOCABULARY), width)
    # It never ends by itself, so that tests decide what does, and likes ASCII best.
    bias = decoder.projection.bias = np.zeros(len(VOCABULARY), np.float32)
    bias[: len(SPECIAL)] = -1000.0
    bias[len(SPECIAL) + 0x20 : len(SPECIAL) + 0x7F] = 2.0
    decoder.layer_norm.gamma = np.ones(width, np.float32)
    for layer in decoder.layer:
        layer.self_attention.layer_norm.gamma = np.ones(width, np.float32)
        layer.self_attention.linear[0].weight = weights(
            width + width // heads * kv_heads * 2, width
        )
        layer.self_attention.linear[1].weight = weights(width, width)
        layer.ffn.layer_norm.gamma = np.ones(width, np.float32)
        layer.ffn.linear_0.weight = weights(hidden, width)
        layer.ffn.linear_0_noact.weight = weights(hidden, width)
        layer.ffn.linear_1.weight = weights(width, hidden)
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = SPECIAL
    spec.config.layer_norm_epsilon = 1e-5
    spec.register_vocabulary(VOCABULARY)
    spec.validate()
    spec.optimize()
    spec.save(str(folder))

    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(VOCABULARY)}, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"model_max_length": context, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


class Bench:
    """A service over one model, and what the tests look at inside of it."""

    def __init__(self, service: LLMInferenceService, manager: LLMModelManager) -> None:
        self.service = service
        self.manager = manager

    @property
    def loaded(self) -> Any:
        loaded = self.manager.get_loaded_model("m")
        assert loaded is not None
        return loaded

    @property
    def engine(self) -> Any:
        return self.loaded.model_object.engine

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the threads go on until something is so."""
        while not condition():
            await asyncio.sleep(0.001)

    async def idle(self) -> None:
        """Until nothing runs and nothing waits."""
        health = self.engine.health
        await self.until(lambda: health().num_requests_running + health().num_requests_waiting == 0)


Make = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def make(tiny_model: Path) -> AsyncIterator[Make]:
    """Make services; options are those of the model. All are closed at the end."""
    services: list[LLMInferenceService] = []

    async def build(source: str | Path | None = None, **options: Any) -> Bench:
        options.setdefault("n_threads", 1)
        config = ModelConfig(model_id="m", source=str(source or tiny_model), options=options)
        manager = LLMModelManager(config=[config])
        service = LLMInferenceService(manager, handlers=[CTranslate2Handler()])
        services.append(service)
        await manager.load("m")
        return Bench(service, manager)

    async with asyncio.timeout(60):
        yield build
        for service in services:
            await service.close(drain_timeout_s=0)


@pytest.fixture
def greedy() -> Callable[..., GenerationParams]:
    def params(max_new_tokens: int | None = 16, **more: Any) -> GenerationParams:
        return GenerationParams(max_new_tokens=max_new_tokens, temperature=0, **more)

    return params
