"""What README.md shows works as it stands, and so does the demo."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from engineroom import (
    EngineRoomError,
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    load_deployment,
)
from engineroom.testing import EchoHandler

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def deployment(tmp_path, monkeypatch):
    """A folder with the README's deployment.yaml, which is where its examples are run."""
    (text,) = blocks("yaml")
    (tmp_path / "deployment.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "deployment.yaml"


def test_the_deployment_file_is_valid(deployment):
    (model,) = load_deployment(deployment).models
    assert model.model_id == "smollm2"
    assert model.runtime == "llamacpp"


RUNTIMES = {"llamacpp": "llama_cpp", "hf_transformers": "transformers"}
HANDLERS = {
    "engineroom_llamacpp": "LlamaCppHandler",
    "engineroom_hf_transformers": "HuggingFaceTransformersHandler",
    "engineroom_vllm": "VLLMHandler",
}


@pytest.mark.real_model
@pytest.mark.parametrize("number", [0, 1])  # 2 is for a server: test_server.py
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_examples_run_on_each_runtime(deployment, capsys, runtime, number):
    pytest.importorskip(RUNTIMES[runtime], reason=f"needs the runtime {runtime}")
    text = deployment.read_text(encoding="utf-8")
    assert text.count("runtime: llamacpp") == 1  # one line changes
    deployment.write_text(text.replace("runtime: llamacpp", f"runtime: {runtime}"))
    exec(compile(blocks("python")[number], f"README.md block {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"(eos_token|stop_sequence|length)", printed)
    assert " Paris" in printed


def test_the_table_of_runtimes_is_what_they_claim():
    pattern = r"^\| (`\w+`).*? \| (yes|no) \| (yes|no) \| (yes|no) \|$"
    table = {row[0]: row[1:] for row in re.findall(pattern, README, re.MULTILINE)}
    fields = ("embeddings", "rerank", "prompt_token_ids", "adapters", "tools", "structured_output")
    assert [name.strip("`") for name in table] == list(fields)
    for place, (package, handler) in enumerate(HANDLERS.items()):
        claimed = getattr(pytest.importorskip(package), handler)().capabilities()
        for name in fields:
            assert table[f"`{name}`"][place] == ("yes" if getattr(claimed, name) else "no"), name


def test_the_runtime_in_fifteen_lines_is_one():
    namespace: dict[str, object] = {}
    exec(compile(blocks("python")[3], "README.md block 3", "exec"), namespace)
    handler = namespace["ShoutHandler"]()
    manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "shout:"}]})
    with LLMInferenceService(manager, handlers=[handler]) as service:
        request = InferenceRequest(model_id="m", prompt="mind the gap", stop_sequences=["GAP"])
        response = service.run(request)
        response.raise_for_error()
        assert "".join(service.stream_sync(request)) == response.generated_text
    assert response.generated_text == "MIND! THE! "
    assert response.finish_reason == "stop_sequence"
    assert response.generated_tokens == 3


# ── examples/demo.py ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_the_demo_answers_and_sums_up_on_the_last_line(demo, capsys):
    responses = await demo.answer(["all right", "again"], "echo:", handlers=[EchoHandler()])
    assert [response.generated_text for response in responses] == ["all right", "again"]
    lines = capsys.readouterr().out.splitlines()
    assert "all right" in lines
    assert re.fullmatch(r"echo: · echo · 1 tokens · [\d.]+ tokens/s · eos_token", lines[-1])


@pytest.mark.real_model
async def test_what_the_demo_asks_is_answered_with_sense(demo):
    pytest.importorskip("llama_cpp", reason="needs the runtime llamacpp")
    responses = await demo.answer(demo.QUESTIONS, params=GenerationParams(temperature=0))
    assert "Paris" in responses[0].generated_text
    assert "energy" in responses[1].generated_text
    assert {response.finish_reason for response in responses} == {"eos_token"}


async def test_the_demo_says_what_went_wrong(demo):
    manager_has_no_such_file = "no-such-file.gguf"
    with pytest.raises(EngineRoomError, match=r"no-such-file\.gguf"):
        await demo.answer(["hello"], manager_has_no_such_file, handlers=[EchoHandler()])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--temperature", "9"], 2, "temperature: Input should be less than or equal to 2"),
        (["--max-new-tokens", "-1"], 2, "max_new_tokens: "),
    ],
)
def test_the_demo_refuses_what_is_out_of_range(demo, capsys, arguments, status, message):
    with pytest.raises(SystemExit) as exit_:
        demo.main(arguments)
    assert exit_.value.code == status
    assert message in capsys.readouterr().err


def test_the_demo_fails_in_one_line(demo, capsys):
    assert demo.main(["--model", "no-such-file.gguf", "hello"]) in {1, 2}
    assert re.fullmatch(r"demo: [^\n]+\n", capsys.readouterr().err)
