"""What the handler says of itself, what it refuses, loading and unloading; and SmolLM2."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hf_benches import EXACT, NO_END, TEXT, Bench, ask, growth_of_cycles

from engineroom import (
    STRUCTURED_KINDS,
    ChatMessage,
    ConfigurationError,
    GenerationParams,
    HandlerRegistry,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    ModelConfig,
)
from engineroom.prompts.reading import _INLINE_CHARS
from engineroom.testing import EchoHandler
from engineroom_hf_transformers import HuggingFaceTransformersHandler

Make = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def make(tiny: Callable[[str], Path]) -> AsyncIterator[Make]:
    """Make services over a tiny model, with options of it. All are closed at the end."""
    benches: list[Bench] = []

    async def build(kind: str | Path = "llama", **changes: Any) -> Bench:
        bench = Bench(kind if isinstance(kind, Path) else tiny(kind), **changes)
        benches.append(bench)
        await bench.manager.load("m")
        return bench

    async with asyncio.timeout(60):
        yield build
        for bench in benches:
            await bench.service.close(drain_timeout_s=0)


def config(source: Path | str, **options: Any) -> ModelConfig:
    return ModelConfig(model_id="m", source=str(source), options=options)


def chat(*messages: tuple[str, str], **kw: Any) -> InferenceRequest:
    return InferenceRequest(
        model_id="m",
        messages=[ChatMessage(role=role, content=text) for role, text in messages],
        params=GenerationParams(temperature=0, max_new_tokens=12, logit_bias=NO_END),
        **kw,
    )


# ── what it says of itself ───────────────────────────────────────────────────────────────────


def test_the_entry_point_is_found_with_its_api_version() -> None:
    registry = HandlerRegistry(allow=["hf_transformers"])
    assert [handler.name for handler in registry.handlers] == ["hf_transformers"]
    record = next(r for r in registry.plugins if r.name == "hf_transformers")
    assert record.status == "active"
    assert (record.api_version or "").startswith("1")


def test_importing_the_plugin_and_asking_it_loads_no_runtime(tiny: Callable[[str], Path]) -> None:
    code = f"""
