"""``POST /v1/completions``: prompts as they stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from engineroom.inference.streams import InferenceStream
from engineroom.schemas import InferenceRequest, InferenceResponse, TokenId, TokenLogprob
from engineroom.server.apis.openai_chat import (
    OpenAIRequest,
    finish_of,
    sampling_of,
    several,
    usage_of,
)
from engineroom.server.apis.request_fields import parse
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import answer_all, stream_all
from engineroom.server.http.frames import DONE, Framer, dumps, event

__all__ = ["CompletionRequest", "completions"]

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


async def completions(call: Call) -> None:
    """Continue prompts."""
    request = parse(call, CompletionRequest, await call.json())
    prompts = _prompts(request)
    requests = _requests(call, request, prompts)
    for each in requests:
        call.context.log_prompt(each)
    created, completion_id = int(time.time()), f"cmpl-{call.id}"
    echoed = [each if request.echo and isinstance(each, str) else "" for each in prompts]
    heads = [head for head in echoed for _ in range(request.n or 1)]
    if request.stream:
        usage = bool(request.stream_options and request.stream_options.include_usage)
        base = {
            "id": completion_id,
            "object": "text_completion",
            "created": created,
            "model": request.model,
            "system_fingerprint": None,
        }
        logprobs = request.logprobs is not None
        writer = CompletionWriter(base, heads, len(prompts), usage, logprobs)
        await stream_all(call, requests, writer)
        return
    responses = await answer_all(call, requests)
    await call.answer_json(
        {
            "id": completion_id,
            "object": "text_completion",
            "created": created,
            "model": request.model,
            "choices": [
                {
                    "index": index,
                    "text": heads[index] + (response.generated_text or ""),
                    "logprobs": (
                        _entries(response.logprobs or ()) if request.logprobs is not None else None
                    ),
                    "finish_reason": finish_of(response),
                }
                for index, response in enumerate(responses)
            ],
            "usage": usage_of(responses, len(prompts)),
            "system_fingerprint": None,
        }
    )


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
    if request.echo and not all(isinstance(each, str) for each in prompts):
        raise ApiError(
            400,
            "echo with token ids is not supported by this server; leave echo out, or send text",
            "unsupported_parameter",
            "echo",
        )
    params = sampling_of(request)
    params["max_new_tokens"] = request.max_tokens
    params["logprobs"] = request.logprobs
    return several(
        call,
        request,
        params,
        absent={"temperature": None, "max_new_tokens": DEFAULT_MAX_TOKENS},
        inputs=[
            {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
            for prompt in prompts
        ],
    )


def _entries(logprobs: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    offsets: list[int] = []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [{token: logprob for _, token, logprob in entry.top} for entry in logprobs],
        "text_offset": offsets,
    }


class CompletionWriter:
    """Chunks of a text completion."""

    def __init__(
        self,
        base: dict[str, Any],
        heads: Sequence[str],
        prompts: int,
        usage: bool,
        logprobs: bool,
    ) -> None:
        self.wants_logprobs = logprobs
        self._base = base
        self._heads = heads
        self._prompts = prompts
        self._usage = usage
        self._offsets = [0] * len(heads)

    def _chunk(self, index: int, text: str, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}
        value = {**self._base, "choices": [choice]}
        if self._usage:
            value["usage"] = None
        return value

    def begin(self, streams: Sequence[InferenceStream]) -> bytes:
        """The prompts, where they are echoed."""
        return b"".join(self.framer(i)(head) for i, head in enumerate(self._heads) if head)

    def framer(self, index: int) -> Callable[[str], bytes]:
        """Makes chunks."""
        return Framer(lambda text: self._chunk(index, text))

    def text_with_logprobs(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """A chunk with its tokens' log probabilities."""
        entries = _entries(logprobs, self._offsets[index])
        self._offsets[index] += sum(len(entry.token) for entry in logprobs)
        return event(self._chunk(index, text, logprobs=entries))

    def finish(self, index: int, response: InferenceResponse) -> bytes:
        """The chunk that says why the text ended."""
        return event(self._chunk(index, "", finish_reason=finish_of(response)))

    def _usage_chunk(self, responses: Sequence[InferenceResponse]) -> bytes:
        if not self._usage:
            return b""
        usage = usage_of(responses, self._prompts)
        return event({**self._base, "choices": [], "usage": usage})

    def end(self, responses: Sequence[InferenceResponse]) -> bytes:
        """Usage, if it was asked for, and the end."""
        return self._usage_chunk(responses) + DONE

    def fail(self, refused: ApiError, responses: Sequence[InferenceResponse]) -> bytes:
        """Usage first: clients stop reading at an error."""
        return self._usage_chunk(responses) + b"data: " + dumps(refused.openai()) + b"\n\n" + DONE
