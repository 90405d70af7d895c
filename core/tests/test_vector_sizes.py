"""How long vectors are, and to what lengths they may be cut."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engineroom import ConfigurationError, LLMInferenceService, LLMModelManager, VectorSizes
from engineroom.sources import EmbeddingOptions, vector_sizes
from engineroom.testing import EchoHandler


@pytest.mark.parametrize(
    ("option", "config", "smaller"),
    [
        (None, None, set()),
        (None, {}, set()),
        (None, {"is_matryoshka": True}, None),
        (None, {"is_matryoshka": False}, set()),
        (None, {"is_matryoshka": "yes"}, set()),
        (None, {"matryoshka_dimensions": [2, 4, 8, 16, "3", -1, True]}, {2, 4}),
        (None, {"matryoshka_dimensions": [4], "is_matryoshka": True}, {4}),
        (None, {"matryoshka_dimensions": [], "is_matryoshka": True}, None),
        (True, {}, None),
        (False, {"is_matryoshka": True}, set()),
        ([3], {"matryoshka_dimensions": [4]}, {3}),
    ],
)
def test_options_and_the_models_files_say_it(option: Any, config: Any, smaller: Any) -> None:
    sizes = vector_sizes(8, EmbeddingOptions(matryoshka=option), config)
    assert sizes == VectorSizes(8, None if smaller is None else frozenset(smaller))


@pytest.mark.parametrize("wrong", [0, "yes", [0], [True], ["8"], [1.5]])
def test_an_option_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="matryoshka"):
        EmbeddingOptions(matryoshka=wrong)


@pytest.mark.parametrize(
    ("smaller", "fine", "wrong", "says"),
    [
        (None, (1, 7, 8), (9,), "cut to 1 to 8, not 9"),
        ({2, 4}, (2, 4, 8), (1, 3, 9), "cut to 2, 4 or 8, not"),
        (set(), (8,), (1, 9), "not made for them to be cut"),
    ],
)
def test_what_a_model_has_not_is_refused_by_name(
    smaller: Any, fine: Any, wrong: Any, says: str
) -> None:
    sizes = VectorSizes(8, None if smaller is None else frozenset(smaller))
    for size in fine:
        sizes.check(size)
    for size in wrong:
        with pytest.raises(ConfigurationError, match=says) as caught:
            sizes.check(size)
        assert caught.value.field == "dimensions"


class Said(EchoHandler):
    """Says of its vectors what a test wants; makes them as long as they are."""

    def __init__(self, sizes: VectorSizes | None, scale: float = 1.0) -> None:
        super().__init__()
        self.sizes, self.scale = sizes, scale

    async def load_model(self, config: Any) -> Any:
        loaded = await super().load_model(config)
        loaded.vector_sizes = self.sizes
        return loaded

    async def embed(self, loaded_model: Any, texts: Any) -> Any:
        made = await super().embed(loaded_model, texts)
        vectors = [[x * self.scale for x in vector] for vector in made.vectors]
        return type(made)(vectors, made.prompt_tokens)


async def embed(handler: EchoHandler, texts: Any, **fields: Any) -> Any:
    manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "echo:"}]})
    async with LLMInferenceService(manager, handlers=[handler]) as service:
        return await service.embed("m", texts, **fields)


@pytest.mark.parametrize("scale", [1.0, 2.0])
async def test_a_vector_that_is_cut_keeps_the_length_1(scale: float) -> None:
    handler = Said(VectorSizes(26, None), scale)
    (whole,) = (await embed(handler, ["abbz"])).vectors
    (cut,) = (await embed(handler, ["abbz"], dimensions=2)).vectors
    length = 1.0 if scale == 1 else math.hypot(*whole[:2])
    assert math.hypot(*cut) == pytest.approx(length)
    assert cut[1] / cut[0] == pytest.approx(2)


@pytest.mark.parametrize(
    ("sizes", "fine", "wrong"),
    [
        (None, 26, 2),  # it says nothing
        (VectorSizes(2), 26, 2),  # it says what is not so
        (VectorSizes(30, None), 26, 27),
    ],
)
async def test_what_the_vectors_show_counts(sizes: Any, fine: int, wrong: int) -> None:
    made = None
    if sizes is None or sizes.smaller is None:
        made = await embed(Said(sizes), ["ab"], dimensions=fine)
        assert len(made.vectors[0]) == fine
    with pytest.raises(ConfigurationError, match="dimensions"):
        await embed(Said(sizes), ["ab"], dimensions=wrong)


async def test_token_ids_are_texts_too() -> None:
    by_text = await embed(EchoHandler(), ["ab", "ba"])
    for ids in ([97, 98], (97, 98)):
        by_ids = await embed(EchoHandler(), [ids, "ba"])
        assert by_ids.vectors == by_text.vectors
    assert by_ids.prompt_tokens == 3
    for wrong in ([[]], [[-1]], [[True]], [[1.5]], [["a"]], [[2**31]], [{1: 2}]):
        with pytest.raises(ConfigurationError):
            await embed(EchoHandler(), wrong)


async def test_a_handler_that_takes_no_ids_is_given_none() -> None:
    class Without(EchoHandler):
        def capabilities(self) -> Any:
            claimed = super().capabilities()
            return type(claimed)(embeddings=True)

    with pytest.raises(ConfigurationError, match="'echo' takes no token ids; send text"):
        await embed(Without(), ["a", [97]])
    assert (await embed(Without(), ["a"])).vectors
