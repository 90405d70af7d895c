"""A LoRA adapter, for the requests that name it and for no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """Random weights for two projections of each layer, as peft saves them."""
    import torch
    from safetensors.torch import save_file

    width, kv_width, rank = 128, 64, 4
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        for name, out in (("q_proj", width), ("v_proj", kv_width)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, width)
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny_model),
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_an_adapter_is_used_by_requests_that_name_it(
    make: Callable[..., Any], adapter: Path
) -> None:
    modules = [{"name": "tuned", "path": str(adapter)}]
    bench = make(lora_modules=modules, aliases=["tuned", "other"])
    bench.load()
    plain = bench.answer(max_new_tokens=12).generated_text
    tuned = bench.answer(max_new_tokens=12, model_id="tuned").generated_text
    assert tuned != plain
    # Beside each other, and by a name that is only another name of the model.
    together = bench.answers(
        [{"max_new_tokens": 12, "model_id": name} for name in ("m", "tuned", "other", "tuned")]
    )
    assert [answer.generated_text for answer in together] == [plain, tuned, plain, tuned]
