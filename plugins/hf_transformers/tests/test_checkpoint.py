"""What is read of a checkpoint before anything is loaded, and what is refused."""

from __future__ import annotations

import contextlib
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

from engineroom import ConfigurationError, EngineRoomError, ModelConfig, ModelNotFoundError
from engineroom.sources import read_safetensors_header
from engineroom_hf_transformers.checkpoint import Checkpoint, find_checkpoint, looks_native
from engineroom_hf_transformers.options import HfTransformersOptions
from engineroom_hf_transformers.sizes import (
    choose_device,
    choose_dtype,
    context_tokens,
    estimate_bytes,
)

Tiny = Callable[[str], Path]
Changed = Callable[..., Path]
PLAIN = HfTransformersOptions(device="cpu")
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


def refusal(source: Path | str, options: HfTransformersOptions = PLAIN) -> str:
    with pytest.raises(ConfigurationError) as caught:
        find_checkpoint(str(source), options)
    return str(caught.value)


def native(source: Path | str) -> bool:
    return looks_native(ModelConfig(model_id="m", source=str(source)))


# ── what is native ───────────────────────────────────────────────────────────────────────────


def test_folders_and_repositories_are_native_and_gguf_files_never(
    tiny: Tiny, tmp_path: Path
) -> None:
    assert native(tiny("llama"))
    assert native(tiny("llama") / "model.safetensors")
    assert native("hf:owner/name")
    assert native("hf:owner/name@main:model.safetensors")
    assert not native("hf:owner/name:model.gguf")
    assert not native(tmp_path)
    assert not native(tmp_path / "absent")
    assert not native("package:absent_module/file")
    assert not native("hf:nonsense")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert not native(tmp_path / "m.gguf")


def test_a_folder_with_only_pickled_weights_is_native_so_that_the_error_comes_from_here(
    copied: Tiny,
) -> None:
    folder = copied("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert native(folder)
    (folder / "pytorch_model.bin").unlink()
    assert not native(folder)


# ── folders ──────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_knows_its_files_and_values(tiny: Tiny) -> None:
    found = find_checkpoint(str(tiny("llama")), PLAIN)
    assert found.format == "safetensors"
    assert [path.name for path in found.weights] == ["model.safetensors"]
    assert found.config["model_type"] == "llama"
    assert set(found.values) == {"F32"}
    assert find_checkpoint(str(tiny("llama") / "model.safetensors"), PLAIN) == found


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        find_checkpoint(str(tmp_path / "absent"), PLAIN)
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    assert "neither a folder" in refusal(tmp_path / "file.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal(tmp_path)


def test_a_model_that_is_an_adapter_as_well_is_refused(copied: Tiny) -> None:
    folder = copied("llama")
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter at once" in refusal(folder)


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="hf:owner/absent"):
        find_checkpoint("hf:owner/absent", PLAIN)
    with pytest.raises(ModelNotFoundError, match=r"hf:owner/absent:model\.gguf"):
        find_checkpoint("hf:owner/absent:model.gguf", PLAIN)


def test_revisions_agree_or_are_given_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def snapshot_download(repo: str, revision: str | None) -> str:  # a fake: no hub is here
        asked.append(revision)
        return str(tiny("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    v2 = PLAIN.model_copy(update={"revision": "v2"})
    find_checkpoint("hf:o/n", PLAIN)
    find_checkpoint("hf:o/n@v1", PLAIN)
    find_checkpoint("hf:o/n", v2)
    find_checkpoint("hf:o/n@v2", v2)
    find_checkpoint("hf:o/n@v1:model.safetensors", PLAIN)
    assert asked == [None, "v1", "v2", "v2", "v1"]
    assert "give one of them" in refusal("hf:o/n@v1", v2)
    assert "models on the hub" in refusal(tiny("llama"), v2)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "no JSON object but list"),
        (b"{}", "model_type"),
        (b'{"model_type": 5}', "model_type"),
        (b'{"model_type": "llama"}', "names no architectures"),
        (b'{"model_type": "llama", "architectures": []}', "names no architectures"),
        (b'{"model_type": "llama", "architectures": [5]}', "names no architectures"),
    ],
)
def test_a_damaged_config_is_refused(copied: Tiny, content: bytes, why: str) -> None:
    folder = copied("llama")
    (folder / "config.json").write_bytes(content)
    message = refusal(folder)
    assert why in message
    assert "config.json" in message