import sys
from engineroom import LoadedModel, ModelConfig
from engineroom_hf_transformers import HuggingFaceTransformersHandler
handler = HuggingFaceTransformersHandler()
config = ModelConfig(model_id="m", source={str(tiny("llama"))!r}, options={{"device": "cpu"}})
assert handler.can_load(config) is True
assert handler.can_handle(LoadedModel(model_id="m", model_object=1, config=config)) is False
handler.capabilities()
print(sorted({{"torch", "transformers", "tokenizers", "jinja2"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_honours_every_parameter() -> None:
    capabilities = HuggingFaceTransformersHandler().capabilities()
    assert capabilities.params == set(GenerationParams.model_fields)
    assert capabilities.structured_output == set(STRUCTURED_KINDS)
    assert capabilities.chat
    assert capabilities.tools


def test_folders_and_repositories_are_its_own(
    tiny: Callable[[str], Path], tmp_path: Path, smollm2_gguf: Path
) -> None:
    handler = HuggingFaceTransformersHandler()
    assert handler.can_load(config(tiny("llama"))) is True
    assert handler.can_load(config("hf:owner/name")) is True
    for source in (tmp_path, tmp_path / "absent", smollm2_gguf, "echo:", "hf:o/n:m.gguf"):
        assert handler.can_load(config(source)) is False, source


def test_foreign_models_are_not_handled(tiny: Callable[[str], Path]) -> None:
    handler = HuggingFaceTransformersHandler()
    for name in (None, "hf_transformers", "llamacpp"):
        loaded = LoadedModel(
            model_id="m", model_object=object(), config=config(tiny("llama")), handler_name=name
        )
        assert handler.can_handle(loaded) is False


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
async def test_the_memory_estimate_is_what_the_model_says_when_loaded(
    make: Make, kind: str
) -> None:
    bench = await make(kind)
    loaded = bench.manager.get_loaded_model("m")
    assert loaded is not None
    estimate = HuggingFaceTransformersHandler().estimate_memory(loaded.config)
    assert estimate is not None
    assert estimate["cpu"] == pytest.approx(loaded.memory_bytes, rel=0.02)


async def test_health_counts_and_says_how_full_the_cache_is(make: Make) -> None:
    bench = await make(max_batch_size=1)
    loaded = bench.manager.get_loaded_model("m")
    assert loaded is not None
    handler = HuggingFaceTransformersHandler()
    at_rest = handler.health(loaded)
    assert (at_rest.ok, at_rest.num_requests_running, at_rest.kv_cache_usage) == (True, 0, 0)
    stream = bench.service.stream(ask(max_new_tokens=None))
    await anext(stream)
    queued = asyncio.create_task(bench.service.infer(ask(max_new_tokens=1)))
    await bench.until(lambda: handler.health(loaded).num_requests_waiting == 1)
    busy = handler.health(loaded)
    assert busy.num_requests_running == 1
    assert 0 < (busy.kv_cache_usage or 0) <= 1
    await stream.aclose()
    assert (await queued).generated_tokens == 1
    await bench.idle()


async def test_tokens_are_counted_without_what_the_model_adds(make: Make) -> None:
    bench = await make()
    loaded = bench.manager.get_loaded_model("m")
    assert loaded is not None
    handler = HuggingFaceTransformersHandler()
    count = handler.count_tokens(loaded, "hello there")
    response = await bench.service.infer(ask("hello there", max_new_tokens=1))
    assert response.prompt_tokens == count + 1  # the beginning


async def test_tokens_are_told_as_an_answer_reads_them(make: Make) -> None:
    bench = await make()
    service, special = bench.service, "</s>"
    request = ask(f"hello there{special}", max_new_tokens=1)
    answer = await service.infer(request)
    told = await service.tokenize(request, pieces=True)
    assert len(told.ids) == answer.prompt_tokens == len(told.pieces or ())
    assert told.ids[0] == 0 and told.ids[-1] == 1
    bare = await service.tokenize(request, add_special_tokens=False)
    assert bare.ids == told.ids[1:]
    text = await service.tokenize(request, add_special_tokens=False, special_as_text=True)
    assert 1 not in text.ids
    for ids in (bare.ids, text.ids):
        assert await service.detokenize("m", ids) == f"hello there{special}"
    assert await service.detokenize("m", told.ids) == f"<s>hello there{special}"
    with pytest.raises(ConfigurationError, match="the model's tokens are 0 to"):
        await service.detokenize("m", [10**6])


async def test_explain_says_who_runs_the_model(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bench = await make("mamba")
    (verdict,) = (v for v in bench.service.explain("m").verdicts if v.verdict == "chosen")
    assert verdict.handler == "hf_transformers"
    assert "one request at a time, by generate(): it keeps a state" in verdict.reason
    assert "one at a time, by generate(): it keeps a state" in caplog.text


# ── what it refuses ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"structured_output": {"regex": "("}}, "structured_output.regex: cannot be honoured"),
        ({"logit_bias": {300: 1.0}}, "token 300; the model's tokens are 0 to 299"),
        ({"num_beams": 2**63}, "at most 64 are searched with"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs cannot be told with num_beams"),
    ],
    ids=["structured_output", "logit_bias", "many beams", "beams"],
)
async def test_what_cannot_be_done_is_refused_by_name(
    make: Make, params: dict[str, Any], said: str
) -> None:
    bench = await make()
    response = await bench.service.infer(ask(**params))
    assert response.error_type == "ConfigurationError"
    assert said in response.error_message
    assert (await bench.service.infer(ask(max_new_tokens=1))).error_message is None


async def test_unknown_options_are_refused_with_the_nearest_name(make: Make) -> None:
    from engineroom import ConfigurationError

    with pytest.raises(ConfigurationError, match="did you mean 'max_batch_size'"):
        await make(max_batch_sise=2)


async def test_an_empty_prompt_is_refused_where_the_model_adds_nothing(make: Make) -> None:
    for kind, refused in (("qwen2", True), ("llama", False)):
        bench = await make(kind)
        response = await bench.service.infer(ask("", max_new_tokens=2))
        assert (response.error_type == "ConfigurationError") == refused
        if refused:
            assert "no tokens" in response.error_message


# ── chat ─────────────────────────────────────────────────────────────────────────────────────


async def test_messages_equal_the_same_text_rendered_by_hand(make: Make) -> None:
    bench = await make("qwen2")  # a prompt gets no beginning, which a template would have to write
    found = await bench.service.infer(chat(("system", "be"), ("user", "hi")))
    text = "<|start|>system\nbe<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    by_hand = await bench.service.infer(ask(text, max_new_tokens=12))
    assert found.error_message is None
    assert (found.generated_text, found.prompt_tokens) == (
        by_hand.generated_text,
        by_hand.prompt_tokens,
    )


async def test_roles_that_the_template_refuses_are_a_clear_error(make: Make) -> None:
    bench = await make(chat_template="{{ raise_exception('no users here') }}")
    response = await bench.service.infer(chat(("user", "1")))
    assert response.error_type == "ConfigurationError"
    assert "no users here" in response.error_message


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TOOL_TEMPLATE = "{% if tools %}{{ tools[0].function.name * 9 }}{% endif %}{{ messages[0].content }}"


async def test_tools_reach_the_template_unless_none_may_be_chosen(make: Make) -> None:
    bench = await make(chat_template=TOOL_TEMPLATE, tool_format="hermes")
    counts = [
        (await bench.service.infer(chat(("user", "hi"), **kw))).prompt_tokens
        for kw in (
            {},
            {"tools": TOOLS},
            {"tools": TOOLS, "tool_choice": "auto"},
            {"tools": TOOLS, "tool_choice": "none"},
        )
    ]
    assert counts[0] == counts[3] < counts[1] == counts[2]


async def test_a_long_prompt_is_tokenised_beside_the_event_loop(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make()
    threads: list[threading.Thread] = []
    codec = type(bench.engine.codec)

    def note(read: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            threads.append(threading.current_thread())
            return read(*args)

        return noted

    monkeypatch.setattr(codec, "prompt", note(codec.prompt))
    monkeypatch.setattr(codec, "chat", note(codec.chat))
    await bench.service.infer(ask("short", max_new_tokens=1))
    await bench.service.infer(ask("x" * (_INLINE_CHARS + 1)))
    await bench.service.infer(chat(("user", "x" * _INLINE_CHARS), ("user", "y")))
    # However short: the template is foreign code.
    await bench.service.infer(chat(("user", "x")))
    assert [t is threading.main_thread() for t in threads] == [True, False, False, False]


async def test_a_template_that_loops_ends_and_holds_up_nobody(make: Make) -> None:
    looping = "{% for i in range(99999) %}{% for j in range(9999) %}{{ i }}{% endfor %}{% endfor %}"
    bench = await make(chat_template=looping)
    waiting = asyncio.create_task(bench.service.infer(chat(("user", "a"))))
    answered = 0
    while not waiting.done():
        (await bench.service.infer(ask("hello", max_new_tokens=1))).raise_for_error()
        answered += 1
    response = await waiting
    assert response.error_type == "ConfigurationError"
    assert "it takes more than" in response.error_message
    assert answered > 3


# ── loading and unloading ────────────────────────────────────────────────────────────────────


async def test_a_cancelled_load_leaves_nothing_behind(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    from engineroom_hf_transformers import engine as engine_module

    made: list[Any] = []
    init = engine_module.HfEngine.__init__

    def slow(self: Any, *args: Any) -> None:
        entered.set()
        assert go_on.wait(20)
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(engine_module.HfEngine, "__init__", slow)
    source = config(tiny("llama"), **EXACT)
    task = asyncio.create_task(HuggingFaceTransformersHandler().load_model(source))
    await asyncio.to_thread(entered.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    async with asyncio.timeout(20):
        while not (made and made[0].parts.model is None):
            await asyncio.sleep(0.001)
    assert made[0]._ended


async def test_two_models_answer_side_by_side(tiny: Callable[[str], Path]) -> None:
    models = [
        ModelConfig(model_id=kind, source=str(tiny(kind)), options=EXACT)
        for kind in ("llama", "mamba")
    ]

    def to(model: str) -> InferenceRequest:
        return ask("hello").model_copy(update={"model_id": model})

    async with LLMInferenceService(
        LLMModelManager(config=models), handlers=[HuggingFaceTransformersHandler()]
    ) as service:
        one, two = await service.infer(to("llama")), await service.infer(to("mamba"))
        again = await asyncio.gather(*(service.infer(to(m)) for m in ("llama", "mamba") * 3))
    assert one.error_message is two.error_message is None
    assert one.generated_text != two.generated_text
    assert {r.generated_text for r in again[::2]} == {one.generated_text}
    assert {r.generated_text for r in again[1::2]} == {two.generated_text}


@pytest.mark.parametrize("kind", ["llama", "mamba"])
async def test_loading_and_unloading_again_and_again_keeps_memory_flat(
    write_checkpoint: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    wide = {"hidden_size": 256} | ({"intermediate_size": 2048} if kind == "llama" else {})
    path = write_checkpoint(kind, tmp_path / "wide", **wide)
    # A process of its own: what other tests have left in this one comes and goes as it likes.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        grown = await asyncio.wrap_future(pool.submit(growth_of_cycles, path, 12))
    # Weights and cache of a cycle are several MiB: keeping those of each would show.
    assert grown < 12 << 20


async def test_a_model_is_run_by_the_runtime_that_loaded_it(tiny: Callable[[str], Path]) -> None:
    manager = LLMModelManager(
        config=[config(tiny("llama"), **EXACT), ModelConfig(model_id="echo", source="echo:")]
    )
    handlers = [EchoHandler(), HuggingFaceTransformersHandler()]
    async with LLMInferenceService(manager, handlers) as service:
        a = await service.infer(ask("x", max_new_tokens=2))
        b = await service.infer(InferenceRequest(model_id="echo", prompt="x"))
        assert (a.handler, b.handler) == ("hf_transformers", "echo")


# ── SmolLM2 ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.real_model
async def test_smollm2_answers_alike_streamed_and_whole_alone_and_beside(smollm2: Path) -> None:
    def question(text: str, **kw: Any) -> InferenceRequest:
        stops = kw.pop("stop_sequences", None)
        return InferenceRequest(
            model_id="m",
            messages=[ChatMessage(role="user", content=text)],
            params=GenerationParams(**({"temperature": 0, "max_new_tokens": 24} | kw)),
            stop_sequences=stops,
        )

    requests = [
        question("Write one sentence about the sea."),
        question("Count from one to ten.", stop_sequences=[", 4", "five"]),
        question("Say hello in French.", temperature=0.8, seed=1),
    ]
    bench = Bench(smollm2, max_context=512)
    async with asyncio.timeout(120), bench.service:
        whole = [await bench.service.infer(request) for request in requests]
        beside = await asyncio.gather(*(bench.service.infer(request) for request in requests))
        for request, one, other in zip(requests, whole, beside, strict=True):
            chunks, response = await bench.streamed(request)
            assert one.error_message is None
            text = "".join(chunks)
            assert text == one.generated_text == other.generated_text != ""
            for name in ("finish_reason", "prompt_tokens", "generated_tokens", "stop_sequence"):
                assert getattr(response, name) == getattr(one, name)
        assert any(word in (whole[0].generated_text or "") for word in ("sea", "ocean", "water"))


@pytest.mark.real_model
async def test_smollm2_greedy_answers_are_those_of_generate(smollm2: Path) -> None:
    from hf_benches import Reference, Rig, load

    reference = Reference(smollm2)
    with Rig(load(smollm2), max_context=512) as rig:
        for prompt in ("The capital of France is", TEXT[:300]):
            tokens = rig.tokens(prompt)
            found = (await rig.answer(tokens)).tokens
            assert found == reference.generate(
                tokens, 24, eos_token_id=sorted(rig.engine.parts.end_ids)
            )
