"""Loading: the real library, over tiny models that are whole, damaged, or not what they say."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engineroom import (
    ConfigurationError,
    ModelConfig,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom.engine import BackgroundLoad
from engineroom_hf_transformers.loading import Parts, load_engine, load_parts, release
from engineroom_hf_transformers.options import HfTransformersOptions

# PEFT calls what the newest transformers have a new name for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Tiny = Callable[[str], Path]
Changed = Callable[..., Path]


def loaded(source: Path | str, **options: Any) -> Parts:
    options = {"device": "cpu", "n_threads": 1} | options
    config = ModelConfig(model_id="m", source=str(source))
    return load_parts(config, HfTransformersOptions(**options))


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        loaded(source, **options)
    return str(caught.value)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 20, 100, 7]])).logits
    return found


# ── what is loaded ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "gpt2", "mamba"]
)
def test_a_causal_model_is_loaded_as_the_library_loads_it(kind: str, tiny: Tiny) -> None:
    parts = loaded(tiny(kind))
    assert parts.kind == "causal"
    assert parts.end_ids == {1}
    assert parts.n_vocab == 300
    assert parts.n_trained == (None if kind == "mamba" else 512)
    assert parts.n_context == (4096 if kind == "mamba" else 512)
    assert parts.device == torch.device("cpu")
    assert parts.dtype == torch.float32
    assert parts.draft is None
    assert parts.tokenizer("a b").input_ids
    model = parts.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    assert weights <= parts.weight_bytes <= weights + 10_000
    stock = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32)
    # Linear layers are computed by other kernels.
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-4, atol=1e-4)


def test_kinds_are_told_apart(tiny: Tiny) -> None:
    parts = loaded(tiny("t5"))
    assert parts.kind == "encoder-decoder"
    assert parts.n_vocab == 300
    assert hasattr(parts.model, "generate")
    parts = loaded(tiny("bert"))
    assert parts.kind == "embedding"
    assert parts.n_vocab == 300


def test_a_model_of_something_else_is_refused(copied: Tiny, change_json: Changed) -> None:
    folder = copied("bert")
    change_json(folder / "config.json", architectures=["BertForTokenClassification"])
    assert "neither generates text nor" in refusal(folder)


def test_options_decide_type_context_and_attention(tiny: Tiny) -> None:
    parts = loaded(
        tiny("llama"), dtype="bfloat16", max_context=100, attn_implementation="eager", n_threads=2
    )
    assert parts.dtype == torch.bfloat16
    assert {p.dtype for p in parts.model.parameters()} == {torch.bfloat16}
    assert parts.n_context == 100
    assert parts.model.config._attn_implementation == "eager"
    assert torch.get_num_threads() == 2
    assert loaded(tiny("llama")).model.config._attn_implementation == "sdpa"
    assert torch.get_num_threads() == 1


def test_ends_come_from_the_generation_config_and_the_tokenizer(
    copied: Tiny, change_json: Changed
) -> None:
    folder = copied("llama")
    change_json(folder / "generation_config.json", eos_token_id=[4, 7])
    assert loaded(folder).end_ids == {4, 7, 1}


@pytest.mark.real_model
def test_a_gguf_file_is_loaded(smollm2_gguf: Path) -> None:
    parts = loaded(smollm2_gguf)
    assert parts.kind == "causal"
    assert parts.n_vocab == 49152
    assert parts.n_trained == 8192
    assert parts.n_context == 4096
    assert parts.tokenizer("hello").input_ids
    release(parts)


@pytest.mark.real_model
def test_the_converted_smollm2_is_loaded(smollm2: Path) -> None:
    parts = loaded(smollm2)
    assert parts.n_vocab == 49152
    assert parts.end_ids == {2}
    release(parts)


def test_pickled_weights_are_loaded_where_that_is_allowed(copied: Tiny, tiny: Tiny) -> None:
    folder = copied("llama")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "allow_pickle" in refusal(folder)
    parts = loaded(folder, allow_pickle=True)
    assert torch.equal(logits(parts.model), logits(loaded(tiny("llama")).model))


# ── what is refused ──────────────────────────────────────────────────────────────────────────


def test_what_is_not_there_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError):
        loaded(tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError):
        loaded("hf:owner/absent")


def test_missing_weights_are_not_made_at_random(copied: Tiny) -> None:
    folder = copied("qwen2")
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    assert "no weights for model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_more_layers_than_the_weights_have_are_refused(copied: Tiny, change_json: Changed) -> None:
    folder = copied("llama")
    change_json(folder / "config.json", num_hidden_layers=3, layer_types=None)
    message = refusal(folder)
    assert "no weights for model.layers.2." in message
    assert "others" in message


def test_weights_of_another_size_are_refused(copied: Tiny, change_json: Changed) -> None:
    folder = copied("llama")
    change_json(folder / "config.json", intermediate_size=80)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_hidden_layers": "many"},
        {"hidden_size": -5},
        {"hidden_act": "absent"},
        {"rope_parameters": 7},
        {"vocab_size": None, "num_key_value_heads": 3},
        {"dtype": "complex77"},
    ],
)
def test_nonsense_in_the_config_is_a_typed_error(
    copied: Tiny, change_json: Changed, change: dict[str, Any]
) -> None:
    folder = copied("llama")
    change_json(folder / "config.json", **change)
    assert str(folder) in refusal(folder)


def test_an_unknown_type_of_model_is_told(copied: Tiny, change_json: Changed) -> None:
    folder = copied("llama")
    change_json(folder / "config.json", model_type="unheardof")
    assert "does not know models of the type 'unheardof'" in refusal(folder)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "unheardof"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_models_own_runs_only_where_that_is_allowed(
    copied: Tiny,
    change_json: Changed,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder = copied("llama")
    (folder / "own.py").write_text(REMOTE)
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change_json(
        folder / "config.json",
        model_type="unheardof",
        architectures=["OwnForCausalLM"],
        auto_map=auto,
    )
    assert "trust_remote_code: true" in refusal(folder)
    with caplog.at_level(logging.WARNING):
        parts = loaded(folder, trust_remote_code=True)
    assert type(parts.model).__name__ == "OwnForCausalLM"
    assert parts.kind == "causal"
    assert "Python code" in caplog.text


def test_a_model_that_the_library_knows_does_not_need_its_own_code(
    copied: Tiny, change_json: Changed
) -> None:
    folder = copied("llama")
    auto = {"AutoConfig": "absent.C", "AutoModelForCausalLM": "absent.M"}
    change_json(folder / "config.json", auto_map=auto)
    assert type(loaded(folder).model).__name__ == "LlamaForCausalLM"


def test_a_model_without_a_tokenizer_is_refused(copied: Tiny) -> None:
    folder = copied("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "tokenizer" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 5}'])
def test_a_damaged_tokenizer_is_refused(copied: Tiny, content: str) -> None:
    folder = copied("gpt2")
    (folder / "tokenizer.json").write_text(content)
    assert "no tokenizer" in refusal(folder)


# ── quantisation ─────────────────────────────────────────────────────────────────────────────


def test_an_unknown_method_of_quantisation_is_told(tiny: Tiny) -> None:
    message = refusal(tiny("llama"), quantization={"quant_method": "absent"})
    assert "'absent' is not known" in message
    assert "gptq" in message
    assert "None is not known" in refusal(tiny("llama"), quantization={})


def test_a_missing_library_is_told_with_how_to_install_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

    def absent(*_: Any, **__: Any) -> None:  # a fake: the library may well be there
        raise ImportError("Using `bitsandbytes` requires it")

    for module in (quantizer_bnb_8bit.Bnb8BitHfQuantizer, quantizer_bnb_4bit.Bnb4BitHfQuantizer):
        monkeypatch.setattr(module, "validate_environment", absent)
    for settings in (
        {"load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ):
        message = refusal(tiny("llama"), quantization=settings)
        assert "pip install bitsandbytes accelerate" in message


def test_wrong_settings_of_quantisation_are_told(tiny: Tiny) -> None:
    message = refusal(
        tiny("llama"), quantization={"quant_method": "gptq", "bits": "many", "group_size": -7}
    )
    assert "quantization: gptq refuses" in message


# ── adapters ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Path:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_into_the_weights(tiny: Tiny, adapter: Path) -> None:
    import peft

    base = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    plain = logits(base)
    expected = logits(peft.PeftModel.from_pretrained(base, str(adapter)))
    parts = loaded(tiny("llama"), adapter=str(adapter))
    assert type(parts.model).__name__ == "LlamaForCausalLM"
    found = logits(parts.model)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


def test_an_adapter_that_cannot_be_merged_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    parts = loaded(tiny("llama"), adapter=str(tmp_path / "prompt"))
    assert type(parts.model).__name__ == "PeftModelForCausalLM"
    assert parts.n_vocab == 300
    assert parts.end_ids == {1}


def test_an_adapter_that_is_wrong_is_told(
    tiny: Tiny, adapter: Path, tmp_path: Path, change_json: Changed
) -> None:
    def told(folder: Path, model: str = "llama") -> str:
        return refusal(tiny(model), adapter=str(folder))

    assert "there is no folder" in told(tmp_path / "absent")
    assert "no adapter_config.json" in told(tmp_path)
    assert "does not fit this model" in told(adapter, "gpt2")
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-9])
    assert "not a usable safetensors file" in told(adapter)
    weights.rename(adapter / "adapter_model.bin")
    assert "allow_pickle" in told(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in told(adapter)
    weights.write_bytes(content)
    change_json(adapter / "adapter_config.json", r=3)
    assert "does not fit this model" in told(adapter)


# ── draft models ─────────────────────────────────────────────────────────────────────────────


def test_a_draft_model_of_the_same_vocabulary_is_loaded(
    tiny: Tiny, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    folder = write_checkpoint("llama", tmp_path / "draft", seed=2, num_hidden_layers=1)
    parts = loaded(tiny("llama"), draft_model=str(folder), max_context=64)
    assert parts.draft is not None
    assert parts.draft.model.config.num_hidden_layers == 1
    assert parts.draft.n_context == 64
    release(parts)
    assert parts.draft is None


def test_a_draft_model_of_another_vocabulary_is_refused(copied: Tiny, tiny: Tiny) -> None:
    folder = copied("llama")
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    words = state["model"]["vocab"]
    first, second = (word for word, number in words.items() if number in {100, 101})
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(state), encoding="utf-8")
    assert "another vocabulary" in refusal(tiny("llama"), draft_model=str(folder))
    with pytest.raises(ModelNotFoundError):
        loaded(tiny("llama"), draft_model=str(folder / "absent"))
    assert "continue text" in refusal(tiny("t5"), draft_model=str(tiny("llama")))


# ── memory ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_no_memory_is_told_with_what_is_needed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:  # a fake: the machine's memory is not to be filled
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ResourceNotAvailableError, match=r"needs about .* GiB \(\d+ bytes\)"):
        loaded(tiny("llama"))


def test_released_parts_hold_nothing(tiny: Tiny) -> None:
    parts = loaded(tiny("llama"))
    model = weakref.ref(parts.model)
    weight = weakref.ref(parts.model.lm_head.weight)
    release(parts)
    assert parts.model is None
    assert model() is None
    assert weight() is None
    release(parts)


# ── loads that nobody waits for ──────────────────────────────────────────────────────────────


class FakeEngine:
    """An engine that only knows whether it was closed."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.model = weakref.ref(parts.model)
        self.closed = threading.Event()

    def close(self) -> None:
        assert self.parts.model is not None  # closed before its model goes
        self.closed.set()


