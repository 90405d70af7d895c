"""What the APIs' requests have in common: strict schemas, and fields refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engineroom.border import get_logger
from engineroom.schemas import ChatMessage, GenerationParams, InferenceRequest
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, invalid_fields, unsupported

__all__ = [
    "ApiRequest",
    "ModelName",
    "Number",
    "Sampling",
    "StopList",
    "StreamOptions",
    "SubSchema",
    "TextPart",
    "build",
    "chat_message",
    "check_count",
    "common_fields",
    "conversation",
    "parse",
    "text_of",
]

logger = get_logger("engineroom.server.fields")


def _no_control(value: Any) -> Any:
    if isinstance(value, str) and any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in value):
        raise ValueError("must not contain control characters")
    return value


ModelName = Annotated[
    str, Field(min_length=1, max_length=256, examples=["default"]), BeforeValidator(_no_control)
]
Number = Annotated[float, Field(allow_inf_nan=False)]
StopList = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)]


class SubSchema(BaseModel):
    """A part of a request. Fields that it does not know are let pass."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class ApiRequest(SubSchema):
    """The body of a request.

    Every field that the API has is in the schema and honoured, or in one of these two.
    """

    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {}
    """Fields that this server does not honour → the values that ask for nothing. Any other value
    is refused by name."""
    WITHOUT_EFFECT: ClassVar[Collection[str]] = ()
    """Fields that can have no effect here, whatever they say: they speak of tools, which are
    refused, or of the prices and lifetimes of a cache, which change no answer."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Fields of ``GenerationParams`` and ``InferenceRequest`` → what this API calls them."""


def _not_obfuscated(value: Any) -> Any:
    if value is True:
        raise ValueError("is not supported by this server; leave it out")
    return value


class TextPart(SubSchema):
    """A part of a message's content."""

    type: str
    text: str | None = None


class StreamOptions(SubSchema):
    """How to stream."""

    include_usage: bool | None = None
    """A last chunk, without choices, has the usage."""
    include_obfuscation: Annotated[bool | None, BeforeValidator(_not_obfuscated)] = None
    """Not with ``true``: chunks are as long as their texts."""


