"""What a runtime is to engineroom: one class with three methods to write.

A runtime is a subclass of :class:`InferenceHandler` (or, easier, of
:class:`~engineroom.handlers.token_handler.TokenHandler`), published under an entry point::

    [project.entry-points."engineroom.handlers"]
    my_runtime = "my_package.handler:MyHandler"

Methods need no decorator: the registry takes a subclass's methods for implementations of the
hook specifications here, and says at registration what is wrong with them. Importing the
plugin's module must not import its runtime; that waits until ``load_model``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.errors import ConfigurationError
from engineroom.handlers.markers import hookspec
from engineroom.schemas import GenerationParams, InferenceRequest, InferenceResponse

__all__ = [
    "API_VERSION",
    "Capabilities",
    "Embeddings",
    "HandlerHealth",
    "InferenceHandler",
    "Scores",
    "StreamEnd",
]

API_VERSION: Final = "1.0"
"""Version of the handler contract. Handlers of another major version are refused."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a handler can do. What it cannot do is refused by name, never dropped.

    :param params: the fields of :class:`~engineroom.schemas.GenerationParams` that it honours.
    :param chat: takes ``messages``.
    :param stop_sequences: honours ``stop_sequences``; every ``TokenHandler`` does.
    :param tools: hands ``tools`` to the model's chat template, as
        :func:`~engineroom.prompts.tokens_of` does. Every ``TokenHandler`` with
        ``chat`` honours them: where it does not itself, they are told in a message.
    :param structured_output: kinds of ``structured_output`` that it honours, of ``json_schema``,
        ``json_object``, ``regex``, ``choice`` and ``grammar``. One that honours ``grammar``
        honours a ``tool_choice`` that asks for a call, and tools that are ``strict``, as well.
    :param embeddings: has :meth:`InferenceHandler.embed`, for models that are made for it.
    :param rerank: has :meth:`InferenceHandler.rerank`, for models that are made for it.
    :param template_args: hands ``template_args`` and ``reasoning`` to the model's chat template, as
        :func:`~engineroom.prompts.tokens_of` does.
    :param adapters: honours ``adapter``, and refuses names that it does not know.
    :param reasoning_budget: ends reasoning after so many tokens.
    :param continue_final_message: continues a last message that is the assistant's, as
        :func:`~engineroom.prompts.tokens_of` does.
    :param prompt_token_ids: takes ``prompt_token_ids``, and refuses ids that the model has not;
        the same of ids that :meth:`InferenceHandler.embed` gets.
    """

    params: frozenset[str] = frozenset()
    chat: bool = False
    stop_sequences: bool = False
    tools: bool = False
    structured_output: frozenset[str] = frozenset()
    embeddings: bool = False
    adapters: bool = False
    template_args: bool = False
    reasoning_budget: bool = False
    prompt_token_ids: bool = False
    continue_final_message: bool = False
    rerank: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.params) - set(GenerationParams.model_fields)):
            raise ConfigurationError(
                f"Capabilities(params=…) names {', '.join(unknown)}, which GenerationParams "
                f"does not have; its fields are {', '.join(GenerationParams.model_fields)}"
            )

    def unsupported(self, request: InferenceRequest) -> list[str]:
        """Names of what ``request`` asks for and this handler cannot do, in a fixed order."""
        names = sorted(request.params.requested() - self.params)
        structured = request.params.structured_output
        if (
            structured is not None
            and "structured_output" not in names
            and structured.kind not in self.structured_output
        ):
            names.append(f"structured_output.{structured.kind}")
        if request.messages is not None and not self.chat:
            names.append("messages")
        if request.prompt_token_ids is not None and not self.prompt_token_ids:
            names.append("prompt_token_ids")
        if request.continue_final_message and not self.continue_final_message:
            names.append("continue_final_message")
        if request.stop_sequences and not self.stop_sequences:
            names.append("stop_sequences")
        if request.tools and not self.tools:
            names.append("tools")
        if "grammar" not in self.structured_output:
            if request.tool_choice not in (None, "none", "auto"):
                names.append("tool_choice")
            if request.has_strict_tools:
                names.append("tools.strict")
        if request.reasoning_budget is not None and not self.reasoning_budget:
            names.append("reasoning_budget")
        if request.messages is not None and not self.template_args:
            stated = (n for n in ("template_args", "reasoning") if getattr(request, n) is not None)
            names.extend(stated)
        if request.adapter is not None and not self.adapters:
            names.append("adapter")
        return names


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Texts as vectors.

    :param vectors: one a text, in the order of the texts, all of one length.
    :param prompt_tokens: tokens of all texts together.
    """

    vectors: Sequence[Sequence[float]]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """How well documents answer their queries.

    :param scores: one a pair, in the order of the pairs; the higher, the better.
    :param prompt_tokens: tokens of all pairs together.
    """

    scores: Sequence[float]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class HandlerHealth:
    """How a loaded model's engine is doing.

    :param ok: it serves requests.
    :param detail: why not, if not; else what is worth knowing, which ``explain`` shows.
    :param num_requests_running: requests that hold a slot.
    :param num_requests_waiting: requests that wait for one.
    :param kv_cache_usage: used share of the key/value cache, 0 to 1; ``None`` if not known.
    :param dead: it has ended for good, and nobody may have noticed: the model is unloaded where
        that is seen, and the next request has it loaded anew.
    """

    ok: bool = True
    detail: str = ""
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float | None = None
    dead: bool = False