def test_a_huge_config_is_not_read(copied: Tiny) -> None:
    path = copied("llama") / "config.json"
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse
    assert "no model's has more" in refusal(path.parent)


def test_pickled_weights_are_refused_unless_they_are_asked_for(
    copied: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("llama")
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "allow_pickle: true" in message
    options = PLAIN.model_copy(update={"allow_pickle": True})
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(str(folder), options)
    assert "unpickling the weights" in caplog.text
    assert found.format == "pickle"
    assert estimate_bytes(found, options)["cpu"] > size


def test_running_code_of_the_models_own_is_logged(
    copied: Tiny, change_json: Changed, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("llama")
    change_json(folder / "config.json", auto_map={"AutoConfig": "code.Config"})
    options = PLAIN.model_copy(update={"trust_remote_code": True})
    with caplog.at_level(logging.WARNING):
        find_checkpoint(str(folder), PLAIN)
        assert caplog.records == []
        find_checkpoint(str(folder), options)
    assert "Python code that comes with the model" in caplog.text


# ── several files ────────────────────────────────────────────────────────────────────────────


def sharded(folder: Path, weight_map: Any) -> Path:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_files_without_their_index_are_told(copied: Tiny) -> None:
    folder = sharded(copied("llama"), {})
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(
        folder / "model-00001-of-00002.safetensors"
    )
    with pytest.raises(ConfigurationError, match="00001-of-00002.safetensors, but not their index"):
        find_checkpoint(str(folder), PLAIN)


def test_a_gguf_model_in_several_files_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama", split_max_tensors=1)
    for name in "ab":
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigurationError, match="in 2 files, of which Transformers would read"):
        find_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"), PLAIN)


def test_the_files_of_an_index_are_found(copied: Tiny, tiny: Tiny) -> None:
    folder = sharded(copied("llama"), {"a": "model-00001-of-00001.safetensors"})
    found = find_checkpoint(str(folder), PLAIN)
    assert found.values == find_checkpoint(str(tiny("llama")), PLAIN).values
    assert native(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x",
        "C:\\x",
        "..\\x",
        "",
        5,
        None,
        "a\0b",
        "//x/y",
    ],
)
def test_an_index_that_points_outside_is_refused(copied: Tiny, name: Any) -> None:
    assert "points outside" in refusal(sharded(copied("llama"), {"a": name}))


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(copied: Tiny, weight_map: Any) -> None:
    assert "no weight_map" in refusal(sharded(copied("llama"), weight_map))


def test_a_missing_file_of_an_index_is_told(copied: Tiny) -> None:
    assert "absent.safetensors is not there" in refusal(
        sharded(copied("llama"), {"a": "absent.safetensors"})
    )


# ── headers ──────────────────────────────────────────────────────────────────────────────────


@SLOW
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool]),
    cut=st.integers(1, 50),
)
def test_what_the_library_writes_is_read_and_no_less_of_it(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], kind: Any, cut: int
) -> None:
    path = tmp_path_factory.mktemp("st") / "m.safetensors"
    tensors = {str(i): torch.zeros(shape, dtype=kind) for i, shape in enumerate(shapes)}
    save_file(tensors, path, metadata={"format": "pt"})
    assert sum(read_safetensors_header(path).values.values()) == sum(
        t.numel() for t in tensors.values()
    )
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ConfigurationError):
        read_safetensors_header(path)


