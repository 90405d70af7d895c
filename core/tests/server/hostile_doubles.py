"""Fake runtimes that raise whatever a test says, wherever it says; observers and log handlers, too.

They stand in for a third party's; what is under test is that nothing but their own request sees it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from engineroom import (
    Capabilities,
    Embeddings,
    HandlerHealth,
    InferenceHandler,
    InferenceRequest,
    InferenceResponse,
    LoadedModel,
    ModelConfig,
    TokenHandler,
    TokenStep,
    hookimpl,
)


class Menu:
    """What raises where: the name of a place → what is called there."""

    def __init__(self) -> None:
        self.at: dict[str, Callable[[], None]] = {}
        self.reached: set[str] = set()

    def hit(self, place: str) -> None:
        self.reached.add(place)
        if (raiser := self.at.get(place)) is not None:
            raiser()


class HostileHandler(InferenceHandler):
    """A runtime with an ``infer`` and a ``stream_infer`` of its own."""

    name = "hostile"

    def __init__(self, menu: Menu) -> None:
        self.menu = menu
        self.running = 0

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        self.menu.hit("can_handle")
        return loaded_model.model_object == self.name

    def can_load(self, config: ModelConfig) -> bool:
        self.menu.hit("can_load")
        return config.source == f"{self.name}:"

    def import_runtime(self) -> None:
        self.menu.hit("import_runtime")

    def runtime_processes(self) -> Sequence[int]:
        self.menu.hit("runtime_processes")
        return ()

    def estimate_memory(self, config: ModelConfig) -> Mapping[str, int] | None:
        self.menu.hit("estimate_memory")
        return None

    def capabilities(self) -> Capabilities:
        self.menu.hit("capabilities")
        return Capabilities(params=frozenset({"max_new_tokens"}), chat=True, embeddings=True)

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        self.menu.hit("health")
        return HandlerHealth()

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        await asyncio.sleep(0)
        self.menu.hit("load_model")
        return LoadedModel(model_id=config.model_id, model_object=self.name, config=config)

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        await asyncio.sleep(0)
        self.menu.hit("unload_model")

    async def infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> InferenceResponse:
        await asyncio.sleep(0)
        self.menu.hit("infer")
        return InferenceResponse(
            request_id=request.request_id, model_id=request.model_id, generated_text="one two"
        )

    async def stream_infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[str, None]:
        self.running += 1
        try:
            self.menu.hit("before the first")
            yield "one"
            await asyncio.sleep(0)
            self.menu.hit("midway")
            yield " two"
            while "hang" in self.menu.at:
                await asyncio.sleep(0.001)
                yield " more"
        finally:
            self.running -= 1
            self.menu.hit("at the end")

    async def embed(self, loaded_model: LoadedModel, texts: Sequence[str]) -> Embeddings:
        await asyncio.sleep(0)
        self.menu.hit("embed")
        return Embeddings([[1.0, 0.0] for _ in texts], len(texts))


class HostileSteps(TokenHandler):
    """The same as steps, which core reads."""

    name = "hostile-steps"

    def __init__(self, menu: Menu) -> None:
        self.menu = menu
        self.running = 0

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return loaded_model.model_object == self.name

    def can_load(self, config: ModelConfig) -> bool:
        return config.source == f"{self.name}:"

    def capabilities(self) -> Capabilities:
        return Capabilities(params=frozenset({"max_new_tokens"}), chat=True)

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        return LoadedModel(model_id=config.model_id, model_object=self.name, config=config)

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        self.running += 1
        try:
            self.menu.hit("before the first")
            yield TokenStep((1,), "one", prompt_tokens=1)
            await asyncio.sleep(0)
            self.menu.hit("midway")
            yield TokenStep((2,), " two")
            while "hang" in self.menu.at:
                await asyncio.sleep(0.001)
                yield TokenStep((3,), " more")
        finally:
            self.running -= 1
            self.menu.hit("at the end")


HOOKS = (
    "engineroom_request_started", "engineroom_request_waited", "engineroom_request_gaps",
    "engineroom_request_finished", "engineroom_model_loaded", "engineroom_model_unloaded",
    "engineroom_model_state_changed",
)  # fmt: skip


class HostileObserver:
    """Has every hook that a request comes by."""

    def __init__(self, menu: Menu) -> None:
        self.menu = menu

    @hookimpl
    def engineroom_request_started(self) -> None:
        self.menu.hit("engineroom_request_started")

    @hookimpl
    def engineroom_request_waited(self) -> None:
        self.menu.hit("engineroom_request_waited")

    @hookimpl
    def engineroom_request_gaps(self) -> None:
        self.menu.hit("engineroom_request_gaps")

    @hookimpl
    def engineroom_request_finished(self) -> None:
        self.menu.hit("engineroom_request_finished")

    @hookimpl
    def engineroom_model_loaded(self) -> None:
        self.menu.hit("engineroom_model_loaded")

    @hookimpl
    def engineroom_model_unloaded(self) -> None:
        self.menu.hit("engineroom_model_unloaded")

    @hookimpl
    def engineroom_model_state_changed(self) -> None:
        self.menu.hit("engineroom_model_state_changed")

    def traceparent_of(self, request_id: str) -> str | None:
        self.menu.hit("traceparent_of")
        return None


class HostileLogHandler(logging.Handler):
    """What an application hangs on the log."""

    def __init__(self, menu: Menu) -> None:
        super().__init__(logging.DEBUG)
        self.menu = menu

    def emit(self, record: logging.LogRecord) -> None:
        self.menu.hit("log")
