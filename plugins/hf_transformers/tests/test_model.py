"""Which models are driven, which are not and why; and that a trial finds out."""

from __future__ import annotations

import asyncio
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_benches import DRIVEN, TEXT, Rig, Tiny, load, options

from engineroom_hf_transformers.attention import NAMES, Span, StepStoppedError
from engineroom_hf_transformers.model import forward_of, why_not_driven


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path]) -> Tiny:
    return Tiny(tiny)


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("kind", DRIVEN)
def test_these_are_driven(models: Tiny, kind: str, kernel: str) -> None:
    parts = models.parts(kind)
    assert why_not_driven(parts, options(attn_implementation=kernel)) == ""
    name = NAMES["eager" if kernel == "eager" else "sdpa"]
    assert parts.model.config._attn_implementation == name


@pytest.mark.parametrize(
    ("kind", "why"),
    [("mamba", "a state instead of keys"), ("t5", "an encoder-decoder model")],
)
def test_these_are_not_and_this_is_why(models: Tiny, kind: str, why: str) -> None:
    parts = models.parts(kind)
    before = parts.model.config._attn_implementation
    assert why in why_not_driven(parts, options())
    assert parts.model.config._attn_implementation == before


def test_layers_of_an_unknown_kind_are_not_driven(models: Tiny) -> None:
    parts = models.parts("mistral")
    config = parts.model.config
    before = getattr(config, "layer_types", None)
    config.layer_types = ["full_attention", "linear_attention"]
    try:
        assert "layers of the kind linear_attention" in why_not_driven(parts, options())
    finally:
        if before is None:
            del config.layer_types
        else:
            config.layer_types = before


# ── models that are not what they seem ───────────────────────────────────────────────────────


