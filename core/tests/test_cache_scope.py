"""What one caller had computed is of use to nobody else: whose, by which salt, and who says so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError
from toy_runtime import ToyHandler

from engineroom import (
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelNotFoundError,
)

TEXT = "a prompt that is long enough to begin like another one, for what that is worth"
NAMES = st.none() | st.text(max_size=6)
SALTS = st.none() | st.text(min_size=1, max_size=6)


def ask(key: object = None, salt: str | None = None, prompt: str = TEXT) -> InferenceRequest:
    metadata = {} if key is None else {"api_key": key}
    params = GenerationParams(max_new_tokens=2, temperature=0)
    return InferenceRequest(
        model_id="m", prompt=prompt, cache_salt=salt, metadata=metadata, params=params
    )


# ── the scope of a request ───────────────────────────────────────────────────────────────────


@given(st.tuples(NAMES, SALTS), st.tuples(NAMES, SALTS))
def test_two_requests_share_a_scope_where_key_and_salt_are_the_same(
    one: tuple[str | None, str | None], other: tuple[str | None, str | None]
) -> None:
    same = (one[0] or "", one[1]) == (other[0] or "", other[1])
    assert (ask(*one).cache_scope == ask(*other).cache_scope) is same
    shared = ask(*one).over_all_keys().cache_scope == ask(*other).over_all_keys().cache_scope
    assert shared is (one[1] == other[1])


def test_a_scope_tells_neither_key_nor_salt_and_is_empty_without_them() -> None:
    assert ask().cache_scope == ask("ann").over_all_keys().cache_scope == ask(3).cache_scope == ""
    scope = ask("ann", "secret").cache_scope
    assert len(scope) == 32
    assert "ann" not in scope and "secret" not in scope


def test_a_copy_keeps_its_scope_and_what_is_read_anew_is_kept_apart() -> None:
    request = ask("ann").over_all_keys()
    assert request.model_copy(update={"timeout_s": 3}).cache_scope == ""
    assert request.key_name == "ann"
    again = InferenceRequest.model_validate(request.model_dump())
    assert again.cache_scope == ask("ann").cache_scope != ""
    assert (
        ask("ann").model_copy(update={"cache_salt": "x"}).cache_scope == ask("ann", "x").cache_scope
    )


@pytest.mark.parametrize("salt", ["", "x" * 129, 7, ["a"]])
def test_a_salt_is_a_text_of_some_length(salt: Any) -> None:
    with pytest.raises(ValidationError, match="cache_salt"):
        ask(salt=salt)
    assert ask(salt="x" * 128).cache_scope


# ── what the deployment says ─────────────────────────────────────────────────────────────────


def managed(
    own: str | None = None, deployment: str | None = None, flag: Any = None
) -> LLMModelManager:
    model = {"model_id": "m", "source": "toy:", "aliases": ["n"], "prefix_cache_scope": own}
    config = {"models": [model], "prefix_cache_scope": deployment}
    return LLMModelManager(config=config, prefix_cache_scope=flag)


@pytest.mark.parametrize(
    ("own", "deployment", "flag", "scope"),
    [
        (None, None, None, "key"),
        (None, "shared", None, "shared"),
        ("key", "shared", None, "key"),
        (None, "shared", "key", "key"),
        (None, "key", "shared", "shared"),
        ("shared", "key", "key", "shared"),
    ],
)
def test_a_models_own_word_counts_then_the_managers_then_the_deployments(
    own: str | None, deployment: str | None, flag: str | None, scope: str
) -> None:
    manager = managed(own, deployment, flag)
    assert manager.prefix_cache_scope("m") == manager.prefix_cache_scope("n") == scope
    with pytest.raises(ModelNotFoundError):
        manager.prefix_cache_scope("x")


async def cached(service: LLMInferenceService, request: InferenceRequest) -> int:
    """Cached prompt tokens, the same in whole and in a stream."""
    answer = await service.infer(request)
    answer.raise_for_error()
    assert answer.cached_prompt_tokens is not None
    return answer.cached_prompt_tokens


@pytest.mark.parametrize("scope", [None, "key", "shared"])
async def test_requests_find_what_their_key_had_computed_or_all_had(scope: str | None) -> None:
    manager = managed(deployment=scope)
    async with LLMInferenceService(manager, handlers=[ToyHandler()]) as service:
        assert await cached(service, ask("ann")) == 0
        assert await cached(service, ask("ann")) == len(TEXT) - 1
        others = [ask("bob"), ask(), ask("ann", "salt"), ask("bob", "salt")]
        found = [await cached(service, request) for request in others]
        whole = len(TEXT) - 1
        assert found == ([whole, whole, 0, whole] if scope == "shared" else [0] * 4)
        stream = service.stream(ask("bob"))
        assert [chunk async for chunk in stream]
        assert stream.response is not None
        assert stream.response.cached_prompt_tokens == whole  # its own, by now


async def test_a_reload_changes_who_finds_it_and_no_model_is_loaded_anew() -> None:
    manager = managed()
    handler = ToyHandler()
    async with LLMInferenceService(manager, handlers=[handler]) as service:
        await cached(service, ask())
        loaded = manager.get_loaded_model("m")
        model = {"model_id": "m", "source": "toy:"}
        report = await manager.reload({"models": [model], "prefix_cache_scope": "shared"})
        assert report.adjusted == ("m",)
        assert manager.get_loaded_model("m") is loaded
        assert await cached(service, ask("ann")) == len(TEXT) - 1
        assert "prefix_cache_scope: shared" in str(await asyncio.to_thread(service.explain, "m"))
        await manager.reload({"models": [{**model, "prefix_cache_scope": "key"}]})
        assert await cached(service, ask("bob")) == 0
        assert "prefix_cache_scope" not in str(await asyncio.to_thread(service.explain, "m"))


async def test_an_unknown_model_is_said_to_be_so() -> None:
    async with LLMInferenceService(managed(), handlers=[ToyHandler()]) as service:
        answer = await service.infer(ask("ann").model_copy(update={"model_id": "x"}))
        assert answer.error_type == "ModelNotFoundError"
