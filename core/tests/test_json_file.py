"""JSON of anyone's is read within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from engineroom import ConfigurationError
from engineroom.sources import read_json


def test_objects_and_lists_are_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"a": [1]}', encoding="utf-8")
    assert read_json(path, dict) == {"a": [1]}
    path.write_text("[1]", encoding="utf-8")
    assert read_json(path, list) == [1]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "no JSON object but list"),
        (b"null", "no JSON object but NoneType"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"some.json' is damaged.*{why}"):
        read_json(path, dict)


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(b"[]")
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ConfigurationError, match="no model's has more than 16 MiB"):
        read_json(path, list)
    with pytest.raises(ConfigurationError, match="no model's has more than 64 MiB"):
        read_json(path, list, limit=64 << 20)


def test_what_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_json(path, dict)
