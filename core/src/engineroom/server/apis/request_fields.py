"""What the APIs' requests have in common: strict schemas, and fields refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SkipValidation,
    Tag,
    ValidationError,
)

from engineroom.border import get_logger
from engineroom.field_types import FewFields, LogitBias, either
from engineroom.schemas import ChatMessage, GenerationParams, InferenceRequest
from engineroom.server.apis.peer_fields import (
    USE_INSTEAD,
    KnownFields,
    aliases_of,
    by_own_names,
    is_neutral,
    with_peers,
)
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, invalid_fields, unsupported

__all__ = [
    "NOT_ZERO",
    "ApiRequest",
    "Content",
    "Generating",
    "MaxTokens",
    "ModelName",
    "Number",
    "PartType",
    "Priority",
    "Sampling",
    "StopList",
    "StreamOptions",
    "SubSchema",
    "TextPart",
    "TimeoutS",
    "build",
    "chat_message",
    "check_counts",
    "common_fields",
    "conversation",
    "known_aliases",
    "known_fields",
    "params_of",
    "parse",
    "request_id",
    "tell_unknown",
    "text_of",
]

logger = get_logger("engineroom.server.fields")


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _no_control(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("must not contain control characters")
    return value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be above 0, or -1: until the context is full")
    return value


ModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        examples=["default"],
        json_schema_extra={"pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"},
    ),
    AfterValidator(_no_control),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
TimeoutS = Annotated[Number, Field(gt=0)]
"""Seconds for the request; the server may allow less."""
Priority = Annotated[int, Field(ge=-100, le=100)]
"""Waiting requests of a higher priority go first; two seconds of waiting are worth one step."""
NOT_ZERO: Final = (Field(json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero))
"""Of a limit of tokens."""
MaxTokens = Annotated[int, Field(ge=-1), *NOT_ZERO]
"""Most tokens of an answer; -1: until the context is full."""
StopList = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=64)
]


class SubSchema(BaseModel):
    """A part of a request. Fields that it does not know are let pass."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


class ApiRequest(FewFields, SubSchema):
    """The body of a request.

    Every field that the API has is in the schema and honoured, or in one of these two.
    """

    model_config = ConfigDict(extra="allow")
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {}
    """Fields that this server does not honour → the values that ask for nothing. Any other value
    is refused by name."""
    INSTEAD: ClassVar[Mapping[str, str]] = {}
    """Some of these, which other APIs have → what a client may do instead."""
    WITHOUT_EFFECT: ClassVar[Collection[str]] = ()
    """Fields that can have no effect here, whatever they say: they speak of tools that
    run at the server, of which there are none, or of the prices and lifetimes of a cache, which
    change no answer."""
    IGNORED: ClassVar[Mapping[str, tuple[Collection[Any], str]]] = {}
    """Fields that change no text → the values that ask for nothing, and why any other is ignored,
    which the client is told beside the answer."""
    PEERS: ClassVar[bool] = False
    """Whether :mod:`.peer_fields` says what becomes of fields that the API itself does not have."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Fields of ``GenerationParams`` and ``InferenceRequest`` → what this API calls them."""
    COUNTED: ClassVar[Collection[str]] = ()
    """Fields with messages, or with parts of one, which are counted before they are looked at."""


def _not_obfuscated(value: Any) -> Any:
    if value is True:
        raise ValueError("is not supported by this server; leave it out")
    return value


PartType = Annotated[str, Field(json_schema_extra={"minLength": 1})]
"""What a part of a content is. Another than those that the route takes is refused by its name."""


class TextPart(SubSchema):
    """A part of a message's content."""

    type: PartType
    text: str | None = None
    refusal: str | None = None
    """The text of a part of type ``refusal``."""
    thinking: Any = None
    """What the assistant thought, in a part that says so: a text, or parts of text."""

    @property
    def thought(self) -> str:
        """The text of a part that says what the assistant thought."""
        if isinstance(self.thinking, list):
            texts = (part.get("text") for part in self.thinking if isinstance(part, dict))
            return "".join(text for text in texts if isinstance(text, str))
        thought = self.text if self.thinking is None else self.thinking
        return thought if isinstance(thought, str) else ""


Content = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[TextPart], Field(fail_fast=True), Tag("(parts)")],
    either("a text or a list of parts", {str: "(text)", list: "(parts)"}),
]
"""What a message says."""


class StreamOptions(SubSchema):
    """How to stream."""

    include_usage: bool | None = None
    """A last chunk, without choices, has the usage."""
    include_obfuscation: Annotated[
        bool | None,
        BeforeValidator(_not_obfuscated),
        Field(json_schema_extra={"anyOf": [{"const": False}, {"type": "null"}]}),
    ] = None
    """Not with ``true``: chunks are as long as their texts."""


