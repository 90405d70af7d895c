"""Estimates by device, with devices that a fake tells of; and learnt positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engineroom import ConfigurationError, ModelConfig
from engineroom.sources import GgufHeader
from engineroom_llamacpp import LlamaCppHandler, library, sizes
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.library import device_name, gpu_devices
from engineroom_llamacpp.metadata import read_header
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions
from engineroom_llamacpp.sizes import check_positions, estimate

GIB = 1 << 30
# Of the tiny model with two layers: 64 wide, two heads of 16 for keys and values, F32.
EMBEDDING = 269 * 64 * 4
OUTPUT = 269 * 64 * 4 + 64 * 4
CACHE = 512 * (32 + 32) * 2


@pytest.fixture
def header(tiny_model: Path) -> GgufHeader:
    return read_header(tiny_model)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def there_are(*free: int) -> None:
        found = [(f"cuda:{number}", each) for number, each in enumerate(free)]
        monkeypatch.setattr(sizes, "gpu_devices", lambda: found)

    return there_are


def layer(header: GgufHeader) -> int:
    return sum(t.size for t in header.tensors if t.name.startswith("blk.0."))


def test_without_gpus_all_is_the_cpus(header: GgufHeader, gpus: Any) -> None:
    gpus()
    assert estimate(header, LlamaCppOptions()) == {"cpu": header.tensor_bytes + 2 * CACHE}
    gpus(GIB)
    assert set(estimate(header, LlamaCppOptions(n_gpu_layers=0))) == {"cpu"}


def test_all_layers_and_the_output_go_to_the_gpu(header: GgufHeader, gpus: Any) -> None:
    gpus(GIB)
    block = layer(header) + CACHE
    assert estimate(header, LlamaCppOptions()) == {"cpu": EMBEDDING, "cuda:0": 2 * block + OUTPUT}
    everything = LlamaCppOptions(n_gpu_layers=99)
    assert estimate(header, everything) == estimate(header, LlamaCppOptions())


def test_the_last_layers_go_first(header: GgufHeader, gpus: Any) -> None:
    gpus(GIB)
    block = layer(header) + CACHE
    for count, on_gpu in ((1, OUTPUT), (2, OUTPUT + block), (3, OUTPUT + 2 * block)):
        found = estimate(header, LlamaCppOptions(n_gpu_layers=count))
        assert found["cuda:0"] == on_gpu
        assert sum(found.values()) == header.tensor_bytes + 2 * CACHE


def test_layers_are_split_by_shares_or_by_free_memory(header: GgufHeader, gpus: Any) -> None:
    block = layer(header) + CACHE
    gpus(GIB, GIB)
    assert estimate(header, LlamaCppOptions(tensor_split=[2, 1])) == {
        "cpu": EMBEDDING,
        "cuda:0": 2 * block,
        "cuda:1": OUTPUT,
    }
    assert "cuda:1" not in estimate(header, LlamaCppOptions(tensor_split=[1]))
    assert "cuda:0" not in estimate(header, LlamaCppOptions(tensor_split=[0, 1]))
    gpus(GIB, 2 * GIB)
    by_memory = estimate(header, LlamaCppOptions())
    assert by_memory["cuda:0"] == block
    assert by_memory["cuda:1"] == block + OUTPUT
    assert estimate(header, LlamaCppOptions(tensor_split=[0, 0])) == by_memory


def test_one_gpu_of_several_takes_it_all(header: GgufHeader, gpus: Any) -> None:
    gpus(GIB, GIB)
    assert set(estimate(header, LlamaCppOptions(main_gpu=1))) == {"cpu", "cuda:1"}
    assert set(estimate(header, LlamaCppOptions(main_gpu=5))) == {"cpu"}  # the load refuses it


def test_a_tied_output_layer_is_a_copy(tmp_path: Path, gpus: Any) -> None:
    path = tmp_path / "tied.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.ones((10, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = LlamaCppOptions(n_ctx=8, n_parallel=1)
    cache = 8 * 64 * 2
    gpus(GIB)
    assert estimate(read_header(path), options) == {"cpu": 1280, "cuda:0": 1280 + 128 + cache}
    gpus()
    assert estimate(read_header(path), options) == {"cpu": 1280 + 128 + cache}


def test_layers_with_heads_of_their_own_have_caches_of_their_own(
    header: GgufHeader, gpus: Any
) -> None:
    gpus()
    own = gguf_array(2, 1)
    metadata = {**header.metadata, "llama.attention.head_count_kv": own}
    changed = GgufHeader(3, metadata, 0, 0, 0, header.tensors)
    expected = header.tensor_bytes + CACHE + CACHE // 2
    assert estimate(changed, LlamaCppOptions()) == {"cpu": expected}


def gguf_array(*values: int) -> Any:
    from engineroom.sources import GgufArray

    return GgufArray(len(values), values)


def test_the_cache_is_what_the_attention_keeps(gpus: Any) -> None:
    gpus()

    def cache(architecture: str, **sizes: int) -> int:
        """Numbers of a token; two bytes each."""
        metadata = {"general.architecture": architecture, f"{architecture}.context_length": 64}
        metadata |= {f"{architecture}.{key.replace('__', '.')}": n for key, n in sizes.items()}
        found = estimate(GgufHeader(3, metadata, 0, 0, 0), LlamaCppOptions(n_ctx=8))
        return found["cpu"] // (8 * 2)

    heads = {"attention__head_count": 71, "attention__head_count_kv": 1}
    assert cache("falcon", block_count=32, embedding_length=4544, **heads) == 4_096
    latent = {
        "block_count": 61,
        "embedding_length": 7168,
        "attention__head_count": 128,
        "attention__head_count_kv": 1,
        "attention__key_length": 576,
        "attention__value_length": 512,
        "attention__key_length_mla": 192,
        "attention__value_length_mla": 128,
        "attention__kv_lora_rank": 512,
        "rope__dimension_count": 64,
    }
    assert cache("deepseek2", **latent) == 35_136
    old = latent | {
        "attention__head_count_kv": 128,
        "attention__key_length": 192,
        "attention__value_length": 128,
        "attention__key_length_mla": 0,
    }
    assert cache("deepseek2", **old) == 61 * 128 * (192 + 128)  # unpacked by older converters


def test_the_handler_gives_it_by_device(tiny_model: Path, gpus: Any) -> None:
    gpus(GIB)
    config = ModelConfig(model_id="m", source=str(tiny_model), options={"n_gpu_layers": 1})
    found = LlamaCppHandler().estimate_memory(config)
    assert found is not None
    assert found["cuda:0"] == OUTPUT


def test_devices_are_named_as_core_names_them() -> None:
    names = {"CUDA0": "cuda:0", "CUDA12": "cuda:12", "ROCm1": "cuda:1", "Vulkan0": "vulkan:0"}
    assert {name: device_name(name) for name in names} == names
    assert device_name("Metal") == "metal:0"


def test_a_build_without_gpus_is_told_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llama_cpp"
    (folder / "lib").mkdir(parents=True)

    class Spec:
        origin = str(folder / "__init__.py")

    monkeypatch.setattr(library.importlib.util, "find_spec", lambda _: Spec)
    for name in ("libggml-base.so", "libggml-cpu.so"):
        (folder / "lib" / name).touch()
    assert not library._may_have_gpus()

    def must_not_load() -> Any:
        raise AssertionError("the library was loaded for an estimate")

    monkeypatch.setattr(library, "load", must_not_load)
    assert gpu_devices() == []
    (folder / "lib" / "libggml-cuda.so").touch()
    assert library._may_have_gpus()
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda _: None)
    assert not library._may_have_gpus()


def test_the_library_is_asked_for_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real one, as if it might have GPUs; a build for the CPU alone has none.
    monkeypatch.setattr(library, "_may_have_gpus", lambda: True)
    monkeypatch.setattr(library.load(), "llama_supports_gpu_offload", lambda: True)
    for name, free in gpu_devices():
        assert name.partition(":")[2].isdecimal()
        assert free >= 0


def test_positions_that_were_learnt_have_an_end(header: GgufHeader) -> None:
    from engineroom.sources import GgufTensor

    learnt = (*header.tensors, GgufTensor("position_embd.weight", (64, 512), 0, 0, 4))
    changed = GgufHeader(3, header.metadata, 0, 0, 0, learnt)
    with pytest.raises(ConfigurationError, match="n_ctx=513 is more than the 512 positions"):
        check_positions(changed, LlamaCppOptions(n_ctx=513))
    check_positions(changed, LlamaCppOptions(n_ctx=512))
    check_positions(changed, LlamaCppOptions())
    check_positions(header, LlamaCppOptions(n_ctx=5000))


def test_the_cache_is_as_large_as_the_library_makes_it(tiny_model: Path, gpus: Any) -> None:
    gpus()
    options = LlamaCppOptions(n_ctx=512, n_threads=1, flash_attn="off")
    model = LlamaModel(tiny_model, options)
    try:
        context = LlamaContext(model, options)
        try:
            header = read_header(tiny_model)
            assert model.memory_bytes == header.tensor_bytes
            cells = context.n_ctx
            assert estimate(header, options)["cpu"] - header.tensor_bytes == 2 * CACHE * cells / 512
        finally:
            context.close()
    finally:
        model.close()
