"""The text, the counts and the clock of one request, made of its decoding steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pydantic import ValidationError

from engineroom.errors import InferenceError
from engineroom.generation.steps import TokenStep
from engineroom.generation.text import TextPipeline
from engineroom.schemas import FinishReason, InferenceRequest, InferenceResponse, TokenLogprob

__all__ = ["Generation"]


@dataclass(slots=True, eq=False, repr=False)
class Generation:
    """The text, the counts and the clock of one request."""

    request: InferenceRequest
    handler: str
    finish_reason: FinishReason | None = None
    generated_tokens: int = 0
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    logprobs: list[TokenLogprob] | None = None
    _pipeline: TextPipeline = field(init=False)
    _limit: int | None = field(init=False)
    _parts: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)
    _first_at: float | None = None

    def __post_init__(self) -> None:
        self._pipeline = TextPipeline(self.request.stop_sequences)
        self._limit = self.request.params.max_new_tokens

    def take(self, step: TokenStep) -> str:
        """Take a step; return the text that may be shown. Sets ``finish_reason`` at the end."""
        if step.prompt_tokens is not None:
            self.prompt_tokens = step.prompt_tokens
        if step.cached_prompt_tokens is not None:
            self.cached_prompt_tokens = step.cached_prompt_tokens
        if step.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(step.logprobs)
        if tokens := step.token_ids:
            if self._first_at is None:
                self._first_at = time.perf_counter()
            self.generated_tokens += len(tokens)
        pipeline = self._pipeline
        shown = pipeline.feed(text) if (text := step.text) else ""
        if pipeline.matched is not None:
            self.finish_reason = "stop_sequence"
        elif step.finish is not None:
            self.finish_reason = step.finish
        elif self._limit is not None and self.generated_tokens >= self._limit:
            self.finish_reason = "length"
        if shown:
            self._parts.append(shown)
        return shown

    def finish(self) -> str:
        """End the text; return what was still held back."""
        rest = self._pipeline.finish()
        if self._pipeline.matched is not None:
            self.finish_reason = "stop_sequence"
        elif self.finish_reason is None:
            self.finish_reason = "eos_token"
        if rest:
            self._parts.append(rest)
        return rest

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._parts)

    def response(self) -> InferenceResponse:
        """The response as far as it has come.

        :raises InferenceError: a step had a value that no response may have.
        """
        now = time.perf_counter()
        first = self._first_at
        try:
            return InferenceResponse(
                request_id=self.request.request_id,
                model_id=self.request.model_id,
                generated_text=self.text,
                finish_reason=self.finish_reason,
                stop_sequence=self._pipeline.matched,
                prompt_tokens=self.prompt_tokens,
                generated_tokens=self.generated_tokens,
                cached_prompt_tokens=self.cached_prompt_tokens,
                inference_time_ms=(now - self._started) * 1000,
                time_to_first_token_ms=None if first is None else (first - self._started) * 1000,
                logprobs=self.logprobs,
                handler=self.handler,
            )
        except ValidationError as error:
            # Without the values, which are text of the model's.
            wrong = error.errors(include_url=False, include_context=False, include_input=False)
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in wrong[:3])
            raise InferenceError(
                f"handler {self.handler!r} yielded steps that make no response: {problems}; "
                "mend the plugin"
            ) from None
