"""``POST /v1/completions``: prompts as they stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import repeat
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from engineroom.field_types import TokenId
from engineroom.generation.deltas import StreamDelta
from engineroom.generation.text import Utf8Decoder
from engineroom.schemas import InferenceRequest, InferenceResponse, PromptLogprob, TokenLogprob
from engineroom.server.apis.openai_common import (
    OF_ANTHROPIC,
    Completed,
    FinishReason,
    OpenAIRequest,
    OpenAIWriter,
    check_choices,
    requests_for,
)
from engineroom.server.apis.openai_logprobs import ENTRIES, bytes_of
from engineroom.server.apis.request_fields import parse
from engineroom.server.apis.routing import SSE, work_route
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError
from engineroom.server.http.exchange import respond
from engineroom.server.http.frames import Answer, event, slices, taken

__all__ = ["ROUTES", "CompletionRequest"]

DEFAULT_MAX_TOKENS = 16
"""As OpenAI's."""

TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
_PROMPTS: Mapping[type, str] = {str: "(texts)", int: "(ids)", list: "(lists of ids)"}


def _kind_of_prompt(value: Any) -> str | None:
    """Which of its forms a prompt has: mistakes are told of that one alone."""
    if not isinstance(value, list):
        return "(text)" if isinstance(value, str) else None
    return _PROMPTS.get(type(value[0])) if value else "(texts)"


