"""What ``service.tokenize`` and ``detokenize`` ask of a handler, and what they make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from engineroom.config.model import LoadedModel
from engineroom.config.options import problems
from engineroom.errors import ConfigurationError, InferenceError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.token_handler import as_handler_gets_it
from engineroom.inference.scope import RequestScope
from engineroom.other_requests import DetokenizeRequest, TokenizeRequest
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.telemetry import working_for

__all__ = ["DetokenizeWork", "TokenizeWork", "Tokens", "detokenize_request", "tokenize_request"]

_AT_A_TIME: Final = 65_536
"""The bytes of so many tokens are asked for at a time."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A request's input as its model reads it.

    :param ids: token ids.
    :param pieces: the bytes that each stands for; ``None``: they were not asked for.
    :param max_context_tokens: tokens that the model can read and write in all; ``None``: not known.
    """

    ids: Sequence[int]
    pieces: Sequence[bytes] | None = None
    max_context_tokens: int | None = None


class TokenizeWork:
    """Asks a handler for the token ids of a request's input. Called once.

    :param pieces: the bytes of the tokens as well.
    """

    def __init__(self, *, pieces: bool) -> None:
        self._pieces = pieces
        self.tokens: Tokens | None = None
        """What came of it."""

    async def __call__(
        self, scope: RequestScope, handler: InferenceHandler, loaded_model: LoadedModel
    ) -> InferenceResponse:
        """Read the input."""
        request = as_handler_gets_it(handler, loaded_model, scope.request)
        with working_for(request):
            ids: object = await handler.tokenize(loaded_model, request)
            if ids is None:
                raise ConfigurationError(
                    f"handler {handler.name!r} does not tell the tokens of prompts; use another "
                    "runtime"
                )
            if not isinstance(ids, list | tuple):
                raise InferenceError(
                    f"handler {handler.name!r}: tokenize returned {type(ids).__name__} instead of "
                    "a list of token ids; mend the plugin"
                )
            pieces: list[bytes] = []
            for start in range(0, len(ids) if self._pieces else 0, _AT_A_TIME):
                pieces += await _bytes_of(handler, loaded_model, ids[start : start + _AT_A_TIME])
        scope.check()
        told = pieces if self._pieces else None
        self.tokens = Tokens(ids, told, loaded_model.max_context_tokens)
        # Nothing was read for an answer: no prompt tokens.
        return InferenceResponse(request_id=request.request_id, model_id=request.model_id)


class DetokenizeWork:
    """Asks a handler for the bytes of tokens. Called once.

    :param request: the tokens.
    :param most: bytes that the text may have; ``None``: as many as there are.
    """

    def __init__(self, request: DetokenizeRequest, most: int | None) -> None:
        self._request = request
        self._most = most
        self.text = ""
        """What came of it."""

    async def __call__(
        self, scope: RequestScope, handler: InferenceHandler, loaded_model: LoadedModel
    ) -> InferenceResponse:
        """Make a text of the tokens."""
        request, text = self._request, bytearray()
        with working_for(request):
            for start in range(0, len(request.tokens), _AT_A_TIME):
                some = request.tokens[start : start + _AT_A_TIME]
                text += b"".join(await _bytes_of(handler, loaded_model, some))
                if self._most is not None and len(text) > self._most:
                    raise ConfigurationError(
                        f"the text of the tokens has more than {self._most} bytes; send fewer of "
                        "them at a time",
                        field="tokens",
                    )
        scope.check()
        self.text = text.decode("utf-8", "replace")
        return InferenceResponse(request_id=request.request_id, model_id=request.model_id)


async def _bytes_of(
    handler: InferenceHandler, loaded_model: LoadedModel, tokens: Sequence[int]
) -> Sequence[bytes]:
    made: object = await handler.token_bytes(loaded_model, tokens)
    if made is None:
        raise ConfigurationError(
            f"handler {handler.name!r} does not tell the text of tokens; use another runtime"
        )
    if not isinstance(made, list | tuple) or len(made) != len(tokens):
        raise InferenceError(
            f"handler {handler.name!r}: token_bytes did not return the bytes of each token; mend "
            "the plugin"
        )
    return made


def tokenize_request(request: InferenceRequest, **fields: Any) -> TokenizeRequest:
    """The same request, whose input is to be told as tokens."""
    own = {name: getattr(request, name) for name in type(request).model_fields}
    return TokenizeRequest.model_construct(request.model_fields_set, **own, **fields)


def detokenize_request(model_id: object, tokens: object, **fields: Any) -> DetokenizeRequest:
    """The request that a call of ``service.detokenize`` is.

    :param fields: further ones of the request; ``None``: not said.
    :raises ConfigurationError: it is none.
    """
    if not isinstance(model_id, str) or not isinstance(tokens, list | tuple):
        raise ConfigurationError(
            "detokenize takes the id of a model and a list of token ids, not "
            f"{type(model_id).__name__} and {type(tokens).__name__}"
        )
    stated = {name: value for name, value in fields.items() if value is not None}
    told = {"model_id": model_id, "tokens": list(tokens), **stated}
    try:
        return DetokenizeRequest(**told)
    except ValidationError as error:
        mistakes = problems(error, told)
    raise ConfigurationError(f"detokenize: {mistakes}")
