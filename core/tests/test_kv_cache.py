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
# As their config.json has it, on the hub.
DBRX = {
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
}
MPT_7B = {
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "attn_config": {"attn_type": "multihead_attention", "alibi": True},
}
JAMBA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
}
QWEN3_NEXT_80B = {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_size": 2048,
    "full_attention_interval": 4,
}
KIMI_LINEAR = {
    **DEEPSEEK_V3,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [1, 2, 3, 5, 6, 7, 9],
    },
}
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (FALCON_7B, 4_096),
        ({**FALCON_7B, "new_decoder_architecture": True, "num_kv_heads": 8}, 32 * 2 * 8 * 64),
        ({**FALCON_7B, "multi_query": False}, 290_816),
        (DEEPSEEK_V3, 35_136),
        (DBRX, 81_920),
        (MPT_7B, 262_144),
        ({**MPT_7B, "attn_config": {"kv_n_heads": 4}}, 32_768),
        ({**MPT_7B, "attn_config": {"attn_type": "multiquery_attention"}}, 8_192),
        (JAMBA, 4 * 2 * 8 * 128),
        (QWEN3_NEXT_80B, 12 * 2 * 2 * 256),
        (KIMI_LINEAR, 7 * (512 + 64)),
        ({**SIZES, "hybrid_override_pattern": "M*-"}, 2 * 4 * 8),
        ({**SIZES, "block_types": ["recurrent", "attention"]}, 2 * 4 * 8),
        ({**SIZES, "attn_layer_indices": [0, 2]}, 2 * 2 * 4 * 8),
        ({**SIZES, "full_attn_idxs": [1]}, 2 * 4 * 8),
        ({**SIZES, "attn_type_list": [0, 1, 1]}, 2 * 2 * 4 * 8),
        ({**SIZES, "attention_head_dim": 16}, 3 * 2 * 4 * 16),
        ({**SIZES, "num_key_value_heads_per_layer": [4, 2, 1]}, 2 * 7 * 8),
        (
            {
                "num_transformer_layers": 2,
                "num_query_heads": [12, 16],
                "num_kv_heads": [3, 4],
                "head_dim": 64,
                "model_dim": 1280,
            },
            2 * 7 * 64,
        ),
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


@pytest.mark.parametrize(
    "unread",
    [
        {"hybrid_override_pattern": "M*"}, {"hybrid_override_pattern": 3}, {"block_types": []},
        {"attn_layer_period": 0}, {"attn_layer_period": "2"}, {"full_attention_interval": -1},
        {"attn_layer_indices": []}, {"attn_layer_indices": None}, {"attn_type_list": [1]},
        {"linear_attn_config": {"full_attn_layers": 3}}, {"linear_attn_config": []},
        {"attn_config": ["kv_n_heads"]}, {"attn_config": {"kv_n_heads": "8"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_understood_counts_in_full(unread: dict[str, Any]) -> None:
    assert kv_values_per_token({**SIZES, **unread}) == 3 * 2 * 4 * 8


HYBRIDS = (
    "jamba", "bamba", "zamba", "zamba2", "nemotron_h", "recurrent_gemma", "kimi_linear", "minimax",
    "qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2", "granitemoehybrid",
)  # fmt: skip


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_that_attend_are_those_of_transformers(kind: str) -> None:
    """Told apart by what ``config.json`` says, as Transformers tells them apart by its classes."""
    transformers = pytest.importorskip("transformers")
    told: dict[str, Any] = {"attn_layer_indices": [9, 18, 27]} if kind == "bamba" else {}
    made = transformers.CONFIG_MAPPING[kind](**told)
    kinds = getattr(made, "layer_types", None) or made.layers_block_type
    attends = [
        kind not in ("linear_attention", "mamba", "conv", "recurrent", "moe", "mlp")
        for kind in kinds
    ]
    said = {"num_hidden_layers": made.num_hidden_layers, **made.to_dict()}
    assert [layer.keys > 0 for layer in kv_layers(said)] == attends
    # What older files say instead of a list.
    shorter = {k: v for k, v in said.items() if k not in ("layer_types", "layers_block_type")}
    if kind in ("jamba", "bamba", "recurrent_gemma", "zamba2", "lfm2"):
        assert [layer.keys > 0 for layer in kv_layers(shorter)] == attends


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
