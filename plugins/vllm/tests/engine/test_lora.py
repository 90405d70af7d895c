"""LoRA adapters: each request has the one that it names, whatever runs beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK, ALPHA = 4, 8
SIZES = {"q_proj": 128, "v_proj": 64}


def place(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Random weights for two projections of each layer, as peft saves them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name, out in SIZES.items():
            prefix = f"base_model.model.{place(layer, name)}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, 128) / 8
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(SIZES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def text_of(model: Path, adapter: Path | None, prompt: str, tokens: int) -> str:
    """What transformers generates, with the adapter's weights added to the model's."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if adapter is not None:
        weights = load_file(adapter / "adapter_model.safetensors")
        for layer in range(2):
            for name in SIZES:
                prefix = f"base_model.model.{place(layer, name)}"
                a, b = (weights[f"{prefix}.lora_{side}.weight"] for side in "AB")
                with torch.no_grad():
                    network.get_submodule(place(layer, name)).weight += ALPHA / RANK * (b @ a)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        found = network.generate(ids, do_sample=False, max_new_tokens=tokens)
    text: str = tokenizer.decode(found[0, ids.shape[1] :])
    return text


def test_each_request_has_its_own_adapter_or_none_whatever_runs_beside_it(
    make: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    names = {None: None, "one": 3, "two": 4}
    adapters = {
        name: None if seed is None else write_adapter(tmp_path / str(name), tiny_model, seed)
        for name, seed in names.items()
    }
    prompt, tokens = "Once upon a time", 24
    expected = {
        name: text_of(tiny_model, adapter, prompt, tokens) for name, adapter in adapters.items()
    }
    assert len(set(expected.values())) == 3
    modules = [{"name": name, "path": str(path)} for name, path in adapters.items() if path]
    bench = make(lora_modules=modules, aliases=["one"])
    bench.load()

    def ask(*asked: str | None) -> None:
        requests = [{"prompt": prompt, "max_new_tokens": tokens, "adapter": name} for name in asked]
        answers = bench.answers(requests)
        assert [(n, a.generated_text) for n, a in zip(asked, answers, strict=True)] == [
            (n, expected[n]) for n in asked
        ]

    for name in (None, "one", None, "two", None):  # each alone
        ask(name)
    for _ in range(3):
        ask(None, "one", "two", None, "two", "one", None)
        ask("two", None)
        ask("one", None)
    by_its_alias = bench.answer(prompt, max_new_tokens=tokens, model_id="one")
    assert by_its_alias.generated_text == expected["one"]
    unknown = bench.answer(prompt, adapter="three")
    assert unknown.error_type == "ConfigurationError" and "one, two" in unknown.error_message
