"""``EngineHandler``: what handlers with an engine for each model do alike."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from engineroom import (
    BatchingEngine,
    Capabilities,
    ConfigurationError,
    DecodeLoop,
    EngineHandler,
    EngineTask,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    ResourceNotAvailableError,
    TokenizeRequest,
    TokenStep,
    request_logger,
)

LOG = logging.getLogger("test")


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n_ctx: int = 8


class Codec:
    def prompt(self, prompt: str | None, messages: Any, tools: Any = None) -> list[int]:
        return list((prompt or "").encode())

    def whole(self, text: str) -> list[int]:
        return [*text.encode(), 0]

    def count(self, text: str) -> int:
        return len(text)


class CountingEngine(BatchingEngine[EngineTask]):
    """Answers with one token; a text's vector is its length."""

    longer_context = "take a larger n_ctx"

    def __init__(self, options: Options) -> None:
        super().__init__("m", DecodeLoop("counting"), max_running=2, max_queue=2)
        self.codec = Codec()
        self.n_ctx, self.n_vocab, self.memory_bytes = options.n_ctx, 128, 7
        self.stuck = False
        self.closed = threading.Event()
        self.open()

    def request(self, request: InferenceRequest, tokens: list[int]) -> EngineTask:
        return self.submit(EngineTask(log=request_logger(LOG, request)))

    async def embed(self, texts: list[list[int]]) -> list[list[float]]:
        request = InferenceRequest(model_id="m", prompt="x")
        await self.run(EngineTask(log=request_logger(LOG, request)))
        return [[float(len(text))] for text in texts]

    def can_step(self) -> bool:
        return not self.stuck

    def step(self) -> None:
        ended = list(self.running)
        for task in ended:
            self.leave(task)
        self.hand_over((task.mailbox, TokenStep([1], "1", finish="eos_token")) for task in ended)

    def shut(self) -> None:
        self.closed.set()


class CountingHandler(EngineHandler):
    name = "counting"
    api_version = "1.0"
    options_class = Options

    def __init__(self) -> None:
        self.made: list[CountingEngine] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def capabilities(self) -> Capabilities:
        return Capabilities(embeddings=True, prompt_token_ids=True)

    def make_engine(self, config: ModelConfig, options: Options) -> CountingEngine:
        assert self.go_on.wait(20)
        self.made.append(CountingEngine(options))
        return self.made[-1]

    def is_native(self, path: Path) -> bool:
        return path.suffix == ".count"

    def is_native_name(self, source: str) -> bool:
        return source.endswith(".count")


class EmbeddingHandler(CountingHandler):
    def embedder(self, engine: CountingEngine) -> CountingEngine:
        return engine


def config(**options: Any) -> ModelConfig:
    return ModelConfig(model_id="m", source="x.count", options=options)


def ask(prompt: str = "hello", **fields: Any) -> InferenceRequest:
    return InferenceRequest(model_id="m", prompt=prompt, **fields)


async def test_it_loads_answers_embeds_and_unloads() -> None:
    handler = EmbeddingHandler()
    loaded = await handler.load_model(config(n_ctx=6))
    (engine,) = handler.made
    assert (loaded.max_context_tokens, loaded.memory_bytes) == (6, 7)
    assert loaded.tokenizer is engine.codec
    assert handler.can_handle(loaded) is True
    assert handler.count_tokens(loaded, "abc") == 3
    assert (await handler.infer(loaded, ask())).generated_text == "1"
    embeddings = await handler.embed(loaded, ["a", "bcd"])
    assert (embeddings.vectors, embeddings.prompt_tokens) == ([[2.0], [4.0]], 6)
    assert handler.health(loaded).ok
    await handler.unload_model(loaded)
    assert engine.closed.is_set()
    assert not handler.health(loaded).ok


