"""Hostile files against the real library: each is refused or can be used; none ends the process."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import pytest
from gguf_bytes import Entry, f32, flag, i32, image, numbers, string, strings, u32

from engineroom.sources import gguf_header as reader

SCRIPT = Path(__file__).parent / "hostile.py"
Pairs = dict[str, bytes]


class Parts:
    """A good file in pieces, to be put together wrongly."""

    def __init__(self, path: Path) -> None:
        found = gguf.GGUFReader(str(path))
        self.pairs: Pairs = {
            name: b"".join(bytes(part) for part in field.parts[2:])
            for name, field in found.fields.items()
            if not name.startswith("GGUF.")
        }
        self.entries: list[Entry] = [
            (
                tensor.name,
                [int(n) for n in tensor.shape],
                int(tensor.tensor_type),
                int(tensor.data_offset - found.data_offset),
            )
            for tensor in found.tensors
        ]
        whole = path.read_bytes()
        self.head = len(whole[: found.data_offset])
        self.whole = whole
        self.data = whole[found.data_offset :]

    def image(
        self,
        changes: dict[str, bytes | None],
        entries: list[Entry] | None = None,
        data: bytes | None = None,
    ) -> bytes:
        merged: dict[str, bytes | None] = {**self.pairs, **changes}
        pairs = {key: value for key, value in merged.items() if value is not None}
        return image(
            pairs,
            self.entries if entries is None else entries,
            self.data if data is None else data,
        )


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    return Parts(tiny_model)


@pytest.fixture
def outcomes(tmp_path: Path) -> Callable[[Iterable[tuple[str, bytes]]], dict[str, str]]:
    """What came of files, by the name of what is wrong with each."""

    def run(images: Iterable[tuple[str, bytes]]) -> dict[str, str]:
        paths: dict[str, Path] = {}
        for number, (name, content) in enumerate(images):
            paths[name] = tmp_path / f"{number}.gguf"
            paths[name].write_bytes(content)
        lines = "".join(f"{path}\n" for path in paths.values())
        process = subprocess.run(
            [sys.executable, str(SCRIPT)],
            input=lines,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        answers = [line[3:] for line in process.stdout.splitlines() if line.startswith("=> ")]
        if process.returncode:
            culprit = list(paths)[len(answers)]
            pytest.fail(f"{culprit} ended the process: {process.returncode}\n{process.stderr}")
        return dict(zip(paths, answers, strict=True))

    return run


VALUES: Final[dict[str, bytes | None]] = {
    "0": u32(0),
    "1": u32(1),
    "3": u32(3),
    "65": u32(65),
    "2^31": u32(2**31),
    "2^32-1": u32(2**32 - 1),
    "-1": i32(-1),
    "0.0": f32(0.0),
    "nan": f32(float("nan")),
    "true": flag(True),
    "text": string(b"\xff" * 20),
    "no numbers": numbers("I", []),
    "zeros": numbers("I", [0, 0]),
    "600 fours": numbers("I", [4] * 600),
    "strings": strings([b"a"]),
    "absent": None,
}
FURTHER: Final = (
    "llama.attention.key_length",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.expert_group_count",
    "llama.nextn_predict_layers",
    "llama.pooling_type",
    "llama.attention.sliding_window",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.unknown_token_id",
    "general.alignment",
    "split.count",
)


def test_any_value_under_any_key(parts: Parts, outcomes: Any) -> None:
    images = (
        (f"{key}={name}", parts.image({key: value}))
        for key in (*parts.pairs, *FURTHER)
        for name, value in VALUES.items()
    )
    found = outcomes(images)
    assert set(found.values()) == {"refused", "used"}  # some of each, and nothing else


def vocabularies() -> Iterator[tuple[str, dict[str, bytes | None]]]:
    many = 269
    lists = {
        "plain": None,
        "few": strings([b"a", b"b"]),
        "without bytes": strings(b"q%d" % i for i in range(many)),
        "empty": strings([b""] * many),
        "zeros": strings(b"\0" * (i + 1) for i in range(many)),
        "not UTF-8": strings(b"\xff" * (i + 1) for i in range(many)),
    }
    for model in (b"llama", b"gpt2", b"t5", b"none", b""):
        for name, tokens in lists.items():
            changes: dict[str, bytes | None] = {"tokenizer.ggml.model": string(model)}
            if tokens is not None:
                changes["tokenizer.ggml.tokens"] = tokens
                changes["tokenizer.ggml.token_type"] = numbers("i", [1] * many)
            for merges in (None, strings([b"h e", b"nospace", b"", b" "])):
                for beginning in (1, 5000):
                    yield (
                        f"{model!r} {name} {merges is None} {beginning}",
                        {
                            **changes,
                            "tokenizer.ggml.merges": merges,
                            "tokenizer.ggml.bos_token_id": u32(beginning),
                        },
                    )
    for length in (0, 5, 268):
        yield f"{length} types", {"tokenizer.ggml.token_type": numbers("i", [1] * length)}
        yield f"{length} scores", {"tokenizer.ggml.scores": numbers("f", [1.0] * length)}


def test_any_vocabulary(parts: Parts, outcomes: Any) -> None:
    found = outcomes((name, parts.image(changes)) for name, changes in vocabularies())
    assert set(found.values()) == {"refused", "used"}
    for name in ("b'llama' without bytes True 1", "b'llama' empty True 1", "5 types", "5 scores"):
        assert found[name] == "refused", name


def test_vocabularies_that_would_be_read_for_ever(parts: Parts, outcomes: Any) -> None:
    """RWKV's tokenizer goes on only where what it reads begins with a token; WordPiece tries every
    length up to that of the longest one.
    """
    many = 269
    first = [b"\\x%02x" % byte for byte in range(0x80, 0x100)]
    all_bytes = [*first, *(bytes([byte]) for byte in range(0x80) if byte != 0x5C), b"\\\\"]
    words = [b"<s>", *(b"aw%d" % i for i in range(many - len(all_bytes) - 1))]
    escaped = [b"\\t", b"\\xe5b", b"\\'\"c"]
    rwkv = {
        "whole": [*words, *all_bytes],
        "no a": [*words, b"zz", *(token for token in all_bytes if token != b"a")],
        "no E5": [*words[:-1], escaped[1], *(t for t in all_bytes if t != b"\\xe5"), b"zz"],
        "escapes": [*words[:-3], *escaped, *all_bytes],
    }

    def images() -> Iterator[tuple[str, bytes]]:
        for name, tokens in rwkv.items():
            assert len(tokens) == many, (name, len(tokens))
            changes = {
                "tokenizer.ggml.model": string(b"rwkv"),
                "tokenizer.ggml.tokens": strings(tokens),
                "tokenizer.ggml.token_type": numbers("i", [1] * many),
            }
            yield name, parts.image(dict(changes))
        for length in (256, 257):
            changes = {
                "tokenizer.ggml.model": string(b"bert"),
                "tokenizer.ggml.tokens": strings(
                    [b"w%d" % i for i in range(268)] + [b"a" * length]
                ),
                "tokenizer.ggml.token_type": numbers("i", [1] * many),
                "tokenizer.ggml.cls_token_id": u32(2),
                "tokenizer.ggml.seperator_token_id": u32(3),
            }
            yield f"piece of {length}", parts.image(dict(changes))

    assert outcomes(images()) == {
        "whole": "used",
        "no a": "refused",
        "no E5": "refused",
        "escapes": "used",
        "piece of 256": "used",
        "piece of 257": "refused",
    }


def test_rotary_dimensions_fit_the_heads(parts: Parts, outcomes: Any) -> None:
    key = "llama.rope.dimension_count"
    found = outcomes((str(n), parts.image({key: u32(n)})) for n in (2, 16, 17, 18, 2**31))
    assert found["16"] == "used"
    assert {found["17"], found["18"], found[str(2**31)]} == {"refused"}


def test_any_tensors(parts: Parts, outcomes: Any) -> None:
    name, shape, kind, offset = parts.entries[0]
    others = parts.entries[1:]
    wrong: dict[str, list[Entry]] = {
        "none": [],
        "one missing": others,
        "one twice": [*parts.entries, parts.entries[0]],
        "another name": [("x" * 70, shape, kind, offset), *others],
        "an empty name": [("", shape, kind, offset), *others],
        "a negative extent": [(name, [2**63, 1], kind, offset), *others],
        "extents that overflow": [(name, [2**32, 2**32], kind, offset), *others],
        "turned": [(name, shape[::-1], kind, offset), *others],
        "another's place": [(name, shape, kind, others[0][3]), *others],
        "far away": [(name, shape, kind, 2**40), *others],
        "a place that overflows": [(name, shape, kind, 2**64 - 32), *others],
        "shifted": [(name, shape, kind, offset + 1), *others],
        "the other way round": parts.entries[::-1],
        **{f"type {n}": [(name, shape, n, offset), *others] for n in range(45)},
        "an unknown type": [(name, shape, 10_000, offset), *others],
    }
    found = outcomes((what, parts.image({}, entries)) for what, entries in wrong.items())
    used = {what for what, outcome in found.items() if outcome == "used"}
    # The type that it has, and those that take no more room than it.
    assert used <= {f"type {n}" for n in range(45)}
    assert f"type {kind}" in used


def test_any_type_of_values_anywhere(parts: Parts, outcomes: Any) -> None:
    def changed() -> Iterator[tuple[str, bytes]]:
        for number in range(8):  # each kind of tensor that the file has
            for kind, (values, size) in reader._BLOCKS.items():
                entries, place = [], 0
                for i, (name, shape, own, _) in enumerate(parts.entries):
                    type_ = kind if i == number else own
                    per, block = reader._BLOCKS[type_]
                    entries.append((name, shape, type_, place))
                    place += -(-(math.prod(shape) // per * block) // 32) * 32
                if parts.entries[number][1][0] % values == 0:
                    assert size
                    data = bytes(place)
                    yield f"{parts.entries[number][0]}: {kind}", parts.image({}, entries, data)

    assert set(outcomes(changed()).values()) == {"refused", "used"}


def test_a_file_cut_short_anywhere(parts: Parts, outcomes: Any) -> None:
    whole = parts.whole
    draw = random.Random(7)
    places = {0, 3, 4, 8, 16, 24, parts.head - 1, parts.head, parts.head + 1, len(whole) - 33}
    places |= {draw.randrange(parts.head) for _ in range(60)}
    places |= {draw.randrange(parts.head, len(whole) - 33) for _ in range(20)}
    found = outcomes((f"cut at {place}", whole[:place]) for place in sorted(places))
    assert set(found.values()) == {"refused"}


def test_any_changed_bytes_of_the_header(parts: Parts, outcomes: Any) -> None:
    draw = random.Random(11)

    def damaged() -> Iterator[tuple[str, bytes]]:
        for number in range(250):
            content = bytearray(parts.whole)
            places = [draw.randrange(parts.head) for _ in range(draw.choice((1, 1, 2, 5)))]
            for place in places:
                content[place] = draw.choice((0, 1, 9, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            yield f"{number}: {places}", bytes(content)

    assert set(outcomes(damaged()).values()) <= {"refused", "used"}
