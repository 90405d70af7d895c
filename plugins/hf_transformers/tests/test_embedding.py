"""Texts as vectors: pooling, batches, what models say of themselves, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hf_benches import EXACT, options

from engineroom import (
    ConfigurationError,
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
    QueueFullError,
)
from engineroom.sources import PoolingRecipe as Recipe
from engineroom_hf_transformers import HuggingFaceTransformersHandler
from engineroom_hf_transformers.embedding import recipe_of
from engineroom_hf_transformers.loading import Parts, load_parts

TEXTS = ("the cat", "the quick brown fox jumps over the lazy dog", "a", "the hat on the mat")


def service(folder: Path, **changes: Any) -> LLMInferenceService:
    config = ModelConfig(
        model_id="m", source=str(folder), runtime="hf_transformers", options=EXACT | changes
    )
    manager = LLMModelManager(config=[config])
    return LLMInferenceService(manager, handlers=[HuggingFaceTransformersHandler()])


def declare(folder: Path, *modules: str, pooling: dict[str, Any] | None = None) -> Path:
    """Write what sentence-transformers would."""
    listing = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listing))
    for i, name in enumerate(modules):
        (folder / f"{i}_{name}").mkdir(exist_ok=True)
        if name == "Pooling":
            (folder / f"{i}_{name}" / "config.json").write_text(json.dumps(pooling or {}))
    return folder


def reference(folder: Path, texts: Sequence[str], pooling: str) -> list[list[float]]:
    """Each text alone, as transformers computes it, pooled in the plainest way."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            hidden = model(input_ids=ids).last_hidden_state[0]
        row = {
            "mean": lambda h: h.mean(0),
            "cls": lambda h: h[0],
            "max": lambda h: h.max(0).values,
            "lasttoken": lambda h: h[-1],
            "mean_sqrt_len": lambda h: h.sum(0) / len(h) ** 0.5,
        }[pooling](hidden)
        found.append(row.tolist())
    return found


def close(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-4) for a, b in zip(found, expected, strict=True))


async def test_an_encoder_makes_the_mean_of_its_tokens(tiny: Callable[[str], Path]) -> None:
    folder = tiny("bert")
    async with service(folder) as bench:
        found = await bench.embed("m", TEXTS)
    assert close(found.vectors, reference(folder, TEXTS, "mean"))
    assert found.prompt_tokens > len(" ".join(TEXTS).split())  # a beginning and an end each


