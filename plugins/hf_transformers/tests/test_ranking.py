"""Scores of pairs of texts: against transformers, in batches, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hf_benches import EXACT

from engineroom import (
    ConfigurationError,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
)
from engineroom_hf_transformers import HuggingFaceTransformersHandler
from engineroom_hf_transformers.ranking import uses_sigmoid

QUERY = "the cat on the mat"
DOCUMENTS = ("the cat", "the quick brown fox jumps over the lazy dog", "a", "the hat on the mat")


def service(folder: Path, **changes: Any) -> LLMInferenceService:
    config = ModelConfig(
        model_id="m", source=str(folder), runtime="hf_transformers", options=EXACT | changes
    )
    manager = LLMModelManager(config=[config])
    return LLMInferenceService(manager, handlers=[HuggingFaceTransformersHandler()])


def reference(folder: Path, documents: Sequence[str]) -> list[float]:
    """Each pair alone, as transformers computes it, before any sigmoid."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    scores = []
    for document in documents:
        inputs = tokenizer(QUERY, document, return_tensors="pt")
        if model.config.model_type == "llama":  # it has none, whatever its tokenizer says
            inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            scores.append(float(model(**inputs).logits[0, 0]))
    return scores


@pytest.fixture
def ranker(write_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return write_checkpoint("bert-ranker", tmp_path / "ranker", num_labels=1)


@pytest.mark.parametrize("kind", ["bert-ranker", "llama-ranker", "llama-ranker without padding"])
async def test_pairs_have_the_sigmoid_of_the_models_number(
    kind: str, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    own: dict[str, Any] = {"pad_token_id": None} if "without" in kind else {}
    ranker = write_checkpoint(kind.split(maxsplit=1)[0], tmp_path / "ranker", num_labels=1, **own)
    expected = torch.tensor(reference(ranker, DOCUMENTS)).sigmoid().tolist()
    async with service(ranker) as bench:
        made = await bench.rerank("m", QUERY, DOCUMENTS)
        alone = [(await bench.rerank("m", QUERY, [d])).scores[0] for d in DOCUMENTS]
        many = await bench.rerank("m", [QUERY] * 40, DOCUMENTS * 10)
    assert made.scores == pytest.approx(expected, abs=1e-5)
    assert alone == pytest.approx(expected, abs=1e-5)
    assert many.scores == pytest.approx(expected * 10, abs=1e-5)
    assert len(set(made.scores)) == len(DOCUMENTS)
    assert made.prompt_tokens > len(" ".join(DOCUMENTS).split()) + 4 * len(QUERY.split())


async def test_the_number_itself_where_the_model_says_so(
    ranker: Path, change_json: Callable[..., Path]
) -> None:
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    change_json(ranker / "config.json", sentence_transformers=identity)
    async with service(ranker) as bench:
        made = await bench.rerank("m", QUERY, DOCUMENTS)
    assert made.scores == pytest.approx(reference(ranker, DOCUMENTS), abs=1e-5)


async def test_a_special_token_in_a_document_ends_no_text(ranker: Path) -> None:
    import transformers

    special = transformers.AutoTokenizer.from_pretrained(ranker).eos_token
    async with service(ranker) as bench:
        plain, mean = [
            (await bench.rerank("m", QUERY, [text])).prompt_tokens
            for text in ("the cat", f"the{special}cat")
        ]
    assert mean > plain + 1


async def test_what_cannot_be_done_is_refused_in_words(
    ranker: Path, tiny: Callable[[str], Path], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    async with service(ranker) as bench:
        with pytest.raises(ConfigurationError, match=r"document 1 and its query have .* tokens"):
            await bench.rerank("m", QUERY, ["a", "the cat sat " * 2000])
        with pytest.raises(ConfigurationError, match="makes no embeddings"):
            await bench.embed("m", ["a"])
        response = await bench.infer(InferenceRequest(model_id="m", prompt="the"))
        assert "ranks documents and generates no text" in response.error_message
    for kind in ("bert", "llama"):
        async with service(tiny(kind)) as bench:
            with pytest.raises(ConfigurationError, match="ranks no documents; use a cross-encoder"):
                await bench.rerank("m", QUERY, ["a"])
    sorting = write_checkpoint("bert-ranker", tmp_path / "sorting", num_labels=3)
    async with service(sorting) as bench:
        with pytest.raises(ConfigurationError, match="sorts texts into 3 classes"):
            await bench.rerank("m", QUERY, ["a"])


@pytest.mark.parametrize(
    ("config", "sigmoid"),
    [
        ({}, True),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, True),
        ({"sentence_transformers": {"version": "5"}}, True),
    ],
)
def test_the_folder_says_what_becomes_of_the_number(config: Any, sigmoid: bool) -> None:
    assert uses_sigmoid(config) is sigmoid


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="activation 'os.system'"):
        uses_sigmoid({"sbert_ce_default_activation_function": "os.system"})
