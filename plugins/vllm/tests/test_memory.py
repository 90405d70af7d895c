"""How much memory a model is to take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from engineroom import ResourceNotAvailableError
from engineroom_vllm.folder import ModelFolder
from engineroom_vllm.memory import PROCESS_BYTES, plan, require
from engineroom_vllm.options import VLLMOptions

MIB = 1 << 20


def folder(token_values: int = 1000, weights: int = 100 * MIB) -> ModelFolder:
    return ModelFolder(
        path=Path("m"),
        architectures=("X",),
        weight_bytes=weights,
        trained=4096,
        token_values=token_values,
        dtype="float32",
        end_tokens=frozenset(),
    )


def options(**given: Any) -> VLLMOptions:
    return VLLMOptions.model_validate(given)


def test_the_cache_has_room_for_what_runs_at_one_time() -> None:
    wanted = plan(folder(), options(n_ctx=1000, n_parallel=4), cpu=True)
    assert wanted.cache_bytes == 4000 * (4 * 1000 + 256)
    assert (wanted.context, wanted.parallel) == (1000, 4)


def test_the_cache_does_not_grow_with_hundreds_of_requests() -> None:
    many = plan(folder(), options(n_ctx=1000, n_parallel=512), cpu=False)
    assert (
        many.cache_bytes == plan(folder(), options(n_ctx=1000, n_parallel=8), cpu=False).cache_bytes
    )


def test_what_the_deployment_says_is_taken() -> None:
    assert plan(folder(), options(kv_cache_memory="1GiB"), cpu=True, free=0).cache_bytes == 1 << 30
    shared = plan(folder(), options(gpu_memory_utilization=0.4), cpu=False)
    assert shared.cache_bytes is None and shared.cache_bytes_each is None
    both = plan(folder(), options(kv_cache_memory="1GiB", tensor_parallel_size=2), cpu=False)
    assert both.cache_bytes == 2 << 30 and both.cache_bytes_each == 1 << 30


def test_a_model_of_unknown_measures_gets_a_bounded_cache_in_main_memory() -> None:
    assert plan(folder(0), options(), cpu=True).cache_bytes == 1 << 30
    assert plan(folder(0), options(), cpu=False).cache_bytes is None


def test_an_encoder_keeps_no_cache() -> None:
    encoder = dataclasses.replace(folder(), encoder=True)
    assert plan(encoder, options(), cpu=True, free=1 << 36).cache_bytes == 0
    assert plan(encoder, options(), cpu=False).cache_bytes_each == 0
    assert plan(encoder, options(kv_cache_memory="1MiB"), cpu=True).cache_bytes == MIB


@given(free=st.integers(0, 1 << 36), context=st.integers(8, 8192), parallel=st.integers(1, 64))
def test_the_cache_takes_at_most_half_of_what_is_free_but_one_context(
    free: int, context: int, parallel: int
) -> None:
    wanted = plan(folder(), options(n_ctx=context, n_parallel=parallel), cpu=True, free=free)
    one = 4000 * (context + 256)
    assert wanted.cache_bytes is not None
    assert one <= wanted.cache_bytes <= max(one, (free - wanted.weight_bytes) // 2)


def test_what_does_not_fit_is_refused_with_all_figures() -> None:
    wanted = plan(folder(weights=3 << 30), options(kv_cache_memory="2GiB"), cpu=True)
    require(wanted, wanted.total_bytes + PROCESS_BYTES)
    with pytest.raises(ResourceNotAvailableError) as caught:
        require(wanted, wanted.total_bytes + PROCESS_BYTES - 1)
    message = str(caught.value)
    for figure in ("6.5 GiB of memory are needed", "3.0 GiB for the weights", "2.0 GiB for the"):
        assert figure in message
    assert "kv_cache_memory" in message
