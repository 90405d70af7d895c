"""One model of the handler under test, and the ways to ask it something."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.errors import ConfigurationError, error_class
from engineroom.handlers.base import HandlerHealth, InferenceHandler
from engineroom.inference.streams import InferenceStream, StreamError
from engineroom.models.manager import LLMModelManager
from engineroom.schemas import GenerationParams, InferenceRequest, InferenceResponse
from engineroom.service import LLMInferenceService
from engineroom.testing.conformance.outcomes import broken
from engineroom.testing.conformance.patience import Patience

__all__ = ["Bench", "Streamed", "again", "refused", "said"]


@dataclass(slots=True)
class Streamed:
    """A stream that was read to its end."""

    chunks: list[str] = field(default_factory=list)
    response: InferenceResponse | None = None

    @property
    def text(self) -> str:
        """The joined chunks, an error's left out."""
        return "".join(c for c in self.chunks if not isinstance(c, StreamError))


class Bench:
    """A service over one model of the handler under test.

    :param patience: waits for what is asked, and ends the streams that a check leaves open.
    """

    def __init__(self, handler: InferenceHandler, config: ModelConfig, patience: Patience) -> None:
        self.handler = handler
        self.config = config
        self.patience = patience
        self.manager = LLMModelManager(config=[config])
        self.service = LLMInferenceService(self.manager, handlers=[handler])

    @property
    def loaded(self) -> LoadedModel:
        """The model in memory."""
        loaded = self.manager.get_loaded_model(self.config.model_id)
        assert loaded is not None
        return loaded

    async def load(self) -> LoadedModel:
        """Load the model, if it is not."""
        return await self.patience.within(
            self.manager.load(self.config.model_id), f"load_model({self.config.source!r})"
        )

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """The answer through the service, a failure included."""
        return await self.patience.within(self.service.infer(request), f"infer({said(request)})")

    async def answer(self, request: InferenceRequest) -> InferenceResponse:
        """The answer through the service, which must not be a failure."""
        response = await self.infer(request)
        if response.error_message is not None:
            broken(
                did=f"infer({said(request)})",
                expected="an answer",
                saw=f"{response.error_type}: {response.error_message}",
            )
        return response

    async def stream(self, request: InferenceRequest) -> Streamed:
        """The whole stream through the service, which must not fail."""
        streamed = Streamed()
        stream = self.open(request)
        reading = self._collect(stream, streamed)
        await self.patience.within(
            reading, f"stream({said(request)})", lambda: len(streamed.chunks)
        )
        streamed.response = stream.response
        if streamed.chunks and isinstance(streamed.chunks[-1], StreamError):
            broken(
                did=f"stream({said(request)})", expected="an answer", saw=str(streamed.chunks[-1])
            )
        return streamed

    def open(self, request: InferenceRequest) -> InferenceStream:
        """A stream, which is closed with the check if it has not ended by then."""
        stream = self.service.stream(request)
        self.patience.opened.append(stream.aclose)
        return stream

    def direct(self, request: InferenceRequest) -> AsyncGenerator[str, None]:
        """The handler's own generator, without the service around it."""
        generator = self.handler.stream_infer(self.loaded, request)
        self.patience.opened.append(generator.aclose)
        return generator

    async def _collect(self, stream: InferenceStream, into: Streamed) -> None:
        async for chunk in stream:
            into.chunks.append(chunk)

    def health(self) -> HandlerHealth:
        """What the handler says; a plain ``HandlerHealth`` where that is no health at all."""
        health: object = self.handler.health(self.loaded)
        return health if isinstance(health, HandlerHealth) else HandlerHealth()


def again(request: InferenceRequest, **update: Any) -> InferenceRequest:
    """The same request under another id."""
    fields = request.model_dump(exclude={"request_id"}, exclude_unset=True)
    return InferenceRequest.model_validate({**fields, **update})


def is_refusal(
    response: InferenceResponse, kind: type[ConfigurationError] = ConfigurationError
) -> bool:
    """Whether a request was refused, with an error of this kind."""
    return response.error_type is not None and issubclass(error_class(response.error_type), kind)


def refused(
    response: InferenceResponse,
    did: str,
    named: str = "",
    kind: type[ConfigurationError] = ConfigurationError,
) -> None:
    """:raises BrokenRuleError: the response is no error of this kind that names this."""
    message = response.error_message or ""
    if not is_refusal(response, kind) or named not in message:
        broken(
            did=did,
            expected=f"a {kind.__name__}" + (f" that names {named}" if named else ""),
            saw=message or f"an answer: {response.finish_reason!r}, {response.generated_text!r}",
        )


def said(request: InferenceRequest) -> str:
    """A request as it is told in messages."""
    parts = []
    if request.prompt is not None:
        shown = request.prompt if len(request.prompt) <= 40 else request.prompt[:37] + "…"
        parts.append(f"prompt={shown!r}")
    elif (ids := request.prompt_token_ids) is not None:
        more = ", …" if len(ids) > 8 else ""
        parts.append(f"prompt_token_ids=[{', '.join(map(str, ids[:8]))}{more}]")
    else:
        parts.append(f"messages=[{', '.join(m.role for m in request.messages or ())}]")
    parts += [
        f"{name}={getattr(request.params, name)!r}"
        for name in GenerationParams.model_fields
        if name in request.params.model_fields_set
    ]
    if request.stop_sequences:
        parts.append(f"stop_sequences={request.stop_sequences!r}")
    if request.timeout_s is not None:
        parts.append(f"timeout_s={request.timeout_s:g}")
    return ", ".join(parts)
