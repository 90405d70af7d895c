"""A tiny BERT with random weights, and what it computes, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, HEADS, HIDDEN, LAYERS, CONTEXT = 32, 4, 48, 2, 64
EPSILON = 1e-6
WORDS = ("the", "cat", "sat", "on", "a", "mat", "hat", "duck", "something", "else", ".", ",")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# As llama.cpp's converter writes WordPiece: the beginning of a word is marked, not its middle.
TOKENS = (
    *SPECIAL,
    *("▁" + word for word in WORDS),
    *("▁" + letter for letter in LETTERS if letter != "a"),
    *LETTERS,
)

Weights = dict[str, np.ndarray[Any, Any]]


def weights(seed: int = 5) -> Weights:
    random = np.random.default_rng(seed)

    def some(*shape: int, scale: float = 0.3) -> np.ndarray[Any, Any]:
        return random.normal(0, scale, shape).astype(np.float32)

    found = {
        "token_embd.weight": some(len(TOKENS), WIDTH, scale=1.0),
        "position_embd.weight": some(CONTEXT, WIDTH),
        "token_types.weight": some(2, WIDTH),
        "token_embd_norm.weight": 1 + some(WIDTH, scale=0.1),
        "token_embd_norm.bias": some(WIDTH, scale=0.1),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"{block}{name}.weight"] = some(WIDTH, WIDTH)
            found[f"{block}{name}.bias"] = some(WIDTH, scale=0.1)
        found[block + "ffn_up.weight"], found[block + "ffn_up.bias"] = (
            some(HIDDEN, WIDTH),
            some(HIDDEN, scale=0.1),
        )
        found[block + "ffn_down.weight"], found[block + "ffn_down.bias"] = (
            some(WIDTH, HIDDEN),
            some(WIDTH, scale=0.1),
        )
        for name in ("attn_output_norm", "layer_output_norm"):
            found[f"{block}{name}.weight"] = 1 + some(WIDTH, scale=0.1)
            found[f"{block}{name}.bias"] = some(WIDTH, scale=0.1)
    return found


def write_bert(path: Path, *, pooling: int | None = 1, causal: bool | None = False) -> Path:
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(EPSILON)
    if causal is not None:
        writer.add_causal_attention(causal)
    if pooling is not None:
        writer.add_uint32("bert.pooling_type", pooling)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
    for name, values in weights().items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens_of(text: str) -> list[int]:
    """Words that the vocabulary has whole, or letter by letter."""
    found = [TOKENS.index("[CLS]")]
    for word in text.split():
        if "▁" + word in TOKENS:
            found.append(TOKENS.index("▁" + word))
        else:
            found.append(TOKENS.index("▁" + word[0]))
            found += [TOKENS.index(letter) for letter in word[1:]]
    return [*found, TOKENS.index("[SEP]")]


def vector(tokens: Sequence[int], pooling: str, *, normalise: bool = True) -> list[float]:
    w = {name: values.astype(np.float64) for name, values in weights().items()}

    def norm(x: Any, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        return centred / spread * w[name + ".weight"] + w[name + ".bias"]

    def linear(x: Any, name: str) -> Any:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    count = len(tokens)
    x = w["token_embd.weight"][list(tokens)] + w["position_embd.weight"][:count]
    x = norm(x + w["token_types.weight"][0], "token_embd_norm")
    for layer in range(LAYERS):
        b = f"blk.{layer}."
        q, k, v = (
            linear(x, b + name).reshape(count, HEADS, -1).swapaxes(0, 1)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(WIDTH / HEADS)
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        odds /= odds.sum(-1, keepdims=True)
        mixed = (odds @ v).swapaxes(0, 1).reshape(count, WIDTH)
        x = norm(x + linear(mixed, b + "attn_output"), b + "attn_output_norm")
        h = linear(x, b + "ffn_up")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = norm(x + linear(h, b + "ffn_down"), b + "layer_output_norm")
    pooled = {"mean": x.mean(0), "cls": x[0], "last": x[-1]}[pooling]
    if normalise:
        pooled = pooled / np.linalg.norm(pooled)
    found: list[float] = pooled.tolist()
    return found
