"""LoRA adapters: applied to every request, by their scale."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engineroom import GenerationParams, InferenceRequest

Make = Callable[..., Awaitable[Any]]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Changes the queries of both layers of the tiny model."""
    path, rank, width = tmp_path / "adapter.gguf", 4, 64
    random = np.random.default_rng(3)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for layer in range(2):
        name = f"blk.{layer}.attn_q.weight"
        for part, shape in (("lora_a", (rank, width)), ("lora_b", (width, rank))):
            writer.add_tensor(f"{name}.{part}", random.normal(0, 1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


async def answer(make: Make, **options: Any) -> str:
    bench = await make(**options)
    params = GenerationParams(temperature=0, max_new_tokens=24, logit_bias={2: -100.0})
    request = InferenceRequest(model_id="m", prompt="hello", params=params)
    response = await bench.service.infer(request)
    response.raise_for_error()
    text: str = response.generated_text
    return text


async def test_an_adapter_changes_the_answers_by_its_scale(make: Make, adapter: Path) -> None:
    plain = await answer(make)
    applied = await answer(make, lora=[str(adapter)])
    halved = await answer(make, lora=[{"path": str(adapter), "scale": 0.5}])
    off = await answer(make, lora=[{"path": str(adapter), "scale": 0.0}])
    assert off == plain
    assert len({plain, applied, halved}) == 3
