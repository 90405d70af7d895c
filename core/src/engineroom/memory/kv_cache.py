"""How many numbers a key/value cache keeps of a token, from a model's sizes alone.

The one formula of all runtimes. Bytes are these numbers times the size of one, which is the
runtime's to choose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["KVLayer", "kv_layers", "kv_values_per_token"]

_LAYERS: Final = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_transformer_layers",
)  # fmt: skip
_HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "n_heads", "num_query_heads")
_KV_HEADS: Final = (
    "num_key_value_heads_per_layer", "num_key_value_heads", "num_kv_heads", "n_head_kv",
    "multi_query_group_num", "kv_n_heads",
)  # fmt: skip
_WIDTH: Final = ("hidden_size", "n_embd", "d_model", "dim")
_HEAD_WIDTH: Final = ("head_dim", "d_kv", "kv_channels", "attention_head_dim")
_STATES: Final = frozenset(
    {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}
)
"""Kinds of layers that keep a state of a fixed size instead, or nothing at all."""
_MOST_LAYERS: Final = 4096
"""More are no model's: the files come from anyone."""


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one layer keeps of a token.

    :param keys: numbers of its keys, in all heads.
    :param values: numbers of its values.
    """

    keys: int
    values: int


def kv_values_per_token(config: Mapping[str, Any], *, unpacked: bool = False) -> int:
    """Numbers (not bytes) that the cache keeps of one token, in all layers; see :func:`kv_layers`.

    :returns: 0: there is no such cache, or the sizes are not known.
    """
    return sum(layer.keys + layer.values for layer in kv_layers(config, unpacked=unpacked))


def kv_layers(config: Mapping[str, Any], *, unpacked: bool = False) -> tuple[KVLayer, ...]:
    """What each layer keeps of one token: key/value heads × the width of a head, for keys and
    for values; with latent attention (MLA) the latent vector, once.

    Layers with a sliding window count in full: a cache with room for any request keeps as much.

    :param config: sizes under the names of ``config.json``; those of layers that differ are
        lists. See :meth:`engineroom.sources.GgufHeader.config` for GGUF files.
    :param unpacked: the runtime keeps the keys and values that it makes of latent vectors, for
        all heads, instead of these.
    :returns: none where there is no such cache, or the sizes are not known.
    """
    text = dict(config)
    for name in ("text_config", "attn_config"):  # the second: MPT's and DBRX's heads
        if isinstance(inner := config.get(name), Mapping):
            text |= inner
    count = _number(text, *_LAYERS)
    if count > _MOST_LAYERS or not (heads := _each_layer(text, count, *_HEADS)):
        return ()
    kv_heads = _each_layer(text, count, *_KV_HEADS) or heads
    if text.get("attn_type") == "multiquery_attention" or (
        text.get("multi_query") is True and not text.get("new_decoder_architecture")
    ):
        kv_heads = [1] * count
    width = _number(text, *_WIDTH)
    keys = _each_layer(text, count, *_HEAD_WIDTH) or [width // max(1, n) for n in heads]
    values = _each_layer(text, count, "v_head_dim") or keys
    rope, nope = _number(text, "qk_rope_head_dim"), _number(text, "qk_nope_head_dim")
    if (rank := _number(text, "kv_lora_rank")) and not unpacked:
        kv_heads, keys, values = [1] * count, [rank + rope] * count, [0] * count
    elif nope:
        kv_heads, keys = heads, [nope + rope] * count
        values = _each_layer(text, count, "v_head_dim") or keys
    layers = [
        KVLayer(n * key, n * value) for n, key, value in zip(kv_heads, keys, values, strict=True)
    ]
    whole = _whole_attention(text)
    for place, kind in enumerate(_kinds(text, count)):
        if kind in _STATES:
            layers[place] = KVLayer(0, 0)
        elif kind == "full_attention" and whole is not None:
            layers[place] = whole
    return tuple(layers)


def _kinds(text: Mapping[str, Any], count: int) -> Sequence[object]:
    """The kind of each layer, however a model says it; empty: all attend."""
    for name in ("layer_types", "layers_block_type"):
        if isinstance(listed := text.get(name), Sequence) and len(listed) == count:
            return listed
    attending = _attending(text, count)
    if attending is None:
        return ()
    return ["attention" if place in attending else "recurrent" for place in range(count)]


def _attending(text: Mapping[str, Any], count: int) -> Collection[int] | None:
    """The layers that attend, by place, where a model tells them apart; ``None``: it does not."""
    pattern, cycle = text.get("hybrid_override_pattern"), text.get("block_types")
    if isinstance(pattern, str) and len(pattern) == count:  # Nemotron-H
        return [place for place, letter in enumerate(pattern) if letter == "*"]
    if isinstance(cycle, list) and cycle:  # RecurrentGemma
        return [place for place in range(count) if cycle[place % len(cycle)] == "attention"]
    if period := _number(text, "attn_layer_period"):  # Jamba, Zamba
        return range(_number(text, "attn_layer_offset"), count, period)
    if interval := _number(text, "full_attention_interval"):  # Qwen3-Next
        return range(interval - 1, count, interval)
    for name in ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"):  # Bamba, LFM2, Zamba2
        if isinstance(listed := text.get(name), list) and listed:
            return listed
    linear = text.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(listed := linear.get("full_attn_layers"), list):
        return [place - 1 for place in listed if _fits(place)]  # Kimi Linear counts from 1
    kinds = text.get("attn_type_list")
    if isinstance(kinds, list) and len(kinds) == count:  # MiniMax: 0 is linear
        return [place for place, kind in enumerate(kinds) if kind]
    return None


def _whole_attention(text: Mapping[str, Any]) -> KVLayer | None:
    """What layers without a window keep, where they have heads of their own (Gemma 4)."""
    if not (width := _number(text, "global_head_dim")):
        return None
    heads = _number(text, "num_global_key_value_heads") if text.get("attention_k_eq_v") else 0
    heads = heads or _number(text, *_KV_HEADS) or _number(text, *_HEADS)
    return KVLayer(heads * width, heads * width)


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these fields that is a positive number; 0: none is."""
    return next((config[name] for name in names if _fits(config.get(name)) and config[name]), 0)


def _each_layer(config: Mapping[str, Any], count: int, *names: str) -> list[int]:
    """The first of these fields that has a number for each layer, or one for all; empty: none."""
    for name in names:
        value = config.get(name)
        if _fits(value) and value:
            return [value] * count
        if isinstance(value, list) and len(value) >= count and all(map(_fits, value[:count])):
            return value[:count]
    return []


def _fits(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31
