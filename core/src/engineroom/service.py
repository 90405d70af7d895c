"""The dispatcher: a request in, the model's handler found, an answer or a typed error out.

Start reading here. :meth:`LLMInferenceService.process_inference` leases the model
(:mod:`engineroom.models.manager`), takes the first handler that can run it
(:mod:`engineroom.handlers.registry`), refuses what that handler cannot honour, and runs it inside a
``RequestScope`` (:mod:`engineroom.inference.scope`), which is how deadlines, ``aclose`` and
``close`` stop the work without harming the task that asked for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from engineroom.config.model import LoadedModel
from engineroom.errors import (
    ConfigurationError,
    EngineRoomError,
    InferenceError,
    QueueFullError,
    RequestTimeoutError,
    ResourceNotAvailableError,
)
from engineroom.generation.generation import watching
from engineroom.generation.mailbox import Mailbox
from engineroom.generation.steps import LAST_STEP
from engineroom.handlers.base import Capabilities, Embeddings, InferenceHandler, StreamEnd
from engineroom.handlers.dispatch import DispatchReport
from engineroom.handlers.registry import HandlerRegistry
from engineroom.handlers.token_handler import effective_capabilities, open_stream
from engineroom.inference.blocking import BlockingPortal, BlockingStream
from engineroom.inference.delivery import DeliveredChunks, push_to
from engineroom.inference.scope import RequestScope
from engineroom.inference.streams import InferenceStream, StreamError
from engineroom.models.manager import LLMModelManager, ModelSource
from engineroom.schemas import INPUTS, InferenceRequest, InferenceResponse, OnUnsupported
from engineroom.telemetry import request_logger

__all__ = ["LLMInferenceService"]

logger = logging.getLogger(__name__)

DEFAULT_MAX_REQUESTS: Final = 1024
_END: Final = StreamEnd(InferenceResponse(request_id="", model_id=""))
"""What a handler's generator that has ended is taken to have yielded."""


@runtime_checkable
class _Closing(Protocol):
    async def close(self) -> None: ...