@pytest.mark.parametrize(
    ("setting", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
async def test_a_folder_says_how_to_pool(
    copied: Callable[[str], Path], setting: dict[str, Any], pooling: str
) -> None:
    folder = declare(copied("bert"), "Transformer", "Pooling", pooling=setting)
    async with service(folder) as bench:
        found = await bench.embed("m", TEXTS)
    assert close(found.vectors, reference(folder, TEXTS, pooling))


async def test_vectors_are_normalised_where_the_folder_says_so(
    copied: Callable[[str], Path],
) -> None:
    setting = {"pooling_mode_mean_tokens": True}
    folder = declare(copied("bert"), "Transformer", "Pooling", "Normalize", pooling=setting)
    async with service(folder) as bench:
        found = await bench.embed("m", TEXTS)
    assert [sum(x * x for x in vector) for vector in found.vectors] == pytest.approx([1.0] * 4)


async def test_a_model_that_generates_text_may_make_embeddings_too(
    copied: Callable[[str], Path],
) -> None:
    folder = declare(
        copied("qwen3"), "Transformer", "Pooling", pooling={"pooling_mode_lasttoken": True}
    )
    async with service(folder) as bench:
        text = InferenceRequest(
            model_id="m", prompt="the", params=GenerationParams(max_new_tokens=4, temperature=0)
        )
        before = await bench.infer(text)
        found = await bench.embed("m", TEXTS)
        after = await bench.infer(text)
    assert before.generated_text == after.generated_text
    assert before.error_message is None
    assert close(found.vectors, reference(folder, TEXTS, "lasttoken"))


async def test_a_text_ends_as_the_tokenizer_ends_it_and_a_prompt_does_not(
    copied: Callable[[str], Path],
) -> None:
    from tokenizers import Tokenizer, processors

    folder = declare(
        copied("qwen3"), "Transformer", "Pooling", pooling={"pooling_mode_lasttoken": True}
    )
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    end = next(iter(tokenizer.get_added_tokens_decoder().items()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[1].content}", special_tokens=[(end[1].content, end[0])]
    )
    tokenizer.save(str(file))
    async with service(folder) as bench:
        found = await bench.embed("m", TEXTS)
        text = InferenceRequest(
            model_id="m", prompt="the", params=GenerationParams(max_new_tokens=1)
        )
        prompt_tokens = (await bench.infer(text)).prompt_tokens
    assert close(found.vectors, reference(folder, TEXTS, "lasttoken"))
    assert prompt_tokens == len(tokenizer.encode("the", add_special_tokens=False).ids)


@pytest.mark.parametrize("most", [8, 16, 512])
async def test_batches_of_whatever_size_give_the_same(
    tiny: Callable[[str], Path], most: int
) -> None:
    texts = [" ".join(["the cat sat on a mat"] * n) for n in (3, 1, 5, 2, 1, 4)]
    async with service(tiny("bert"), max_batch_tokens=most) as bench:
        together = (await bench.embed("m", texts)).vectors
        alone = [(await bench.embed("m", [text])).vectors[0] for text in texts]
    assert close(together, alone)


async def test_what_cannot_be_done_is_refused_in_words(tiny: Callable[[str], Path]) -> None:
    async with service(tiny("bert")) as bench:
        long = "the cat sat " * 400
        with pytest.raises(ConfigurationError, match=r"text 1 has \d+ tokens; cut"):
            await bench.embed("m", ["a", long])
        response = await bench.infer(InferenceRequest(model_id="m", prompt="the"))
        assert "makes embeddings and generates no text" in (response.error_message or "")
        assert (await bench.embed("m", ["a"])).vectors
    async with service(tiny("llama")) as bench:
        with pytest.raises(ConfigurationError, match="generates text and makes no embeddings"):
            await bench.embed("m", ["a"])


async def test_the_queue_is_bounded_for_it_too(tiny: Callable[[str], Path]) -> None:
    async with service(tiny("bert"), max_queue=0, max_batch_size=1) as bench:
        await bench.embed("m", ["a"])
        calls = [bench.embed("m", [" ".join(["the cat"] * 20)]) for _ in range(6)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        refused = [each for each in found if isinstance(each, BaseException)]
        assert all(isinstance(each, QueueFullError) for each in refused)
        assert len(refused) < len(found)
        assert (await bench.embed("m", ["a"])).vectors


# ── what a folder may say ────────────────────────────────────────────────────────────────────


@pytest.fixture
def bert(copied: Callable[[str], Path]) -> tuple[Path, Parts]:
    folder = copied("bert")
    return folder, load_parts(ModelConfig(model_id="m", source=str(folder)), options())


def test_without_a_word_an_encoder_has_a_recipe(bert: tuple[Path, Parts]) -> None:
    assert recipe_of(*bert) == Recipe("mean", normalise=False)


@pytest.mark.parametrize(
    ("modules", "pooling", "problem"),
    [
        (["Transformer", "Dense"], {}, "a module 'Dense'"),
        (["Transformer", "Pooling"], {}, "no known pooling"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
            "cls_token and max_tokens pooling",
        ),
        (["Transformer", "Pooling"], {"pooling_mode": "median"}, "asks for median pooling"),
    ],
)
def test_what_is_not_known_is_refused(
    bert: tuple[Path, Parts], modules: list[str], pooling: dict[str, Any], problem: str
) -> None:
    folder, parts = bert
    declare(folder, *modules, pooling=pooling)
    with pytest.raises(ConfigurationError, match=problem):
        recipe_of(folder, parts)


@pytest.mark.parametrize(
    ("listing", "problem"),
    [
        ("{}", "no list of modules"),
        ("[1]", "no list of modules"),
        ("[", "damaged"),
        ('[{"type": "x.Pooling", "path": "../../etc"}]', "no ../../etc/config.json"),
        ('[{"type": "x.Pooling", "path": "none"}]', "no none/config.json"),
    ],
)
def test_a_hostile_listing_is_refused(bert: tuple[Path, Parts], listing: str, problem: str) -> None:
    folder, parts = bert
    (folder / "modules.json").write_text(listing)
    with pytest.raises(ConfigurationError, match=problem):
        recipe_of(folder, parts)


async def test_token_ids_have_the_vector_of_their_text(tiny: Callable[[str], Path]) -> None:
    import transformers

    folder = tiny("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    async with service(folder) as bench:
        by_text = await bench.embed("m", TEXTS)
        by_ids = await bench.embed("m", ids)
        assert close(by_ids.vectors, by_text.vectors)
        assert by_ids.prompt_tokens == by_text.prompt_tokens
        with pytest.raises(ConfigurationError, match=r"text 1 has the token 99999; .* are 0 to"):
            await bench.embed("m", [ids[0], [99999]])
        with pytest.raises(ConfigurationError, match=r"text 0 has \d+ tokens"):
            await bench.embed("m", [[1] * 100_000])


@pytest.mark.parametrize("by", ["config", "option"])
async def test_vectors_are_cut_where_the_model_is_made_for_it(
    copied: Callable[[str], Path], by: str
) -> None:
    folder = declare(copied("bert"), "Transformer", "Pooling", "Normalize", pooling={})
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    if by == "config":
        file.write_text(json.dumps(settings | {"matryoshka_dimensions": [2, 4]}))
    width = settings["hidden_size"]
    async with service(folder, **({"matryoshka": [2, 4]} if by == "option" else {})) as bench:
        whole = await bench.embed("m", TEXTS)
        assert (await bench.embed("m", TEXTS, dimensions=width)).vectors == whole.vectors
        cut = await bench.embed("m", TEXTS, dimensions=4)
        with pytest.raises(ConfigurationError, match=f"cut to 2, 4 or {width}, not 3"):
            await bench.embed("m", TEXTS, dimensions=3)
    expected = []
    for vector in whole.vectors:
        length = sum(x * x for x in vector[:4]) ** 0.5
        expected.append([x / length for x in vector[:4]])
    assert close(cut.vectors, expected)
