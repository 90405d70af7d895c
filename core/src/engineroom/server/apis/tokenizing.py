"""``POST /tokenize`` and ``/detokenize``: texts and conversations as the models' own token ids.

They have the form of vLLM's, and take that of llama.cpp's server, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Final

from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field, ValidationError

from engineroom.field_types import TokenId
from engineroom.inference.tokenizing import Tokens
from engineroom.schemas import GenerationParams, InferenceRequest
from engineroom.server.apis.continuing import asked_to_continue
from engineroom.server.apis.openai_chat import ChatInput, message_of
from engineroom.server.apis.request_fields import (
    ApiRequest,
    ModelName,
    Priority,
    TimeoutS,
    common_fields,
    parse,
)
from engineroom.server.apis.routing import work_route
from engineroom.server.apis.tool_fields import ToolList, chosen_tools
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, invalid_fields, unsupported
from engineroom.server.http.exchange import admission
from engineroom.server.http.frames import Answer, Pieces, slices

__all__ = ["ROUTES", "TextRequest", "TokensRequest"]

_AT_A_TIME: Final = 8192
"""So many tokens are written at a time."""
_INPUTS: Final = ("prompt", "messages", "content")
_OF_TEXTS: Final = ("add_special_tokens", "add_special", "parse_special")
"""What is asked of texts alone."""
_ONE_INPUT: Final[list[Any]] = [
    {
        "required": [name],
        "properties": {
            name: {"not": {"type": "null"}},
            **{other: {"type": "null"} for other in _INPUTS if other != name},
            **({n: {"enum": [False, None]} for n in _OF_TEXTS} if name == "messages" else {}),
        },
    }
    for name in _INPUTS
]


class TokensRequest(ApiRequest):
    """A text or a conversation, to be read as the model would."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_INPUT})
    model: ModelName
    prompt: str | None = None
    """A text, as ``/v1/completions`` reads it."""
    messages: Annotated[list[ChatInput], Field(fail_fast=True, min_length=1)] | None = None
    """A conversation, as ``/v1/chat/completions`` reads it."""
    content: str | None = None
    """A text, in the form of llama.cpp's server."""
    add_special_tokens: bool | None = None
    """``false``: nothing is put around the ``prompt``; ``true`` unless said."""
    add_special: bool | None = None
    """The same of ``content``; ``false`` unless said."""
    parse_special: bool | None = None
    """``false``: special tokens in a text are read as characters."""
    return_token_strs: bool | None = None
    """Tell the text of each token, too."""
    with_pieces: bool | None = None
    """The same, in the form of llama.cpp's server."""
    tools: ToolList | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """More names for the model's chat template."""
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    user: str | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority | None = None

    COUNTED: ClassVar[Collection[str]] = ("messages",)
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "chat_template": (),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "chat_template": "leave it out, and set the model's option chat_template",
    }


class TextRequest(ApiRequest):
    """Token ids, to be made a text of."""

    model: ModelName
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    user: str | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority | None = None


class TokenPiece(Answer, kw_only=True):
    """A token, and what it stands for: a text, or bytes where these are no whole characters."""

    id: int
    piece: str | list[int]


class TokenList(Answer, kw_only=True):
    """The tokens of an input.

    :param max_model_len: most tokens of a request and its answer; absent where it is not known.
    :param tokens: their ids, or pieces where those are asked for.
    :param token_strs: their texts, where they are asked for; U+FFFD stands for bytes that are no
        whole character.
    """

    count: int
    max_model_len: int | UnsetType = UNSET
    tokens: list[int | TokenPiece]
    token_strs: list[str] | UnsetType = UNSET


class TokensText(Answer, kw_only=True):
    """The text of tokens, under the names that it has in vLLM and in llama.cpp's server."""

    prompt: str
    content: str


async def tokenize(call: Call) -> None:
    """Tell the tokens of a text or a conversation."""
    request = parse(call, TokensRequest, await call.json())
    asked = _input_of(call, request)
    around = _special_of(request)
    async with call.attended(), admission(call, [asked]) as slot:
        left = {"timeout_s": slot.left_of(asked.timeout_s)}
        made = await call.context.service.tokenize(
            asked.model_copy(update=left),
            add_special_tokens=around,
            special_as_text=request.parse_special is False,
            pieces=bool(request.return_token_strs or request.with_pieces),
        )
    await _answer(call, request, made)