def lying(models: Tiny, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> str:
    """Why a llama is not driven whose attention is called with something changed."""
    from transformers.models.llama import modeling_llama

    parts = models.parts("llama")
    get = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def interface(name: str, default: Any) -> Any:
        function = get(name, default)

        def called(module: Any, *args: Any, **kw: Any) -> Any:
            return change(function, module, *args, **kw)

        return called

    monkeypatch.setattr(
        modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", interface, raising=False
    )
    return why_not_driven(parts, options())


def test_a_model_that_lets_its_tokens_look_ahead_is_found_by_the_trial(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ahead(function: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, **kw: Any) -> Any:
        found = function(module, q, k, v, mask, **kw)
        return found[0] + v.mean(dim=2).mean() * 3, found[1]

    assert "computes something else" in lying(models, monkeypatch, ahead)


def test_a_model_that_shifts_its_keys_by_the_place_in_the_row_is_found_by_the_trial(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(function: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, **kw: Any) -> Any:
        places = torch.arange(k.shape[2], dtype=k.dtype)[None, None, :, None]
        return function(module, q, k + places / 4, v, mask, **kw)

    assert "computes something else" in lying(models, monkeypatch, shifted)


def test_a_model_that_keeps_quiet_about_its_window_is_found(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engineroom_hf_transformers import attention

    parts = models.parts("mistral")
    attend = attention.Recorder.attend

    def quiet(self: Any, call: Any) -> Any:
        from dataclasses import replace

        return attend(self, replace(call, window=None))

    monkeypatch.setattr(attention.Recorder, "attend", quiet)
    assert "sliding window of 16 tokens" in why_not_driven(parts, options())


def test_a_model_with_an_attention_of_its_own_is_not_driven(
    models: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = models.parts("qwen2")

    def refuses(*_: Any) -> None:
        raise ValueError("made up")

    monkeypatch.setattr(type(parts.model), "set_attn_implementation", refuses)
    with pytest.raises(ValueError, match="made up"):  # not even the old one can be set again
        why_not_driven(parts, options())


def test_a_model_that_computes_no_numbers_is_not_driven(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    parts = load(write_checkpoint("llama", tmp_path / "nan"))
    with torch.no_grad():
        parts.model.model.embed_tokens.weight.fill_(float("nan"))
    assert "no numbers" in why_not_driven(parts, options())


async def test_who_is_not_driven_answers_all_the_same(
    models: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from engineroom_hf_transformers import model

    monkeypatch.setattr(model, "_CLOSE", {2: -1.0, 4: -1.0})  # nothing is close enough
    with Rig(models.parts("llama")) as rig:
        assert "computes something else" in rig.engine.why_one_by_one
        assert "one at a time, by generate()" in caplog.text
        tokens = rig.tokens(TEXT[:50])
        assert (await rig.answer(tokens)).tokens == models.reference("llama").greedy(tokens, 24)
        assert rig.engine.health().kv_cache_usage is None


# ── the forward pass ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", DRIVEN)
def test_logits_are_those_of_transformers(models: Tiny, kind: str) -> None:
    parts = models.parts(kind)
    assert not why_not_driven(parts, options())
    forward = forward_of(parts, options())
    tokens = list(range(3, 43))
    with torch.inference_mode():
        expected = models.reference(kind).model(torch.tensor([tokens])).logits[0]
    found = forward(tokens[:30], [], [Span(0, 1, 0, 30)], [29, 0, 7])
    torch.testing.assert_close(found, expected[[29, 0, 7]], atol=2e-4, rtol=1e-3)
    found = forward(tokens[30:], [], [Span(0, 1, 30, 10)], range(10))
    torch.testing.assert_close(found, expected[30:], atol=2e-4, rtol=1e-3)
    assert found.dtype == torch.float32
    forward.close()
    assert forward.cache.nbytes == 0


def test_only_the_logits_that_are_wanted_are_computed(models: Tiny) -> None:
    parts = models.parts("llama")
    assert not why_not_driven(parts, options())
    assert "logits_to_keep" in inspect.signature(parts.model.forward).parameters
    forward = forward_of(parts, options())
    assert forward([5, 6, 7], [], [Span(0, 0, 0, 3)], []).shape == (0, parts.n_vocab)
    forward.close()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own compiler does
async def test_a_compiled_model_answers_alike(
    tiny: Callable[[str], Path],
    models: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with Rig(load(tiny("llama"), compile=True), compile=True) as rig:
        assert not rig.engine.why_one_by_one
        prompts = [rig.tokens(text) for text in (TEXT[:90], TEXT[9:60], "hello")]
        answers = await asyncio.gather(*(rig.read(rig.send(tokens)) for tokens in prompts))
        for tokens, answer in zip(prompts, answers, strict=True):
            assert answer.error is None
            assert answer.tokens == models.reference("llama").greedy(tokens, 24)


async def test_a_model_is_spread_as_a_mapping_says(
    tiny: Callable[[str], Path], models: Tiny
) -> None:
    where = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu"}
    spread = {"device": "auto", "device_map": where | {"model.rotary_emb": "cpu", "lm_head": "cpu"}}
    with Rig(load(tiny("llama"), **spread), **spread) as rig:
        assert not rig.engine.why_one_by_one
        tokens = rig.tokens(TEXT[:90])
        assert (await rig.answer(tokens)).tokens == models.reference("llama").greedy(tokens, 24)


def test_a_step_is_given_up_at_a_layer(models: Tiny) -> None:
    parts = models.parts("llama")
    assert not why_not_driven(parts, options())
    forward = forward_of(parts, options())
    with pytest.raises(StepStoppedError):
        forward([5, 6], [], [Span(0, 0, 0, 2)], [1], lambda: True)
    assert forward([5, 6], [], [Span(0, 0, 0, 2)], [1]).shape == (1, parts.n_vocab)
    forward.close()


def test_the_cache_has_what_each_layer_needs(models: Tiny) -> None:
    for kind, heads, width in (("llama", 2, 16), ("gemma", 1, 24), ("gpt2", 4, 16)):
        parts = models.parts(kind)
        assert not why_not_driven(parts, options())
        forward = forward_of(parts, options(max_batch_size=3))
        assert forward.cache.slots == 3
        assert forward.cache.length == parts.n_context == 256
        assert forward.cache.nbytes == 2 * 3 * 256 * heads * 2 * width * 4
        forward.close()