class StreamEnd(str):
    """What ``stream_infer`` may yield last: no text, but the final response in ``response``.

    It is an empty string, so that joining the chunks of a stream stays right. Without it the
    service knows the text but neither the counts nor why the stream ended.
    """

    __slots__ = ("response",)
    response: InferenceResponse

    def __new__(cls, response: InferenceResponse) -> StreamEnd:
        self = super().__new__(cls, "")
        self.response = response
        return self

    def __getnewargs__(self) -> tuple[InferenceResponse]:  # type: ignore[override]
        """For copies and pickles."""
        return (self.response,)


class InferenceHandler(ABC):
    """A runtime. Subclass it, set ``name``, and write the three abstract methods.

    One instance serves every model of its runtime, many requests at once, and lives as long as
    the process. ``infer`` and ``stream_infer`` are cancelled like any coroutine: by
    ``asyncio.CancelledError`` or, for a stream, by ``aclose()``. Stop the work within one
    decoding step, give the slot back, and let the exception pass.
    """

    name: ClassVar[str]
    """Unique; the name of the entry point, and what ``runtime:`` and ``handlers:`` refer to."""

    api_version: ClassVar[str] = API_VERSION
    """The contract that the handler was written for; plugins write it out as a constant."""

    @hookspec
    @abstractmethod
    def can_handle(self, loaded_model: LoadedModel) -> bool:
        """Say whether this handler can run requests on the model.

        Called for every handler in order until one says ``True``. Must be cheap, free of side
        effects and right for models of other runtimes, whose ``model_object`` may be anything.

        :returns: ``True`` or ``False``; anything else counts as a defect.
        """

    @hookspec
    @abstractmethod
    async def infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> InferenceResponse:
        """Answer the request in whole.

        :returns: text, finish reason, counts.
        :raises EngineRoomError: typed, where the cause is known; other exceptions become
            ``InferenceError``.
        """

    @hookspec
    @abstractmethod
    def stream_infer(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[str, None]:
        """Answer the request piece by piece: an ``async def`` with ``yield``.

        The joined pieces are the text that ``infer`` gives for the same request. May end with
        a :class:`StreamEnd`. Errors are raised, as in ``infer``.
        """

    @hookspec
    async def embed(
        self, loaded_model: LoadedModel, texts: Sequence[str | Sequence[int]]
    ) -> Embeddings:
        """Turn texts into vectors; asked only where ``capabilities().embeddings`` says so.

        The vector of a text does not depend on the texts beside it. Cancelled like any
        coroutine.

        :param texts: at least one, none of them empty. Token ids in the place of a text only where
            ``capabilities().prompt_token_ids`` says so: nothing is to be added to them.
        :raises ConfigurationError: the model makes no embeddings, a text is too long for it, or it
            has no such token.
        """
        raise ConfigurationError(f"handler {self.name!r} makes no embeddings")

    @hookspec
    async def rerank(self, loaded_model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> Scores:
        """Score documents for queries; asked only where ``capabilities().rerank`` says so.

        The score of a pair does not depend on the pairs beside it. Cancelled like any coroutine.

        :param pairs: a query and a document each; at least one, no text empty.
        :raises ConfigurationError: the model scores no pairs of texts, or a pair is too long.
        """
        raise ConfigurationError(f"handler {self.name!r} ranks no documents")

    @hookspec
    def can_load(self, config: ModelConfig) -> bool:
        """Say whether ``source`` is in this runtime's native format.

        A look at a name or a few bytes, not a load. A foreign format that the runtime could
        convert is a ``False``: it is loaded where the deployment names the runtime.
        """
        return False

    @hookspec
    def import_runtime(self) -> None:
        """Import the runtime's libraries, if that was not done before.

        Called in a thread before a load is measured, each time: libraries stay in the process,
        and would be taken for memory that the model did not give back.

        :raises ConfigurationError: they are not installed, or cannot be imported.
        """

    @hookspec
    def runtime_processes(self) -> Collection[int]:
        """Process ids of children of this process that belong to the runtime and to no model.

        Such a one may start or end with any load, and what it takes is no model's memory. Asked
        in a thread, before and after each load and unload.
        """
        return ()

    @hookspec
    async def load_model(self, config: ModelConfig) -> LoadedModel:
        """Load the model, without blocking the event loop.

        :raises ModelNotFoundError: no such file or model.
        :raises ConfigurationError: an option is wrong, or the file is damaged.
        :raises ResourceNotAvailableError: it does not fit.
        """
        raise ConfigurationError(
            f"handler {self.name!r} runs models but does not load them; load "
            f"{config.model_id!r} with another runtime, or lease it from a source of your own",
            model_id=config.model_id,
        )

    @hookspec
    async def unload_model(self, loaded_model: LoadedModel) -> None:
        """Give everything back: memory, threads, processes, files. Called once."""

    @hookspec
    def estimate_memory(self, config: ModelConfig) -> Mapping[str, int] | None:
        """Bytes that the loaded model will take on each device, before anything is loaded.

        :returns: ``{"cpu": bytes, "cuda:0": bytes}``, or ``None`` if it cannot be told.
        """
        return None

    @hookspec
    def capabilities(self) -> Capabilities:
        """What the handler can do. By default nothing beyond a plain prompt is claimed."""
        return Capabilities()

    @hookspec
    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int | None:
        """Tokens of ``text`` without any that the model adds; ``None`` if it cannot be told."""
        return None

    @hookspec
    async def count_prompt_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> int | None:
        """Tokens of a request's input as the model would read it, with its tools and whatever a
        chat template or the model adds; ``None`` if it cannot be told. Nothing is generated.

        :raises ConfigurationError: the input cannot be read, as in an answer.
        """
        return None

    @hookspec
    async def tokenize(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> Sequence[int] | None:
        """Token ids of a request's input as the model would read it, as many as
        :meth:`count_prompt_tokens` says; ``None`` if they cannot be told. Nothing is generated.

        :param request: a :class:`~engineroom.TokenizeRequest`, which says how to read a ``prompt``.
        :raises ConfigurationError: the input cannot be read, as in an answer.
        """
        return None

    @hookspec
    async def token_bytes(
        self, loaded_model: LoadedModel, tokens: Sequence[int]
    ) -> Sequence[bytes] | None:
        """The bytes that each token stands for, those of its name where it is a special one;
        ``None`` if they cannot be told.

        :raises ConfigurationError: the model has no such token.
        """
        return None

    @hookspec
    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        """How the model's engine is doing now. Cheap; called often."""
        return HandlerHealth()

    @hookspec
    def unavailable(self) -> str | None:
        """Why this runtime cannot work here, with what to do; ``None``: it can.

        Asked once of an installed plugin, when it is found; with an answer it is listed and not
        used. Quick, and imports no runtime.
        """
        return None
