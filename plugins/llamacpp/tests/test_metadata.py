"""What of a header would end the process inside of llama.cpp is refused before it sees the file."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType
from gguf_bytes import Entry, f32, image, numbers, string, strings, u32

from engineroom import ConfigurationError
from engineroom.sources import GgufArray, GgufHeader, gguf_header as reader
from engineroom_llamacpp.metadata import read_header

TOKENS = "tokenizer.ggml.tokens"
Pairs = dict[str, bytes]
Read = Callable[..., GgufHeader]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The header of a file with these values and tensors."""

    def read(pairs: Pairs, entries: list[Entry] | None = None, data: int = 0) -> GgufHeader:
        path = tmp_path / "model.gguf"
        pairs = {"general.architecture": string(b"llama"), **pairs}
        path.write_bytes(image(pairs, entries or [], bytes(data)))
        return read_header(path)

    return read


def refusal(read: Read, *content: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(*content)
    assert "model.gguf" in str(caught.value)  # which file, above all
    return str(caught.value)


def test_sizes_of_blocks_are_those_of_the_library() -> None:
    # A wrong size would refuse good files or pass ones that were cut short.
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = Path(llama_cpp.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(next(folder.glob("*ggml-base*"))))
    except (StopIteration, OSError):
        pytest.skip("ggml's own library is not to be found")
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    known = {kind.value for kind in GGMLQuantizationType}
    assert set(reader._BLOCKS) <= known
    for kind, (values, size) in reader._BLOCKS.items():
        if library.ggml_blck_size(kind):  # 0: this build does not know it
            assert (library.ggml_blck_size(kind), library.ggml_type_size(kind)) == (values, size)


def test_a_token_that_is_there_twice_is_named(read: Read) -> None:
    # llama.cpp ends the process over it.
    assert "token b'a' twice" in refusal(read, {TOKENS: strings([b"a", b"b", b"a"])})


def test_empty_tokens_may_be_many(read: Read) -> None:
    tokens = read({TOKENS: strings([b"", b"a", b""])}).metadata[TOKENS]
    assert tokens == GgufArray(3)
    assert tokens.values is None  # not kept once they are checked


@pytest.mark.parametrize("tokens", [u32(3), string(b"a"), numbers("I", [1, 2]), numbers("I", [])])
def test_a_vocabulary_of_anything_but_strings_is_refused(tokens: bytes, read: Read) -> None:
    assert "no array of strings" in refusal(read, {TOKENS: tokens})


@pytest.mark.parametrize("layers", [0, 513, 2**32 - 1])
def test_a_number_of_layers_that_would_end_the_process_is_refused(layers: int, read: Read) -> None:
    assert f"{layers} layers" in refusal(read, {"llama.block_count": u32(layers)})


@pytest.mark.parametrize("epsilon", [-1e-5, float("nan")])
def test_an_epsilon_that_would_end_the_process_is_refused(epsilon: float, read: Read) -> None:
    key = "llama.attention.layer_norm_rms_epsilon"
    assert key in refusal(read, {key: f32(epsilon)})


TWO = {TOKENS: strings([b"a", b"b"])}


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        ({"llama.rope.scaling.type": string(b"spiral")}, "rope.scaling.type is 'spiral'"),
        ({"llama.rope.scaling.type": u32(1)}, "rope.scaling.type is '1'"),
        ({"llama.expert_count": u32(8)}, "expert_used_count is 0, of 8"),
        ({"llama.expert_used_count": u32(2)}, "expert_used_count is 2, of 0"),
        ({"llama.expert_count": u32(2**20)}, "expert_count is 1048576, not 0 to 1024"),
        (
            {"llama.expert_count": u32(8), "llama.expert_used_count": u32(9)},
            "expert_used_count is 9, of 8",
        ),
        ({"llama.expert_group_count": u32(2)}, "expert_group_count is 2, of 0"),
        ({"llama.nextn_predict_layers": u32(3)}, "nextn_predict_layers is 3, of 2"),
        ({"llama.embedding_length_out": u32(65)}, "embedding_length_out is 65"),
        ({**TWO, "tokenizer.ggml.scores": numbers("f", [0.0])}, "2 tokens and 1 scores"),
        ({**TWO, "tokenizer.ggml.token_type": numbers("I", [])}, "2 tokens and 0 types"),
        ({**TWO, "tokenizer.ggml.scores": u32(1)}, "scores is no array"),
        ({**TWO, "tokenizer.chat_template": u32(1)}, "chat_template is no text"),
        ({**TWO, "tokenizer.ggml.model": string(b"llama")}, "no token for the byte 0x00"),
    ],
)
def test_metadata_that_would_end_the_process_are_refused(
    pairs: Pairs, problem: str, read: Read
) -> None:
    assert problem in refusal(read, {"llama.block_count": u32(2), **pairs})


def test_metadata_of_a_mixture_of_experts_are_good(read: Read) -> None:
    header = read(
        {
            "llama.block_count": u32(2),
            "llama.expert_count": u32(8),
            "llama.expert_used_count": numbers("I", [2, 4]),
            "llama.expert_group_count": u32(4),
            "llama.expert_group_used_count": u32(2),
            "llama.rope.scaling.type": string(b"yarn"),
            "llama.nextn_predict_layers": u32(1),
        }
    )
    assert header.numbers("expert_used_count", 2) == (2, 4)
    assert header.numbers("expert_count", 3) == (8, 8, 8)
    assert header.numbers("expert_used_count", 3) is None  # not one for each
    assert header.numbers("absent", 1) is None


@pytest.mark.parametrize("kind", [9, 24, 26, 28])
def test_weights_of_a_type_that_nothing_computes_with_are_refused(kind: int, read: Read) -> None:
    tensors = [("a.weight", [32], kind, 0)]
    assert f"({kind}) that no weights are of" in refusal(read, {}, tensors, 512)


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "blk.0.attn_q.bias"])
def test_norms_and_biases_have_full_precision(name: str, read: Read) -> None:
    assert "other than F32" in refusal(read, {}, [(name, [32], 8, 0)], 64)
    assert read({}, [(name, [32], 0, 0)], 128)
