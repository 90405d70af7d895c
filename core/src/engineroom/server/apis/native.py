"""engineroom's own API: ``POST /v1/inference``, with the schemas that the library has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.schemas import InferenceRequest, InferenceResponse, PromptLogprob, TokenLogprob
from engineroom.server.apis.request_fields import check_counts, common_fields
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, OpenAIError, invalid_fields
from engineroom.server.http.exchange import Writer, respond
from engineroom.server.http.frames import Framer, event, named_event, taken

__all__ = ["ROUTES"]

_LOGPROBS: Final = TypeAdapter(list[PromptLogprob])
_LISTS: Final = ("logprobs", "prompt_logprobs")
_ENTRIES: Final = 256
"""Log probabilities of so many tokens are encoded at a time."""


async def inference(call: Call) -> None:
    """Answer an ``InferenceRequest``; a stream ends with the ``InferenceResponse``."""
    raw = await call.json()
    if not isinstance(raw, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    check_counts(call, raw)
    try:
        request = InferenceRequest.model_validate(raw)
    except ValidationError as error:
        raise invalid_fields(error) from error
    common = common_fields(call, request)
    own = {name: common[name] for name in ("timeout_s", "priority", "metadata")}
    request = request.model_copy(update={"request_id": call.id, **own})
    await respond(call, [request], InferenceWriter(call))


class InferenceWriter(Writer):
    """``{"text": …}``, ``{"reasoning": …}`` or ``{"tool_call": {"call": 0, "id": …, "name": …,
    "arguments": …}}`` for each chunk, then an event ``response`` or ``error``.

    Log probabilities are in the final response.
    """

    def __init__(self, call: Call) -> None:
        self._warnings = [*call.warnings]  # to which those of the answer are added
        self._rounds = call.context.rounds
        self._lists: dict[str, bytes] = {}

    async def prepare(
        self,
        index: int,
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[PromptLogprob] | None,
    ) -> None:
        """Encode its log probabilities."""
        lists: Sequence[list[Any] | None] = (logprobs, prompt_logprobs)
        for name, entries in zip(_LISTS, lists, strict=True):
            if entries is not None:
                parts: list[bytes] = []
                for some in taken(entries, _ENTRIES):
                    await self._rounds.next()
                    parts.append(_LOGPROBS.dump_json(some)[1:-1])
                self._lists[name] = b"[" + b",".join(parts) + b"]"

    def whole(self, responses: Sequence[InferenceResponse]) -> bytes:
        return self._json(responses[0])

    def _json(self, response: InferenceResponse) -> bytes:
        own = self._with_warnings(response).model_copy(update=dict.fromkeys(_LISTS))
        text = own.model_dump_json().encode()
        for name in _LISTS:
            field = b'"%b":' % name.encode()
            before, _, after = text.partition(field + b"null")
            text = before + field + self._lists.get(name, b"null") + after
        return text

    def _with_warnings(self, response: InferenceResponse) -> InferenceResponse:
        if not self._warnings:
            return response
        warnings = [*self._warnings, *response.warnings]
        return response.model_copy(update={"warnings": warnings})

    def framer(self, index: int) -> Callable[[str], bytes]:
        of_text = Framer(lambda text: {"text": text})
        return of_text if self.plain else lambda chunk: _delta(chunk) or of_text(chunk)

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The final response."""
        return b"event: response\ndata: " + self._json(response) + b"\n\n"

    def fail(self, error: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """The error, then the final response, whose message says no more than the error."""
        response = responses[0].model_copy(update={"error_message": error.message})
        return named_event("error", OpenAIError.of(error)) + self.finish(0, response)


def _delta(chunk: str) -> bytes | None:
    """The event of what is no content."""
    if isinstance(chunk, ReasoningDelta):
        return event({"reasoning": chunk.text})
    if isinstance(chunk, ToolCallDelta):
        made = {"id": chunk.id, "name": chunk.name}
        told = {name: value for name, value in made.items() if value is not None}
        return event({"tool_call": {"call": chunk.call, **told, "arguments": chunk.arguments}})
    return None


ROUTES = (
    work_route(
        "/v1/inference",
        inference,
        "Answer an InferenceRequest",
        "engineroom",
        request=InferenceRequest,
        response=InferenceResponse,
        streams=SSE,
        example={"model_id": "default", "prompt": "Once upon a time"},
    ),
)
