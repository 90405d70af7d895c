"""Loading, unloading and what the handler says of itself; and the real SmolLM2."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from llama_benches import ask

from engineroom import (
    ChatMessage,
    ConfigurationError,
    GenerationParams,
    HandlerRegistry,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    ModelConfig,
    ModelNotFoundError,
)
from engineroom.testing import EchoHandler
from engineroom_llamacpp import LlamaCppHandler, handler, loading
from engineroom_llamacpp.model import LlamaModel

Make = Callable[..., Awaitable[Any]]


def config(source: Path | str, **options: Any) -> ModelConfig:
    return ModelConfig(model_id="m", source=str(source), options=options)


# ── what it says of itself ───────────────────────────────────────────────────────────────────────


def test_the_entry_point_is_found_with_its_api_version() -> None:
    registry = HandlerRegistry(allow=["llamacpp"])
    assert [handler.name for handler in registry.handlers] == ["llamacpp"]
    record = next(r for r in registry.plugins if r.name == "llamacpp")
    assert record.status == "active"
    assert (record.api_version or "").startswith("1")


def test_importing_the_plugin_and_asking_it_loads_no_runtime(tiny_model: Path) -> None:
    code = f"""
import sys
from engineroom import LoadedModel, ModelConfig
from engineroom_llamacpp import LlamaCppHandler
handler = LlamaCppHandler()
config = ModelConfig(model_id="m", source={str(tiny_model)!r})
assert handler.can_load(config) is True
assert handler.can_handle(LoadedModel(model_id="m", model_object=1, config=config)) is False
assert handler.estimate_memory(config)["cpu"] > 0
handler.capabilities()
print(sorted({{"llama_cpp", "torch", "transformers", "jinja2"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_gguf_files_are_its_own(tiny_model: Path, tmp_path: Path, smollm2_source: str) -> None:
    handler = LlamaCppHandler()
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"not one")
    assert handler.can_load(config(tiny_model)) is True
    assert handler.can_load(config(smollm2_source)) is True
    assert handler.can_load(config("hf:owner/name:model.Q4_0.gguf")) is True
    for source in (other, tmp_path, tmp_path / "absent", "hf:owner/name", "echo:", "package:no/x"):
        assert handler.can_load(config(source)) is False


def test_foreign_models_are_not_handled(tiny_model: Path) -> None:
    handler = LlamaCppHandler()
    for name in (None, "llamacpp", "vllm"):
        loaded = LoadedModel(
            model_id="m", model_object=object(), config=config(tiny_model), handler_name=name
        )
        assert handler.can_handle(loaded) is False


async def test_the_memory_estimate_is_what_the_model_says_when_loaded(make: Make) -> None:
    bench = await make(n_ctx=512)
    loaded = bench.manager.get_loaded_model("m")
    estimate = LlamaCppHandler().estimate_memory(loaded.config)
    assert estimate is not None
    assert estimate["cpu"] == pytest.approx(loaded.memory_bytes, rel=0.01)


# ── loading ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "only 0 bytes"),
        (b"GGUF", "only 4 bytes"),
        (b"hello, I am not a model at all, sorry", "instead of b'GGUF'"),
        (b"GGUF" + b"\xff" * 400, "version"),
    ],
)
async def test_files_that_are_no_models_are_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="not a usable GGUF file") as caught:
        await LlamaCppHandler().load_model(config(path))
    assert said in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.99])
async def test_a_file_cut_short_is_refused_and_the_process_lives(
    tiny_model: Path, tmp_path: Path, share: float
) -> None:
    data = tiny_model.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ConfigurationError, match="cut short|too small"):
        await LlamaCppHandler().load_model(config(path))


async def test_what_llama_cpp_itself_refuses_is_a_typed_error(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = tiny_model.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lmaol")
    path = tmp_path / "unknown.gguf"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="llama.cpp cannot load"):
        await LlamaCppHandler().load_model(config(path))


