"""What the files of a model say of it, and that no file keeps the server from answering."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")

from engineroom.server.model_facts import ModelFacts, facts_of

CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "max_position_embeddings": 512}


async def test_a_folder_of_safetensors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 64}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for number, size in enumerate((10, 20)):
        part = tmp_path / f"model-{number}.safetensors"
        part.write_bytes(b"x" * size)
        os.utime(part, (1000 + number, 1000 + number))
    assert await facts_of(str(tmp_path)) == ModelFacts(
        size=30,
        modified=1001.0,
        format="safetensors",
        family="llama",
        quantization="BF16",
        context_tokens=512,
        embedding_length=64,
        template="{{ messages }}",
        info={"general.architecture": "llama"},
    )
    (tmp_path / "model-0.safetensors").write_bytes(b"x" * 11)  # another one is read anew
    assert (await facts_of(str(tmp_path))).size == 31


@pytest.mark.parametrize("source", ["echo:", "/nowhere/at/all", "hf:nobody/nothing", "package:x/y"])
async def test_what_is_not_here_says_nothing(source):
    assert await facts_of(source) == ModelFacts()


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": 1, "hidden_size": "x"}'])
async def test_a_folder_that_says_nonsense(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    facts = await facts_of(str(tmp_path))
    assert (facts.family, facts.embedding_length, facts.size) == ("", None, None)


async def test_a_gguf_file_that_was_cut(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    assert await facts_of(str(path)) == ModelFacts()
    path.write_bytes(b"no model")
    assert (await facts_of(str(path))).size == 8
