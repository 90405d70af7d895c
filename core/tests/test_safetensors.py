"""Headers of safetensors files, and every way in which they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engineroom import ConfigurationError
from engineroom.sources import read_safetensors_header


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[" * 50_000, b""),
        ([], b""),
        ({"a": 5}, b""),
        ({"a": entry()}, b"1234567"),  # cut short
        ({"a": entry()}, b"123456789"),  # longer than it says
        ({"a": entry(dtype="X")}, b"12345678"),
        ({"a": entry(dtype=["F32"])}, b"12345678"),
        ({"a": entry(shape=[3])}, b"12345678"),
        ({"a": entry(shape=[-2])}, b"12345678"),
        ({"a": entry(shape=[2.0])}, b"12345678"),
        ({"a": entry(shape=[True, 2])}, b"12345678"),
        ({"a": entry(shape=5)}, b"12345678"),
        ({"a": entry(shape="12")}, b"12345678"),
        ({"a": entry(shape=[2**40, 2**40], offsets=[0, 8])}, b"12345678"),
        ({"a": entry(offsets=[8, 0])}, b"12345678"),
        ({"a": entry(offsets=[0, 8, 9])}, b"12345678"),
        ({"a": entry(offsets=[0, 2**70])}, b"12345678"),
        ({"a": entry(), "b": entry()}, b"12345678"),  # overlap
        ({"a": entry(offsets=[4, 12])}, b"123456781234"),  # a gap
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    path = with_header(tmp_path / "m.safetensors", header, data)
    with pytest.raises(ConfigurationError, match="not a usable safetensors file"):
        read_safetensors_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, b"\xff" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError):
        read_safetensors_header(path)


def test_a_header_says_what_the_tensors_are_made_of(tmp_path: Path) -> None:
    tensors = {
        "a": entry(),
        "b": entry("BF16", (2, 3), (8, 20)),
        "c": entry("F4", (2,), (20, 21)),
        "__metadata__": {"format": "pt"},
    }
    header = read_safetensors_header(with_header(tmp_path / "m.safetensors", tensors, bytes(21)))
    assert header.dtypes == {"a": "F32", "b": "BF16", "c": "F4"}
    assert header.values == {"F32": 2, "BF16": 6, "F4": 2}
