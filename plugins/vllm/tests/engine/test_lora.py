"""LoRA adapters, which a CPU does not keep apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engineroom import ConfigurationError


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


def test_adapters_are_refused_where_requests_beside_would_get_them_too(
    make: Callable[..., Any], adapter: Path
) -> None:
    modules = [{"name": "tuned", "path": str(adapter)}]
    bench = make(lora_modules=modules, aliases=["tuned"])
    with pytest.raises(ConfigurationError, match="lora_modules"):
        bench.load()
