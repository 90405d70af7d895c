"""``POST /v1/completions``: prompts as they stand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import InferenceRequest, InferenceResponse, TokenId, TokenLogprob
from engineroom.server.apis.openai_common import (
    FinishReason,
    OpenAIRequest,
    OpenAIWriter,
    Usage,
    finish_of,
    head_of,
    includes_usage,
    requests_for,
    sampling_of,
    usage_of,
)
from engineroom.server.apis.request_fields import parse
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import answer_all, stream_all
from engineroom.server.http.frames import Answer, Framer, event

__all__ = ["ROUTES", "CompletionRequest"]

DEFAULT_MAX_TOKENS = 16
"""As OpenAI's."""

TokenIds = Annotated[list[TokenId], Field(min_length=1)]
_PROMPTS: Mapping[type, str] = {str: "texts", int: "ids", list: "lists of ids"}


def _kind_of_prompt(value: Any) -> str | None:
    """Which of its forms a prompt has: mistakes are told of that one alone."""
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    return _PROMPTS.get(type(value[0])) if value else "texts"


class CompletionRequest(OpenAIRequest):
    """Prompts to be continued as they stand: no chat template is applied."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1), Tag("texts")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[TokenIds], Field(min_length=1), Tag("lists of ids")],
        Discriminator(
            _kind_of_prompt,
            custom_error_type="prompt",
            custom_error_message="must be a text, a list of texts, a list of token ids, or a list "
            "of lists of token ids",
        ),
    ]
    """A text or several, or their token ids, which are refused where the runtime takes none."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """16 unless said."""
    echo: bool | None = None
    """Put the prompt before the text. Not with token ids."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    RENAMED: ClassVar[Mapping[str, str]] = {**OpenAIRequest.RENAMED, "prompt_token_ids": "prompt"}
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "suffix": ("",),
        "best_of": (1,),
    }


# ── answers ──────────────────────────────────────────────────────────────────────────────────


class CompletionLogprobs(Answer, kw_only=True):
    """Log probabilities of the text's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer, kw_only=True):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Answer, kw_only=True):
    """Continued prompts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None = None


class TextChoice(Answer, kw_only=True):
    """What a chunk adds to one text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def completions(call: Call) -> None:
    """Continue prompts."""
    request = parse(call, CompletionRequest, await call.json())
    prompts = _prompts(request)
    requests = _requests(call, request, prompts)
    for inference in requests:
        call.context.log_prompt(inference)
    head = head_of(call, request, "cmpl")
    echoed = [
        prompt if request.echo and isinstance(prompt, str) else ""
        for prompt in prompts
        for _ in range(request.n or 1)
    ]
    wants_logprobs = request.logprobs is not None
    if request.stream:
        head["object"] = "text_completion"
        usage = includes_usage(request)
        writer = CompletionWriter(head, usage, wants_logprobs, len(prompts), echoed)
        await stream_all(call, requests, writer)
        return
    responses = await answer_all(call, requests)
    choices = [
        CompletionChoice(
            index=index,
            text=echoed[index] + (response.generated_text or ""),
            logprobs=_logprobs(response.logprobs or ()) if wants_logprobs else None,
            finish_reason=finish_of(response),
        )
        for index, response in enumerate(responses)
    ]
    usage_sum = usage_of(responses, len(prompts))
    await call.answer_json(Completion(**head, choices=choices, usage=usage_sum))


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt: Any = request.prompt
    return [prompt] if _kind_of_prompt(prompt) in ("text", "ids") else list(prompt)


def _requests(
    call: Call, request: CompletionRequest, prompts: Sequence[str | list[int]]
) -> list[InferenceRequest]:
    if request.echo and request.logprobs is not None:
        raise ApiError(
            400,
            "logprobs of the prompt are not supported by this server; leave echo or logprobs out",
            "unsupported_parameter",
            "echo",
        )
    if request.echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise ApiError(
            400,
            "echo with token ids is not supported by this server; leave echo out, or send text",
            "unsupported_parameter",
            "echo",
        )
    params = sampling_of(request)
    params["max_new_tokens"] = request.max_tokens
    params["logprobs"] = request.logprobs
    return requests_for(
        call,
        request,
        params,
        absent={"temperature": None, "max_new_tokens": DEFAULT_MAX_TOKENS},
        inputs=[
            {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
            for prompt in prompts
        ],
    )


def _logprobs(tokens: Sequence[TokenLogprob], offset: int = 0) -> CompletionLogprobs:
    offsets: list[int] = []
    for entry in tokens:
        offsets.append(offset)
        offset += len(entry.token)
    return CompletionLogprobs(
        tokens=[entry.token for entry in tokens],
        token_logprobs=[entry.logprob for entry in tokens],
        top_logprobs=[{token: logprob for _, token, logprob in entry.top} for entry in tokens],
        text_offset=offsets,
    )


class CompletionWriter(OpenAIWriter):
    """Chunks of a text completion.

    :param echoed: what each text begins with, where the prompt is echoed.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        usage: bool,
        logprobs: bool,
        prompts: int,
        echoed: Sequence[str],
    ) -> None:
        super().__init__(head, usage, logprobs, prompts)
        self._echoed = echoed
        self._offsets = [0] * len(echoed)

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The prompts, where they are echoed."""
        return b"".join(self.framer(i)(text) for i, text in enumerate(self._echoed) if text)

    def framer(self, index: int) -> Callable[[str], bytes]:
        return Framer(lambda text: self._chunk(TextChoice(index=index, text=text)))

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        entries = _logprobs(logprobs, self._offsets[index])
        self._offsets[index] += sum(len(entry.token) for entry in logprobs)
        return event(self._chunk(TextChoice(index=index, text=text, logprobs=entries)))

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The chunk that says why the text ended."""
        choice = TextChoice(index=index, text="", finish_reason=finish_of(response))
        return event(self._chunk(choice))


ROUTES = (
    work_route(
        "/v1/completions",
        completions,
        "Continue prompts (OpenAI)",
        "OpenAI",
        request=CompletionRequest,
        response=Completion,
        streams=SSE,
        example={"model": "default", "prompt": "Once upon a time", "max_tokens": 20},
    ),
)