def unload(engine: FakeEngine) -> None:
    engine.close()
    release(engine.parts)


def a_load(tiny: Tiny, build: Callable[[Parts], Any]) -> BackgroundLoad[Any]:
    config = ModelConfig(model_id="m", source=str(tiny("llama")))
    options = HfTransformersOptions(device="cpu", n_threads=1)
    return BackgroundLoad(
        lambda: load_engine(config, options, build), unload, name="hf_transformers"
    )


def test_a_load_gives_the_engine(tiny: Tiny) -> None:
    engine = a_load(tiny, FakeEngine).run()
    assert not engine.closed.is_set()
    assert engine.parts.model is not None


def test_a_load_that_is_abandoned_before_it_ends_gives_its_memory_back(tiny: Tiny) -> None:
    load = a_load(tiny, FakeEngine)
    load.abandon()
    engine = load.run()
    assert engine.closed.is_set()
    assert engine.parts.model is None
    gc.collect()
    assert engine.model() is None


def test_a_load_that_is_abandoned_after_it_ended_gives_its_memory_back(tiny: Tiny) -> None:
    load = a_load(tiny, FakeEngine)
    engine = load.run()
    load.abandon()
    load.abandon()
    assert engine.closed.wait(60)
    for thread in threading.enumerate():
        if thread.name == "hf_transformers-unload":
            thread.join(60)
    assert engine.parts.model is None


