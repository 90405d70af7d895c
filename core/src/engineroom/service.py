"""The dispatcher: a request in, the model's handler found, an answer or a typed error out.

Start reading here. Each request is an :class:`~engineroom.inference.execution.Execution`: it leases
the model (:mod:`engineroom.models.manager`), takes the first handler that can run it
(:mod:`engineroom.handlers.registry`), and is refused where that handler cannot honour it. It runs
inside a ``RequestScope`` (:mod:`engineroom.inference.scope`), which is how deadlines, ``aclose``
and ``close`` stop the work without harming the task that asked for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from engineroom.border import get_logger
from engineroom.config.model import LoadedModel
from engineroom.errors import ConfigurationError, ModelNotFoundError
from engineroom.handlers.base import Capabilities, Embeddings, InferenceHandler, Scores
from engineroom.handlers.dispatch import DispatchReport
from engineroom.handlers.registry import HandlerRegistry
from engineroom.handlers.token_handler import effective_capabilities, unsupported_by
from engineroom.inference.admission import Admission
from engineroom.inference.blocking import BlockingPortal, BlockingStream
from engineroom.inference.counting import CountWork, count_request
from engineroom.inference.embedding import EmbeddingWork, embedding_request
from engineroom.inference.execution import Execution, answer_whole
from engineroom.inference.kinds import check_claims, check_generates
from engineroom.inference.ranking import RankingWork, rerank_request
from engineroom.inference.scope import RequestScope
from engineroom.inference.streams import InferenceStream
from engineroom.inference.tokenizing import (
    DetokenizeWork,
    TokenizeWork,
    Tokens,
    detokenize_request,
    tokenize_request,
)
from engineroom.models.manager import LLMModelManager, ModelSource
from engineroom.schemas import (
    INPUTS,
    InferenceRequest,
    InferenceResponse,
    OnUnsupported,
)
from engineroom.telemetry import request_logger

__all__ = ["LLMInferenceService"]

logger = get_logger("engineroom.service")

DEFAULT_MAX_REQUESTS: Final = 1024


class LLMInferenceService:
    """Answers requests with whatever runtime the model needs.

    :param model_manager: where models come from: an :class:`~engineroom.LLMModelManager`, or
        anything with its ``lease`` method.
    :param handlers: exactly these handlers: instances, which are asked first, and names of
        installed ones, each in this order. ``None``: the manager's, which by default are those
        that are installed.
    :param on_unsupported: what to do about parameters that a handler does not honour, where
        the request does not say; ``None``: as the deployment says, which is ``"error"``.
    :param max_requests: most requests at one time, waiting ones included; more are refused at
        once with ``QueueFullError``.
    """

    def __init__(
        self,
        model_manager: ModelSource,
        handlers: Sequence[InferenceHandler | str] | None = None,
        *,
        on_unsupported: OnUnsupported | None = None,
        max_requests: int = DEFAULT_MAX_REQUESTS,
    ) -> None:
        if max_requests < 1:
            raise ConfigurationError(f"max_requests must be at least 1, not {max_requests}")
        self._source = model_manager
        self.registry = _registry_for(model_manager, handlers)
        if on_unsupported is None:
            managed = model_manager if isinstance(model_manager, LLMModelManager) else None
            on_unsupported = managed.config.on_unsupported if managed is not None else "error"
        self._on_unsupported: OnUnsupported = on_unsupported
        self._capabilities: dict[str, Capabilities] = {}
        self._portal = BlockingPortal()
        self._running = Admission(self.registry, self._portal, max_requests)

    # ── the way in ───────────────────────────────────────────────────────────────────────────

    async def process_inference(
        self, request: InferenceRequest
    ) -> InferenceResponse | InferenceStream:
        """Answer a request, as its ``stream`` says.

        :returns: an ``InferenceResponse``, in which a failure is told by ``error_message``; or
            an :class:`~engineroom.InferenceStream` of ``str`` chunks, in which a failure is one
            last :class:`~engineroom.StreamError`. Nothing but cancellation is raised.
        :raises ConfigurationError: ``request`` is no request at all.
        """
        check_generates(request, "process_inference")
        return self.stream(request) if request.stream else await self.infer(request)

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Answer in whole, whatever the request's ``stream`` says.

        :raises ConfigurationError: ``request`` is no request to generate.
        """
        check_generates(request, "infer")
        return await self._execution(self._scope(request)).run(answer_whole)

    def stream(self, request: InferenceRequest) -> InferenceStream:
        """Answer piece by piece, whatever the request's ``stream`` says.

        :raises ConfigurationError: ``request`` is no request to generate.
        """
        check_generates(request, "stream")
        scope = self._scope(request)
        return InferenceStream(request, scope, self._execution(scope).chunks())

    async def embed(
        self,
        model_id: str,
        texts: Sequence[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        priority: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Embeddings:
        """Turn texts into vectors, with a model that is made for it.

        Observers see an :class:`~engineroom.EmbeddingRequest`, and a response that has the counts.

        :param texts: at least one, none of them empty; each a text, or its token ids, which are
            read as they are.
        :param dimensions: numbers that each vector is to have, where the model is made for vectors
            that are cut; ``None``: as many as it makes.
        :param timeout_s: seconds that it may take, waiting and loading included.
        :param request_id: what logs and observers call it; ``None``: an id of its own.
        :param priority: as a request's, -100 to 100; ``None``: 0.
        :param metadata: the caller's own; handed to observers, never to the model.
        :raises ConfigurationError: there is no text, the model makes no embeddings or none of so
            many numbers, or its handler takes no token ids.
        :raises EngineRoomError: what else a request may fail with.
        """
        request = embedding_request(
            model_id,
            texts,
            dimensions=dimensions,
            timeout_s=timeout_s,
            request_id=request_id,
            priority=priority,
            metadata=metadata,
        )
        scope, work = RequestScope(request), EmbeddingWork(request)
        await self._execution(scope).run(work)
        scope.raise_error()
        assert work.embeddings is not None
        return work.embeddings

    async def count_prompt_tokens(self, request: InferenceRequest) -> int:
        """How many tokens a request's input has, with its tools and whatever the chat template or
        the model adds. Nothing is generated; the model is loaded where it was not.

        Observers see a :class:`~engineroom.CountRequest`, and a response without counts.

        :raises ConfigurationError: ``request`` is no request to generate, or the model's runtime
            does not count.
        :raises EngineRoomError: what else a request may fail with.
        """
        check_generates(request, "count_prompt_tokens")
        scope, work = RequestScope(count_request(request)), CountWork()
        await self._execution(scope).run(work)
        scope.raise_error()
        return work.count

    async def tokenize(
        self,
        request: InferenceRequest,
        *,
        add_special_tokens: bool = True,
        special_as_text: bool = False,
        pieces: bool = False,
    ) -> Tokens:
        """The token ids of a request's input, as :meth:`count_prompt_tokens` counts them.

        Observers see a :class:`~engineroom.TokenizeRequest`, and a response without counts.

        :param add_special_tokens: a ``prompt`` has around it what the model wants there.
        :param special_as_text: special tokens that a ``prompt`` names are text.
        :param pieces: the bytes of each token are told, too.
        :raises ConfigurationError: ``request`` is no request to generate, or the model's runtime
            does not tell.
        :raises EngineRoomError: what else a request may fail with.
        """
        check_generates(request, "tokenize")
        how = {"add_special_tokens": add_special_tokens, "special_as_text": special_as_text}
        scope, work = RequestScope(tokenize_request(request, **how)), TokenizeWork(pieces=pieces)
        await self._execution(scope).run(work)
        scope.raise_error()
        assert work.tokens is not None
        return work.tokens

    async def detokenize(
        self,
        model_id: str,
        tokens: Sequence[int],
        *,
        max_bytes: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        priority: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of token ids, the names of special ones in it; U+FFFD stands for bytes that are
        no whole character.

        Observers see a :class:`~engineroom.DetokenizeRequest`, and a response without counts.

        :param max_bytes: a longer text is refused; ``None``: none is.
        :param timeout_s: seconds that it may take, waiting and loading included.
        :param request_id: what logs and observers call it; ``None``: an id of its own.
        :param priority: as a request's, -100 to 100; ``None``: 0.
        :param metadata: the caller's own; handed to observers, never to the model.
        :raises ConfigurationError: the model has no such token, or its runtime does not tell.
        :raises EngineRoomError: what else a request may fail with.
        """
        fields = {"timeout_s": timeout_s, "request_id": request_id, "priority": priority}
        request = detokenize_request(model_id, tokens, metadata=metadata, **fields)
        scope, work = RequestScope(request), DetokenizeWork(request, max_bytes)
        await self._execution(scope).run(work)
        scope.raise_error()
        return work.text

    async def rerank(
        self,
        model_id: str,
        query: str | Sequence[str],
        documents: Sequence[str],
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        priority: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Score documents for a query, with a model that is made for it.

        Observers see a :class:`~engineroom.RerankRequest`, and a response that has the counts.

        :param query: one for all documents, or as many as there are documents.
        :param documents: at least one, none of them empty; the scores are in their order.
        :param timeout_s: seconds that it may take, waiting and loading included.
        :param request_id: what logs and observers call it; ``None``: an id of its own.
        :param priority: as a request's, -100 to 100; ``None``: 0.
        :param metadata: the caller's own; handed to observers, never to the model.
        :raises ConfigurationError: there is no text, or the model scores no pairs of texts.
        :raises EngineRoomError: what else a request may fail with.
        """
        request = rerank_request(
            model_id,
            query,
            documents,
            timeout_s=timeout_s,
            request_id=request_id,
            priority=priority,
            metadata=metadata,
        )
        scope, work = RequestScope(request), RankingWork(request)
        await self._execution(scope).run(work)
        scope.raise_error()
        assert work.scores is not None
        return work.scores

    def run(self, request: InferenceRequest) -> InferenceResponse:
        """Answer in whole, for callers without an event loop. Blocks.

        :raises ConfigurationError: called on the event loop that the service runs on, or
            ``request`` is no request to generate.
        """
        check_generates(request, "run")
        return self._portal.run(lambda: self.infer(request))

    def stream_sync(self, request: InferenceRequest) -> BlockingStream:
        """Answer piece by piece, for callers without an event loop.

        :returns: an iterator of chunks with ``response`` and ``close()``.
        :raises ConfigurationError: ``request`` is no request to generate.
        """
        check_generates(request, "stream_sync")
        return BlockingStream(self._portal, lambda: self.stream(request))

    # ── the ways around ──────────────────────────────────────────────────────────────────────

    def register_handler(self, handler: InferenceHandler, before: str | None = None) -> None:
        """Add a handler: after those added before, ahead of all installed ones.

        :param before: put it directly before the handler of this name instead.
        :raises ConfigurationError: see :meth:`HandlerRegistry.register`.
        """
        self.registry.register(handler, before)

    def explain(self, model_id: str) -> DispatchReport:
        """Every handler, its verdict on the model, and why.

        :raises ModelNotFoundError: there is no such model.
        :raises ConfigurationError: the model source cannot tell.
        """
        ask = getattr(self._source, "explain", None)
        if ask is None:
            raise ConfigurationError(
                f"{type(self._source).__name__} has no explain(); lease the model and ask "
                "service.registry.explain(loaded_model)"
            )
        report: DispatchReport = ask(model_id)
        return report

    def capabilities_of(self, handler: InferenceHandler) -> Capabilities:
        """What a handler of the service can do; it is asked once."""
        capabilities = self._capabilities.get(handler.name)
        if capabilities is None:
            capabilities = self._capabilities[handler.name] = effective_capabilities(handler)
        return capabilities

    @property
    def model_source(self) -> ModelSource:
        """Where models come from: what was given as ``model_manager``."""
        return self._source

    def turn_away(self, request: InferenceRequest, reason: str) -> None:
        """Tell log and observers of a request that a limit ahead of the service turned away.

        :param reason: of few words, fit to be counted by; see ``engineroom_request_rejected``.
        """
        self._running.turn_away(request, reason)

    @property
    def num_requests(self) -> int:
        """Requests that are being answered or wait for it."""
        return len(self._running)

    async def __aenter__(self) -> LLMInferenceService:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    def __enter__(self) -> LLMInferenceService:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close_sync()

    async def close(self, drain_timeout_s: float = 30.0) -> None:
        """Take no more requests, let the running ones end, then unload the models.

        :param drain_timeout_s: seconds that running requests get; then they are stopped, and
            their callers told so.
        :raises ConfigurationError: it belongs to the process that this one was forked from.
        """
        self._portal.home.check()
        self._running.closed = True
        if drain_timeout_s > 0:
            await self._running.wait_idle(drain_timeout_s)
        self._running.interrupt("the service was closed; send it again")
        await self._running.wait_idle()
        try:
            if (close := getattr(self._source, "close", None)) is not None:
                await close()
        finally:
            self._portal.stop()

    def close_sync(self, drain_timeout_s: float = 30.0) -> None:
        """As :meth:`close`, for callers without an event loop."""
        try:
            self._portal.run(lambda: self.close(drain_timeout_s))
        finally:
            self._portal.join()

    # ── dispatch ─────────────────────────────────────────────────────────────────────────────

    def _scope(self, request: InferenceRequest) -> RequestScope:
        """The request's life; where the deployment says so, its key does not count for caches."""
        scope_of = getattr(self._source, "prefix_cache_scope", None)
        if scope_of is not None and request.key_name is not None:
            with suppress(ModelNotFoundError):  # told when it is leased
                if scope_of(request.model_id) == "shared":
                    request = request.over_all_keys()
        return RequestScope(request)

    def _execution(self, scope: RequestScope) -> Execution:
        return Execution(scope, self._running, self._source, self._choose)

    def _choose(
        self, scope: RequestScope, loaded_model: LoadedModel
    ) -> tuple[InferenceHandler, list[str]]:
        """The model's handler, and warnings about what that does not honour; or a refusal."""
        handler = self.registry.select(loaded_model)
        scope.handler = handler.name
        scope.handler_module = type(handler).__module__
        request, capabilities = scope.request, self.capabilities_of(handler)
        if logger.isEnabledFor(logging.DEBUG):
            request_logger(logger, request).debug(
                "request %s for %s goes to handler %s: %s",
                request.request_id, request.model_id, handler.name, self.registry.why(loaded_model),
            )  # fmt: skip
        if request.kind in ("embed", "rerank", "detokenize"):
            check_claims(handler.name, capabilities, request)
            return handler, []
        unsupported = unsupported_by(handler, loaded_model, capabilities, request)
        if not unsupported:
            return handler, []
        # Without its input a request has nothing to continue: that cannot be a warning.
        if lost := [name for name in INPUTS if name in unsupported]:
            advice = f"send prompt= instead of {lost[0]}=, or use another runtime"
        else:
            advice = (
                f"leave {'it' if len(unsupported) == 1 else 'them'} out, use another runtime, or "
                'set on_unsupported="warn"'
            )
        warn = (request.on_unsupported or self._on_unsupported) == "warn"
        if lost or not warn:
            raise ConfigurationError(
                f"handler {handler.name!r} does not honour {', '.join(unsupported)}; {advice}"
            )
        ignored = f"was ignored: handler {handler.name!r} does not honour it"
        return handler, [f"{name} {ignored}" for name in unsupported]


def _registry_for(
    source: ModelSource, handlers: Sequence[InferenceHandler | str] | None
) -> HandlerRegistry:
    managed = source if isinstance(source, LLMModelManager) else None
    if handlers is None:
        return managed.registry if managed is not None else HandlerRegistry()
    registry = HandlerRegistry(
        allow=[h for h in handlers if isinstance(h, str)],
        disabled=managed.config.disabled_handlers if managed is not None else (),
    )
    for handler in handlers:
        if not isinstance(handler, str):
            registry.register(handler)
    if managed is not None:
        managed.use_registry(registry)
    return registry