@SLOW
@given(data=st.data())
def test_a_header_with_wrong_bytes_is_refused_or_read_but_never_crashes(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((tiny("gpt2") / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("st") / "m.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(ConfigurationError):
        read_safetensors_header(path)


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────


def test_a_gguf_file_is_read(smollm2_gguf: Path) -> None:
    found = find_checkpoint(str(smollm2_gguf), PLAIN)
    assert found.format == "gguf"
    assert found.folder == smollm2_gguf.parent
    assert found.config["num_hidden_layers"] == 30
    assert found.config["max_position_embeddings"] == 8192
    assert found.values == {"F32": 134_515_008}
    cache = 8 * 4096 * 2 * 30 * 3 * 64 * 4
    assert estimate_bytes(found, PLAIN) == {"cpu": 4 * 134_515_008 + cache}


@SLOW
@given(data=st.data())
def test_a_damaged_gguf_file_is_refused_or_read_but_never_hangs(
    smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    with smollm2_gguf.open("rb") as file:
        content = bytearray(file.read(data.draw(st.integers(8, 4000))))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    path.write_bytes(content)
    assert "not a usable GGUF file" in refusal(path)


def test_a_gguf_file_that_declares_endless_arrays_is_refused(tmp_path: Path) -> None:
    def written(*values: tuple[str, Any]) -> Path:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + b"".join(struct.pack("<" + c, v) for c, v in values))
        return path

    key = (("Q", 1), ("c", b"k"))
    for kind in (0, 8, 9, 77):
        path = written(
            ("I", 3), ("Q", 0), ("Q", 1), *key, ("I", 9), ("I", kind), ("Q", 2**60), ("Q", 0)
        )
        assert "not a usable GGUF file" in refusal(path)
    assert "version 9" in refusal(written(("I", 9), ("Q", 0), ("Q", 0)))
    assert "its architecture" in refusal(written(("I", 3), ("Q", 0), ("Q", 0)))
    assert "entries" in refusal(written(("I", 3), ("Q", 0), ("Q", 2**63)))


# ── sizes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "values_a_token"),
    [
        ("llama", 2 * 2 * 2 * 16),
        ("qwen2", 2 * 2 * 2 * 16),
        ("qwen3", 2 * 2 * 2 * 32),
        ("gemma", 2 * 2 * 1 * 24),
        ("gemma2", 2 * 2 * 2 * 16),
        ("mistral", 2 * 2 * 2 * 16),
        ("gpt2", 2 * 2 * 4 * 16),
        ("mamba", 0),
        ("t5", 2 * 2 * 4 * 8),
    ],
)
def test_weights_and_cache_are_estimated_from_the_headers(
    tiny: Tiny, kind: str, values_a_token: int
) -> None:
    folder = tiny(kind)
    found = find_checkpoint(str(folder), PLAIN)
    options = PLAIN.model_copy(update={"max_batch_size": 3, "max_context": 100})
    weights = 4 * found.values["F32"]
    size = (folder / "model.safetensors").stat().st_size
    assert 0 <= size - weights < 20_000  # the header
    assert estimate_bytes(found, options) == {"cpu": weights + 3 * 100 * values_a_token * 4}
    half = options.model_copy(update={"dtype": "bfloat16"})
    assert estimate_bytes(found, half)["cpu"] * 2 == estimate_bytes(found, options)["cpu"]


def test_the_estimate_knows_other_layouts() -> None:
    def cache(**config: Any) -> int:
        options = HfTransformersOptions(device="cpu", max_batch_size=1, max_context=8)
        found = Checkpoint(Path(), "safetensors", config, (), {"F32": 0})
        return estimate_bytes(found, options)["cpu"] // (8 * 4)

    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    assert cache(**sizes) == 3 * 4 * 16
    assert cache(text_config=sizes, num_hidden_layers=99) == 3 * 4 * 16
    assert cache(**sizes, multi_query=True) == 3 * 1 * 16
    latent = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 5}
    assert cache(**sizes, **latent) == 3 * 4 * (8 + 5)
    falcon = {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544}
    assert cache(**falcon, multi_query=True) == 4_096
    # Transformers unpacks latent vectors in front of its attention, whose numbers are kept.
    deepseek = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512}
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    assert cache(**deepseek, **heads) == 61 * 128 * (192 + 128)
    assert cache(num_hidden_layers="x", num_attention_heads=True, hidden_size=-1) == 0
    assert cache(num_hidden_layers=1, num_attention_heads=2**30, hidden_size=1) == 0