class CompletionRequest(OpenAIRequest):
    """Prompts to be continued as they stand: no chat template is applied."""

    prompt: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[str], Field(fail_fast=True, min_length=1), Tag("(texts)")]
        | Annotated[TokenIds, Tag("(ids)")]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1), Tag("(lists of ids)")],
        Discriminator(
            _kind_of_prompt,
            custom_error_type="prompt",
            custom_error_message="must be a text, a list of texts, a list of token ids, or a list "
            "of lists of token ids",
        ),
    ]
    """A text or several, or their token ids, which are refused where the runtime takes none."""
    max_tokens: Annotated[int, Field(ge=-1)] | None = None
    """16 unless said; 0: none, for the log probabilities of the prompt, or to have it read; -1:
    until the context is full."""
    echo: bool | None = None
    """Put the prompt before the text, and with ``logprobs``, those of its tokens before the
    text's."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    RENAMED: ClassVar[Mapping[str, str]] = {**OpenAIRequest.RENAMED, "prompt_token_ids": "prompt"}
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "suffix": ("",),
        "best_of": (1,),
        "add_special_tokens": (True,),
        "top_logprobs": (0,),
        # A prompt is taken as it stands: no template is told of these.
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "chat_template_kwargs": ({},),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "reasoning_effort": ("none",),
        "reasoning": ({},),
        "thinking": ({"type": "disabled"}, {"type": "auto"}),
        "reasoning_budget": (),
        "text": ({}, {"format": {"type": "text"}}),
        **OF_ANTHROPIC,
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "top_logprobs": "use logprobs",
        "text": "use response_format",
        "output_config": "use response_format",
        "output_format": "use response_format",
        "stop_sequences": "use stop",
    }


# ── answers ──────────────────────────────────────────────────────────────────────────────────


class CompletionLogprobs(Answer, kw_only=True):
    """Log probabilities of the text's tokens.

    :param tokens: texts; ``bytes:`` and the bytes for what is no whole character.
    :param token_logprobs: ``None`` for the first token of a prompt.
    :param text_offset: characters of the text before each.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer, kw_only=True):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Completed, kw_only=True):
    """Continued prompts."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def completions(call: Call) -> None:
    """Continue prompts."""
    raw = await call.json()
    asked: Any = raw.get("prompt") if isinstance(raw, dict) else None
    if _kind_of_prompt(asked) in ("(texts)", "(lists of ids)"):
        check_choices(call, len(asked))
    request = parse(call, CompletionRequest, raw)
    prompt: Any = request.prompt
    prompts = [prompt] if _kind_of_prompt(prompt) in ("(text)", "(ids)") else list(prompt)
    await call.context.rounds.next()  # token ids by the hundred thousand are looked at once more
    requests = _requests(call, request, prompts)
    await respond(call, requests, CompletionWriter(call, request, prompts))


def _requests(
    call: Call, request: CompletionRequest, prompts: Sequence[str | list[int]]
) -> list[InferenceRequest]:
    echoed = sum(map(len, prompts)) * (request.n or 1) if request.echo else 0
    if echoed > (most := call.context.settings.max_body_bytes):
        raise ApiError(
            400,
            f"the echo of all prompts would have {echoed} characters, and at most {most} are sent; "
            "leave echo out",
            "echo_too_long",
            "echo",
        )
    params: dict[str, Any] = {"max_new_tokens": request.max_tokens, "logprobs": request.logprobs}
    if request.echo:
        # The text of token ids is told by their entries.
        as_text = all(isinstance(prompt, str) for prompt in prompts)
        params["prompt_logprobs"] = request.logprobs if as_text else request.logprobs or 0
    inputs = [
        {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt} for prompt in prompts
    ]
    return requests_for(call, request, params, DEFAULT_MAX_TOKENS, inputs)


class CompletionWriter(OpenAIWriter):
    """A text completion, or its chunks."""

    PREFIX = "cmpl"
    COMPLETED = Completion
    CHUNK = "text_completion"

    def __init__(
        self, call: Call, request: CompletionRequest, prompts: Sequence[str | list[int]]
    ) -> None:
        super().__init__(call, request, request.logprobs is not None, len(prompts))
        n = request.n or 1
        self._echoes = bool(request.echo)
        of_each = [prompt for prompt in prompts for _ in range(n)]
        # What each text begins with; of token ids it is not known yet.
        self._echoed = [p if self._echoes and isinstance(p, str) else "" for p in of_each]
        self._as_ids = [not isinstance(prompt, str) for prompt in of_each]
        self._offsets = [_Offsets() for _ in of_each]

    def choice(self, response: InferenceResponse, **fields: Any) -> CompletionChoice:
        text = self._echoed[fields["index"]] + (response.generated_text or "")
        return CompletionChoice(text=text, **fields)

    def addition(self, chunk: str | None) -> dict[str, Any]:
        return {"text": "" if chunk is None or isinstance(chunk, StreamDelta) else chunk}

    async def prepare(
        self,
        index: int,
        logprobs: list[TokenLogprob] | None,
        prompt_logprobs: list[PromptLogprob] | None,
    ) -> None:
        """Those of the prompt come first, where it is echoed."""
        if not self._echoes or self._streams:
            await super().prepare(index, logprobs, None)
            return
        entries = prompt_logprobs or []
        await self._read_prompt(index, entries)
        if self.wants_logprobs:
            await self.encode(index, [entries, logprobs or []])

    async def opening(self, index: int, prompt_logprobs: list[PromptLogprob]) -> bytes:
        """The prompt, where it is echoed; its log probabilities come in several chunks."""
        if not self._echoes:
            return b""
        await self._read_prompt(index, prompt_logprobs)
        text = self._echoed[index]
        if not self.wants_logprobs or not prompt_logprobs:
            return self.framer(index)(text) if text else b""
        frames: list[bytes] = []
        for some in taken(prompt_logprobs, ENTRIES):
            await self._rounds.next()
            entries = self.entries(index, some)
            frames.append(event(self.chunk(index, self.addition(text), logprobs=entries)))
            text = ""
        return b"".join(frames)

    async def _read_prompt(self, index: int, entries: Sequence[PromptLogprob]) -> None:
        """The text of a prompt's tokens, for what is echoed and where in it they are."""
        texts: list[str] = []
        if entries and (self.wants_logprobs or self._as_ids[index]):
            decoder = Utf8Decoder()
            for some in slices(entries, ENTRIES):
                await self._rounds.next()
                texts += [_fed(decoder, entry) for entry in some]
            texts.append(decoder.finish())
        text = "".join(texts)
        if self._as_ids[index]:
            self._echoed[index] = text
        elif text:
            # A tokenizer may put something before the prompt, which is no part of its text.
            self._offsets[index].skip(len(text) - len(self._echoed[index]))

    def entries(self, index: int, logprobs: Sequence[PromptLogprob]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[_shown(entry.token, entry.bytes) for entry in logprobs],
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[
                None
                if entry.logprob is None
                else {
                    _shown(token, known): logprob
                    for (_, token, logprob), known in zip(
                        entry.top, entry.top_bytes or repeat(None), strict=False
                    )
                }
                for entry in logprobs
            ],
            text_offset=[self._offsets[index].before(entry) for entry in logprobs],
        )


class _Offsets:
    """Counts the characters that one answer's tokens make, which may be halves of them."""

    def __init__(self) -> None:
        self._characters = 0
        self._decoder = Utf8Decoder()

    def skip(self, characters: int) -> None:
        """So many come before the text."""
        self._characters = -characters

    def before(self, entry: PromptLogprob) -> int:
        """Characters of the text before this token, which is the next one."""
        before = max(0, self._characters)
        self._characters += len(_fed(self._decoder, entry))
        return before


def _fed(decoder: Utf8Decoder, entry: PromptLogprob) -> str:
    """The characters that an answer's next token completes."""
    known = bytes_of(entry.token, entry.bytes)
    return entry.token if known is None else decoder.feed(bytes(known))


def _shown(token: str, known: Sequence[int] | None) -> str:
    """A token's text; its bytes, as OpenAI writes them, where they are no whole character."""
    if known is None or "\ufffd" not in token:
        return token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)


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
