"""The life of one piece of work, of whatever kind: let in, done by a handler, ended, told of.

``infer``, ``embed`` and the chunks of a stream differ in what they ask the handler for. All else
is the same and stands here once: admission, the lease of the model, the choice of the handler,
and an end that makes one response of whatever happened.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TypeAlias

from engineroom.border import in_thread, passes
from engineroom.config.model import LoadedModel
from engineroom.errors import InferenceError, ModelNotFoundError
from engineroom.generation.reader import StepReader
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.token_handler import answers_by_steps, read_steps
from engineroom.inference.admission import Admission
from engineroom.inference.delivery import ChunkReader, DeliveredChunks
from engineroom.inference.outcome import completed, failed
from engineroom.inference.request_log import whose_mistake
from engineroom.inference.scope import RequestScope
from engineroom.inference.streams import StreamError
from engineroom.models.manager import ModelSource
from engineroom.schemas import InferenceResponse

__all__ = ["Choose", "Execution", "Work", "answer_whole"]

Choose: TypeAlias = Callable[[RequestScope, LoadedModel], tuple[InferenceHandler, list[str]]]
"""Finds the model's handler, and warns of what that does not honour; or raises."""
Work: TypeAlias = Callable[
    [RequestScope, InferenceHandler, LoadedModel], Awaitable[InferenceResponse]
]
"""What is asked of the handler: one a kind of request that is answered in whole. It calls the
scope's ``check`` when the handler has answered."""


@dataclass(eq=False, slots=True)
class Execution:
    """Carries one request from admission to its end.

    Used with ``async with``, at whose end the lease is given back, the response is made, and the
    observers are told; an error ends there, unless it is the caller's own cancellation.

    :param scope: the request, and what stops it.
    :param admission: lets it in.
    :param source: where its model comes from.
    :param choose: finds its handler.
    """

    scope: RequestScope
    admission: Admission
    source: ModelSource
    choose: Choose
    _lease: AbstractAsyncContextManager[LoadedModel] | None = field(default=None, init=False)
    _warnings: list[str] = field(default_factory=list, init=False)
    _entered: float = field(default=0.0, init=False)
    _response: InferenceResponse | None = field(default=None, init=False)
    _delivered: DeliveredChunks | None = field(default=None, init=False)
    _thrown: BaseException | None = field(default=None, init=False)  # in, by who reads the stream

    async def run(self, work: Work) -> InferenceResponse:
        """Answer in whole, in the caller's task.

        :returns: the response, in which a failure is told; ``scope.error`` is that error.
        """
        scope = self.scope
        scope.begin()
        try:
            async with self:
                handler, loaded_model = await self._open()
                self._complete(await work(scope, handler, loaded_model))
            assert scope.response is not None
            return scope.response
        finally:
            scope.end()

    async def chunks(self) -> AsyncGenerator[str, None]:
        """Answer piece by piece. Runs in whichever task reads; ends with a ``StreamError``."""
        scope = self.scope
        delivered = self._delivered = DeliveredChunks()
        async with self:
            handler, loaded_model = await self._open()
            registry, hook = self.admission.registry, "engineroom_request_gaps"
            if registry.listens(hook):
                tell = partial(registry.notify, hook, request=scope.request, handler=scope.handler)
                delivered.listener = lambda gaps_s: tell(gaps_s=gaps_s)
            reader = _open_reader(scope, handler, loaded_model)
            try:
                while not reader.ended:
                    sink = scope.sink
                    if sink is None:
                        chunk = await reader.next_chunk()
                    else:
                        chunk = await sink.fill(reader, delivered)
                    scope.check()
                    if chunk:
                        delivered.add(chunk)
                    elif sink is None or sink.held is None:
                        continue
                    try:
                        yield chunk
                    except BaseException as error:
                        self._thrown = error
                        raise
            finally:
                await reader.aclose()
                delivered.tell()
            scope.check()
            self._complete(reader.response())
        if scope.error is not None and not scope.quiet:
            if isinstance(self._thrown, GeneratorExit):  # nothing may be yielded any more
                scope.unread = StreamError(scope.error)
            else:
                yield StreamError(scope.error)

    async def _open(self) -> tuple[InferenceHandler, LoadedModel]:
        """Let the request in, lease its model, choose its handler."""
        scope, registry = self.scope, self.admission.registry
        if not registry.discovered:  # observers, too, are to see the first request
            await in_thread(registry.discover)
        scope.check()
        self.admission.admit(scope)
        lease = self.source.lease(scope.request.model_id)
        loaded_model = await lease.__aenter__()
        self._lease = lease
        handler, self._warnings = self.choose(scope, loaded_model)
        scope.warnings = self._warnings
        self._entered = time.perf_counter()
        scope.queued_s += self._entered - scope.started
        return handler, loaded_model

    def _complete(self, response: InferenceResponse | None) -> None:
        self._response = completed(
            self.scope, response, self._warnings, self._entered, self._delivered
        )

    def _is_known(self) -> bool:
        """Whether its model is one of the source's, as far as that can tell."""
        try:
            getattr(self.source, "get_config", id)(self.scope.request.model_id)
        except ModelNotFoundError:
            return False
        return True

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        raised = error
        if self._lease is not None:
            try:
                await self._lease.__aexit__(kind, error, trace)
            except BaseException as late:  # noqa: BLE001 - told of, or raised again, below
                raised = late
        if raised is None:
            assert self._response is not None
            self.admission.finish(self.scope, self._response)
            return False
        # Before its frames are let go of, which tell where it was raised.
        whose = whose_mistake(self.scope, raised, self._is_known())
        own = raised is self._thrown or passes(raised)
        response, ended_by = failed(self.scope, raised, self._delivered, own=own)
        self.scope.whose = "nobody" if ended_by is self.scope.cause else whose
        self.admission.finish(self.scope, response)
        if isinstance(ended_by, Exception):
            return True
        if ended_by is error:
            return False
        try:
            raise ended_by
        finally:
            del raised, ended_by


async def answer_whole(
    scope: RequestScope, handler: InferenceHandler, loaded_model: LoadedModel
) -> InferenceResponse:
    """The whole answer, read from the handler's steps or given by its own ``infer``."""
    if answers_by_steps(handler, "infer"):
        reader = read_steps(handler, loaded_model, scope.request)
        scope.generation = reader.generation
        response = await reader.read_all()
    else:
        response = await handler.infer(loaded_model, scope.request)
    scope.check()
    if not isinstance(response, InferenceResponse):
        raise InferenceError(
            f"handler {handler.name!r}: infer returned {type(response).__name__} instead of an "
            "InferenceResponse; mend the plugin"
        )
    return response


def _open_reader(
    scope: RequestScope, handler: InferenceHandler, loaded_model: LoadedModel
) -> StepReader | ChunkReader:
    """What a stream is read from: the handler's steps, or what its own ``stream_infer`` yields."""
    if answers_by_steps(handler, "stream_infer"):
        reader = read_steps(handler, loaded_model, scope.request)
        scope.generation = reader.generation
        return reader
    return ChunkReader(handler.name, handler.stream_infer(loaded_model, scope.request))