class Generating(ApiRequest):
    """A request to a model, and whose turn it is."""

    timeout_s: TimeoutS | None = None
    priority: Priority | None = None
    adapter: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of an adapter (LoRA) that was loaded with the model."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """What was computed of the prompt is found again only by requests with the same salt."""
    model: ModelName
    stream: bool | None = None


class Sampling(Generating):
    """Parameters that go beyond the API's own; OpenAI's clients send them as ``extra_body``."""

    PEERS: ClassVar[bool] = True

    top_k: Annotated[int, Field(ge=-1), AfterValidator(lambda k: max(k, 0))] | None = None
    """-1 and 0: all."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: SkipValidation[LogitBias | None] = None
    """Token id → bias. Checked with the service's parameters, once."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """Before so many tokens the answer does not end by itself, nor by a stop sequence."""
    ignore_eos: bool | None = None
    """The answer never ends by itself."""
    num_beams: Annotated[int, Field(ge=1)] | None = None
    early_stopping: bool | None = None


_PARAMS: Final = frozenset(GenerationParams.model_fields) - {"logprobs"}
"""Fields that mean the same in every request that has them."""

_Request = TypeVar("_Request", bound=ApiRequest)


def parse(call: Call, schema: type[_Request], raw: Any) -> _Request:
    """Check a body.

    :raises ApiError: 400; the message names every field that is wrong or not honoured.
    """
    if not isinstance(raw, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    raw, called = by_own_names(raw, known_aliases(schema))
    fields = known_fields(schema)
    for name, neutral in fields.refused.items():
        if name in raw and not is_neutral(raw[name], neutral):
            instead = schema.INSTEAD.get(name) or USE_INSTEAD.get(name, "leave it out")
            own = called.get(name, name)
            raise unsupported(own, own, instead)
    check_counts(call, raw, schema.COUNTED)
    try:
        request = schema.model_validate(raw)
    except ValidationError as error:
        raise invalid_fields(error, called) from error
    call.warn(
        f"{name} was ignored: {why}"
        for name, (neutral, why) in fields.ignored.items()
        if name in raw and not is_neutral(raw[name], neutral)
    )
    tell_unknown(
        call,
        set(request.model_extra or ()).difference(fields.refused, fields.ignored, fields.idle),
    )
    return request


def tell_unknown(call: Call, names: Iterable[str]) -> None:
    """Refuse fields that nobody knows, or tell the log of them, as the settings say.

    :raises ApiError: 400.
    """
    if unknown := sorted(names):
        shown = ", ".join(repr(name[:64]) for name in unknown[:8])
        if call.context.settings.unknown_fields == "refuse":
            raise ApiError(400, f"unknown fields: {shown}", "unknown_field", unknown[0][:64])
        names = [name for name in unknown[:8] if name.isidentifier() and len(name) <= 40]
        call.log(logger).debug(
            "%d unknown fields were ignored: %s", len(unknown), ", ".join(names) or "…"
        )


@cache
def known_fields(schema: type[ApiRequest]) -> KnownFields:
    """What becomes of the fields that a request does not have: those of its own API and, where it
    is one that generates, those of others.
    """
    own = KnownFields(schema.REFUSED, schema.IGNORED, schema.WITHOUT_EFFECT)
    return with_peers(schema.model_fields, own) if schema.PEERS else own


@cache
def known_aliases(schema: type[ApiRequest]) -> Mapping[str, str]:
    """What others call fields of a request → what its own API does."""
    return aliases_of({*schema.model_fields, *schema.REFUSED}) if schema.PEERS else {}


def params_of(
    call: Call, request: Generating, params: Mapping[str, Any], absent: Mapping[str, Any]
) -> GenerationParams:
    """How to generate.

    :param params: fields of ``GenerationParams`` that are called otherwise in the API.
    :param absent: fields that the client did not give, as the API has them then; they are used
        where the runtime honours them, and are the service's own defaults where it does not.
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
        return GenerationParams(**asked)
    except ValidationError as error:
        raise invalid_fields(error, request.RENAMED) from error


def build(
    call: Call, request: Generating, params: GenerationParams, index: int = 0, **fields: Any
) -> InferenceRequest:
    """The service's request.

    :param index: which of several answers.
    :raises ApiError: 400.
    """
    try:
        return InferenceRequest(
            model_id=request.model,
            params=params,
            request_id=request_id(call, index),
            stream=bool(request.stream),
            **common_fields(call, request),
            **fields,
        )
    except ValidationError as error:
        raise invalid_fields(error, request.RENAMED) from error


def request_id(call: Call, index: int) -> str:
    """The id of one of several answers."""
    return call.id if index == 0 else f"{call.id}-{index}"


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
        call.warn([warning])
        call.log(logger).warning("priority %d was lowered to %d", asked, most)
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
        text = part.refusal if kind == "refusal" else part.text
        if text is None:
            raise ApiError(400, f"{where}: the part has no text", "invalid_value", where)
        texts.append(text)
    return "".join(texts)


def check_counts(
    call: Call, raw: Mapping[str, Any], names: Collection[str] = ("messages",)
) -> None:
    """Refuse more messages, or parts of them, than the server takes.

    :param raw: the body, of which nothing is known.
    :param names: fields with messages, or with parts of one.
    :raises ApiError: 400.
    """
    settings = call.context.settings
    for name in names:
        if not isinstance(messages := raw.get(name), list):
            continue
        if len(messages) > settings.max_messages:
            many = f"{len(messages)} {name} are more than {settings.max_messages}"
            raise ApiError(400, many, "too_many_messages", name)
        contents = (m.get("content") for m in messages if isinstance(m, dict))
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > settings.max_parts:
            many = f"{name} with {parts} parts are more than {settings.max_parts}; join them"
            raise ApiError(400, many, "too_many_parts", name)


def chat_message(
    role: str, content: str | None, where: str, name: str | None = None, **fields: Any
) -> ChatMessage:
    """A message. :raises ApiError: 400."""
    try:
        return ChatMessage(**{"role": role, "content": content, "name": name, **fields})
    except ValidationError as error:
        problem = invalid_fields(error)
        raise ApiError(400, f"{where}: {problem.message}", "invalid_value", "messages") from error


def conversation(
    messages: Sequence[Any], name: str = "messages", kinds: Collection[str] = ("text",)
) -> list[ChatMessage]:
    """The messages of the field ``name``. :raises ApiError: 400."""
    return [
        chat_message(message.role, text_of(message.content, where, kinds), where)
        for where, message in ((f"{name}.{number}", m) for number, m in enumerate(messages))
    ]
