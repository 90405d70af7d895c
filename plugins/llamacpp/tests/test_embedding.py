"""Texts as vectors: against plain arithmetic, in batches, beside each other, and refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from llama_bert import CONTEXT, WIDTH, tokens_of, vector, write_bert

from engineroom import (
    ConfigurationError,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    QueueFullError,
)
from engineroom_llamacpp.metadata import read_header
from engineroom_llamacpp.sizes import estimate, is_encoder, pooling_of

Make = Callable[..., Awaitable[Any]]
TEXTS = ("the cat", "the cat sat on a mat", "duck", "a hat on the mat . something else , quacks")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert") / "bert.gguf")


def close(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    # llama.cpp looks GELU up in a table of halves.
    return all(a == pytest.approx(b, abs=3e-3) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "pooling"), [(1, "mean"), (2, "cls"), (3, "last"), (None, "mean"), (0, "mean")]
)
async def test_vectors_are_those_of_plain_arithmetic(
    make: Make, tmp_path: Path, kind: int | None, pooling: str
) -> None:
    bench = await make(write_bert(tmp_path / "m.gguf", pooling=kind))
    found = await bench.service.embed("m", TEXTS)
    assert close(found.vectors, [vector(tokens_of(text), pooling) for text in TEXTS])
    assert found.prompt_tokens == sum(len(tokens_of(text)) for text in TEXTS)


async def test_the_length_is_left_as_it_is_where_that_is_asked(make: Make, bert: Path) -> None:
    bench = await make(bert, normalize=False)
    found = await bench.service.embed("m", TEXTS)
    assert close(
        found.vectors, [vector(tokens_of(text), "mean", normalise=False) for text in TEXTS]
    )
    lengths = [sum(x * x for x in each) ** 0.5 for each in found.vectors]
    assert all(abs(length - 1) > 0.05 for length in lengths)


@pytest.mark.parametrize("options", [{"n_batch": 8}, {"n_batch": 16}, {}, {"flash_attn": "on"}])
async def test_batches_of_whatever_size_give_the_same(
    make: Make, bert: Path, options: dict[str, Any]
) -> None:
    bench = await make(bert, **options)
    texts = [" ".join(["the cat sat on a mat"] * n) for n in (3, 1, 5, 2, 1, 4)] * 15
    together = (await bench.service.embed("m", texts)).vectors
    alone = [(await bench.service.embed("m", [text])).vectors[0] for text in texts[:6]]
    assert close(together, alone * 15)


async def test_calls_take_turns(make: Make, bert: Path) -> None:
    # One text of each call a turn: a short call is done long before a long one.
    bench = await make(bert, n_batch=16)
    ended: list[str] = []

    async def call(name: str, texts: Sequence[str]) -> None:
        await bench.service.embed("m", texts)
        ended.append(name)

    await asyncio.gather(call("long", ["the cat"] * 400), call("short", ["the cat"] * 2))
    assert ended == ["short", "long"]


async def test_what_cannot_be_done_is_refused_in_words(make: Make, bert: Path) -> None:
    bench = await make(bert)
    with pytest.raises(
        ConfigurationError, match=rf"length is {CONTEXT} tokens.* text 1 has \d+ tokens"
    ):
        await bench.service.embed("m", ["a", "the cat sat " * 400])
    response = await bench.service.infer(InferenceRequest(model_id="m", prompt="the"))
    assert "makes embeddings and generates no text" in response.error_message
    assert (await bench.service.embed("m", ["a"])).vectors


async def test_a_text_of_just_the_length_is_read(make: Make, bert: Path) -> None:
    bench = await make(bert)
    text = " ".join(["cat"] * (CONTEXT - 2))
    found = await bench.service.embed("m", [text])
    assert close(found.vectors, [vector(tokens_of(text), "mean")])
    with pytest.raises(ConfigurationError, match="65 tokens"):
        await bench.service.embed("m", [text + " cat"])


async def test_a_model_that_generates_text_makes_none(make: Make) -> None:
    bench = await make()
    with pytest.raises(ConfigurationError, match="generates text and makes no embeddings"):
        await bench.service.embed("m", ["a"])


async def test_the_queue_is_bounded_for_it_too(make: Make, bert: Path) -> None:
    bench = await make(bert, max_queue=0, n_parallel=1)
    await bench.service.embed("m", ["a"])
    calls = [bench.service.embed("m", ["the cat sat on a mat"] * 200) for _ in range(6)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    refused = [each for each in found if isinstance(each, BaseException)]
    assert all(isinstance(each, QueueFullError) for each in refused)
    assert len(refused) < len(found)
    assert (await bench.service.embed("m", ["a"])).vectors


async def test_a_cancelled_call_leaves_the_others_alone(make: Make, bert: Path) -> None:
    bench = await make(bert, n_batch=16)
    expected = (await bench.service.embed("m", TEXTS)).vectors
    first = asyncio.ensure_future(bench.service.embed("m", ["the cat"] * 500))
    second = asyncio.ensure_future(bench.service.embed("m", list(TEXTS) * 20))
    await asyncio.sleep(0.005)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert close((await second).vectors, expected * 20)
    engine = bench.manager.get_loaded_model("m").model_object
    await bench.until(lambda: engine.health().num_requests_running == 0)


async def test_a_step_that_fails_is_an_error_and_the_next_one_works(
    make: Make, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(bert)
    context = bench.manager.get_loaded_model("m").model_object._context
    monkeypatch.setattr(context, "decode", lambda _: -3)
    with pytest.raises(InferenceError, match="could not compute the step"):
        await bench.service.embed("m", ["a"])
    monkeypatch.undo()
    monkeypatch.setattr(context, "vector", lambda _: None)
    with pytest.raises(InferenceError, match="no numbers"):
        await bench.service.embed("m", ["a", "the cat"])
    monkeypatch.undo()
    assert len((await bench.service.embed("m", ["a"])).vectors[0]) == WIDTH


# ── models that do both ──────────────────────────────────────────────────────────────────────


def with_pooling(source: Path, target: Path, pooling: int) -> Path:
    """A copy of a file with one more number in its metadata."""
    found = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), "llama")
    for name, field in found.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    writer.add_uint32("llama.pooling_type", pooling)
    for tensor in found.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


async def test_a_model_that_generates_text_may_make_embeddings_too(
    make: Make, tiny_model: Path, tmp_path: Path
) -> None:
    path = with_pooling(tiny_model, tmp_path / "both.gguf", 3)
    bench = await make(path)
    plain = await make(tiny_model)
    text = InferenceRequest(
        model_id="m", prompt="the", params=GenerationParams(max_new_tokens=40, temperature=0)
    )
    alone = await plain.service.infer(text)
    beside, found = await asyncio.gather(
        bench.service.infer(text), bench.service.embed("m", list(TEXTS) * 5)
    )
    assert beside.error_message is None
    assert beside.generated_text == alone.generated_text
    one = [(await bench.service.embed("m", [each])).vectors[0] for each in TEXTS]
    assert close(found.vectors, one * 5)
    assert len({tuple(each) for each in one}) == len(TEXTS)
    # The last token decides: with another pooling the vectors are others.
    mean = await make(with_pooling(tiny_model, tmp_path / "mean.gguf", 1))
    assert not close((await mean.service.embed("m", TEXTS)).vectors, one)
    # The cache of both contexts counts, and the logits of all tokens, twice.
    sizes = [
        sum(estimate(read_header(each), bench.engine.options).values())
        for each in (tiny_model, path)
    ]
    logits = 2 * 4 * 512 * bench.engine.model.n_vocab
    assert sizes[1] - sizes[0] == 512 * 2 * (32 + 32) * 2 + logits


def test_what_a_file_says_of_pooling(tiny_model: Path, bert: Path, tmp_path: Path) -> None:
    assert pooling_of(read_header(tiny_model)) is None
    assert pooling_of(read_header(bert)) == 1
    assert is_encoder(read_header(bert))
    assert not is_encoder(read_header(tiny_model))
    assert estimate(read_header(bert), _options()) == {"cpu": read_header(bert).tensor_bytes}
    with pytest.raises(ConfigurationError, match="ranks texts"):
        pooling_of(read_header(write_bert(tmp_path / "rank.gguf", pooling=4)))
    with pytest.raises(ConfigurationError, match="odd.gguf.* has the pooling_type 77; known are 0"):
        pooling_of(read_header(write_bert(tmp_path / "odd.gguf", pooling=77)))


def _options() -> Any:
    from engineroom_llamacpp.options import LlamaCppOptions

    return LlamaCppOptions()


@pytest.mark.parametrize("causal", [None, True])
@pytest.mark.parametrize("trial", [False, True])
async def test_an_encoder_that_does_not_say_so_is_refused(
    make: Make, tmp_path: Path, causal: bool | None, trial: bool
) -> None:
    with pytest.raises(ConfigurationError, match="m.gguf"):
        await make(write_bert(tmp_path / "m.gguf", causal=causal), trial=trial, n_ctx=64)


async def test_a_model_that_ranks_is_refused_with_its_name(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ranks texts"):
        await make(write_bert(tmp_path / "rank.gguf", pooling=4))


async def test_token_ids_have_the_vector_of_their_text(make: Make, bert: Path) -> None:
    bench = await make(bert)
    ids = [tokens_of(text) for text in TEXTS]
    by_text, by_ids = [await bench.service.embed("m", given) for given in (TEXTS, ids)]
    assert close(by_ids.vectors, by_text.vectors)
    assert by_ids.prompt_tokens == by_text.prompt_tokens
    with pytest.raises(ConfigurationError, match="text 1 has the token 99999; the model's tokens"):
        await bench.service.embed("m", [ids[0], [99999]])
    with pytest.raises(ConfigurationError, match="text 0 has 1000 tokens"):
        await bench.service.embed("m", [[1] * 1000])


async def test_vectors_are_cut_where_the_option_says_so(make: Make, bert: Path) -> None:
    bench = await make(bert)
    whole = await bench.service.embed("m", TEXTS, dimensions=WIDTH)
    with pytest.raises(ConfigurationError, match="not made for them to be cut to 4"):
        await bench.service.embed("m", TEXTS, dimensions=4)
    bench = await make(bert, matryoshka=True)
    cut = await bench.service.embed("m", TEXTS, dimensions=4)
    for full, beginning in zip(whole.vectors, cut.vectors, strict=True):
        length = sum(x * x for x in full[:4]) ** 0.5
        assert beginning == pytest.approx([x / length for x in full[:4]], abs=1e-4)