async def _answer(call: Call, request: TokensRequest, made: Tokens) -> None:
    most = UNSET if made.max_context_tokens is None else made.max_context_tokens
    answer, bytes_of = Pieces[TokenList](), made.pieces or ()
    for some in slices(range(len(made.ids)), _AT_A_TIME):
        await call.context.rounds.next()
        tokens: Any = [made.ids[place] for place in some]
        texts: Any = UNSET
        if request.return_token_strs:
            texts = [bytes_of[place].decode("utf-8", "replace") for place in some]
        if request.with_pieces:
            tokens = [TokenPiece(id=made.ids[n], piece=_shown(bytes_of[n])) for n in some]
        count = len(made.ids)
        answer.add(TokenList(count=count, max_model_len=most, tokens=tokens, token_strs=texts))
    await call.answer_json(answer.whole())


def _shown(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _special_of(request: TokensRequest) -> bool:
    """Whether special tokens are added to a text.

    :raises ApiError: 400: more is asked of a conversation than its template says.
    """
    if request.messages is not None:
        for name in _OF_TEXTS:
            if getattr(request, name):
                raise unsupported(
                    f"{name} with messages",
                    name,
                    "leave it out: the chat template says what is special",
                )
        return True
    for_prompt, for_content = request.add_special_tokens, request.add_special
    by_default = request.content is None
    own, other = (for_prompt, for_content) if by_default else (for_content, for_prompt)
    return next((said for said in (own, other) if said is not None), by_default)


def _input_of(call: Call, request: TokensRequest) -> InferenceRequest:
    """The service's request. :raises ApiError: 400."""
    given = [name for name in _INPUTS if getattr(request, name) is not None]
    if len(given) != 1:
        raise ApiError(
            400,
            f"give one of prompt, messages and content; found {' and '.join(given) or 'none'}",
            "invalid_value",
            given[1] if given else "prompt",
        )
    fields: dict[str, Any] = {
        "prompt": request.prompt if request.content is None else request.content
    }
    if request.messages is not None:
        messages = [
            message_of(message, f"messages.{number}")
            for number, message in enumerate(request.messages)
        ]
        tools = [tool.function for tool in request.tools or ()]
        fields = {
            "messages": messages,
            "template_args": request.chat_template_kwargs or None,
            "continue_final_message": asked_to_continue(
                messages,
                continue_final_message=request.continue_final_message,
                add_generation_prompt=request.add_generation_prompt,
                prefixes=[n for n, message in enumerate(request.messages) if message.prefix],
            ),
            **chosen_tools(call, tools, None, None, "function.parameters"),
        }
    common = common_fields(call, request)
    try:
        return InferenceRequest(
            model_id=request.model,
            request_id=call.id,
            params=GenerationParams(max_new_tokens=1),  # nothing is generated
            timeout_s=common["timeout_s"],
            priority=common["priority"],
            metadata=common["metadata"],
            **fields,
        )
    except ValidationError as error:
        raise invalid_fields(error, {"prompt": given[0]}) from error


async def detokenize(call: Call) -> None:
    """Tell the text of tokens."""
    request = parse(call, TextRequest, await call.json())
    common = common_fields(call, request)
    asked = InferenceRequest(
        model_id=request.model,
        prompt="",
        request_id=call.id,
        params=GenerationParams(max_new_tokens=1),  # nothing is generated
        timeout_s=common["timeout_s"],
        priority=common["priority"],
        metadata=common["metadata"],
    )
    async with call.attended(), admission(call, [asked]) as slot:
        await call.context.rounds.next()  # ids by the hundred thousand are looked at once more
        text = await call.context.service.detokenize(
            asked.model_id,
            request.tokens,
            max_bytes=call.context.settings.max_body_bytes,
            timeout_s=slot.left_of(asked.timeout_s),
            request_id=asked.request_id,
            priority=asked.priority,
            metadata=asked.metadata,
        )
    await call.context.rounds.next()
    await call.answer_json(TokensText(prompt=text, content=text))


ROUTES = (
    work_route(
        "/tokenize",
        tokenize,
        "Tell the tokens of a text or a conversation (vLLM, llama.cpp)",
        "Tokens",
        request=TokensRequest,
        response=TokenList,
        example={"model": "default", "prompt": "Why is the sky blue?"},
    ),
    work_route(
        "/detokenize",
        detokenize,
        "Tell the text of tokens (vLLM, llama.cpp)",
        "Tokens",
        request=TextRequest,
        response=TokensText,
        example={"model": "default", "tokens": [87, 104, 121]},
    ),
)
