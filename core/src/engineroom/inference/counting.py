"""What ``service.count_prompt_tokens`` asks of a handler, and what it makes of the answer."""

from __future__ import annotations

from engineroom.config.model import LoadedModel
from engineroom.errors import ConfigurationError, InferenceError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.token_handler import as_handler_gets_it
from engineroom.inference.scope import RequestScope
from engineroom.other_requests import CountRequest
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.telemetry import working_for

__all__ = ["CountWork", "count_request"]


class CountWork:
    """Asks a handler how many tokens a request's input has. Called once."""

    def __init__(self) -> None:
        self.count = 0
        """What came of it."""

    async def __call__(
        self, scope: RequestScope, handler: InferenceHandler, loaded_model: LoadedModel
    ) -> InferenceResponse:
        """Count."""
        request = as_handler_gets_it(handler, loaded_model, scope.request)
        with working_for(request):
            count: object = await handler.count_prompt_tokens(loaded_model, request)
        scope.check()
        if count is None:
            raise ConfigurationError(
                f"handler {handler.name!r} does not count prompts; use another runtime"
            )
        if type(count) is not int or count < 0:
            raise InferenceError(
                f"handler {handler.name!r}: count_prompt_tokens returned {count!r:.80} instead of "
                "a number; mend the plugin"
            )
        self.count = count
        # Nothing was read for an answer: no prompt tokens.
        return InferenceResponse(request_id=request.request_id, model_id=request.model_id)


def count_request(request: InferenceRequest) -> CountRequest:
    """The same request, to be counted."""
    return CountRequest.model_construct(
        request.model_fields_set,
        **{name: getattr(request, name) for name in type(request).model_fields},
    )
