"""Options of a model: what they may say, and how mistakes are told."""

from __future__ import annotations

from typing import Any

import pytest

from engineroom import ConfigurationError, ModelConfig, parse_options
from engineroom_llamacpp import LlamaCppOptions
from engineroom_llamacpp.library import CACHE_TYPES, FLASH_ATTENTION
from engineroom_llamacpp.options import CacheType, LoraAdapter

DEFAULTS: dict[str, Any] = {
    "n_ctx": None,
    "kv_unified": "auto",
    "n_parallel": 8,
    "n_batch": 512,
    "n_ubatch": 512,
    "prefill_chunk": 128,
    "max_queue": 256,
    "prefix_cache": True,
    "prompt_cache_memory": None,
    "draft_model": None,
    "prompt_lookup": False,
    "draft_tokens": 4,
    "n_threads": None,
    "n_threads_batch": None,
    "n_gpu_layers": -1,
    "main_gpu": None,
    "tensor_split": None,
    "flash_attn": "auto",
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "lora": [],
    "requantize": None,
    "trial": True,
    "use_mmap": True,
    "use_mlock": False,
    "rope_freq_base": None,
    "rope_freq_scale": None,
    "normalize": True,
    "matryoshka": None,
    "chat_template": None,
    "reasoning_format": None,
    "chat_template_kwargs": None,
    "tool_format": None,
}
INT_MAX = 2**31 - 1
# The least and the most that an option may be; llama.cpp takes 32 bits.
WHOLE_NUMBERS = {
    "n_ctx": (8, INT_MAX),
    "n_parallel": (1, 256),
    "n_batch": (1, 65536),
    "n_ubatch": (1, 65536),
    "prefill_chunk": (1, INT_MAX),
    "max_queue": (0, INT_MAX),
    "draft_tokens": (1, 64),
    "n_threads": (1, 1024),
    "n_threads_batch": (1, 1024),
    "n_gpu_layers": (-1, INT_MAX),
    "main_gpu": (0, INT_MAX),
}
# What has to go with an option at its edge.
COMPANIONS: dict[str, dict[str, Any]] = {
    "n_ctx": {"n_parallel": 1},
    "n_parallel": {"n_batch": 256},
    "n_batch": {"n_parallel": 1},
}


def parse(**options: Any) -> LlamaCppOptions:
    return parse_options(
        LlamaCppOptions, ModelConfig(model_id="m", source="m.gguf", options=options)
    )


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse(**options)
    assert caught.value.model_id == "m"
    assert "'m'" in str(caught.value)
    return str(caught.value)


def test_every_option_has_the_default_that_is_written_down() -> None:
    assert parse().model_dump() == DEFAULTS


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_a_whole_number_has_its_range(name: str) -> None:
    least, most = WHOLE_NUMBERS[name]
    for value in (least, most):
        assert getattr(parse(**COMPANIONS.get(name, {}), **{name: value}), name) == value
    for value in (least - 1, most + 1, 2**32 + 8, 2**70):
        message = refusal(**{name: value})
        assert f"{name}: " in message
    for value in (1.5, "many", [1], float("nan")):
        assert f"{name}: " in refusal(**{name: value})


@pytest.mark.parametrize("name", [*WHOLE_NUMBERS, "rope_freq_base", "rope_freq_scale"])
@pytest.mark.parametrize("value", [True, False])
def test_a_number_is_not_a_switch(name: str, value: bool) -> None:
    # n_gpu_layers: on would be one layer of many, without a word.
    message = refusal(**{name: value})
    assert f"{name}: give a number, not {str(value).lower()}" in message


@pytest.mark.parametrize("name", ["rope_freq_base", "rope_freq_scale"])
def test_a_frequency_is_positive_and_finite(name: str) -> None:
    assert getattr(parse(**{name: 0.5}), name) == 0.5
    assert getattr(parse(**{name: 10000}), name) == 10000.0
    for value in (0, -1.0, float("inf"), float("nan")):
        assert f"{name}: " in refusal(**{name: value})


def test_proposals_come_from_one_place() -> None:
    assert "either draft_model or prompt_lookup" in refusal(draft_model="a", prompt_lookup=True)


def test_shares_of_gpus_are_neither_negative_nor_infinite() -> None:
    assert parse(tensor_split=[3, 0, 1.5]).tensor_split == [3.0, 0.0, 1.5]
    for value in (-1, float("inf"), float("nan")):
        assert "tensor_split.1: " in refusal(tensor_split=[1, value])


