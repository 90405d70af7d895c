"""A fake runtime: it says the prompt back, as slowly and as badly as a test asks.

Deterministic, without weights and without threads. It stands in where the thing under test is
not the runtime::

    manager = LLMModelManager(config=[ModelConfig(model_id="echo", source="echo:")])
    service = LLMInferenceService(manager, handlers=[EchoHandler()])
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.config.options import parse_options
from engineroom.errors import ConfigurationError, InferenceError, QueueFullError
from engineroom.generation.steps import TokenStep
from engineroom.handlers.base import Capabilities, Embeddings, HandlerHealth, Scores
from engineroom.handlers.token_handler import TokenHandler
from engineroom.schemas import InferenceRequest
from engineroom.sources.vectors import VectorSizes

__all__ = ["EchoHandler", "EchoModel", "EchoOptions"]

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz"
_WORD: Final = re.compile(r"\s*\S+|\s+")


class EchoOptions(BaseModel):
    """The ``options:`` of an echo model. Whatever is not said does nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds before each token; 0 still lets other tasks run between two tokens."""
    load_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that loading takes."""
    n_parallel: Annotated[int, Field(ge=1)] = 64
    """Requests that run at one time; more wait."""
    max_queue: Annotated[int, Field(ge=0)] = 64
    """Requests that wait at one time; more are refused."""
    split_bytes: bool = False
    """Yield single bytes, so that characters are cut, instead of words."""
    fail: Literal["load", "before", "during", "after", "unload"] | None = None
    """Where to raise ``RuntimeError``: in loading, before the first token, after the second,
    after the last, or in unloading."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """How often the prompt is said back."""


@dataclass(eq=False)
class EchoModel:
    """The ``model_object`` of an echo model; tests look at it."""

    options: EchoOptions
    slots: asyncio.Semaphore
    running: int = 0
    waiting: int = 0
    finished: int = 0
    """Generations that ended, in whatever way."""
    unloaded: bool = False
    seen: list[InferenceRequest] = field(default_factory=list)


class EchoHandler(TokenHandler):
    """Says the prompt, or the last message, back word by word.

    Loads any ``source`` that starts with ``echo:``. Honours ``max_new_tokens`` and
    ``stop_sequences``; other parameters are refused, as they should be. Token ids of a prompt
    are characters by their number in Unicode, of which it says one a step.

    :param unloadable: ``False``: ``can_load`` says no to everything.
    """

    name: ClassVar[str] = "echo"
    api_version: ClassVar[str] = "1.0"

    def __init__(self, *, unloadable: bool = True) -> None:
        self._unloadable = unloadable
        self.loads = 0
        self.unloads = 0

    def capabilities(self) -> Capabilities:
        """``max_new_tokens``, chat, and the sampling switches, which change nothing here."""
        return Capabilities(
            params=frozenset({"max_new_tokens", "temperature", "do_sample"}),
            chat=True,
            embeddings=True,
            prompt_token_ids=True,
            rerank=True,
        )

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        """True for echo models."""
        return isinstance(loaded_model.model_object, EchoModel)

    def can_load(self, config: ModelConfig) -> bool:
        """True for sources that start with ``echo:``."""
        return self._unloadable and (config.source or "").startswith("echo:")

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        """Make an echo model."""
        options = parse_options(EchoOptions, config)
        self.loads += 1
        await asyncio.sleep(options.load_delay_s)
        if options.fail == "load":
            raise RuntimeError("asked to fail in loading")
        return LoadedModel(
            model_id=config.model_id,
            model_object=EchoModel(options, asyncio.Semaphore(options.n_parallel)),
            config=config,
            handler_name=self.name,
            max_context_tokens=1 << 20,
            memory_bytes=0,
            vector_sizes=VectorSizes(len(_ALPHABET)),
        )

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """Forget the model."""
        self.unloads += 1
        model = _model(loaded_model)
        model.unloaded = True
        if model.options.fail == "unload":
            raise RuntimeError("asked to fail in unloading")

    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int:
        """Words, or bytes with ``split_bytes``."""
        return len(_pieces(_model(loaded_model).options, text))

    async def count_prompt_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> int:
        """Those of the last message, or of the prompt."""
        return len(request.prompt_token_ids or _input(_model(loaded_model).options, request))

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """Requests running and waiting."""
        model = _model(loaded_model)
        return HandlerHealth(
            ok=not model.unloaded,
            num_requests_running=model.running,
            num_requests_waiting=model.waiting,
        )

    async def embed(
        self, loaded_model: LoadedModel, texts: Sequence[str | Sequence[int]]
    ) -> Embeddings:
        """How often each letter of the alphabet is in a text, as a vector of length 1."""
        model = _model(loaded_model)
        read = [text if isinstance(text, str) else "".join(_characters(text)) for text in texts]
        model.running += 1
        try:
            await asyncio.sleep(model.options.token_delay_s)
            if model.options.fail == "before":
                raise RuntimeError("asked to fail before the first token")
            pairs = zip(texts, read, strict=True)
            tokens = sum(
                len(_pieces(model.options, said) if isinstance(text, str) else text)
                for text, said in pairs
            )
            return Embeddings([_letters(text) for text in read], tokens)
        finally:
            model.running -= 1

    async def rerank(self, loaded_model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> Scores:
        """How alike the letters of a query and a document are, from 0 to 1."""
        model = _model(loaded_model)
        model.running += 1
        try:
            await asyncio.sleep(model.options.token_delay_s)
            if model.options.fail == "before":
                raise RuntimeError("asked to fail before the first token")
            tokens = sum(len(_pieces(model.options, text)) for pair in pairs for text in pair)
            letters = [(_letters(query), _letters(document)) for query, document in pairs]
            return Scores([sum(map(mul, *both)) for both in letters], tokens)
        finally:
            model.running -= 1

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        """Yield the prompt's words (or bytes), one a step."""
        model = _model(loaded_model)
        options = model.options
        if model.waiting >= options.max_queue and model.slots.locked():
            raise QueueFullError(f"{model.waiting} requests wait already (max_queue)")
        model.seen.append(request)
        model.waiting += 1
        try:
            await model.slots.acquire()
        finally:
            model.waiting -= 1
        model.running += 1
        try:
            pieces = _input(options, request)
            if options.fail == "before":
                raise RuntimeError("asked to fail before the first token")
            yield TokenStep(prompt_tokens=len(request.prompt_token_ids or pieces))
            produced = 0
            for _ in range(options.repeat):
                for piece in pieces:
                    await asyncio.sleep(options.token_delay_s)
                    if options.fail == "during" and produced == 2:
                        raise RuntimeError("asked to fail after the second token")
                    if model.unloaded:
                        raise InferenceError("the model was unloaded while it was used")
                    yield TokenStep((produced,), piece)
                    produced += 1
            if options.fail == "after":
                raise RuntimeError("asked to fail after the last token")
            yield TokenStep(finish="eos_token")
        finally:
            model.running -= 1
            model.finished += 1
            model.slots.release()


