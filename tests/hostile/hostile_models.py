"""Tiny random models with a vocabulary of the usual size, as a GGUF file and as a folder.

Both have the same byte-level BPE tokenizer, which is written down rather than trained: all words of
up to three letters, with and without a space before them, and runs of up to 64 spaces, since it is
the longest token that says how long a text may be that still fits the context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from engineroom.prompts import byte_alphabet

SPECIAL: Final = ("<s>", "</s>", "<pad>", "<|start|>", "<|end|>")
BOS, EOS, PAD = 0, 1, 2
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
SPACE: Final = "Ġ"
HEAD: Final = 32
HIDDEN: Final = 96
TALKS: Final = {"layers": 2, "heads": 2, "vectors": False}
VECTORS: Final = {"layers": 1, "heads": 16, "vectors": True}
"""Wide ones: 2,048 vectors are a million numbers to be written."""
TEMPLATE: Final = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SLOWLY: Final = "slowly, please"
REFUSE: Final = "refuse, please"
SLOW_TEMPLATE: Final = (
    "{% set last = messages[-1].content if messages[-1].content is string else '' %}"
    "{% if '" + SLOWLY + "' in last %}"
    "{% for a in range(1000) %}{% for b in range(2000) %}{% set c = a * b %}{% endfor %}"
    "{% endfor %}{% endif %}"
    "{% if '" + REFUSE + "' in last %}{{ raise_exception(last) }}{% endif %}" + TEMPLATE
)
"""Bounded, and slow where a message asks for it: two million of the five million steps. Where one
asks to be refused, the refusal says all of it back."""


@cache
def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens, and the merges that make them, the first ones first."""
    merges = list(_merges())
    return [*SPECIAL, *byte_alphabet().values(), *(a + b for a, b in merges)], merges


def _merges() -> Iterator[tuple[str, str]]:
    pairs = ["".join(pair) for pair in product(LETTERS, LETTERS)]
    yield from ((a, b) for a, b in pairs)
    yield from (("".join(pair), c) for pair, c in product(pairs, LETTERS))
    yield from ((SPACE, a) for a in LETTERS)
    yield from ((SPACE + a, b) for a, b in pairs)
    yield from ((SPACE + pair, c) for pair, c in product(pairs, LETTERS))
    yield from ((SPACE * count, SPACE * count) for count in (1, 2, 4, 8, 16, 32))


def _weights(layers: int, heads: int, vectors: bool) -> dict[str, np.ndarray[Any, Any]]:
    """As transformers names them. What talks never ends by itself and writes no special tokens."""
    random = np.random.default_rng(1)
    count, width = len(vocabulary()[0]), heads * HEAD

    def some(*shape: int, scale: float = 0.25) -> np.ndarray[Any, Any]:
        return random.normal(0, scale, shape).astype(np.float32)

    made = {
        "model.embed_tokens.weight": some(count, width, scale=1.0),
        "model.norm.weight": np.ones(width, np.float32),
    }
    if not vectors:
        made["lm_head.weight"] = head = some(count, width)
        head[: len(SPECIAL)] = 0
    for layer in range(layers):
        block = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{block}{norm}.weight"] = np.ones(width, np.float32)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            made[f"{block}self_attn.{name}.weight"] = some(width, width)
        made[block + "mlp.gate_proj.weight"] = some(HIDDEN, width)
        made[block + "mlp.up_proj.weight"] = some(HIDDEN, width)
        made[block + "mlp.down_proj.weight"] = some(width, HIDDEN)
    return made


_IN_GGUF: Final = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _name_in_gguf(name: str) -> str:
    for theirs, ours in _IN_GGUF.items():
        name = name.replace(theirs, ours)
    return name


