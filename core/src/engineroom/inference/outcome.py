"""What came of a request, as its response tells it: done, stopped or failed."""

from __future__ import annotations

import asyncio

from engineroom.border import failure, get_logger, own_copy, without_frames, words
from engineroom.errors import EngineRoomError, InferenceError, RequestTimeoutError
from engineroom.inference.delivery import DeliveredChunks
from engineroom.inference.request_log import defect, origin
from engineroom.inference.scope import RequestScope
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.telemetry import request_logger

__all__ = ["completed", "failed"]

logger = get_logger("engineroom.service")


def completed(
    scope: RequestScope,
    response: InferenceResponse | None,
    warnings: list[str],
    entered: float,
    delivered: DeliveredChunks | None = None,
) -> InferenceResponse:
    """What a handler gave, with all that the service knows better.

    :param response: the handler's; ``None``: its stream had no ``StreamEnd``.
    :param entered: when the handler was asked, by :func:`time.perf_counter`.
    """
    request = scope.request
    if response is None:
        response = InferenceResponse(
            request_id=request.request_id,
            model_id=request.model_id,
            generated_text=delivered.text if delivered is not None else None,
        )
    response.request_id = request.request_id
    response.model_id = request.model_id
    response.handler = scope.handler
    response.queue_time_ms = (entered - scope.started) * 1000
    if response.finish_reason is None:
        response.finish_reason = "eos_token" if response.error_message is None else "error"
    if response.time_to_first_token_ms is not None:
        response.time_to_first_token_ms += (entered - scope.started) * 1000
    if delivered is not None and delivered.first_at is not None:
        response.time_to_first_token_ms = (delivered.first_at - scope.started) * 1000
    if warnings:
        response.warnings = [*warnings, *response.warnings]
    return response


def failed(
    scope: RequestScope,
    error: BaseException,
    delivered: DeliveredChunks | None = None,
    *,
    own: bool = False,
) -> tuple[InferenceResponse, BaseException]:
    """The response of a request that did not end well, and what ended it.

    :param own: the error is none of the handler's: an interrupt, or raised by who reads the stream.
    :returns: the second is an ``Exception`` where the response says all, and
        ``scope.error`` that error typed; what is none must be raised: the caller's own
        cancellation, an interrupt.
    """
    raised, error = error, _what_ended(scope, error, own)
    response = _partial(scope, delivered)
    if isinstance(error, Exception):
        assert isinstance(error, EngineRoomError)
        if isinstance(raised, EngineRoomError) and raised.__cause__ is not None:
            origin(scope.request, raised)
        without_frames(raised)
        # One of a load may be that of many requests: each names itself in its own.
        typed = scope.error = own_copy(without_frames(error)).with_context(
            request_id=scope.request.request_id, model_id=scope.request.model_id
        )
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
    return response, error


def _what_ended(scope: RequestScope, error: BaseException, own: bool) -> BaseException:
    """The scope's own reason, where that is why the error came; a typed one for what is a defect.

    A defect is logged. A request that somebody else cancels ends so, whatever its handler raises.
    """
    if isinstance(error, asyncio.CancelledError):
        if scope.uncancel_if_ours():
            assert scope.cause is not None
            return scope.cause
        if scope.cancelled:
            return error
    elif isinstance(error, GeneratorExit) and own:
        return scope.cause or error
    elif own and not isinstance(error, Exception):
        return error
    if not isinstance(error, EngineRoomError):
        error = _defect(scope.request, error)
    if scope.overruled:
        return asyncio.CancelledError()
    return scope.cause or error  # whatever the handler made of being stopped


def _defect(request: InferenceRequest, error: BaseException) -> EngineRoomError:
    """A typed error for what a handler must not raise, which is logged."""
    what = ""
    if isinstance(error, asyncio.CancelledError):  # a future of the runtime's own was cancelled
        what = "the work was cancelled inside the runtime"
    said = InferenceError(what or words(error)).with_context(
        request_id=request.request_id, model_id=request.model_id
    )
    defect(request, error, said.describe())
    return failure(error, what)


def _partial(scope: RequestScope, delivered: DeliveredChunks | None) -> InferenceResponse:
    """How far a request had come, as its steps or its chunks tell."""
    generation = scope.generation
    response = InferenceResponse(
        request_id=scope.request.request_id, model_id=scope.request.model_id
    )
    if generation is not None:
        try:
            response = generation.response()
        except InferenceError as error:
            request_logger(logger, scope.request).warning("%s", error.message)
            response.generated_text = generation.text
    if delivered is not None and (text := delivered.text):
        response.generated_text = text
    response.stop_sequence = None
    response.handler = scope.handler
    return response