class Sampling(ApiRequest):
    """Parameters that go beyond the API's own; OpenAI's clients send them as ``extra_body``."""

    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1)] | None = None
    num_beams: Annotated[int, Field(ge=1)] | None = None
    early_stopping: bool | None = None
    timeout_s: Annotated[Number, Field(gt=0)] | None = None
    """Seconds for the request; the server may allow less."""
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    """Waiting requests of a higher priority go first; two seconds of waiting are worth one step."""
    adapter: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of an adapter (LoRA) that was loaded with the model."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """What was computed of the prompt is found again only by requests with the same salt."""
    model: ModelName
    stream: bool | None = None


_PARAMS: Final = frozenset(GenerationParams.model_fields) - {"logit_bias", "logprobs"}
"""Fields that mean the same in every request that has them."""

_Request = TypeVar("_Request", bound=ApiRequest)


def parse(call: Call, schema: type[_Request], raw: Any) -> _Request:
    """Check a body.

    :raises ApiError: 400; the message names every field that is wrong or not honoured.
    """
    if not isinstance(raw, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    for name, neutral in schema.REFUSED.items():
        value = raw.get(name)
        if value is not None and not any(v == value and type(v) is type(value) for v in neutral):
            raise unsupported(name, name)
    try:
        request = schema.model_validate(raw)
    except ValidationError as error:
        raise invalid_fields(error) from error
    unknown = sorted(
        set(request.model_extra or ()).difference(schema.REFUSED, schema.WITHOUT_EFFECT)
    )
    if unknown:
        shown = ", ".join(repr(name[:64]) for name in unknown[:8])
        if call.context.settings.unknown_fields == "refuse":
            raise ApiError(400, f"unknown fields: {shown}", "unknown_field", unknown[0][:64])
        names = [name for name in unknown[:8] if name.isidentifier() and len(name) <= 40]
        call.log(logger).debug(
            "%d unknown fields were ignored: %s", len(unknown), ", ".join(names) or "…"
        )
    return request


def build(
    call: Call,
    request: Sampling,
    *,
    params: Mapping[str, Any],
    absent: Mapping[str, Any],
    index: int = 0,
    **fields: Any,
) -> InferenceRequest:
    """The service's request.

    :param params: fields of ``GenerationParams`` that are called otherwise in the API.
    :param absent: fields that the client did not give, as the API has them then; they are used
        where the runtime honours them, and are the service's own defaults where it does not.
    :param index: which of several answers.
    :raises ApiError: 400.
    """
    same = {name: getattr(request, name) for name in _PARAMS & type(request).model_fields.keys()}
    asked = {n: value for n, value in {**same, **params}.items() if value is not None}
    if "seed" in asked:
        asked["seed"] %= 1 << 63
    if missing := {n: v for n, v in absent.items() if n not in asked}:
        honoured = call.context.directory.honoured_params(request.model)
        asked |= {n: v for n, v in missing.items() if honoured is None or n in honoured}
    try:
        return InferenceRequest(
            model_id=request.model,
            params=GenerationParams(**asked),
            request_id=call.id if index == 0 else f"{call.id}-{index}",
            stream=bool(request.stream),
            **common_fields(call, request),
            **fields,
        )
    except ValidationError as error:
        raise invalid_fields(error, request.RENAMED) from error


def _priority(call: Call, request: Any) -> int:
    """What a request asks for, or the most that its key may have."""
    most = call.identity.max_priority
    if most is None:
        most = call.context.settings.max_priority
    asked: int | None = getattr(request, "priority", None)
    if asked is None or "priority" not in request.model_fields_set:
        return min(0, most)
    if asked <= most:
        return asked
    warning = f"priority {asked} is more than this key may ask for; it goes as {most}"
    if warning not in call.warnings:  # of several answers, once
        call.warnings.append(warning)
        call.log(logger).info("priority %d was lowered to %d", asked, most)
    return most


def common_fields(call: Call, request: Any) -> dict[str, Any]:
    """Deadline, priority, metadata, and what else is not of the text."""
    timeouts = (call.context.settings.request_timeout_s, getattr(request, "timeout_s", None))
    metadata: dict[str, Any] = {}
    for name in (b"traceparent", b"tracestate"):
        if value := call.header(name):
            metadata[name.decode()] = value
    if isinstance(asked := getattr(request, "metadata", None), dict):
        metadata = {**asked, **metadata}
    for field in ("user", "safety_identifier"):
        if (who := getattr(request, field, None)) is not None:
            metadata[field] = who
    metadata["api_key"] = call.identity.name
    return {
        "timeout_s": min((limit for limit in timeouts if limit is not None), default=None),
        "priority": _priority(call, request),
        "adapter": getattr(request, "adapter", None),
        "cache_salt": getattr(request, "cache_salt", None),
        "metadata": metadata,
    }


def text_of(content: Any, where: str, kinds: Collection[str] = ("text",)) -> str | None:
    """The text of a message: a string, or parts of text.

    :raises ApiError: 400: a part is something else.
    """
    if content is None or isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        kind = part.type
        if kind not in kinds:
            raise ApiError(
                400,
                f"{where}: content of type {kind[:64]!r} is not supported by this server; "
                f"send {' or '.join(kinds)}",
                "unsupported_content",
                where,
            )
        if part.text is None:
            raise ApiError(400, f"{where}: the part has no text", "invalid_value", where)
        texts.append(part.text)
    return "".join(texts)


def check_count(call: Call, messages: Sequence[Any], name: str = "messages") -> None:
    """Refuse more messages than the server takes. :raises ApiError: 400."""
    limit = call.context.settings.max_messages
    if len(messages) > limit:
        raise ApiError(
            400, f"{len(messages)} {name} are more than {limit}", "too_many_messages", name
        )


def chat_message(
    role: str, content: str | None, where: str, name: str | None = None
) -> ChatMessage:
    """A message. :raises ApiError: 400."""
    try:
        return ChatMessage.model_validate({"role": role, "content": content, "name": name})
    except ValidationError as error:
        problem = invalid_fields(error)
        raise ApiError(400, f"{where}: {problem.message}", "invalid_value", "messages") from error


def conversation(
    call: Call, messages: Sequence[Any], name: str = "messages", kinds: Collection[str] = ("text",)
) -> list[ChatMessage]:
    """The messages of the field ``name``. :raises ApiError: 400."""
    check_count(call, messages, name)
    return [
        chat_message(message.role, text_of(message.content, where, kinds), where)
        for where, message in ((f"{name}.{number}", m) for number, m in enumerate(messages))
    ]
