"""What comes out: the same on every runtime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from engineroom.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    EngineRoomError,
    error_class,
)
from engineroom.field_types import FrozenSchema
from engineroom.tools import ToolCall

__all__ = ["FINISH_REASONS", "FinishReason", "InferenceResponse", "PromptLogprob", "TokenLogprob"]

FinishReason: TypeAlias = Literal[
    "eos_token", "length", "stop_sequence", "tool_calls", "cancelled", "timeout", "error"
]
FINISH_REASONS: Final = frozenset(get_args(FinishReason))
"""Why a generation ended; see ``docs/usage.md`` for what each means."""


class PromptLogprob(FrozenSchema):
    """One token of a prompt, how likely it was, and what else was likely.

    All of it is tuples: the garbage collector has nothing to do with those that hold texts and
    numbers alone, and an answer may have hundreds of thousands.
    """

    token_id: int
    token: str
    """The token's own text; U+FFFD stands for bytes that are no whole character."""
    logprob: float | None
    """``None`` for the first token, before which there is nothing."""
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest alternatives as ``(token_id, token, logprob)``, likeliest first."""
    bytes: tuple[int, ...] | None = None
    """The token's own bytes, which may be no whole character; ``None``: not known."""
    top_bytes: tuple[tuple[int, ...], ...] | None = None
    """Those of the alternatives, in their order."""


class TokenLogprob(PromptLogprob):
    """One token that has others before it: a generated one, or one of a prompt."""

    logprob: float


class InferenceResponse(BaseModel):
    """What came of a request."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    request_id: str
    model_id: str
    generated_text: str | None = None
    """The text, without the stop sequence that ended it; whatever there was so far on failure."""
    error_message: str | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    """Tokens generated, the end-of-sequence token not counted."""
    reasoning_tokens: int | None = None
    """Those of them that are reasoning, the markers around it not counted; ``None``: the model
    does not reason."""
    inference_time_ms: float | None = None
    """From the service's acceptance of the request to its end."""
    queue_time_ms: float | None = None
    """From the acceptance until the handler was asked: what its model let it wait, a load included.
    """
    error_type: str | None = None
    """Name of the class of :mod:`engineroom.errors` that :meth:`raise_for_error` raises."""
    time_to_first_token_ms: float | None = None
    cached_prompt_tokens: int | None = None
    """Prompt tokens whose work was not done again because an earlier request had done it."""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[PromptLogprob] | None = None
    """One entry for each of the ``prompt_tokens``, where the request asked for them."""
    warnings: list[str] = Field(default_factory=list)
    handler: str | None = None
    """Name of the handler that did the work."""
    reasoning: str | None = None
    """What the model thought before it answered, without its markers; ``None``: nothing."""
    tool_calls: list[ToolCall] | None = None
    """The calls that it has written in whole; ``None``: there are none."""
    cut_call: bool = False
    """The answer ends within a call, which for this reason is not among the ``tool_calls``."""
    stop_sequence: str | None = None
    """The stop sequence that ended the text, where ``finish_reason`` is ``stop_sequence``."""

    _cause: BaseException | None = PrivateAttr(default=None)
    _begun: tuple[tuple[int, bool], ...] = PrivateAttr(default=())
    _entries: tuple[int, ...] = PrivateAttr(default=())

    def place_calls(
        self, begun: Iterable[tuple[int, bool]], entries: Iterable[int] | None = None
    ) -> None:
        """Where calls have begun.

        :param begun: for each that did, in their order, how many characters of the text stand
            before it, and whether it is one of the ``tool_calls``, or was cut or none after all.
        :param entries: for each, how many of the ``logprobs`` came with the text before it.
        """
        self._begun = tuple(begun)
        self._entries = (0,) * len(self._begun) if entries is None else tuple(entries)

    @property
    def logprobs_of_texts(self) -> list[int]:
        """For each text among the :attr:`parts` but the last, how many of the ``logprobs`` have
        come up to its end. What comes then, those of calls among them, belongs to the next text.
        """
        ends: list[int] = []
        start = 0
        for (place, _), entries in zip(self._begun, self._entries, strict=True):
            ends += [entries] if place > start else []
            start = max(start, place)
        return ends if start < len(self.generated_text or "") else ends[:-1]

    @property
    def parts(self) -> list[str | ToolCall]:
        """The text and the calls in the order in which the model wrote them, as a stream tells
        them. No text is empty. Where it is not known, calls stand behind the text.
        """
        text, calls = self.generated_text or "", iter(self.tool_calls or ())
        parts: list[str | ToolCall] = []
        start = 0
        for place, complete in self._begun:
            parts += [text[start:place]] if place > start else []
            start = max(start, place)
            if complete and (call := next(calls, None)) is not None:
                parts.append(call)
        return [*parts, *([text[start:]] if text[start:] else []), *calls]

    def raise_for_error(self) -> None:
        """Raise the typed error if the request failed; do nothing otherwise.

        :raises EngineRoomError: the class that ``error_type`` names.
        """
        if self.error_message is None:
            return
        raise self._error(self.error_message) from self._cause  # a local of it would be a cycle

    def _error(self, message: str) -> EngineRoomError:
        error_type = error_class(self.error_type)
        error = error_type(message, request_id=self.request_id, model_id=self.model_id)
        if isinstance(error, ConfigurationError) and isinstance(self._cause, ConfigurationError):
            error.field = self._cause.field  # with which the message begins
        if isinstance(error, ContextLengthExceededError) and isinstance(
            self._cause, ContextLengthExceededError
        ):
            error.tokens, error.most = self._cause.tokens, self._cause.most
        return error

    def record_error(self, error: EngineRoomError) -> None:
        """Make this the response of a request that failed with ``error``."""
        self.error_message = error.describe()
        self.error_type = next(
            cls.__name__ for cls in type(error).__mro__ if cls is error_class(cls.__name__)
        )
        self._cause = error
