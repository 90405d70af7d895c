"""Runtimes that compute nothing, so that what is left is the service's own cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import ClassVar

from engineroom import (
    Capabilities,
    InferenceHandler,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    Mailbox,
    ModelConfig,
    TokenHandler,
    TokenStep,
)

__all__ = ["FakeEngine", "InstantHandler", "MarkedHandler", "SteppedHandler", "serve"]


class FakeEngine:
    """Waits for ``streams`` mailboxes, then gives each of them one prepared item a step."""

    def __init__(self, streams: int, steps: Sequence[TokenStep]) -> None:
        self._steps = steps
        self._streams = streams
        self._mailboxes: list[Mailbox] = []
        self._full = asyncio.Event()

    def open(self) -> Mailbox:
        """A new request's mailbox."""
        mailbox = Mailbox()
        self._mailboxes.append(mailbox)
        if len(self._mailboxes) == self._streams:
            self._full.set()
        return mailbox

    async def run(self) -> None:
        """All steps, once. Between two of them every reader has its turn."""
        await self._full.wait()
        mailboxes = self._mailboxes
        for step in self._steps:
            for mailbox in mailboxes:
                mailbox.put(step)
            await asyncio.sleep(0)


class _Loading(InferenceHandler):
    """Loads anything; there is nothing to load."""

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return loaded_model.handler_name == self.name

    def can_load(self, config: ModelConfig) -> bool:
        return True

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        return LoadedModel(
            model_id=config.model_id, model_object=None, config=config, handler_name=self.name
        )


class SteppedHandler(_Loading, TokenHandler):
    """Reads one of :attr:`engine`'s mailboxes."""

    name: ClassVar[str] = "fake_stepped"
    engine: FakeEngine

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[Mailbox, None]:
        yield self.engine.open()


class MarkedHandler(_Loading, TokenHandler):
    """Yields prepared steps without waiting; notes the CPU time as it comes to some of them."""

    name: ClassVar[str] = "fake_marked"

    def __init__(self, steps: Sequence[TokenStep], marks: Sequence[int]) -> None:
        self._steps = steps
        self._marked = [number in marks for number in range(len(steps))]
        self.times: list[int] = []

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        times = self.times = []
        for step, marked in zip(self._steps, self._marked, strict=True):
            if marked:
                times.append(time.thread_time_ns())
            yield step


class InstantHandler(_Loading):
    """Has the answer ready."""

    name: ClassVar[str] = "fake_instant"

    def capabilities(self) -> Capabilities:
        return Capabilities(params=frozenset({"max_new_tokens"}))

    async def infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> InferenceResponse:
        return InferenceResponse(
            request_id=request.request_id,
            model_id=request.model_id,
            generated_text="yes",
            finish_reason="eos_token",
        )

    async def stream_infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[str, None]:
        yield "yes"


async def serve(handler: InferenceHandler) -> LLMInferenceService:
    """A service over the real model manager with this handler and a model ``fake``, loaded."""
    manager = LLMModelManager(config=[ModelConfig(model_id="fake", source="fake:")])
    service = LLMInferenceService(manager, handlers=[handler])
    await manager.load_configured_models()
    return service
