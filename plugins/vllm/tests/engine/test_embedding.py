"""Texts as vectors, by a tiny encoder: the same as the Transformers runtime's, and what is
refused.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engineroom import ConfigurationError, Embeddings, QueueFullError

TEXTS = (
    "the cat",
    "the quick brown fox jumps over the lazy dog",
    "a",
    "the hat on the mat",
    "[SEP] the cat",
)
WORDS = ("the", "a", "cat", "hat", "mat", "on", "quick", "brown", "fox", "jumps", "over")


@pytest.fixture(scope="module")
def start(bench_class: Any) -> Callable[..., Any]:
    """A service over an encoder, whose own files say how much it reads."""

    def made(folder: Path, **options: Any) -> Any:
        return bench_class(folder, **{"n_ctx": None, "kv_cache_memory": None, **options})

    return made


@pytest.fixture(scope="module")
def bench(encoder: Path, start: Callable[..., Any]) -> Iterator[Any]:
    """One engine for all tests that only ask it."""
    made = start(encoder, n_parallel=4, max_queue=8)
    made.load()
    yield made
    made.close()


def embed(bench: Any, texts: Sequence[str]) -> Embeddings:
    found: Embeddings = bench.run(bench.service.embed("m", texts))
    return found


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def of_transformers(folder: Path, texts: Sequence[str]) -> Embeddings:
    """The same texts by the other runtime, over the same weights."""
    pytest.importorskip("engineroom_hf_transformers")
    from engineroom import LLMInferenceService, LLMModelManager

    async def ask() -> Embeddings:
        model = {"model_id": "m", "source": str(folder), "runtime": "hf_transformers"}
        async with LLMInferenceService(LLMModelManager(config={"models": [model]})) as service:
            return await service.embed("m", texts)

    return asyncio.run(ask())


def test_vectors_are_those_of_transformers(bench: Any, encoder: Path) -> None:
    ours, theirs = embed(bench, TEXTS), of_transformers(encoder, TEXTS)
    assert ours.prompt_tokens == theirs.prompt_tokens
    for text, a, b in zip(TEXTS, ours.vectors, theirs.vectors, strict=True):
        assert cosine(a, b) >= 0.9999, text
        assert math.hypot(*a) == pytest.approx(math.hypot(*b), rel=1e-3), text


def test_a_folder_says_how_to_pool_and_to_normalise_and_unloading_ends_a_call_in_words(
    encoder: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    folder = Path(shutil.copytree(encoder, tmp_path / "says"))
    parts = ("Transformer", "Pooling", "Dense", "Normalize")
    listing = [{"type": f"sentence_transformers.models.{n}", "path": n} for n in parts]
    dense = torch.nn.Linear(128, 32)
    layer = {
        "in_features": 128,
        "out_features": 32,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    for name, content in (
        ("modules.json", listing),
        ("Pooling/config.json", {"pooling_mode_cls_token": True}),
        ("Dense/config.json", layer),
        ("sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False}),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    weights = {f"linear.{n}": tensor for n, tensor in dense.state_dict().items()}
    save_file(weights, folder / "Dense" / "model.safetensors")
    made = start(folder)

    async def unloaded() -> BaseException | None:
        call = asyncio.create_task(made.handler.embed(made.loaded, ["the cat"] * 4000))
        await made.until(lambda: made.handler.health(made.loaded).num_requests_running == 1)
        await made.handler.unload_model(made.loaded)
        await asyncio.wait([call])
        return call.exception()

    try:
        made.load()
        assert made.loaded.max_context_tokens == 24
        found = embed(made, TEXTS)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        for text, vector in zip(TEXTS[:4], found.vectors, strict=False):
            with torch.inference_mode():
                hidden = model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0, 0]
                wanted = torch.tanh(dense(hidden))
            assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-4)
            assert cosine(vector, wanted.tolist()) >= 0.9999, text
        error = made.run(unloaded())
        assert error is not None and "was unloaded while the request ran" in str(error)
    finally:
        made.close()


def test_many_texts_of_several_callers_each_get_their_own(bench: Any) -> None:
    texts = [" ".join(WORDS[: 1 + i % len(WORDS)]) for i in range(40)]
    alone = {text: embed(bench, [text]).vectors[0] for text in texts[: len(WORDS)]}

    async def all_at_once() -> list[Embeddings]:
        calls = [bench.service.embed("m", texts[i:] + texts[:i]) for i in range(4)]
        return await asyncio.gather(*calls)

    for i, found in enumerate(bench.run(all_at_once())):
        for text, vector in zip(texts[i:] + texts[:i], found.vectors, strict=True):
            assert vector == pytest.approx(alone[text], abs=1e-4), text
    health = bench.handler.health(bench.loaded)
    assert health.ok and health.num_requests_running == 0


def test_a_cancelled_call_leaves_nothing_in_the_engine(bench: Any) -> None:
    long = [" ".join(WORDS * 8)] * 200

    async def cancelled() -> None:
        calls = [asyncio.create_task(bench.handler.embed(bench.loaded, long)) for _ in range(3)]
        await bench.until(lambda: bench.handler.health(bench.loaded).num_requests_running == 3)
        for call in calls[:2]:
            call.cancel()
        ended = await asyncio.gather(*calls[:2], return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended)
        assert len((await calls[2]).vectors) == 200
        processor = bench.engine.lifecycle.llm.output_processor
        assert not processor.request_states
        assert not bench.engine._running

    bench.run(cancelled())


def test_the_queue_is_bounded_for_it_too(bench: Any) -> None:
    async def ask() -> list[Any]:
        calls = [bench.handler.embed(bench.loaded, list(TEXTS) * 8) for _ in range(20)]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = bench.run(ask())
    refused = [each for each in found if isinstance(each, BaseException)]
    assert refused and all(isinstance(each, QueueFullError) for each in refused)
    assert len(refused) <= 20 - 12


def test_what_cannot_be_done_is_refused_in_words(bench: Any) -> None:
    assert bench.loaded.max_context_tokens == 128
    with pytest.raises(ConfigurationError, match=r"is 128 tokens.* text 1 has 129 tokens"):
        embed(bench, ["a", "cat " * 127])
    assert len(embed(bench, ["cat " * 126]).vectors) == 1
    for fields in ({}, {"messages": [("user", "Hello")], "prompt": None}):
        response = bench.answer(**fields)
        assert response.error_type == "ConfigurationError"
        assert "makes embeddings and generates no text" in response.error_message
    with pytest.raises(ConfigurationError, match="none is empty"):
        embed(bench, ["a", ""])


def test_what_would_end_the_engine_later_is_refused_when_it_is_loaded(
    start: Callable[..., Any], make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    made = start(make_encoder(tmp_path / "narrow", heads=8))
    try:
        with pytest.raises(ConfigurationError, match="attention heads have 16 numbers"):
            made.load()
    finally:
        made.close()


def test_an_encoder_with_another_head_is_told_what_to_do(
    start: Callable[..., Any], make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    made = start(make_encoder(tmp_path / "masked", head="BertForMaskedLM"))
    try:
        with pytest.raises(
            ConfigurationError, match="not for embeddings; save it without its head"
        ):
            made.load()
    finally:
        made.close()


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_decoder_without_its_head_makes_the_mean_of_its_tokens(
    kind: str, start: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Left to itself, vLLM would look for the head of one, and take the last token of the other."""
    import torch
    import transformers

    folder = tmp_path / "headless"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for part in (tokenizer, model):
        part.save_pretrained(folder)
    made = start(folder, n_ctx=64, kv_cache_memory="64MiB")
    try:
        made.load()
        found = embed(made, ["the cat", "a"])
        assert "set the option runner: generate" in made.answer().error_message
    finally:
        made.close()
    for text, vector in zip(["the cat", "a"], found.vectors, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        assert cosine(vector, hidden.mean(0).tolist()) >= 0.9999
