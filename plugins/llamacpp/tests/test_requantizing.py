"""Requantised copies: made once, never stale, whole or not at all; hints and estimates."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engineroom import (
    ConfigurationError,
    GenerationParams,
    InferenceRequest,
    ModelConfig,
    ResourceNotAvailableError,
)
from engineroom_llamacpp import LlamaCppHandler, requantizing
from engineroom_llamacpp.library import load
from engineroom_llamacpp.loading import estimate_bytes
from engineroom_llamacpp.metadata import read_header
from engineroom_llamacpp.options import LlamaCppOptions
from engineroom_llamacpp.requantizing import requantized

Make = Callable[..., Awaitable[Any]]
Q4_0, Q8_0 = LlamaCppOptions(requantize="q4_0"), LlamaCppOptions(requantize="q8_0")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINEROOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llamacpp"


@pytest.fixture
def source(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    shutil.copy(tiny_model, path)
    return path


def made(path: Path, options: LlamaCppOptions = Q4_0) -> Path:
    return requantized(path, read_header(path), options, "m")


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.gguf")) if cache.is_dir() else []


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix not in (".gguf", ".lock")]


def types(path: Path) -> set[int]:
    return {tensor.kind for tensor in read_header(path).tensors if len(tensor.shape) > 1}


@pytest.mark.parametrize(("options", "kind"), [(Q4_0, 2), (Q8_0, 8)])
def test_a_copy_is_made_once_and_found_again(
    source: Path,
    cache: Path,
    options: LlamaCppOptions,
    kind: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "engineroom.llamacpp"):
        first = made(source, options)
    assert "model 'm': its weights are requantised from F32" in caplog.text
    assert "answers otherwise" in caplog.text
    assert kind in types(first)
    assert first.parent == cache
    before = first.stat()
    assert made(source, options) == first
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    assert leftovers(cache) == []
    # And of what is in that quantisation already there is none.
    assert made(first, options) == first
    assert copies(cache) == [first]


def test_without_the_option_nothing_is_made(source: Path, cache: Path) -> None:
    assert made(source, LlamaCppOptions()) == source
    assert not cache.exists()


@pytest.mark.parametrize("way", ["written", "in place", "replaced"])
def test_a_source_that_changes_has_another_copy_and_the_old_one_goes(
    source: Path, cache: Path, way: str
) -> None:
    other = made(source, Q8_0)
    first = made(source)
    old = source.stat()
    if way == "written":
        source.write_bytes(source.read_bytes() + b"\0")
    elif way == "in place":  # with the times it had
        with source.open("rb+") as file:
            file.seek(-500, os.SEEK_END)
            file.write(b"\x01" * 100)
        os.utime(source, ns=(old.st_atime_ns, old.st_mtime_ns))
    else:
        content = bytearray(source.read_bytes())
        content[-500:-400] = b"\x02" * 100
        source.unlink()
        source.write_bytes(content)
        os.utime(source, ns=(old.st_atime_ns, old.st_mtime_ns))
    second = made(source)
    assert second != first
    assert copies(cache) == sorted([other, second])  # of the other kind, it is its own affair


def test_two_models_of_one_name_have_a_copy_each(tiny_model: Path, cache: Path) -> None:
    paths = [cache.parent.parent / name / "model.gguf" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir(parents=True)
        shutil.copy(tiny_model, path)
    found = [made(path) for path in paths]
    assert copies(cache) == sorted(found)
    assert len(set(found)) == 2


def test_many_at_once_make_one(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = load()
    original, calls = library.llama_model_quantize, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(library, "llama_model_quantize", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(made(source))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(calls) == 1
    assert leftovers(cache) == []


def test_many_processes_at_once_make_one(source: Path, cache: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from engineroom_llamacpp import requantizing\n"
        "from engineroom_llamacpp.metadata import read_header\n"
        "from engineroom_llamacpp.options import LlamaCppOptions\n"
        "original = requantizing._write\n"
        "requantizing._write = lambda *a: (print('made', flush=True), original(*a))\n"
        "path = Path(sys.argv[1])\n"
        "sys.stdin.readline()\n"
        "options = LlamaCppOptions(requantize='q4_0')\n"
        "print(requantizing.requantized(path, read_header(path), options, 'm'))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0].split() for process in processes]
    lines = [line for lines in told for line in lines]
    assert [process.returncode for process in processes] == [0] * 4
    assert lines.count("made") == 1
    assert set(lines) - {"made"} == set(map(str, copies(cache)))
    assert leftovers(cache) == []


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_copy_that_is_cut_short_is_made_anew(
    source: Path, cache: Path, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    copy = made(source)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:left])
    estimated = estimate_bytes(str(source), Q4_0)
    assert estimated is not None  # of the source: there is no copy
    assert made(source) == copy
    assert copy.read_bytes() == whole
    assert "is damaged, and is made anew" in caplog.text
    assert leftovers(cache) == []


def test_what_a_killed_process_left_is_deleted(source: Path, cache: Path) -> None:
    copy = made(source)
    copy.unlink()
    (cache / f"{copy.stem}abcdefgh.part").write_bytes(b"a" * 1000)
    assert made(source) == copy
    assert leftovers(cache) == []


def test_a_folder_without_room_is_told_before_anything_is_written(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(ResourceNotAvailableError, match="1 MiB are free.*ENGINEROOM_CACHE"):
        made(source)
    assert copies(cache) == []
    assert leftovers(cache) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX's")
def test_a_write_that_fails_leaves_nothing_behind(source: Path, cache: Path) -> None:
    # A limit on the size of files stands for the full disk; it ends this process's own writes.
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from engineroom import ResourceNotAvailableError\n"
        "from engineroom_llamacpp.metadata import read_header\n"
        "from engineroom_llamacpp.options import LlamaCppOptions\n"
        "from engineroom_llamacpp.requantizing import requantized\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "path = Path(sys.argv[1])\n"
        "options = LlamaCppOptions(requantize='q8_0')\n"
        "try:\n"
        "    requantized(path, read_header(path), options, 'm')\n"
        "except ResourceNotAvailableError as error:\n"
        "    print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "cannot be written" in process.stdout
    assert "ENGINEROOM_CACHE" in process.stdout
    assert copies(cache) == []
    assert leftovers(cache) == []
    assert made(source, Q8_0).is_file()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(source: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.parent.chmod(0o500)
    with pytest.raises(ResourceNotAvailableError, match="cannot be written"):
        made(source)


def test_a_folder_that_is_a_file_is_told(source: Path, cache: Path) -> None:
    cache.parent.write_text("")
    with pytest.raises(ResourceNotAvailableError, match="cannot be written"):
        made(source)


def test_what_llama_cpp_cannot_make_is_told_with_its_reason(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load(), "llama_model_quantize", lambda *_: 1)
    with pytest.raises(ConfigurationError, match="cannot make q4_0 of.*leave requantize out"):
        made(source)
    assert leftovers(cache) == []


def test_a_source_that_changes_meanwhile_is_not_kept(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load()
    original = library.llama_model_quantize

    def slow(*arguments: Any) -> Any:
        found = original(*arguments)
        source.write_bytes(source.read_bytes() + b"\0")
        return found

    monkeypatch.setattr(library, "llama_model_quantize", slow)
    with pytest.raises(ConfigurationError, match="changed while it was read"):
        made(source)
    assert copies(cache) == []
    assert leftovers(cache) == []


async def test_a_model_is_loaded_from_its_copy(make: Make, source: Path, cache: Path) -> None:
    bench = await make(source, requantize="q8_0")
    (copy,) = copies(cache)
    assert bench.engine.model.path == copy
    request = InferenceRequest(
        model_id="m", prompt="hello", params=GenerationParams(max_new_tokens=8, temperature=0)
    )
    response = await bench.service.infer(request)
    assert response.error_message is None
    assert bench.engine.model.memory_bytes == read_header(copy).tensor_bytes


@pytest.mark.parametrize("options", [Q4_0, Q8_0])
def test_the_estimate_is_that_of_the_copy(
    source: Path, cache: Path, options: LlamaCppOptions
) -> None:
    plain = estimate_bytes(str(source), LlamaCppOptions())
    before = estimate_bytes(str(source), options)
    assert plain is not None
    assert before is not None
    assert not cache.exists()  # an estimate makes nothing
    header = read_header(made(source, options))
    after = estimate_bytes(str(source), options)
    assert after is not None
    difference = plain["cpu"] - after["cpu"]
    assert difference == read_header(source).tensor_bytes - header.tensor_bytes
    assert before["cpu"] == pytest.approx(after["cpu"], rel=0.1)


def quantised(path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    raw = np.zeros((64, gguf.quants.quant_shape_to_byte_shape((64, 256), kind)[1]), np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "system", "told"),
    [
        ("Q4_1", "AVX2 = 1 | REPACK = 1", True),
        ("Q5_K", "AVX2 = 1 | REPACK = 1", True),
        ("Q5_K", "NEON = 1 | DOTPROD = 1 | REPACK = 1", False),
        ("Q4_0", "AVX2 = 1 | REPACK = 1", False),
        ("Q4_K", "AVX2 = 1 | REPACK = 1", False),
        ("Q8_0", "AVX2 = 1 | REPACK = 1", False),
        ("F16", "AVX2 = 1 | REPACK = 1", False),
        ("Q4_0", "SSE3 = 1 | REPACK = 1", True),
        ("Q4_1", "AVX2 = 1", False),
    ],
)
def test_weights_without_a_fast_kernel_are_told_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    system: str,
    told: bool,
) -> None:
    monkeypatch.setattr(load(), "llama_print_system_info", system.encode)
    path = quantised(tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    with caplog.at_level(logging.INFO, "engineroom.llamacpp"):
        requantizing.hint(read_header(path), LlamaCppOptions(), "m")
    assert ("the option requantize: q4_0" in caplog.text) is told
    if told:
        assert f"most of its weights are {kind}" in caplog.text


def test_the_library_tells_of_its_kernels_in_these_words() -> None:
    system = load().llama_print_system_info().decode()
    assert system.startswith("CPU")
    assert " = 1" in system


async def test_the_handler_loads_with_the_option_in_words(source: Path, cache: Path) -> None:
    config = ModelConfig(model_id="m", source=str(source), options={"requantize": "q5_k"})
    with pytest.raises(ConfigurationError, match="requantize"):
        await LlamaCppHandler().load_model(config)
    assert not cache.exists()