def write_gguf(path: Path, context: int, *, layers: int, heads: int, vectors: bool) -> Path:
    """A GGUF file. :param vectors: it is made for embeddings."""
    import gguf

    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(heads * HEAD)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    if vectors:
        writer.add_uint32("llama.pooling_type", 1)
    for name, values in _weights(layers, heads, vectors).items():
        writer.add_tensor(_name_in_gguf(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(
    folder: Path, context: int, *, layers: int, heads: int, vectors: bool, ranks: bool = False
) -> Path:
    """A folder as transformers saves it.

    :param vectors: it is made for embeddings.
    :param ranks: it scores pairs of texts.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)

    def write(name: str, value: Any) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")

    weights = _weights(layers, heads, vectors or ranks)
    if ranks:
        weights["score.weight"] = np.full((1, heads * HEAD), 0.01, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokens, merges = vocabulary()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens),
        "hidden_size": heads * HEAD, "intermediate_size": HIDDEN, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": HEAD,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": vectors, "bos_token_id": BOS, "eos_token_id": EOS,
        "pad_token_id": PAD, "torch_dtype": "float32", "rope_theta": 10000.0,
    }  # fmt: skip
    if ranks:
        ranker = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "fits"}}
        config |= {**ranker, "label2id": {"fits": 0}}
    write("config.json", config)
    around = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token, "special": True, **flags} for i, token in enumerate(SPECIAL)
    ]
    begun = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            SPECIAL[BOS]: {"id": SPECIAL[BOS], "ids": [BOS], "tokens": [SPECIAL[BOS]]}
        },
    }
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", **around},
        "post_processor": begun, "decoder": {"type": "ByteLevel", **around},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }  # fmt: skip
    write("tokenizer.json", tokenizer)
    names = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS], "pad_token": SPECIAL[PAD]}
    write(
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names},
    )
    if vectors:
        kinds = (("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"))
        modules = [
            {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, path, kind in kinds
        ]
        write("modules.json", modules)
        write(
            "1_Pooling/config.json",
            {"word_embedding_dimension": heads * HEAD, "pooling_mode_mean_tokens": True},
        )
    return folder


def deployment(folder: Path, runtime: str, context: int) -> dict[str, Any]:
    """A deployment of a runtime: ``m`` talks, ``slow`` has a slow template, ``e`` makes vectors.

    ``r`` ranks documents, where the runtime has models for it; else it is the one for vectors.
    """
    write = write_gguf if runtime == "llamacpp" else write_folder
    ending = ".gguf" if runtime == "llamacpp" else ""
    talks = write(folder / f"talks{ending}", context, **TALKS)
    vectors = write(folder / f"vectors{ending}", context, **VECTORS)
    options = {**_OPTIONS[runtime], "n_ctx": context}
    models = [
        {"model_id": "m", "source": str(talks), "aliases": ["default"], "options": options},
        {
            "model_id": "slow",
            "source": str(talks),
            "options": {**options, "chat_template": SLOW_TEMPLATE},
        },
        {
            "model_id": "e",
            "source": str(vectors),
            "options": {**options, **_FOR_VECTORS.get(runtime, {}), "n_ctx": 2048},
        },
    ]
    if runtime == "hf_transformers":
        ranks = write_folder(folder / "ranks", context, **TALKS, ranks=True)
        models.append(
            {"model_id": "r", "source": str(ranks), "options": {**options, "n_ctx": 2048}}
        )
    else:
        models[-1]["aliases"] = ["r"]
    return {"models": [{**model, "runtime": runtime} for model in models]}


_FOR_VECTORS: Final[dict[str, dict[str, Any]]] = {"llamacpp": {"flash_attn": "on"}}
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    # In whole precision: random weights magnify rounding, and texts are compared.
    "llamacpp": {
        "cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "n_threads": 1,
        "trial": False, "max_queue": 2000,
    },
    "hf_transformers": {"device": "cpu", "n_threads": 1, "max_queue": 2000},
    "vllm": {"kv_cache_memory": "256MiB", "n_parallel": 8},
}  # fmt: skip
