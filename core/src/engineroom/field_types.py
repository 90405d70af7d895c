"""Kinds of fields that schemas have: names, texts, numbers, token ids, and either of two things.

Each says what is wrong once, and stops there: a list of a million mistakes is told by its first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice, takewhile
from math import isfinite
from typing import Annotated, Any, ClassVar, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticSerializationError, PydanticUseDefault, from_json, to_json

from engineroom.json_shape import MAX_VALUES, excess
from engineroom.printable import CONTROLS

__all__ = [
    "MAX_LOGIT_BIAS",
    "MAX_TOKEN_ID",
    "FewFields",
    "Float",
    "FrozenSchema",
    "Identifier",
    "Int",
    "JsonObject",
    "LogitBias",
    "MessageCalls",
    "NotEmpty",
    "OrDefault",
    "Text",
    "Texts",
    "TokenId",
    "check_values",
    "either",
    "half_of_pair",
    "json_of",
    "levels_exceeded",
    "no_booleans",
]


_HALF: Final = "half of a surrogate pair"
_ESCAPED_HALF: Final = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_PLACE: Final = 200
_MAX_LOOKED_THROUGH: Final = 10_000
MAX_LEVELS: Final = 254
"""Of objects and lists in a JSON value; deeper ones cannot be written."""
_TOO_DEEP: Final = "serialization depth"
"""In what pydantic says of them."""


def _no_control_characters(value: str) -> str:
    if CONTROLS.search(value):
        raise ValueError(
            "must not contain control characters or line breaks (it is written to logs and headers)"
        )
    return value


def half_of_pair(text: str) -> int | None:
    """Where half of a surrogate pair stands, which no encoding takes; ``None``: nowhere."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return error.start
    return None


def _can_be_encoded(value: str) -> str:
    if (place := half_of_pair(value)) is not None:
        raise ValueError(f"must be text, but character {place} is {_HALF}")
    return value


def _texts_can_be_encoded(value: dict[str, Any]) -> dict[str, Any]:
    for text in (*value, *value.values()):
        if isinstance(text, str):
            _can_be_encoded(text)
    return value


def json_of(value: Any) -> bytes:
    """A value as JSON. :raises ValueError: it is none."""
    try:
        return to_json(value)
    except PydanticSerializationError as error:
        problem = str(error)
    if _TOO_DEEP in problem:
        raise ValueError(f"{levels_exceeded(value, MAX_LEVELS)}; make it flatter")
    raise ValueError(f"must be JSON, but cannot be written as such ({problem:.200})")


def levels_exceeded(value: Any, most: int) -> str:
    """What to say of a JSON value of more than so many levels of objects and lists."""
    place = _deepest(value, most)
    where = f", and is deeper at {place}" if place else ""
    return f"may have {most} levels of objects and lists{where}"


def _deepest(value: Any, most: int) -> str:
    """How the way to what is deeper begins; empty where that is not found at once."""
    todo: list[tuple[Any, int, str]] = [(value, 1, "")]
    for _ in range(_MAX_LOOKED_THROUGH):
        if not todo:
            break
        part, level, at = todo.pop()
        if level > most:
            return at if len(at) < _MAX_PLACE else f"{at}…"
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(part, Mapping):
            items = islice(part.items(), _MAX_LOOKED_THROUGH)
        elif isinstance(part, list | tuple):
            items = enumerate(islice(part, _MAX_LOOKED_THROUGH))
        todo += [
            (item, level + 1, f"{at}.{key}"[:_MAX_PLACE].lstrip("."))
            for key, item in items
            if isinstance(item, Mapping | list | tuple)
        ]
    return ""


def check_values(*parts: bytes) -> None:
    """Refuse JSON of so many values that others would wait while it is read or written.

    :raises ValueError: it has too many, together.
    """
    if (too_much := excess(b",".join(parts), MAX_VALUES)) is not None:
        raise ValueError(f"is too much: {too_much}")


def _json_can_be_encoded(value: dict[str, Any]) -> dict[str, Any]:
    check_values(json_of(value))
    return value


def _check_texts(value: Any, place: str) -> None:
    """Say where the text is that cannot be encoded. No more than is read at once is looked through.

    :raises ValueError: it is among them.
    """
    todo: list[tuple[Any, str]] = [(value, place)]
    for _ in range(_MAX_LOOKED_THROUGH):
        if not todo:
            return
        part, at = todo.pop()
        if isinstance(part, Mapping):
            for key, item in islice(part.items(), _MAX_LOOKED_THROUGH):
                if isinstance(key, str) and (half := half_of_pair(key)) is not None:
                    raise ValueError(f"{at} has a key whose character {half} is {_HALF}")
                todo.append((item, f"{at}.{key}"[:_MAX_PLACE]))
        elif isinstance(part, list | tuple):
            some = enumerate(islice(part, _MAX_LOOKED_THROUGH))
            todo.extend((item, f"{at}.{number}"[:_MAX_PLACE]) for number, item in some)
        elif isinstance(part, str) and (half := half_of_pair(part)) is not None:
            raise ValueError(f"{at} must be text, but character {half} is {_HALF}")
    raise ValueError(f"{place} must be text, but a character in it is {_HALF}")


def _call_can_be_encoded(call: dict[str, Any]) -> dict[str, Any]:
    """A template is given arguments as what they say: escapes are read there."""
    try:
        to_json(call)
    except PydanticSerializationError as error:
        if "surrogate" in str(error):  # else it is no JSON, and a caller's own
            _check_texts(call, "the call")
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str) and _ESCAPED_HALF.search(arguments):
        try:
            from_json(arguments)
        except ValueError as error:
            if "surrogate" in str(error) or "hex escape" in str(error):
                _check_escapes(arguments)
    return call