@pytest.mark.parametrize(
    ("written", "meant"),
    [("auto", "auto"), ("on", "on"), ("off", "off"), (True, "on"), (False, "off")],
)
def test_flash_attention_may_be_written_as_yaml_reads_it(written: Any, meant: str) -> None:
    assert parse(flash_attn=written).flash_attn == meant


@pytest.mark.parametrize("value", ["yes", 1, 0, None])
def test_flash_attention_is_nothing_else(value: Any) -> None:
    assert "flash_attn: " in refusal(flash_attn=value)


def test_every_type_of_cache_and_switch_has_a_number_of_the_librarys() -> None:
    assert set(CacheType.__args__) == set(CACHE_TYPES)
    assert set(FLASH_ATTENTION) == {"auto", "on", "off"}
    for name in ("cache_type_k", "cache_type_v"):
        for kind in CACHE_TYPES:
            assert getattr(parse(**{name: kind}), name) == kind
        assert f"{name}: " in refusal(**{name: "q6_k"})


def test_adapters_are_paths_or_paths_with_a_scale() -> None:
    options = parse(lora=["a.gguf", {"path": "b.gguf", "scale": 0.5}, {"path": "c.gguf"}])
    assert options.lora == [
        LoraAdapter(path="a.gguf", scale=1.0),
        LoraAdapter(path="b.gguf", scale=0.5),
        LoraAdapter(path="c.gguf", scale=1.0),
    ]


@pytest.mark.parametrize(
    ("adapter", "place"),
    [
        ({"scale": 1.0}, "lora.0.path"),
        ({"path": "a", "scale": float("inf")}, "lora.0.scale"),
        ({"path": "a", "scale": True}, "lora.0.scale"),
        ({"path": "a", "weight": 1.0}, "lora.0.weight"),
        (7, "lora.0"),
    ],
)
def test_a_wrong_adapter_is_told_by_its_place(adapter: Any, place: str) -> None:
    assert f"{place}: " in refusal(lora=[adapter])


def test_an_unknown_option_comes_with_the_nearest_known_one() -> None:
    message = refusal(n_contx=4096)
    assert "n_contx: there is no such key; did you mean 'n_ctx'?" in message


def test_an_unknown_option_of_an_adapter_is_not_taken_for_one_of_the_model() -> None:
    message = refusal(lora=[{"path": "a", "n_ctxx": 1.0}])
    assert "lora.0.n_ctxx: " in message
    assert "'n_ctx'" not in message


def test_an_unknown_option_near_to_none_comes_with_all_of_them() -> None:
    message = refusal(zzzz=1)
    for name in DEFAULTS:
        assert name in message


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal(n_ctx=1, n_paralel=4, flash_attn="maybe", use_mmap="perhaps")
    for name in ("n_ctx: ", "n_paralel: ", "flash_attn: ", "use_mmap: "):
        assert message.count(name) == 1


def test_options_are_not_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().n_ctx = 16  # type: ignore[misc]


def test_a_quantised_cache_of_values_needs_flash_attention() -> None:
    message = refusal(cache_type_v="q8_0", flash_attn=False)
    assert "cache_type_v=q8_0 needs flash attention" in message
    assert "Value error" not in message  # pydantic's own words
    for options in (
        {"cache_type_v": "q8_0", "flash_attn": "auto"},
        {"cache_type_v": "q8_0", "flash_attn": "on"},
        {"cache_type_v": "bf16", "flash_attn": "off"},
        {"cache_type_k": "q8_0", "flash_attn": "off"},
    ):
        parse(**options)


def test_the_cache_and_the_batch_have_room_for_every_sequence() -> None:
    assert "n_ctx=8 has no cell" in refusal(n_ctx=8, n_parallel=9)
    assert "n_batch=8 has no token" in refusal(n_batch=8, n_parallel=9)
    parse(n_ctx=9, n_batch=9, n_parallel=9)


# ── threads ─────────────────────────────────────────────────────────────────────────────────────


def test_one_gpu_and_shares_of_several_do_not_go_together() -> None:
    assert "set one of them" in refusal(main_gpu=1, tensor_split=[1, 1])
    assert parse(main_gpu=1).main_gpu == 1


def test_two_adapters_may_not_have_one_name() -> None:
    lora = [{"path": "a", "name": "x"}, "b", {"path": "c", "name": "x"}]
    assert "two adapters have the name 'x'" in refusal(lora=lora)
    assert [each.name for each in parse(lora=lora[:2]).lora] == ["x", None]
    assert "name" in refusal(lora=[{"path": "a", "name": ""}])