@runtime_checkable
class _Explaining(Protocol):
    def explain(self, model_id: str) -> DispatchReport: ...


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
        self._max_requests = max_requests
        self.registry = _registry_for(model_manager, handlers)
        if on_unsupported is None:
            managed = model_manager if isinstance(model_manager, LLMModelManager) else None
            on_unsupported = managed.config.on_unsupported if managed is not None else "error"
        self._on_unsupported: OnUnsupported = on_unsupported
        self._capabilities: dict[str, Capabilities] = {}
        self._running: set[RequestScope] = set()
        self._embedding: set[asyncio.Future[Embeddings]] = set()
        self._idle: list[asyncio.Future[None]] = []
        self._closed = False
        self._portal = BlockingPortal()

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
        if not isinstance(request, InferenceRequest):
            raise ConfigurationError(
                f"process_inference takes an InferenceRequest, not {type(request).__name__}; "
                "build one with InferenceRequest(model_id=…, prompt=…)"
            )
        return self.stream(request) if request.stream else await self.infer(request)

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Answer in whole, whatever the request's ``stream`` says."""
        scope = RequestScope(request)
        scope.begin()
        try:
            await self._discover()
            self._admit(scope)
            async with self._source.lease(request.model_id) as loaded_model:
                handler, warnings = self._choose(scope, loaded_model)
                response = await self._infer(handler, loaded_model, scope, warnings)
            return self._finish(scope, response)
        except BaseException as error:  # noqa: BLE001 - logged, or raised again, in _failed
            return self._failed(scope, error)
        finally:
            scope.end()

    def stream(self, request: InferenceRequest) -> InferenceStream:
        """Answer piece by piece, whatever the request's ``stream`` says."""
        scope = RequestScope(request)
        return InferenceStream(request, scope, self._chunks(scope))

    async def embed(
        self, model_id: str, texts: Sequence[str], *, timeout_s: float | None = None
    ) -> Embeddings:
        """Turn texts into vectors, with a model that is made for it.

        :param texts: at least one, none of them empty.
        :param timeout_s: seconds that it may take, waiting and loading included.
        :raises ConfigurationError: there is no text, or the model makes no embeddings.
        :raises EngineRoomError: what else a request may fail with.
        """
        _check_texts(texts, model_id)
        await self._discover()
        if self._closed:
            raise ResourceNotAvailableError("the service is closed; it takes no more requests")
        if self.num_requests >= self._max_requests:
            raise QueueFullError(
                f"{self.num_requests} requests are running or waiting, which is the bound "
                "(max_requests); send it again later"
            )
        self._portal.bind()
        work = asyncio.ensure_future(self._embed(model_id, texts))
        self._embedding.add(work)
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"it was not done after timeout_s={timeout_s} seconds", model_id=model_id
            ) from error
        except asyncio.CancelledError:
            if work.cancelled() and self._closed and not _is_being_cancelled():
                raise ResourceNotAvailableError(
                    "the service was closed; send it again", model_id=model_id
                ) from None
            raise
        finally:
            self._embedding.discard(work)

    async def _embed(self, model_id: str, texts: Sequence[str]) -> Embeddings:
        try:
            async with self._source.lease(model_id) as loaded_model:
                handler = self.registry.select(loaded_model)
                if not self.capabilities_of(handler).embeddings:
                    raise ConfigurationError(
                        f"handler {handler.name!r} makes no embeddings; use another runtime"
                    )
                found = await handler.embed(loaded_model, texts)
                if not _is_embeddings(found, len(texts)):
                    raise InferenceError(
                        f"handler {handler.name!r}: embed did not return Embeddings with a vector "
                        "for each text; mend the plugin"
                    )
                return found
        except EngineRoomError as error:
            error.with_context(model_id=model_id)
            raise
        except Exception as error:
            logger.exception("model %r: embedding failed", model_id)
            raise InferenceError(f"{type(error).__name__}: {error}", model_id=model_id) from error

    def run(self, request: InferenceRequest) -> InferenceResponse:
        """Answer in whole, for callers without an event loop. Blocks.

        :raises ConfigurationError: called on the event loop that the service runs on.
        """
        return self._portal.run(lambda: self.infer(request))

    def stream_sync(self, request: InferenceRequest) -> BlockingStream:
        """Answer piece by piece, for callers without an event loop.

        :returns: an iterator of chunks with ``response`` and ``close()``.
        """
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
        if not isinstance(self._source, _Explaining):
            raise ConfigurationError(
                f"{type(self._source).__name__} has no explain(); lease the model and ask "
                "service.registry.explain(loaded_model)"
            )
        return self._source.explain(model_id)

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

    @property
    def num_requests(self) -> int:
        """Requests that are being answered or wait for it."""
        return len(self._running) + len(self._embedding)

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
        """
        self._closed = True
        if drain_timeout_s > 0:
            await asyncio.gather(
                self._wait_idle(drain_timeout_s), self._wait_embedded(drain_timeout_s)
            )
        for work in list(self._embedding):
            work.cancel()
        for scope in list(self._running):
            scope.interrupt(ResourceNotAvailableError("the service was closed; send it again"))
        await self._wait_idle(None)
        await self._wait_embedded(None)
        try:
            if isinstance(self._source, _Closing):
                await self._source.close()
        finally:
            self._portal.stop()

    def close_sync(self, drain_timeout_s: float = 30.0) -> None:
        """As :meth:`close`, for callers without an event loop."""
        try:
            self._portal.run(lambda: self.close(drain_timeout_s))
        finally:
            self._portal.join()

    # ── one request ──────────────────────────────────────────────────────────────────────────

    async def _chunks(self, scope: RequestScope) -> AsyncGenerator[str, None]:
        """The chunks of a stream. Runs in whichever task reads."""
        given = DeliveredChunks()
        closing = False  # nothing may be yielded any more
        try:
            await self._discover()
            self._admit(scope)
            async with self._source.lease(scope.request.model_id) as loaded_model:
                handler, warnings = self._choose(scope, loaded_model)
                if self.registry.listens("engineroom_request_gaps"):
                    given.listener = partial(self._spaced, scope)
                entered = time.perf_counter()
                inner, generation = open_stream(
                    handler, loaded_model, scope.request, scope.progress
                )
                advance = inner.__anext__
                mailbox: Mailbox | None = None
                end: Any = _END if generation is None else LAST_STEP
                final: InferenceResponse | None = None
                ended = False
                try:
                    with watching(scope.progress):
                        piece = await anext(inner, end)
                    while piece is not _END:
                        if generation is not None:
                            if isinstance(piece, Mailbox):
                                mailbox, advance, chunk = piece, piece.get, ""
                            elif mailbox is not None and isinstance(piece, str):
                                # It was taken as it was pushed.
                                chunk = piece
                            else:
                                chunk = generation.take(piece)
                            if generation.finish_reason is not None:
                                # Before the last text goes out: slow readers must not keep slots.
                                await inner.aclose()
                                chunk += generation.finish()
                                final, ended = generation.response(), True
                        elif isinstance(piece, StreamEnd):
                            chunk, final = "", piece.response
                        else:
                            chunk = _checked(handler, piece)
                        scope.check()
                        sink = scope.sink
                        if chunk or (sink is not None and sink.held is not None):
                            if chunk:
                                given.add(chunk)
                            try:
                                yield chunk
                            except GeneratorExit:
                                closing = True
                                raise
                        if ended:
                            break
                        try:
                            if mailbox is None or generation is None or scope.sink is None:
                                piece = await advance()
                            else:
                                piece = await push_to(mailbox, generation, given, scope.sink)
                        except StopAsyncIteration:
                            piece = end
                finally:
                    await inner.aclose()
                scope.check()
                response = _completed(scope, handler, final, warnings, entered)
                if final is None:
                    response.generated_text = "".join(given.texts)
                if given.first_at is not None:
                    response.time_to_first_token_ms = (given.first_at - scope.started) * 1000
            given.tell()
            self._finish(scope, response)
        except BaseException as error:  # noqa: BLE001 - logged, or raised again, in _failed
            given.tell()
            response = self._failed(scope, error, "".join(given.texts))
            cause = response._cause
            if scope.quiet or not isinstance(cause, EngineRoomError):
                return
            if closing:
                scope.unread = StreamError(cause)
            else:
                yield StreamError(cause)

    async def _infer(
        self,
        handler: InferenceHandler,
        loaded_model: LoadedModel,
        scope: RequestScope,
        warnings: list[str],
    ) -> InferenceResponse:
        entered = time.perf_counter()
        with watching(scope.progress):
            response = await handler.infer(loaded_model, scope.request)
        scope.check()
        if not isinstance(response, InferenceResponse):
            raise InferenceError(
                f"handler {handler.name!r}: infer returned {type(response).__name__} instead of "
                "an InferenceResponse; mend the plugin"
            )
        return _completed(scope, handler, response, warnings, entered)

    async def _discover(self) -> None:
        """Have the plugins found, off the loop; observers, too, are to see the first request."""
        if not self.registry.discovered:
            await asyncio.to_thread(self.registry.discover)

    def _admit(self, scope: RequestScope) -> None:
        """Count the request in, or refuse it at once."""
        if self._closed:
            self._rejected(scope, "closed")
            raise ResourceNotAvailableError("the service is closed; it takes no more requests")
        if self.num_requests >= self._max_requests:
            self._rejected(scope, "queue_full")
            raise QueueFullError(
                f"{self.num_requests} requests are running or waiting, which is the bound "
                "(max_requests); send it again later"
            )
        self._portal.bind()
        self._running.add(scope)
        request = scope.request
        scope.arm(
            RequestTimeoutError(f"it was not done after timeout_s={request.timeout_s} seconds")
        )
        self.registry.notify("engineroom_request_started", request=request)
        if scope.deadline is not None and asyncio.get_running_loop().time() >= scope.deadline:
            raise RequestTimeoutError(
                f"timeout_s={request.timeout_s} seconds were over before it began"
            )

    def _rejected(self, scope: RequestScope, reason: str) -> None:
        self.registry.notify("engineroom_request_rejected", request=scope.request, reason=reason)

    def _spaced(self, scope: RequestScope, gaps_s: tuple[float, ...]) -> None:
        """Tell the observers how far chunks lay apart."""
        self.registry.notify(
            "engineroom_request_gaps",
            request=scope.request,
            handler=scope.handler,
            gaps_s=gaps_s,
        )

    def _choose(
        self, scope: RequestScope, loaded_model: LoadedModel
    ) -> tuple[InferenceHandler, list[str]]:
        """The model's handler, and warnings about what that does not honour."""
        handler = self.registry.select(loaded_model)
        scope.handler = handler.name
        return handler, self._check(handler, scope.request)

    def _check(self, handler: InferenceHandler, request: InferenceRequest) -> list[str]:
        """Refuse what the handler does not honour, or say so in warnings."""
        unsupported = self.capabilities_of(handler).unsupported(request)
        if not unsupported:
            return []
        warn = (request.on_unsupported or self._on_unsupported) == "warn"
        # Without its input a request has nothing to continue: that cannot be a warning.
        inputs = [name for name in INPUTS if name in unsupported]
        if inputs:
            raise ConfigurationError(
                f"handler {handler.name!r} does not honour {', '.join(unsupported)}; send prompt= "
                f"instead of {inputs[0]}=, or use another runtime"
            )
        if not warn:
            raise ConfigurationError(
                f"handler {handler.name!r} does not honour {', '.join(unsupported)}; leave "
                f"{'it' if len(unsupported) == 1 else 'them'} out, use another runtime, or set "
                'on_unsupported="warn"'
            )
        return [
            f"{name} was ignored: handler {handler.name!r} does not honour it"
            for name in unsupported
        ]

    def _finish(self, scope: RequestScope, response: InferenceResponse) -> InferenceResponse:
        """Count the request out and tell the observers. Called once for each admitted one."""
        response.inference_time_ms = (time.perf_counter() - scope.started) * 1000
        scope.stop(response)
        self._running.discard(scope)
        self.registry.notify(
            "engineroom_request_finished", request=scope.request, response=response
        )
        if not self._running:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()
        return response

    def _failed(
        self, scope: RequestScope, error: BaseException, partial: str | None = None
    ) -> InferenceResponse:
        """The response of a request that did not end well; raises what must not be swallowed."""
        request = scope.request
        if isinstance(error, asyncio.CancelledError):
            if scope.uncancel_if_ours():
                assert scope.cause is not None
                error = scope.cause
            elif not scope.cancelled:  # a future of the runtime's own was cancelled
                error = InferenceError("the work was cancelled inside the runtime")
        if isinstance(error, Exception) and not isinstance(error, EngineRoomError):
            request_logger(logger, request).error(
                "request failed: %s", _as_typed(error, request).describe(), exc_info=error
            )
        if scope.cause is not None and isinstance(error, Exception | GeneratorExit):
            error = scope.cause  # whatever the handler made of being stopped
        response = _partial(scope, partial)
        if isinstance(error, Exception):
            typed = _as_typed(error, request)
            response.record_error(typed)
            response.finish_reason = (
                "timeout"
                if isinstance(typed, RequestTimeoutError)
                else "cancelled"
                if error is scope.cause
                else "error"
            )
        else:
            response.finish_reason = "cancelled"
        if scope.quiet:
            response.error_message = response.error_type = None
        if scope in self._running:
            self._finish(scope, response)
        else:
            scope.stop(response)  # refused: it never counted
        if not isinstance(error, Exception):
            raise error
        return response

    async def _wait_idle(self, timeout_s: float | None) -> None:
        if self._running:
            future = asyncio.get_running_loop().create_future()
            self._idle.append(future)
            await asyncio.wait([future], timeout=timeout_s)

    async def _wait_embedded(self, timeout_s: float | None) -> None:
        if self._embedding:
            await asyncio.wait(self._embedding, timeout=timeout_s)


