"""Options of a model: what they may say, and how mistakes are told."""

from __future__ import annotations

from typing import Any

import pytest

from engineroom import ConfigurationError, ModelConfig, parse_options
from engineroom_vllm import VLLMOptions
from engineroom_vllm.options import OWN_ARGUMENTS, LoraModule

DEFAULTS: dict[str, Any] = {
    "max_model_len": None,
    "n_ctx": None,
    "max_num_seqs": None,
    "n_parallel": None,
    "max_queue": 256,
    "runner": "auto",
    "matryoshka": None,
    "tool_format": None,
    "reasoning_format": None,
    "chat_template_kwargs": None,
    "dtype": "auto",
    "quantization": None,
    "gpu_memory_utilization": None,
    "kv_cache_memory": None,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "distributed_executor_backend": None,
    "enable_prefix_caching": True,
    "enforce_eager": None,
    "lora_modules": [],
    "speculative_config": None,
    "n_threads": None,
    "bind_threads": True,
    "chat_template": None,
    "load_timeout_s": 1800.0,
    "keep_ready_s": 0.0,
    "engine_args": {},
}
WHOLE_NUMBERS = {
    "max_model_len": (8, 2**31 - 1),
    "n_ctx": (8, 2**31 - 1),
    "max_num_seqs": (1, 4096),
    "n_parallel": (1, 4096),
    "max_queue": (0, 2**31 - 1),
    "tensor_parallel_size": (1, 1024),
    "pipeline_parallel_size": (1, 1024),
    "n_threads": (1, 1024),
}


def parse(**options: Any) -> VLLMOptions:
    return parse_options(VLLMOptions, ModelConfig(model_id="m", source="m", options=options))


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse(**options)
    assert "'m'" in str(caught.value)
    return str(caught.value)


def test_every_option_has_the_default_that_is_written_down() -> None:
    assert parse().model_dump() == DEFAULTS


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_a_whole_number_has_its_range(name: str) -> None:
    least, most = WHOLE_NUMBERS[name]
    for value in (least, most):
        assert getattr(parse(**{name: value}), name) == value
    for bad in (least - 1, most + 1, 1.5, "many", float("nan"), True):
        assert f"{name}: " in refusal(**{name: bad})


def test_the_names_of_other_runtimes_are_understood() -> None:
    assert parse(n_ctx=64, n_parallel=2).context == 64
    assert parse(n_ctx=64, n_parallel=2).parallel == 2
    assert parse(max_model_len=64, max_num_seqs=2).context == 64
    assert parse(max_model_len=64, max_num_seqs=2).parallel == 2
    assert (parse().context, parse().parallel) == (None, None)
    assert "max_model_len and n_ctx are the same" in refusal(max_model_len=64, n_ctx=64)
    assert "max_num_seqs and n_parallel are the same" in refusal(max_num_seqs=1, n_parallel=1)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("500MB", 500_000_000),
        ("64KiB", 1 << 16),
        ("1TiB", 1 << 40),
        ("12B", 12),
    ],
)
def test_sizes_are_read_with_their_units(written: Any, meant: int) -> None:
    assert parse(kv_cache_memory=written).kv_cache_memory == meant


@pytest.mark.parametrize("value", [0, -1, True, "two", "2 Gigs", "GiB", "-1GiB", None])
def test_what_is_no_size_is_refused(value: Any) -> None:
    if value is None:
        assert parse(kv_cache_memory=None).kv_cache_memory is None
    else:
        assert "kv_cache_memory: " in refusal(kv_cache_memory=value)


def test_a_share_of_memory_is_above_nothing_and_at_most_all() -> None:
    assert parse(gpu_memory_utilization=1.0).gpu_memory_utilization == 1.0
    for value in (0, 1.01, float("nan"), True):
        assert "gpu_memory_utilization: " in refusal(gpu_memory_utilization=value)
    message = refusal(gpu_memory_utilization=0.5, kv_cache_memory="1GiB")
    assert "give one of them" in message and "Value error" not in message


def test_adapters_have_names_of_their_own() -> None:
    module = {"name": "sql", "path": "/adapters/sql"}
    assert parse(lora_modules=[module]).lora_modules == [LoraModule(**module)]
    assert "'sql' is there twice" in refusal(lora_modules=[module, module])
    assert "lora_modules.0.path: " in refusal(lora_modules=[{"name": "sql"}])
    assert "lora_modules.0.name: " in refusal(lora_modules=[{"name": "", "path": "p"}])
    assert "do not go together" in refusal(lora_modules=[module], speculative_config={"a": 1})


@pytest.mark.parametrize("name", sorted(OWN_ARGUMENTS))
def test_what_has_an_option_of_its_own_is_no_engine_argument(name: str) -> None:
    message = refusal(engine_args={name: 1})
    assert name in message and OWN_ARGUMENTS[name] in message


def test_other_engine_arguments_are_handed_on() -> None:
    assert parse(engine_args={"block_size": 32}).engine_args == {"block_size": 32}


def test_an_unknown_option_comes_with_the_nearest_known_one() -> None:
    assert "did you mean 'max_model_len'?" in refusal(max_model_length=4096)


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal(n_ctx=1, n_paralel=4, dtype="int3")
    for name in ("n_ctx: ", "n_paralel: ", "dtype: "):
        assert message.count(name) == 1


def test_options_are_not_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().n_ctx = 16  # type: ignore[misc]
