"""The first load in a process of its own: what ends it, what it leaves, when it is left out."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from llama_bert import write_bert

from engineroom import ConfigurationError
from engineroom_llamacpp import trial
from engineroom_llamacpp.metadata import read_header
from engineroom_llamacpp.trial import stand_trial

Make = Callable[..., Awaitable[Any]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINEROOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llamacpp" / "trials"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every process that is started."""
    found: list[Any] = []
    original = subprocess.run

    def run(*arguments: Any, **more: Any) -> Any:
        found.append(arguments)
        return original(*arguments, **more)

    monkeypatch.setattr(subprocess, "run", run)
    return found


@pytest.fixture
def hostile(tiny_model: Path, tmp_path: Path) -> Path:
    """A file whose header is good, and over which llama.cpp ends the process.

    An architecture of mixtures of experts, which asserts that there are any.
    """
    path = tmp_path / "hostile.gguf"
    path.write_bytes(_renamed(tiny_model.read_bytes(), b"llama", b"smallthinker"))
    read_header(path)
    return path


def _renamed(content: bytes, old: bytes, new: bytes) -> bytes:
    """The file with another architecture, in its name and in its keys, and the data in place."""
    end = content.rindex(b"blk.1.ffn_down.weight") + 21 + 4 + 16 + 4 + 8
    keys = content[:end]
    key = b"general.architecture"
    at = keys.index(key) + len(key) + 4
    keys = keys[:at] + struct.pack("<Q", len(new)) + new + keys[at + 8 + len(old) :]
    place = 0
    while (place := keys.find(old + b".", place)) >= 0:
        length = struct.unpack_from("<Q", keys, place - 8)[0]
        if 0 < length < 64 and keys[place : place + length].isascii():
            keys = (
                keys[: place - 8]
                + struct.pack("<Q", length - len(old) + len(new))
                + new
                + keys[place + len(old) :]
            )
        place += len(new)
    data = content[-(-end // 32) * 32 :]
    return keys + bytes(-len(keys) % 32) + data


async def test_a_file_that_ends_the_process_is_refused_by_name(
    make: Make, hostile: Path, cache: Path
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await make(hostile, trial=True)
    assert str(hostile) in str(caught.value)
    assert "llama.cpp ended the process in which it was tried" in str(caught.value)
    assert "GGML_ASSERT" in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


async def test_a_good_file_is_tried_once_as_long_as_it_stays(
    make: Make, tiny_model: Path, tmp_path: Path, cache: Path, started: list[Any]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model.read_bytes())
    for _ in range(2):
        await make(path, trial=True)
        assert len(started) == 1
    path.write_bytes(tiny_model.read_bytes() + b"\0")
    await make(path, trial=True)
    assert len(started) == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("kind", ["encoder", "generator", "damaged"])
def test_models_of_either_kind_stand_the_trial(
    tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write_bert(tmp_path / "bert.gguf") if kind == "encoder" else tiny_model
    if kind == "damaged":
        path = tmp_path / "cut.gguf"
        path.write_bytes(tiny_model.read_bytes()[:5000])
    # Refused in words would pass, too: here nothing may be refused at all.
    strict = trial._CODE.replace("attempt(sys.argv[2])", "sys.exit(attempt(sys.argv[2]))")
    monkeypatch.setattr(trial, "_CODE", strict)
    if kind == "damaged":
        with pytest.raises(ConfigurationError):
            stand_trial(path)
    else:
        stand_trial(path)
        assert len(list(cache.iterdir())) == 1


def test_what_is_refused_in_words_is_left_to_the_load(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    content = tiny_model.read_bytes()
    path.write_bytes(content.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    stand_trial(path)


async def test_it_can_be_left_out(make: Make, tiny_model: Path, started: list[Any]) -> None:
    await make(tiny_model, trial=False)
    assert started == []


def test_without_a_python_to_start_there_is_none(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # as PyInstaller says it
    stand_trial(tiny_model)
    monkeypatch.delattr(sys, "frozen")
    monkeypatch.setattr(sys, "executable", "")
    stand_trial(tiny_model)
    assert started == []


def test_where_nothing_can_be_noted_it_is_repeated(
    tiny_model: Path, cache: Path, started: list[Any]
) -> None:
    cache.parent.parent.write_text("no folder")
    for number in (1, 2):
        stand_trial(tiny_model)
        assert len(started) == number


def test_a_trial_that_does_not_end_is_refused(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(trial, "_CODE", "import time; time.sleep(60)")
    with pytest.raises(ConfigurationError, match=r"was not loaded in 0\.2 s"):
        stand_trial(tiny_model)


def test_a_trial_that_takes_all_memory_is_refused(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from engineroom_llamacpp import trial; trial._MOST_BYTES = 200 << 20; "
        "trial._watch_memory(); [bytes([n % 256]) * (1 << 22) for n in range(2000)]"
    )
    monkeypatch.setattr(trial, "_CODE", growing)
    with pytest.raises(ConfigurationError, match="status 70: it took more than 200 MiB of memory"):
        stand_trial(tiny_model)


@pytest.mark.parametrize("code", ["import os; os.abort()", "import sys; sys.exit(7)"])
def test_any_other_end_is_a_refusal(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(trial, "_CODE", code)
    with pytest.raises(ConfigurationError, match="it does not say why"):
        stand_trial(tiny_model)