def test_quantised_weights_are_counted_as_they_will_be() -> None:
    found = Checkpoint(Path(), "safetensors", {}, (), {"F32": 800, "I32": 10})
    bits = {"load_in_8bit": True}
    assert estimate_bytes(found, PLAIN)["cpu"] == 3240
    quantised = PLAIN.model_copy(update={"quantization": bits})
    assert estimate_bytes(found, quantised)["cpu"] == 840
    quantised = PLAIN.model_copy(update={"quantization": {"load_in_4bit": True}})
    assert estimate_bytes(found, quantised)["cpu"] == 440


def test_several_devices_share(tiny: Tiny) -> None:
    found = find_checkpoint(str(tiny("llama")), PLAIN)
    options = HfTransformersOptions(device_map={"model": 0, "lm_head": "cuda:1"})
    estimate = estimate_bytes(found, options)
    assert set(estimate) == {"cuda:0", "cuda:1"}
    one = estimate_bytes(found, PLAIN)["cpu"]
    assert one <= sum(estimate.values()) <= one + 1


def test_the_context_is_what_model_and_option_allow() -> None:
    long = HfTransformersOptions(max_context=9000)
    assert context_tokens({"max_position_embeddings": 512}, PLAIN) == 512
    assert context_tokens({"max_position_embeddings": 100_000}, PLAIN) == 4096
    assert context_tokens({"max_position_embeddings": 100_000}, long) == 9000
    assert context_tokens({"n_positions": 512}, long) == 512
    assert context_tokens({}, PLAIN) == 4096
    assert context_tokens({"max_position_embeddings": "x"}, PLAIN) == 4096


# ── devices and types ────────────────────────────────────────────────────────────────────────


def test_the_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device(PLAIN) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(HfTransformersOptions()) == "cpu"
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ConfigurationError, match="use cpu or auto"):
            choose_device(HfTransformersOptions(device=name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(HfTransformersOptions()) == "cuda:1"
    assert choose_device(HfTransformersOptions(device="cuda:0")) == "cuda:0"
    with pytest.raises(ConfigurationError, match="cuda:0 to cuda:1"):
        choose_device(HfTransformersOptions(device="cuda:2"))


def test_the_type_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    half = HfTransformersOptions(dtype="float16")
    assert choose_dtype({}, PLAIN, "cpu") == "float32"
    assert choose_dtype({"dtype": "float32"}, half, "cpu") == "float16"
    assert choose_dtype({"torch_dtype": "bfloat16"}, PLAIN, "cuda:0") == "bfloat16"
    assert choose_dtype({"text_config": {"dtype": "torch.float16"}}, PLAIN, "cuda:0") == "float16"
    assert choose_dtype({"dtype": ["x"]}, PLAIN, "cuda:0") == "float32"
    for name, there in (("_is_avx512_bf16_supported", False), ("_is_amx_tile_supported", False)):
        monkeypatch.setattr(torch.cpu, name, lambda there=there: there, raising=False)
    assert choose_dtype({"dtype": "bfloat16"}, PLAIN, "cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert choose_dtype({"dtype": "bfloat16"}, PLAIN, "cpu") == "bfloat16"


def test_no_source_that_anyone_can_write_escapes_the_typed_errors(tmp_path: Path) -> None:
    for source in ("", " ", "hf:", "hf:a", "package:x", "\0", "~nobody-here/x", "x" * 5000):
        with pytest.raises(EngineRoomError):
            find_checkpoint(source, PLAIN)


# ── options ──────────────────────────────────────────────────────────────────────────────────────


def test_a_deployment_changes_its_runtime_in_one_line() -> None:
    """What other runtimes call the context and the places is understood."""
    other = HfTransformersOptions.model_validate({"n_ctx": 512, "n_parallel": 3})
    assert (other.max_context, other.max_batch_size) == (512, 3)
    with pytest.raises(ValueError, match="max_context and n_ctx are the same; give one of them"):
        HfTransformersOptions.model_validate({"n_ctx": 512, "max_context": 512})
    with pytest.raises(ValueError, match="max_batch_size"):
        HfTransformersOptions.model_validate({"n_parallel": 0})