def _check_texts(texts: object, model_id: str) -> None:
    listed = list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else []
    if not listed or not all(isinstance(text, str) and text for text in listed):
        raise ConfigurationError(
            "embed takes a list of texts, of which none is empty", model_id=model_id
        )


def _is_embeddings(found: object, count: int) -> bool:
    return isinstance(found, Embeddings) and len(found.vectors) == count


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _completed(
    scope: RequestScope,
    handler: InferenceHandler,
    response: InferenceResponse | None,
    warnings: list[str],
    entered: float,
) -> InferenceResponse:
    """What a handler gave, with all that the service knows better."""
    request = scope.request
    if response is None:
        response = InferenceResponse(request_id=request.request_id, model_id=request.model_id)
    response.request_id = request.request_id
    response.model_id = request.model_id
    response.handler = handler.name
    if response.finish_reason is None:
        response.finish_reason = "eos_token" if response.error_message is None else "error"
    if response.time_to_first_token_ms is not None:
        response.time_to_first_token_ms += (entered - scope.started) * 1000
    if warnings:
        response.warnings = [*warnings, *response.warnings]
    return response


def _partial(scope: RequestScope, text: str | None) -> InferenceResponse:
    """How far a request had come, as its handler or its chunks tell."""
    generation = scope.progress.generation
    response = InferenceResponse(
        request_id=scope.request.request_id, model_id=scope.request.model_id
    )
    if generation is not None:
        try:
            response = generation.response()
        except InferenceError as error:
            request_logger(logger, scope.request).warning("%s", error.message)
            response.generated_text = generation.text
    if text:
        response.generated_text = text
    response.stop_sequence = None
    response.handler = scope.handler
    return response


def _as_typed(error: Exception, request: InferenceRequest) -> EngineRoomError:
    if isinstance(error, EngineRoomError):
        # Requests may share an error, that of one load for instance; each names itself in it.
        typed = error.__class__.__new__(error.__class__, *error.args)
        typed.__dict__.update(error.__dict__)
        typed.__cause__, typed.__context__ = error.__cause__, error.__context__
        typed.__suppress_context__ = error.__suppress_context__
        typed.__traceback__ = error.__traceback__
    else:
        typed = InferenceError(f"{type(error).__name__}: {error}" if str(error) else repr(error))
        typed.__cause__ = error
    return typed.with_context(request_id=request.request_id, model_id=request.model_id)


def _checked(handler: InferenceHandler, chunk: object) -> str:
    if not isinstance(chunk, str):
        raise InferenceError(
            f"handler {handler.name!r}: stream_infer yielded {type(chunk).__name__} instead of "
            "str; mend the plugin"
        )
    return chunk


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