def _model(loaded_model: LoadedModel) -> EchoModel:
    model = loaded_model.model_object
    if not isinstance(model, EchoModel):
        raise InferenceError(f"{loaded_model.model_id!r} is no echo model")
    return model


def _letters(text: str) -> list[float]:
    counts = [float(text.lower().count(letter)) for letter in _ALPHABET]
    length = math.hypot(*counts) or 1.0
    return [count / length for count in counts]


def _input(options: EchoOptions, request: InferenceRequest) -> Sequence[str | bytes]:
    if (ids := request.prompt_token_ids) is not None:
        characters = _characters(ids)
        return _pieces(options, "".join(characters)) if options.split_bytes else characters
    if request.prompt is not None:
        return _pieces(options, request.prompt)
    assert request.messages is not None
    return _pieces(options, request.messages[-1].content or "")


def _characters(ids: Sequence[int]) -> list[str]:
    for token in ids:
        if token > 0x10FFFF or 0xD800 <= token <= 0xDFFF:
            raise ConfigurationError(f"token {token} is no character of Unicode")
    return [chr(token) for token in ids]


def _pieces(options: EchoOptions, text: str) -> list[str] | list[bytes]:
    if options.split_bytes:
        return [bytes((byte,)) for byte in text.encode()]
    return _WORD.findall(text)