async def test_a_missing_file_is_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf"):
        await LlamaCppHandler().load_model(config(tmp_path / "absent.gguf"))


async def test_a_folder_stands_for_its_only_gguf_file(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="0 GGUF files"):
        await LlamaCppHandler().load_model(config(tmp_path))
    (tmp_path / "a.gguf").write_bytes(tiny_model.read_bytes())
    handler = LlamaCppHandler()
    await handler.unload_model(await handler.load_model(config(tmp_path, n_ctx=256)))
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="2 GGUF files"):
        await handler.load_model(config(tmp_path))


async def test_a_folder_stands_for_its_only_model_in_several_files(
    make: Make, tiny_model: Path, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    write_model(tmp_path / "m.gguf", split=8)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert LlamaCppHandler().can_load(config(tmp_path)) is True
    whole, parts = await make(tiny_model), await make(tmp_path)
    request = ask("hello", max_new_tokens=8, temperature=0)
    answers = [await bench.service.infer(request) for bench in (whole, parts)]
    assert answers[0].generated_text == answers[1].generated_text
    assert answers[1].error_message is None
    # What other runtimes load as well is theirs, unless the deployment names this one.
    (tmp_path / "config.json").write_text("{}")
    assert LlamaCppHandler().can_load(config(tmp_path)) is False
    (tmp_path / files[1]).unlink()
    with pytest.raises(ConfigurationError, match="in 3 files, of which m-00002-of-00003.gguf is"):
        await LlamaCppHandler().load_model(config(tmp_path))


async def test_unknown_options_are_refused_with_the_nearest_name(tiny_model: Path) -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'n_parallel'"):
        await LlamaCppHandler().load_model(config(tiny_model, n_paralel=2))


async def test_a_missing_or_foreign_lora_adapter_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    handler = LlamaCppHandler()
    with pytest.raises(ConfigurationError, match="lora: there is no file"):
        await handler.load_model(config(tiny_model, lora=[str(tmp_path / "no.gguf")]))
    with pytest.raises(ConfigurationError, match="lora: llama.cpp cannot apply"):
        await handler.load_model(config(tiny_model, lora=[str(tiny_model)]))


async def test_the_options_reach_the_context(make: Make) -> None:
    bench = await make(n_ctx=256, n_parallel=3, n_batch=64, n_threads=1)
    engine = bench.engine
    assert (engine.n_ctx, engine.threads, engine._context.n_batch) == (256, 1, 64)
    assert engine.sequences.count == 3 + 8  # more, for what may be used again


async def test_a_template_that_loops_ends_and_holds_up_nobody(make: Make) -> None:
    looping = "{% for i in range(99999) %}{% for j in range(9999) %}{{ i }}{% endfor %}{% endfor %}"
    bench = await make(chat_template=looping)
    waiting = asyncio.create_task(
        bench.service.infer(ask(prompt=None, messages=[{"role": "user", "content": "a"}]))
    )
    answered = 0
    while not waiting.done():
        (await bench.service.infer(ask(max_new_tokens=1))).raise_for_error()
        answered += 1
    response = await waiting
    assert response.error_type == "ConfigurationError"
    assert "it takes more than" in response.error_message
    assert answered > 3


async def test_a_cancelled_load_leaves_nothing_behind(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, unloaded = threading.Event(), threading.Event(), threading.Event()
    load, unload = loading.load_engine, loading.unload_engine

    def slow(*args: Any) -> Any:
        entered.set()
        go_on.wait(20)
        return load(*args)

    def told(engine: Any) -> None:
        unload(engine)
        unloaded.set()

    monkeypatch.setattr(handler, "load_engine", slow)
    monkeypatch.setattr(handler, "unload_engine", told)
    task = asyncio.create_task(LlamaCppHandler().load_model(config(tiny_model, n_ctx=256)))
    await asyncio.to_thread(entered.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(unloaded.wait, 20)


async def test_two_models_answer_side_by_side(
    tiny_model: Path, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    other = write_model(tmp_path / "other.gguf", seed=5)
    models = [
        ModelConfig(model_id=name, source=str(path), options={"n_ctx": 256})
        for name, path in (("one", tiny_model), ("two", other))
    ]
    params = GenerationParams(temperature=0, max_new_tokens=20, logit_bias={2: -100.0})

    def ask(model: str) -> InferenceRequest:
        return InferenceRequest(model_id=model, prompt="hello", params=params)

    async with LLMInferenceService(
        LLMModelManager(config=models), handlers=[LlamaCppHandler()]
    ) as service:
        one, two = await service.infer(ask("one")), await service.infer(ask("two"))
        again = await asyncio.gather(*(service.infer(ask(m)) for m in ("one", "two") * 4))
    assert one.generated_text != two.generated_text
    assert {r.generated_text for r in again[::2]} == {one.generated_text}
    assert {r.generated_text for r in again[1::2]} == {two.generated_text}


async def test_loading_and_unloading_again_and_again_keeps_memory_flat(
    tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    path = write_model(tmp_path / "wide.gguf", layers=4)
    handler = LlamaCppHandler()
    process = psutil.Process()

    async def cycle() -> None:
        loaded = await handler.load_model(config(path, n_ctx=8192, n_parallel=8))
        request = InferenceRequest(
            model_id="m", prompt="hi", params=GenerationParams(max_new_tokens=2)
        )
        assert (await handler.infer(loaded, request)).generated_tokens is not None
        await handler.unload_model(loaded)

    for _ in range(3):
        await cycle()
    before = process.memory_info().rss
    for _ in range(20):
        await cycle()
    # The cache alone is 16 MiB a cycle: keeping any of them would show.
    grown = process.memory_info().rss - before
    assert grown < 16 << 20
    assert not [t for t in threading.enumerate() if t.name.startswith("llamacpp-")]


async def test_a_model_is_run_by_the_runtime_that_loaded_it(tiny_model: Path) -> None:
    manager = LLMModelManager(
        config=[
            config(tiny_model, n_ctx=256),
            ModelConfig(model_id="echo", source="echo:"),
        ]
    )
    async with LLMInferenceService(manager, [EchoHandler(), LlamaCppHandler()]) as service:
        a = await service.infer(InferenceRequest(model_id="m", prompt="x"))
        b = await service.infer(InferenceRequest(model_id="echo", prompt="x"))
        assert (a.handler, b.handler) == ("llamacpp", "echo")
        verdicts = [(v.handler, v.verdict) for v in service.explain("m").verdicts]
        # Behind them come those that are installed and not listed.
        assert verdicts[:2] == [("echo", "no"), ("llamacpp", "chosen")]


def test_closing_a_model_twice_is_harmless(tiny_model: Path) -> None:
    from engineroom_llamacpp.options import LlamaCppOptions

    model = LlamaModel(tiny_model, LlamaCppOptions())
    model.close()
    model.close()


# ── SmolLM2 ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def smollm2(smollm2_source: str) -> ModelConfig:
    return ModelConfig(model_id="smollm2", source=smollm2_source, options={"n_ctx": 2048})


@pytest.fixture
async def service(smollm2: ModelConfig) -> AsyncIterator[LLMInferenceService]:
    async with (
        asyncio.timeout(120),
        LLMInferenceService(LLMModelManager(config=[smollm2]), [LlamaCppHandler()]) as service,
    ):
        yield service


def question(text: str, **kw: Any) -> InferenceRequest:
    kw.setdefault("temperature", 0)
    kw.setdefault("max_new_tokens", 32)
    stops = kw.pop("stop_sequences", None)
    return InferenceRequest(
        model_id="smollm2",
        messages=[ChatMessage(role="user", content=text)],
        params=GenerationParams(**kw),
        stop_sequences=stops,
    )


@pytest.mark.real_model
async def test_smollm2_answers_alike_streamed_and_whole(service: LLMInferenceService) -> None:
    for request in (
        question("Write one sentence about the sea."),
        question("Count from one to ten.", stop_sequences=[", 4", "five"]),
        question("Say hello in French.", temperature=0.8, seed=1),
    ):
        whole = await service.infer(request)
        stream = service.stream(request)
        text = "".join([chunk async for chunk in stream])
        assert whole.error_message is None
        assert text == whole.generated_text != ""
        for name in ("finish_reason", "prompt_tokens", "generated_tokens", "stop_sequence"):
            assert getattr(stream.response, name) == getattr(whole, name)


@pytest.mark.real_model
async def test_eight_requests_to_smollm2_two_of_them_cancelled_midway(
    service: LLMInferenceService,
) -> None:
    lengths = [8, 12, 16, 20, 24, 28, 64, 64]

    async def read(number: int) -> Any:
        stream = service.stream(
            question(
                f"Tell me a story about the number {number}.",
                max_new_tokens=lengths[number],
                temperature=number / 8,
                seed=number,
            )
        )
        chunks = 0
        async for _ in stream:
            chunks += 1
            if number >= 6 and chunks == 3:
                await stream.aclose()
        return stream.response

    responses = await asyncio.gather(*(read(n) for n in range(8)))
    for number, response in enumerate(responses):
        assert response.error_message is None
        if number >= 6:
            assert response.finish_reason == "cancelled"
            assert response.generated_tokens < 64
        elif response.finish_reason == "length":
            assert response.generated_tokens == lengths[number]
        else:
            assert response.finish_reason == "eos_token"
    assert service.num_requests == 0
    again = await service.infer(question("Hello?", max_new_tokens=4))
    assert again.error_message is None


@pytest.mark.real_model
async def test_smollm2_tells_the_tokens_that_it_reads(service: LLMInferenceService) -> None:
    talk = InferenceRequest(
        model_id="smollm2",
        messages=[ChatMessage(role="user", content="Grüße aus Zürich 🌸, <|im_end|>!")],
        params=GenerationParams(max_new_tokens=3, do_sample=False),
    )
    told = await service.tokenize(talk, pieces=True)
    assert len(told.ids) == (await service.infer(talk)).prompt_tokens
    assert told.max_context_tokens == 2048
    text = await service.detokenize("smollm2", told.ids)
    assert text == b"".join(told.pieces or ()).decode()
    assert text.startswith("<|im_start|>") and text.endswith("<|im_start|>assistant\n")
    assert "Grüße aus Zürich 🌸, <|im_end|>!" in text
    (end,) = (await service.tokenize(ask_for("<|im_end|>"))).ids
    assert told.ids.count(end) == text.count("<|im_end|>") - 1, "in a message it is text"
    plain = await service.tokenize(ask_for("<|im_end|>"), special_as_text=True)
    assert end not in plain.ids
    again = talk.model_copy(update={"messages": None, "prompt_token_ids": list(told.ids)})
    same = [await service.infer(each) for each in (talk, again)]
    assert same[0].generated_text == same[1].generated_text


def ask_for(prompt: str) -> InferenceRequest:
    return InferenceRequest(model_id="smollm2", prompt=prompt)


async def test_smollm2_writes_whole_characters(service: LLMInferenceService) -> None:
    stream = service.stream(
        InferenceRequest(
            model_id="smollm2",
            prompt="a 🎉 b 🎉 c 🎉 d 🎉 e 🎉 f",
            params=GenerationParams(temperature=0, max_new_tokens=24),
        )
    )
    chunks = [chunk async for chunk in stream]
    assert any(ord(char) > 0xFFFF for char in "".join(chunks))
    assert not any("\ufffd" in chunk for chunk in chunks[:-1])
    assert stream.response.generated_tokens > len(chunks)  # tokens that end inside a character
