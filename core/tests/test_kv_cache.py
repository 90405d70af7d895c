"""What a cache keeps of a token, for the ways in which models attend."""

from __future__ import annotations

from typing import Any

import pytest

from engineroom.memory import KVLayer, kv_layers, kv_values_per_token

FALCON_7B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
    "hidden_size": 4544,
    "multi_query": True,
    "new_decoder_architecture": False,
}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (FALCON_7B, 4_096),
        ({**FALCON_7B, "new_decoder_architecture": True, "num_kv_heads": 8}, 32 * 2 * 8 * 64),
        ({**FALCON_7B, "multi_query": False}, 290_816),
        (DEEPSEEK_V3, 35_136),
        (SIZES, 3 * 2 * 4 * 8),
        ({**SIZES, "num_key_value_heads": 2}, 3 * 2 * 2 * 8),
        ({**SIZES, "multi_query_group_num": 2}, 3 * 2 * 2 * 8),
        ({**SIZES, "head_dim": 20}, 3 * 2 * 4 * 20),
        ({**SIZES, "head_dim": 20, "v_head_dim": 10}, 3 * 4 * 30),
        ({**SIZES, "num_key_value_heads": [4, 2, 0]}, 2 * 6 * 8),
        ({**SIZES, "head_dim": [8, 8, 2]}, 2 * 4 * 18),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 12 * 2 * 768),
        ({"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_model": 99}, 2 * 2 * 4 * 8),
        ({"text_config": SIZES, "num_hidden_layers": 99}, 3 * 2 * 4 * 8),
        ({"text_config": {"num_hidden_layers": 1}, **SIZES}, 2 * 4 * 8),
    ],
)
def test_the_numbers_of_a_token(config: dict[str, Any], numbers: int) -> None:
    assert kv_values_per_token(config) == numbers


def test_latent_vectors_are_kept_once_or_unpacked() -> None:
    assert kv_layers(DEEPSEEK_V3)[0] == KVLayer(512 + 64, 0)
    assert kv_layers(DEEPSEEK_V3, unpacked=True)[0] == KVLayer(128 * 192, 128 * 128)
    assert kv_values_per_token(DEEPSEEK_V3, unpacked=True) == 61 * 128 * (192 + 128)
    assert kv_values_per_token(FALCON_7B, unpacked=True) == 4_096


def test_layers_with_a_window_count_in_full_and_those_with_a_state_not() -> None:
    kinds = ["sliding_attention", "linear_attention", "full_attention"]
    full, none = KVLayer(32, 32), KVLayer(0, 0)
    windowed = {**SIZES, "sliding_window": 16}
    assert kv_layers(windowed) == (full, full, full)
    assert kv_layers({**windowed, "layer_types": kinds}) == (full, none, full)
    mamba = ["mamba", "attention", "mamba"]
    assert kv_layers({**SIZES, "layers_block_type": mamba}) == (none, full, none)
    assert kv_layers({**SIZES, "layer_types": kinds[:2]}) == (full, full, full)  # not understood


def test_layers_without_a_window_may_have_heads_of_their_own() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    gemma = {**SIZES, "num_key_value_heads": 2, "layer_types": kinds, "global_head_dim": 16}
    assert kv_layers(gemma) == (KVLayer(16, 16), KVLayer(16, 16), KVLayer(32, 32))
    one = {**gemma, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    assert kv_layers(one)[2] == KVLayer(16, 16)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 24, "hidden_size": 768},  # recurrent
        {**SIZES, "num_hidden_layers": "3"},
        {**SIZES, "num_hidden_layers": True},
        {**SIZES, "num_hidden_layers": 2**30},  # would cost memory here
        {**SIZES, "num_hidden_layers": -1},
        {**SIZES, "num_attention_heads": 2.0},
        {**SIZES, "num_attention_heads": [4]},
        {**SIZES, "num_attention_heads": 2**40},
        {**SIZES, "num_attention_heads": ["4", "4", "4"]},
    ],
)
def test_sizes_that_are_not_known_are_no_cache(config: dict[str, Any]) -> None:
    assert kv_layers(config) == ()
    assert kv_values_per_token(config) == 0
