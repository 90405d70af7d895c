"""A model's folder: what it is, how large it will be, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engineroom import ConfigurationError
from engineroom_vllm.folder import is_model_folder, read_folder

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
    "dtype": "float32",
    "eos_token_id": 2,
}


def write(folder: Path, config: Any = CONFIG, weights: int | None = 1000) -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    if weights is not None:
        (folder / "model.safetensors").write_bytes(b"\0" * weights)
    return folder


def refusal(path: Path) -> str:
    assert is_model_folder(path) is False
    with pytest.raises(ConfigurationError) as caught:
        read_folder(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_sizes_come_from_the_configuration_and_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "second.safetensors").write_bytes(b"\0" * 500)
    assert is_model_folder(path) is True
    folder = read_folder(path)
    assert folder.architectures == ("LlamaForCausalLM",)
    assert folder.weight_bytes == 1500
    assert folder.token_values == 2 * 30 * 3 * 64
    assert folder.token_bytes("auto") == folder.token_values * 4
    assert folder.token_bytes("bfloat16") == folder.token_values * 2
    assert folder.loaded_bytes("auto") == folder.loaded_bytes("float32") == 1500
    assert folder.loaded_bytes("float16") == 750
    assert folder.end_tokens == {2}


def test_the_context_is_what_is_wanted_or_was_trained_but_not_endless(tmp_path: Path) -> None:
    folder = read_folder(write(tmp_path / "m"))
    assert (folder.context(None), folder.context(64), folder.context(10**6)) == (8192, 64, 10**6)
    long = read_folder(write(tmp_path / "m", {**CONFIG, "max_position_embeddings": 131072}))
    assert long.context(None) == 8192
    short = read_folder(write(tmp_path / "m", {**CONFIG, "max_position_embeddings": 512}))
    assert short.context(None) == 512
    silent = read_folder(write(tmp_path / "m", {"architectures": ["X"]}))
    assert silent.context(None) == 8192
    assert silent.token_values == 0
    assert silent.dtype == "auto"
    old = read_folder(write(tmp_path / "m", {"architectures": ["X"], "torch_dtype": "float16"}))
    assert old.dtype == "float16"
    odd = read_folder(write(tmp_path / "m", {"architectures": ["X"], "dtype": ["int3"]}))
    assert odd.dtype == "auto"


def tensors(**dtypes: str) -> bytes:
    """A safetensors file's header."""
    empty = {"shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, **{n: {"dtype": d, **empty} for n, d in dtypes.items()}}
    )
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        (tensors(a="F32", b="F32", ids="I64"), "float32"),
        (tensors(a="BF16", b="BF16", norm="F32"), "bfloat16"),
        (tensors(a="F16"), "float16"),
        (tensors(a="U8", b="U8", scale="BF16"), "bfloat16"),
        (tensors(a="I32"), "auto"),
        (tensors(), "auto"),
        (b"", "auto"),
        (b"\xff" * 8, "auto"),
        (b"\x02" + b"\0" * 7 + b"[]", "auto"),
        (b"\x05" + b"\0" * 7 + b"oops!", "auto"),
        (b"\x09" + b"\0" * 7 + b'{"a": 1}\n', "auto"),
    ],
)
def test_weights_say_their_type_where_the_configuration_does_not(
    tmp_path: Path, weights: bytes, dtype: str
) -> None:
    path = write(tmp_path / "m", {"architectures": ["X"]})
    (path / "model.safetensors").write_bytes(weights)
    assert read_folder(path).dtype == dtype
    assert read_folder(write(path, {**CONFIG, "dtype": "float16"}, None)).dtype == "float16"


def test_encoders_are_known_by_their_kind(tmp_path: Path) -> None:
    for kind, encoder in (("bert", True), ("xlm-roberta", True), ("llama", False), (None, False)):
        config = {**CONFIG, "architectures": ["SomeModel"], "model_type": kind}
        assert read_folder(write(tmp_path / "m", config)).encoder is encoder


def test_tokens_that_end_come_from_both_files(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 2]}), encoding="utf-8"
    )
    assert read_folder(path).end_tokens == {2, 7}


def test_the_text_part_of_a_larger_model_counts(tmp_path: Path) -> None:
    inner = {k: v for k, v in CONFIG.items() if k != "architectures"}
    path = write(tmp_path / "m", {"architectures": ["Both"], "text_config": inner})
    assert read_folder(path).token_values == 2 * 30 * 3 * 64


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"text"', "\x00", "[" * 100_000, '{"architectures": []}', "{}"],
)
def test_a_damaged_configuration_is_told(tmp_path: Path, content: str) -> None:
    message = refusal(write(tmp_path / "m", content))
    assert "damaged" in message or "architectures" in message


def test_a_configuration_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    with (path / "config.json").open("r+b") as file:
        file.truncate(17 << 20)
    assert "16 MiB" in refusal(path)


def test_a_file_of_several_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "model.safetensors").rename(path / "model-00001-of-00003.safetensors")
    said = "lacks model-00002-of-00003.safetensors, model-00003-of-00003.safetensors of its weights"
    with pytest.raises(ConfigurationError, match=said):
        read_folder(path)


def test_wrong_places_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    assert "no weights" in refusal(write(tmp_path / "bare", weights=None))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert "engineroom-llamacpp" in refusal(file)
    other = tmp_path / "model.bin"
    other.write_bytes(b"")
    assert "folders" in refusal(other)


def test_odd_values_of_a_configuration_count_as_not_said(tmp_path: Path) -> None:
    odd = {**CONFIG, "num_hidden_layers": "30", "eos_token_id": [True, "2", None, 5]}
    folder = read_folder(write(tmp_path / "m", odd))
    assert folder.token_values == 0
    assert folder.end_tokens == {5}


def test_a_token_takes_what_its_attention_keeps(tmp_path: Path) -> None:
    falcon = {
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "hidden_size": 4544,
        "multi_query": True,
    }
    latent = {
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "hidden_size": 7168,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }
    for sizes, numbers in ((falcon, 4_096), (latent, 35_136)):
        path = write(tmp_path / "m", {"architectures": ["X"], "dtype": "bfloat16", **sizes})
        assert read_folder(path).token_values == numbers
        assert read_folder(path).token_bytes("auto") == 2 * numbers
