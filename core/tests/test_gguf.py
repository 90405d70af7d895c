"""The header reader, over files of gguf's own writer and over every way to damage them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings, strategies as st

from engineroom import ConfigurationError
from engineroom.sources import (
    GgufArray,
    GgufHeader,
    find_gguf,
    gguf_header as reader,
    gguf_part_paths,
    is_gguf,
    missing_parts,
    part_names,
    read_gguf_header as read_header,
)

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
ARCHITECTURE = ("general.architecture", STRING, "llama")

in_one_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ── files written by hand, to lie in any place ──────────────────────────────────────────────────


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    """A value of the metadata; an array's content is (kind of its items, list of items)."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        inner, items = content
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack("<" + {U8: "B", U32: "I", F32: "f", BOOL: "?", U64: "Q"}[kind], content)


def pair(key: str, kind: int, content: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + value(kind, content)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def image(
    pairs: Iterable[tuple[str, int, Any]] = (ARCHITECTURE,),
    tensors: Iterable[bytes] = (),
    *,
    data: int = 0,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """The bytes of a file; ``counts``: of tensors and pairs, where it is to lie about them."""
    pairs, tensors = list(pairs), list(tensors)
    declared = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *declared)
    head += b"".join(pair(*p) for p in pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def to_file(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return to_file


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)  # which file, above all
    return str(caught.value)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value, and tensors of two types."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(3)
    writer.add_name("a model")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_uint8("x.u8", 255)
    writer.add_int8("x.i8", -128)
    writer.add_uint16("x.u16", 65535)
    writer.add_int16("x.i16", -32768)
    writer.add_int32("x.i32", -(2**31))
    writer.add_uint64("x.u64", 2**64 - 1)
    writer.add_int64("x.i64", -(2**63))
    writer.add_float64("x.f64", 0.1)
    writer.add_bool("x.yes", True)
    writer.add_array("x.numbers", [1, 2, 3])
    writer.add_array("llama.attention.head_count", [4, 4, 2])
    writer.add_array("x.flags", [True, False])
    writer.add_token_list(["a", "é", "", ""])
    writer.add_tensor("one", np.ones((3, 5), np.float32))
    writer.add_tensor("half", np.ones((2, 2), np.float16))
    raw = np.zeros((2, 34), np.uint8)
    writer.add_tensor("q8", raw, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


# ── what is right ───────────────────────────────────────────────────────────────────────────────


def test_a_header_says_what_the_writer_was_told(whole: bytes, write: Any) -> None:
    header = read_header(write(whole))
    found = dict(header.metadata)
    assert found.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert found == {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "general.name": "a model",
        "x.u8": 255,
        "x.i8": -128,
        "x.u16": 65535,
        "x.i16": -32768,
        "x.i32": -(2**31),
        "x.u64": 2**64 - 1,
        "x.i64": -(2**63),
        "x.f64": 0.1,
        "x.yes": True,
        "x.numbers": GgufArray(3),
        "llama.attention.head_count": GgufArray(3),
        "x.flags": GgufArray(2),
        "tokenizer.ggml.tokens": GgufArray(4),
    }
    assert header.version == 3
    assert header.architecture == "llama"
    assert header.tensor_count == 3
    assert header.tensor_bytes == 3 * 5 * 4 + 2 * 2 * 2 + 2 * 34
    assert header.file_bytes == len(whole)


def test_number_gives_whole_numbers_of_the_architecture_alone(write: Any) -> None:
    header = read_header(
        write(
            image(
                [
                    ARCHITECTURE,
                    ("llama.block_count", U32, 7),
                    ("llama.scale", F32, 2.0),
                    ("llama.flag", BOOL, True),
                    ("llama.name", STRING, "7"),
                    ("llama.per_layer", ARRAY, (U32, [5] * 9)),
                    ("other.block_count", U32, 8),
                ]
            )
        )
    )
    assert header.number("block_count") == 7
    # An array has a length, but no number of its own.
    for key in ("scale", "flag", "name", "per_layer", "absent"):
        assert header.number(key) is None, key


def test_sizes_are_said_as_a_configuration_says_them(write: Any) -> None:
    pairs = [
        ARCHITECTURE,
        ("llama.block_count", U32, 3),
        ("llama.attention.head_count", ARRAY, (U32, [4, 4, 2])),
        ("llama.attention.key_length", U32, 16),
        ("llama.attention.key_length_swa", U32, 8),
        ("llama.attention.sliding_window_pattern", ARRAY, (BOOL, [True, True, False])),
        ("llama.attention.kv_lora_rank", U32, 5),  # but unpacked
        ("llama.context_length", U32, 64),
    ]
    assert read_header(write(image(pairs))).config() == {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": [4, 4, 2],
        "head_dim": [8, 8, 16],
        "max_position_embeddings": 64,
    }
    latent = [
        *pairs,
        ("llama.attention.key_length_mla", U32, 4),
        ("llama.rope.dimension_count", U32, 2),
    ]
    config = read_header(write(image(latent))).config()
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (5, 2)


def test_version_2_is_read(write: Any) -> None:
    assert read_header(write(image(version=2))).version == 2


def test_the_alignment_of_the_file_is_used(write: Any) -> None:
    pairs = [ARCHITECTURE, ("general.alignment", U32, 64)]
    content = image(pairs, [tensor("a", [4]), tensor("b", [4], offset=64)])
    start = -(-len(content) // 64) * 64
    content = content.ljust(start + 80, b"\0")
    assert read_header(write(content)).tensor_bytes == 32
    assert "cut short" in refusal(write(content[:-1]))


def test_a_file_without_tensors_is_a_header_all_the_same(write: Any) -> None:
    header = read_header(write(image()))
    assert (header.tensor_count, header.tensor_bytes) == (0, 0)


def test_a_type_of_tensors_that_is_not_known_is_left_to_the_library(write: Any) -> None:
    header = read_header(write(image(tensors=[tensor("new", [3], kind=250)])))
    assert (header.tensor_count, header.tensor_bytes) == (1, 0)


def test_arrays_in_arrays_are_read(write: Any) -> None:
    nested = (ARRAY, [(ARRAY, [(U8, [1, 2]), (STRING, ["a"])]), (U32, [])])
    content = image([ARCHITECTURE, ("deep", ARRAY, nested), ("after", U32, 5)])
    header = read_header(write(content))
    assert header.metadata["deep"] == GgufArray(2)
    assert header.metadata["after"] == 5  # the cursor came out in the right place


def test_text_that_is_not_utf8_does_not_matter(write: Any) -> None:
    content = image([ARCHITECTURE, ("name", STRING, b"\xff\xfe"), ("after", U32, 5)])
    assert read_header(write(content)).metadata["name"] == "\ufffd\ufffd"


# ── what is wrong ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(19)])
def test_a_file_that_is_too_short_for_any_header_says_its_size(content: bytes, write: Any) -> None:
    assert f"only {len(content)} bytes" in refusal(write(content))


def test_another_format_says_what_it_begins_with(write: Any) -> None:
    message = refusal(write(b"PK\x03\x04" + bytes(100)))
    assert "b'PK\\x03\\x04'" in message
    assert "convert" in message


@pytest.mark.parametrize("version", [0, 1, 4, 99, 3 << 24])
def test_other_versions_are_refused_by_number(version: int, write: Any) -> None:
    assert f"version {version};" in refusal(write(image(version=version)))


@pytest.mark.parametrize("counts", [(0, 2**64 - 1), (2**64 - 1, 1), (0, 2**40), (2**40, 1)])
def test_enormous_counts_are_refused_at_once(counts: tuple[int, int], write: Any) -> None:
    message = refusal(write(image(counts=counts, data=1000)))
    assert str(max(counts)) in message
    assert "too small" in message


@pytest.mark.parametrize("inner", [STRING, ARRAY])
def test_an_array_with_an_enormous_count_is_refused_at_once(inner: int, write: Any) -> None:
    key = text("list") + struct.pack("<IIQ", ARRAY, inner, 2**60)
    content = image(counts=(0, 2))
    head = len(content.rstrip(b"\0"))
    assert str(2**60) in refusal(write(content[:head] + key + bytes(100)))


@pytest.mark.parametrize("inner", [U8, U64])
def test_an_array_of_numbers_may_not_go_past_the_end(inner: int, write: Any) -> None:
    head = image().rstrip(b"\0")[24:]
    key = text("list") + struct.pack("<IIQ", ARRAY, inner, 2**60)
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + head + key + bytes(100)
    assert "cut short" in refusal(write(content))


def test_a_header_may_not_be_larger_than_any_model_needs(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A damaged length could claim gigabytes of a large file as the name of something.
    content = image([ARCHITECTURE, ("text", STRING, "a" * 1000)])
    monkeypatch.setattr(reader, "_MAX_HEADER", len(content))
    assert read_header(write(content))
    monkeypatch.setattr(reader, "_MAX_HEADER", 500)
    assert "500" in refusal(write(content))


@pytest.mark.parametrize(
    ("bound", "what"),
    [("_MAX_ENTRIES", "metadata entries"), ("_MAX_STRINGS", "strings of an array")],
)
def test_more_entries_than_any_model_has_are_refused(
    write: Any, monkeypatch: pytest.MonkeyPatch, bound: str, what: str
) -> None:
    tokens = ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b"]))
    path = write(image([ARCHITECTURE, tokens]))
    read_header(path)
    monkeypatch.setattr(reader, bound, 1)
    with pytest.raises(ConfigurationError, match=f"declares 2 {what}, and no model has more"):
        read_header(path, keep=(tokens[0],))


def test_strings_are_kept_where_they_are_asked_for(write: Any) -> None:
    path = write(image([ARCHITECTURE, *((key, ARRAY, (STRING, ["a", "\xe9"])) for key in "xy")]))
    metadata = read_header(path, keep=("x",)).metadata
    assert metadata["x"].values == (b"a", "\xe9".encode())
    assert metadata["y"].values is None
    assert metadata["x"].kind == STRING


def test_a_key_that_is_there_twice_is_named(write: Any) -> None:
    content = image([ARCHITECTURE, ("again", U32, 1), ("again", U32, 2)])
    assert "'again' is there twice" in refusal(write(content))


@pytest.mark.parametrize("missing", [1, 100, 479])
def test_a_tensor_past_the_end_says_where_it_ends_and_where_the_file_does(
    missing: int, write: Any
) -> None:
    # 480 bytes of data: two tensors of 160 bytes, the second of which begins at 320.
    content = image(
        tensors=[tensor("first", [40]), tensor("last", [40], offset=320)],
        data=480,
    )
    assert read_header(write(content)).tensor_bytes == 320
    cut = content[: len(content) - missing]
    message = refusal(write(cut))
    last = missing <= 320
    ends = len(content) if last else len(content) - 320
    assert ("'last'" if last else "'first'") in message
    assert f"ends at byte {ends}, but the file has {len(cut)}: it was cut short" in message


def test_a_tensor_between_its_places_is_refused(write: Any) -> None:
    content = image(tensors=[tensor("skewed", [4], offset=8)], data=64)
    assert "'skewed' is not aligned" in refusal(write(content))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (U32, 0),
        (U32, 48),
        (F32, 32.0),
        (STRING, "32"),
        (BOOL, True),
        (ARRAY, (U8, [0] * 32)),
    ],
)
def test_an_alignment_that_is_no_power_of_two_is_refused(
    kind: int, content: Any, write: Any
) -> None:
    pairs = [ARCHITECTURE, ("general.alignment", kind, content)]
    assert "not a power of two" in refusal(write(image(pairs)))


@pytest.mark.parametrize("shape", [[0], [4, 0], [31], [2**63, 2**63, 2**63, 2**63]])
def test_a_shape_that_no_tensor_can_have_is_refused(shape: list[int], write: Any) -> None:
    message = refusal(write(image(tensors=[tensor("odd", shape, kind=8)])))
    assert "'odd'" in message
    assert str(shape) in message or "cut short" in message


@pytest.mark.parametrize("dimensions", [0, 5, 2**32 - 1])
def test_a_number_of_dimensions_that_no_tensor_has_is_refused(dimensions: int, write: Any) -> None:
    odd = text("odd") + struct.pack("<I", dimensions) + bytes(100)
    assert f"{dimensions} dimensions" in refusal(write(image(tensors=[odd])))


@pytest.mark.parametrize("kind", [13, 99, 2**32 - 1])
def test_a_type_of_values_that_there_is_none_of_is_refused_by_number(kind: int, write: Any) -> None:
    head = pair(*ARCHITECTURE) + text("odd") + struct.pack("<I", kind) + bytes(64)
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + head
    assert f"unknown type {kind}" in refusal(write(content))
    head = pair(*ARCHITECTURE) + text("odd") + struct.pack("<IIQ", ARRAY, kind, 1) + bytes(64)
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + head
    assert f"unknown type {kind}" in refusal(write(content))


def test_arrays_may_not_be_nested_without_end(write: Any) -> None:
    # Each level costs 12 bytes: a file of some megabytes would exhaust the stack.
    levels = struct.pack("<IQ", ARRAY, 1) * 5000
    head = pair(*ARCHITECTURE) + text("deep") + struct.pack("<I", ARRAY) + levels
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + head + bytes(64)
    assert "arrays in arrays" in refusal(write(content))


@pytest.mark.parametrize("pairs", [[], [("general.architecture", U32, 5)]])
def test_a_file_that_does_not_say_its_architecture_is_refused(pairs: Any, write: Any) -> None:
    assert "architecture" in refusal(write(image(pairs, data=64)))


def test_a_file_that_is_not_there_or_is_a_folder_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        assert "cannot be read" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    assert "only 0 bytes" in refusal(path)


def test_a_file_that_may_not_be_read_says_so(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Refused by a fake, since whoever runs the tests may be allowed to read everything.
    path = tmp_path / "secret.gguf"
    path.write_bytes(whole)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in refusal(path)
    assert not is_gguf(path)


def test_is_gguf_looks_at_the_first_bytes_alone(tmp_path: Path) -> None:
    path = tmp_path / "any.bin"
    for content, expected in ((b"GGUF", True), (b"GGUFrest", True), (b"GGU", False), (b"", False)):
        path.write_bytes(content)
        assert is_gguf(path) is expected
    assert not is_gguf(tmp_path / "absent.gguf")
    assert not is_gguf(tmp_path)


def test_tensors_may_not_lie_over_each_other(write: Any) -> None:
    content = image(tensors=[tensor("a", [16]), tensor("b", [4], offset=32)], data=512)
    assert "'a' and 'b' lie over each other" in refusal(write(content))
    assert "'a' is there twice" in refusal(write(image(tensors=[tensor("a", [4])] * 2, data=64)))


def test_another_byte_order_is_told_as_such(write: Any) -> None:
    assert "big-endian" in refusal(write(image(version=3 << 24)))


# ── models in several files ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """The first of three files."""
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama", split_max_tensors=1)
    writer.add_block_count(3)
    for number in range(3):
        writer.add_tensor(f"t{number}", np.ones((3, 5 + number), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m-00001-of-00003.gguf"


def test_a_model_in_several_files_is_counted_in_whole(several: Path) -> None:
    header = read_header(several)
    assert [t.name for t in header.tensors] == ["t0", "t1", "t2"]
    assert header.tensor_bytes == 3 * (5 + 6 + 7) * 4
    assert header.tensor_count == 3
    assert header.file_bytes == sum(each.stat().st_size for each in several.parent.iterdir())
    assert gguf_part_paths(several) == sorted(several.parent.iterdir())
    assert gguf_part_paths(several.with_name("a.gguf")) == [several.with_name("a.gguf")]


def test_a_part_that_is_missing_or_damaged_is_named(several: Path) -> None:
    second, third = gguf_part_paths(several)[1:]
    content = third.read_bytes()
    third.write_bytes(content[:-64])
    with pytest.raises(ConfigurationError, match="00003-of-00003.*cut short"):
        read_header(several)
    third.write_bytes(second.read_bytes())
    assert "two of its files have the tensor 't1'" in refusal(several)
    third.unlink()
    assert "'m-00003-of-00003.gguf', a part of it, is not there" in refusal(several)
    assert "name the first" in refusal(second)
    other = several.rename(several.with_name("other.gguf"))
    assert "it is one of 3 files" in refusal(other)


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_stands_for_its_only_model(several: Path, tmp_path: Path) -> None:
    folder = several.parent
    assert find_gguf(folder) == find_gguf(several) == several
    assert read_header(find_gguf(folder)).tensor_count == 3
    touched(folder, "notes.txt", "config.json")
    assert find_gguf(folder) == several
    assert find_gguf(folder / "absent.gguf") == folder / "absent.gguf"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "0 GGUF files (none); name one file"),
        (("a.gguf", "b.gguf"), "2 GGUF files (a.gguf, b.gguf); name one file"),
        (
            ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b-00002-of-00002.gguf"),
            "3 GGUF files of 2 models (a-00001-of-00002.gguf, b-00001-of-00002.gguf); name one",
        ),
        (
            ("Q4/m-00001-of-00002.gguf", "Q4/m-00002-of-00002.gguf", "Q8/m.gguf"),
            "0 GGUF files (none), and further in Q4/m-00001-of-00002.gguf, Q8/m.gguf; name one",
        ),
        (
            ("m-00001-of-00003.gguf", "m-00003-of-00003.gguf"),
            "a model in 3 files, of which m-00002-of-00003.gguf is not there",
        ),
        (("m-00002-of-00002.gguf",), "in 2 files, of which m-00001-of-00002.gguf is not there"),
        (
            ("m-00001-of-00999.gguf",),
            "m-00013-of-00999.gguf and 986 more is not there",
        ),
        (
            ("m-00001-of-00002.gguf", "m-00001-of-00003.gguf"),
            "2 GGUF files (m-00001-of-00002.gguf, m-00001-of-00003.gguf); name one",
        ),
    ],
)
def test_a_folder_that_is_not_one_model_says_what_is_there(
    tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_gguf(touched(tmp_path, *names))
    assert said in caught.value.message


@given(
    stem=st.text(min_size=1),
    count=st.integers(2, 999),
    place=st.integers(1, 999),
    suffix=st.sampled_from([".gguf", ".safetensors", ".bin"]),
)
def test_any_part_names_all_of_them(stem: str, count: int, place: int, suffix: str) -> None:
    names = [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]
    part = names[place % count]
    assert part_names(part) == names
    assert missing_parts(names) == []
    assert missing_parts([part]) == sorted({*names} - {part})


@pytest.mark.parametrize(
    "name",
    ["m.gguf", "m-00001-of-00001.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf",
     "m-00001-of-01000.gguf", "m-1-of-2.gguf", "-00001-of-00002.gguf"],
)  # fmt: skip
def test_what_is_no_part_is_a_model_by_itself(name: str) -> None:
    assert part_names(name) == [name]
    assert missing_parts([name]) == []


# ── any damage at all ───────────────────────────────────────────────────────────────────────────


def outcome(path: Path) -> GgufHeader | ConfigurationError:
    """All that may come of any file; another exception fails the test."""
    try:
        return read_header(path)
    except ConfigurationError as error:
        return error


def test_a_file_cut_at_any_length_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    padding = -(2 * 34) % 32  # behind the last tensor's data
    path.write_bytes(whole)
    assert isinstance(outcome(path), GgufHeader)
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        found = outcome(path)
        if isinstance(found, GgufHeader):
            assert length >= len(whole) - padding
        else:
            assert "cut short" in str(found) or "too small" in str(found) or "only" in str(found)


@in_one_folder
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_a_file_with_changed_bytes_is_read_or_refused(
    whole: bytes, tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    damaged = bytearray(whole)
    for place, byte in flips:
        damaged[place % len(whole)] = byte
    path = tmp_path / "flipped.gguf"
    path.write_bytes(damaged)
    outcome(path)


@in_one_folder
@given(garbage=st.binary(max_size=400), version=st.sampled_from([2, 3]))
def test_garbage_behind_a_good_beginning_is_read_or_refused(
    tmp_path: Path, garbage: bytes, version: int
) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + garbage)
    outcome(path)
    path.write_bytes(garbage)
    if not garbage.startswith(b"GGUF"):
        assert isinstance(outcome(path), ConfigurationError)


@in_one_folder
@given(
    words=st.lists(
        st.one_of(
            st.integers(0, 16),
            st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]),
        ),
        max_size=40,
    ),
    counts=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_numbers_in_any_place_are_read_or_refused(
    tmp_path: Path, words: list[int], counts: tuple[int, int]
) -> None:
    # Small numbers are lengths, types and counts that lead further in than random bytes do.
    path = tmp_path / "words.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + pair(*ARCHITECTURE)
    path.write_bytes(head + b"".join(struct.pack("<Q", word) for word in words))
    outcome(path)