async def test_what_a_runtimes_own_codec_tells_is_told() -> None:
    class Knowing(Codec):
        def token_bytes(self, token: int) -> bytes:
            return bytes([token])

    for handler, ids in ((EmbeddingHandler(), [97, 98]), (CountingHandler(), [97, 98])):
        loaded = await handler.load_model(config())
        request = TokenizeRequest(model_id="m", prompt="ab")
        assert await handler.tokenize(loaded, request) == ids
        assert await handler.token_bytes(loaded, ids) is None
        handler.made[0].codec = Knowing()
        assert await handler.token_bytes(loaded, ids) == [b"a", b"b"]
        with pytest.raises(ConfigurationError, match="tokens has 128; the model's tokens are 0 to"):
            await handler.token_bytes(loaded, [1, 128])
        bare = TokenizeRequest(model_id="m", prompt="ab", add_special_tokens=False)
        with pytest.raises(ConfigurationError, match="only as the model wants them"):
            await handler.tokenize(loaded, bare)
        await handler.unload_model(loaded)


async def test_a_model_without_text_reads_a_text_as_it_embeds_it() -> None:
    class Silent(EmbeddingHandler):
        def generator(self, engine: CountingEngine) -> CountingEngine:
            raise ConfigurationError("this model makes embeddings")

    handler = Silent()
    loaded = await handler.load_model(config())
    assert await handler.tokenize(loaded, TokenizeRequest(model_id="m", prompt="a")) == [97, 0]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("hello, you"), "shorten the prompt, or take a larger n_ctx"),
        (ask(""), "the prompt has no tokens"),
        (ask(params={"logit_bias": {500: 1.0}}), "logit_bias names token 500"),
    ],
)
async def test_what_the_model_cannot_do_is_refused(
    request_: InferenceRequest, message: str
) -> None:
    handler = CountingHandler()
    loaded = await handler.load_model(config())
    with pytest.raises(ConfigurationError, match=message):
        await handler.infer(loaded, request_)
    with pytest.raises(ConfigurationError, match="'counting' makes no embeddings"):
        await handler.embed(loaded, ["a"])
    with pytest.raises(ConfigurationError, match="text 0 has 10 tokens"):
        await EmbeddingHandler().embed(loaded, ["a" * 9])
    await handler.unload_model(loaded)


async def test_a_request_that_nobody_waits_for_is_cancelled() -> None:
    handler = EmbeddingHandler()
    loaded = await handler.load_model(config())
    (engine,) = handler.made
    engine.stuck = True
    waiting = [
        asyncio.create_task(handler.infer(loaded, ask())),
        asyncio.create_task(handler.embed(loaded, ["a"])),
    ]
    while engine.health().num_requests_running < 2:
        await asyncio.sleep(0.001)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert all(task.cancelled() for task in waiting)
    while engine.health().num_requests_running:
        await asyncio.sleep(0.001)
    await handler.unload_model(loaded)


async def test_a_load_that_nobody_waits_for_is_given_back() -> None:
    handler = CountingHandler()
    handler.go_on.clear()
    loading = asyncio.create_task(handler.load_model(config()))
    await asyncio.sleep(0.01)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    handler.go_on.set()
    while not handler.made:
        await asyncio.sleep(0.001)
    assert await asyncio.to_thread(handler.made[0].closed.wait, 20)


async def test_a_load_without_memory_and_wrong_options_are_named() -> None:
    class Greedy(CountingHandler):
        def make_engine(self, config: ModelConfig, options: Options) -> CountingEngine:
            raise MemoryError

    with pytest.raises(ResourceNotAvailableError):
        await Greedy().load_model(config())
    with pytest.raises(ConfigurationError, match="did you mean 'n_ctx'"):
        await Greedy().load_model(config(n_ctxx=4))


def test_models_and_formats_of_others_are_left_to_them(tmp_path: Path) -> None:
    handler = CountingHandler()
    for thing, name in ((object(), "counting"), (None, "counting")):
        loaded = LoadedModel(model_id="m", model_object=thing, config=config(), handler_name=name)
        assert handler.can_handle(loaded) is False
    for name, expected in (("a.count", True), ("a.txt", False)):
        (tmp_path / name).touch()
        model = ModelConfig(model_id="m", source=str(tmp_path / name))
        assert handler.can_load(model) is expected
    absent = ModelConfig(model_id="m", source=str(tmp_path / "b.count"))
    assert handler.can_load(absent) is True