def _check_escapes(arguments: str) -> None:
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):  # it stays a text
        return
    _check_texts(parsed, "function.arguments")


def _arguments_can_be_read(calls: Any) -> Any:
    """Before anything walks through them."""
    if not isinstance(calls, list | tuple):
        return calls
    # The first that is no object is what is refused, however many come after it.
    some = takewhile(lambda call: isinstance(call, Mapping), calls)
    functions = [call.get("function") for call in some]
    arguments = [part.get("arguments") for part in functions if isinstance(part, Mapping)]
    check_values(*map(_as_written, arguments))
    return calls


def _as_written(arguments: Any) -> bytes:
    if isinstance(arguments, str):
        return arguments.encode(errors="surrogatepass")
    try:
        return to_json(arguments)
    except PydanticSerializationError:  # told later, by its place
        return b""


def no_booleans(value: Any) -> Any:
    """Refuse ``True`` and ``False`` where a number is meant. :raises ValueError: it is one."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    return value


MAX_TOKEN_ID: Final = 2**31 - 1
"""Runtimes count tokens in 32 bits; which ids a model has, only its runtime knows."""

TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_ID)]
Identifier = Annotated[
    str, Field(min_length=1, max_length=256), AfterValidator(_no_control_characters)
]
NotEmpty = Annotated[str, Field(min_length=1)]
Text = Annotated[str, AfterValidator(_can_be_encoded)]
Texts = Annotated[dict[str, Any], AfterValidator(_texts_can_be_encoded)]
"""Of which keys and values that are strings are text; what else there is, is the caller's own."""
JsonObject = Annotated[dict[str, Any], AfterValidator(_json_can_be_encoded)]
MessageCalls = Annotated[
    list[Annotated[dict[str, Any], AfterValidator(_call_can_be_encoded)]],
    Field(fail_fast=True),
    BeforeValidator(_arguments_can_be_read),
]
"""Tool calls of a message, whose arguments may be JSON in a text: that is counted, too."""
Int = Annotated[int, BeforeValidator(no_booleans)]
Float = Annotated[float, BeforeValidator(no_booleans), Field(allow_inf_nan=False)]


def _default_for_none(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


OrDefault: Final = BeforeValidator(_default_for_none)
"""Of a field that has no ``None``: it takes it, and means its default."""


# ── logit bias ───────────────────────────────────────────────────────────────────────────────

MAX_LOGIT_BIAS: Final = 1 << 18
"""Most tokens of a ``logit_bias``: about as many as the largest vocabularies have."""
_MAX_BIAS: Final = 100.0
_ID_SIZES: Final = frozenset(range(1, 19))
_AT_A_TIME: Final = 512


def _biases(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Check many entries at a time, and one by one where there is a mistake, up to the first."""
    if not isinstance(value, dict):
        return handler(value)
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"may have {MAX_LOGIT_BIAS} tokens, not {len(value)}")
    if (plain := _plain_biases(value)) is not None:
        return plain
    biases: dict[int, float] = {}
    entries = iter(value.items())
    while some := dict(islice(entries, _AT_A_TIME)):
        if (plain := _plain_biases(some)) is None:
            for key, amount in some.items():
                biases |= handler({key: amount})
        else:
            biases |= plain
    return biases


def _plain_biases(value: dict[Any, Any]) -> dict[int, float] | None:
    """Ids, or digits as in JSON, and numbers in their range; ``None``: it has something else.

    A vocabulary has hundreds of thousands of entries: none is looked at in Python.
    """
    keys, amounts = set(map(type, value)), value.values()
    if keys == {str}:
        short = not set(map(len, value)) - _ID_SIZES  # a giant one takes a while to look at
        ids = short and (digits := "".join(value)).isascii() and digits.isdigit()
    else:
        ids = keys == {int} and min(value) >= 0
    if not ids or set(map(type, amounts)) - {int, float}:
        return None
    if not (min(amounts) >= -_MAX_BIAS and max(amounts) <= _MAX_BIAS and isfinite(sum(amounts))):
        return None
    return dict(zip(map(int, value), map(float, amounts), strict=True))


def _token_id(value: Any) -> Any:
    short = not isinstance(value, str) or len(value) in _ID_SIZES
    if not short or (isinstance(value, str) and not (value.isascii() and value.isdigit())):
        raise ValueError("must be a token id")
    return no_booleans(value)


def _bias(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("must be a number, not a text")
    return no_booleans(value)


LogitBias = Annotated[
    dict[
        Annotated[int, BeforeValidator(_token_id), Field(ge=0)],
        Annotated[
            float,
            BeforeValidator(_bias),
            Field(ge=-_MAX_BIAS, le=_MAX_BIAS, allow_inf_nan=False),
        ],
    ],
    WrapValidator(_biases),
]
"""Token id → bias. Ids may be digits, as JSON has them."""


# ── one of several things ────────────────────────────────────────────────────────────────────


def either(what: str, kinds: Mapping[type, str]) -> Discriminator:
    """Choose the member of a union by the value's type, so that mistakes are told of it alone.

    :param what: what the value must be, in words.
    :param kinds: a type of values → the ``Tag`` of the union's member. A tag in brackets is no part
        of what the client is told.
    """

    def tag_of(value: Any) -> str | None:
        return next((tag for kind, tag in kinds.items() if isinstance(value, kind)), None)

    return Discriminator(tag_of, custom_error_type="kind", custom_error_message=f"must be {what}")


class FrozenSchema(BaseModel):
    """A schema whose values do not change, and which refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FewFields(BaseModel):
    """A schema that refuses a mapping with far too many fields, rather than each of the fields."""

    MOST_FIELDS: ClassVar = 256

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > cls.MOST_FIELDS:
            raise ValueError(f"may have {cls.MOST_FIELDS} fields, not {len(value)}")
        return value
