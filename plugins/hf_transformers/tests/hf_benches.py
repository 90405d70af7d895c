"""Engines over tiny models for the tests, and what Transformers itself makes of the same texts."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from engineroom import (
    EngineRoomError,
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
)
from engineroom.memory import give_back_memory
from engineroom_hf_transformers import HfTransformersOptions, HuggingFaceTransformersHandler
from engineroom_hf_transformers.engine import HfEngine
from engineroom_hf_transformers.loading import Parts, load_parts
from engineroom_hf_transformers.tasks import Task

DRIVEN = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "gpt2")
"""Tiny models whose cache the engine drives."""
BY_GENERATE = ("mamba", "t5")
END = 1
NO_END = {END: -100.0}  # keeps a tiny model from ending by itself
# Random weights magnify rounding; and the models are too small to share between threads.
EXACT: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "n_threads": 1,
    "max_context": 256,
    "max_batch_size": 4,
}
WORDS = "the quick brown fox jumps over the lazy dog and the cat in the hat sat on a mat "
TEXT = WORDS * 20


def options(**changes: Any) -> HfTransformersOptions:
    return HfTransformersOptions(**(EXACT | changes))


def ask(prompt: str = "hello", stream: bool = False, **kw: Any) -> InferenceRequest:
    request = {k: kw.pop(k) for k in list(kw) if k in InferenceRequest.model_fields}
    kw.setdefault("temperature", 0.0)
    kw.setdefault("max_new_tokens", 24)
    kw.setdefault("logit_bias", NO_END)
    return InferenceRequest(
        model_id="m", prompt=prompt, stream=stream, params=GenerationParams(**kw), **request
    )


def load(folder: Path | str, **changes: Any) -> Parts:
    config = ModelConfig(model_id="m", source=str(folder))
    return load_parts(config, options(**changes))


# ── Transformers itself ──────────────────────────────────────────────────────────────────────


class Reference:
    """A model as Transformers loads and runs it, one request at a time."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        auto = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = transformers.AutoModelForSeq2SeqLM
        # Transformers' fused attention leaves out soft caps: only its plain one is the model.
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        kernel = {"attn_implementation": "eager"} if capped else {}
        self.model = auto.from_pretrained(folder, dtype=torch.float32, **kernel).eval()
        self.is_encoder_decoder = bool(config.is_encoder_decoder)
        self._greedy: dict[tuple[int, ...], list[int]] = {}

    def generate(self, tokens: Sequence[int], new: int, **config: Any) -> list[int]:
        """The tokens that ``generate()`` adds, without the one that ends."""
        import torch

        ids = torch.tensor([list(tokens)])
        with torch.inference_mode():
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                **({"do_sample": False} | config),
            )[0].tolist()
        found = found[1:] if self.is_encoder_decoder else found[len(tokens) :]
        return found[: found.index(END)] if END in found else found

    def greedy(self, tokens: Sequence[int], new: int) -> list[int]:
        """Remembered; the answer to ``new`` tokens begins that to more."""
        known, most = self._greedy.get(tuple(tokens), []), 64 * -(-new // 64)
        if len(known) < new:
            known = self._greedy[tuple(tokens)] = self.generate(tokens, most)
        return known[:new]


class Tiny:
    """Tiny models, each loaded once by Transformers and once by the plugin."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self.folder = folder
        self._references: dict[str, Reference] = {}
        self._parts: dict[str, Parts] = {}

    def reference(self, kind: str) -> Reference:
        if kind not in self._references:
            self._references[kind] = Reference(self.folder(kind))
        return self._references[kind]

    def parts(self, kind: str, **changes: Any) -> Parts:
        """``changes`` are fields of the parts."""
        if kind not in self._parts:
            self._parts[kind] = load(self.folder(kind))
        return dataclasses.replace(self._parts[kind], **changes)


# ── an engine by itself ──────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Answer:
    """What came of a request at the engine."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish: str | None = None
    cached: int | None = None
    steps: int = 0
    error: EngineRoomError | None = None


class Rig:
    """An engine, driven without a service: tokens in, tokens out. Closed by ``with``."""

    def __init__(self, parts: Parts, **changes: Any) -> None:
        self.options = options(**changes)
        self.engine = HfEngine(parts, self.options, "m")

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def tokens(self, prompt: str) -> list[int]:
        return self.engine.codec.prompt(prompt, None)

    def send(self, tokens: Sequence[int], request: InferenceRequest | None = None) -> Task:
        return self.engine.request(request or ask(logit_bias=None), list(tokens))

    async def read(self, task: Task, most: int | None = None) -> Answer:
        """Take what comes; after ``most`` tokens cancel."""
        answer = Answer()
        try:
            while True:
                step = await task.mailbox.get()
                answer.steps += 1
                answer.tokens += step.token_ids
                answer.text += step.text or ""
                if step.cached_prompt_tokens is not None:
                    answer.cached = step.cached_prompt_tokens
                if step.finish is not None:
                    answer.finish = step.finish
                    return answer
                if most is not None and len(answer.tokens) >= most:
                    return answer
        except EngineRoomError as error:
            answer.error = error
            return answer
        finally:
            self.engine.cancel(task)

    async def answer(self, prompt: str | Sequence[int], **kw: Any) -> Answer:
        tokens = self.tokens(prompt) if isinstance(prompt, str) else list(prompt)
        kw.setdefault("logit_bias", None)
        return await self.read(self.send(tokens, ask(**kw)))

    async def idle(self) -> None:
        await idle(self.engine)


async def until(condition: Callable[[], object]) -> None:
    """Let the engine go on until something is so; a minute at most."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def idle(engine: HfEngine) -> None:
    """Until the engine has nothing to do; every slot must then be free."""

    def at_rest() -> bool:
        health = engine.health()
        return health.num_requests_running == 0 and health.num_requests_waiting == 0

    await until(at_rest)
    assert not generate_threads()
    if engine._slots is not None:
        assert engine.health().kv_cache_usage == 0
        assert sorted(s.index for s in engine._slots._free) == list(
            range(engine.options.max_batch_size)
        )


def generate_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("hf_transformers")]


class Held:
    """Holds the next forward pass of an engine where it begins, until told to go on."""

    def __init__(self, engine: HfEngine) -> None:
        self.entered, self._go = threading.Event(), threading.Event()
        forward = engine._forward
        assert forward is not None

        def held(*args: Any) -> Any:
            self.entered.set()
            assert self._go.wait(20)
            return forward(*args)

        held.cache = forward.cache  # type: ignore[attr-defined]
        held.close = forward.close  # type: ignore[attr-defined]
        engine._forward = held  # type: ignore[assignment]

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)

    def go(self) -> None:
        self._go.set()


class Broken:
    """A fake forward pass that raises while ``error`` is set, after writing to the cache."""

    def __init__(self, engine: HfEngine) -> None:
        self.error: Exception | None = None
        self.calls = 0
        forward = engine._forward
        assert forward is not None
        self._forward = forward
        self.cache, self.close = forward.cache, forward.close
        engine._forward = self  # type: ignore[assignment]

    def __call__(self, *args: Any) -> Any:
        import torch

        self.calls += 1
        if self.error is None:
            return self._forward(*args)
        # Half a step: what its tokens would have got is overwritten with something else.
        _, decoding, spans, *_ = args
        with torch.inference_mode():
            for span in (*decoding, *spans):
                for store in (self.cache._keys, self.cache._values):
                    for tensor in store.values():
                        tensor[span.slot, span.start : span.end] = float("nan")
        raise self.error


# ── a service over it ────────────────────────────────────────────────────────────────────────


class Bench:
    """A service over one model, and the engine inside of it."""

    def __init__(self, source: str | Path, **changes: Any) -> None:
        config = ModelConfig(model_id="m", source=str(source), options=EXACT | changes)
        self.manager = LLMModelManager(config=[config])
        self.service = LLMInferenceService(self.manager, [HuggingFaceTransformersHandler()])

    @property
    def engine(self) -> HfEngine:
        loaded = self.manager.get_loaded_model("m")
        assert loaded is not None
        engine: HfEngine = loaded.model_object
        return engine

    async def streamed(self, request: InferenceRequest) -> tuple[list[str], InferenceResponse]:
        stream = self.service.stream(request)
        chunks = [chunk async for chunk in stream]
        return chunks, stream.response

    async def until(self, condition: Callable[[], object]) -> None:
        await until(condition)

    async def idle(self) -> None:
        await idle(self.engine)


def growth_of_cycles(path: Path, cycles: int) -> int:
    """Bytes by which this process grows over so many loads and unloads, after four others."""
    handler = HuggingFaceTransformersHandler()

    async def after(number: int) -> int:
        for _ in range(number):
            config = ModelConfig(model_id="m", source=str(path), options=EXACT)
            loaded = await handler.load_model(config)
            for params in ({}, {"num_beams": 2}, {"temperature": 1.0}):
                request = ask("x" * 100, **({"max_new_tokens": 2, "logit_bias": NO_END} | params))
                assert (await handler.infer(loaded, request)).generated_tokens is not None
            await handler.unload_model(loaded)
        assert not generate_threads()
        give_back_memory()  # what the allocator holds free is not kept by anybody
        return int(psutil.Process().memory_info().rss)

    async def measured() -> int:
        return -(await after(4)) + await after(cycles)

    return asyncio.run(measured())