def test_an_engine_that_cannot_be_built_leaves_no_model(tiny: Tiny) -> None:
    seen: list[Any] = []

    def broken(parts: Parts) -> FakeEngine:
        seen.append(parts)
        raise ConfigurationError("no")

    with pytest.raises(ConfigurationError, match="no"):
        a_load(tiny, broken).run()
    assert seen[0].model is None


# ── noise ────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_written_to_the_terminal(copied: Tiny) -> None:
    folder = copied("llama")
    path = folder / "model.safetensors"
    state = load_file(path)
    state["extra.weight"] = torch.zeros(3)  # the library advises at length about such
    save_file(state, path, metadata={"format": "pt"})
    script = (
        "import logging, sys\n"
        "from engineroom import ModelConfig\n"
        "from engineroom_hf_transformers.loading import load_parts\n"
        "from engineroom_hf_transformers.options import HfTransformersOptions\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "class Kept(logging.Handler):\n"
        "    def emit(self, record): kept.append(record)\n"
        "kept = []\n"
        "ours = logging.getLogger('engineroom.hf_transformers')\n"
        "ours.propagate = False\n"
        "ours.addHandler(Kept())\n"
        "ours.setLevel(logging.DEBUG)\n"
        f"config = ModelConfig(model_id='m', source={str(folder)!r})\n"
        "load_parts(config, HfTransformersOptions(device='cpu'))\n"
        "assert any('extra.weight' in r.getMessage() for r in kept), kept\n"
        "assert all(r.levelno == logging.DEBUG for r in kept)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
