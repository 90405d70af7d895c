"""What pydantic finds wrong, as people are told: where it is, and one message for each place.

A value that may be of several kinds (a union) is wrong in as many ways; only what is wrong by the
kind that it comes nearest to is told. What came from the environment is not shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from engineroom.config.interpolation import FromEnvironment

__all__ = ["Mistake", "mistakes"]

_SHOULD: Final = "Input should be "
_WORD: Final = re.compile(r"[A-Za-z]+|\d+")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong.

    :param loc: keys and places that lead to it, from the outermost.
    :param kind: pydantic's name for what is wrong.
    :param message: what is wrong.
    :param raw: as ``loc``; beside it what pydantic calls the kinds of a union.
    :param cause: the exception that a validator raised.
    """

    loc: tuple[Any, ...]
    kind: str
    message: str
    raw: tuple[int | str, ...] = ()
    cause: Exception | None = None


def mistakes(error: ValidationError, value: object) -> list[Mistake]:
    """The mistakes of a value, one for each place.

    :param value: what was validated.
    """
    items = error.errors(include_url=False)
    return list(_nearest([_Item(item, _led(item, value)) for item in items], 0, ()))


@dataclass(frozen=True, slots=True)
class _Item:
    """What pydantic tells.

    :param led: of each step of its place, whether it leads to a key or a place of the value. Those
        that do not are kinds of a union.
    """

    details: Any
    led: tuple[bool, ...]

    @property
    def is_of_another_kind(self) -> bool:
        """Whether the value is not of this kind at all."""
        return str(self.details["type"]).endswith(("_type", "_parsing", "literal_error"))

    def mistake(self, loc: tuple[Any, ...], message: str | None = None) -> Mistake:
        cause = self.details.get("ctx", {}).get("error")
        return Mistake(
            loc,
            self.details["type"],
            message or _message(self.details),
            self.details["loc"],
            cause if isinstance(cause, Exception) else None,
        )


def _led(item: Any, value: object) -> tuple[bool, ...]:
    loc, led = item["loc"], []
    for number, part in enumerate(loc):
        inside, value = _inside(value, part)
        led.append(inside or (item["type"] == "missing" and number == len(loc) - 1))
    return tuple(led)


def _inside(value: object, part: int | str) -> tuple[bool, object]:
    """Whether a step leads into a value, and what it leads to."""
    if isinstance(value, Mapping) and part in value:
        return True, value[part]
    if isinstance(value, Sequence) and isinstance(part, int) and part < len(value):
        return True, value[part]
    if isinstance(value, BaseModel) and isinstance(part, str) and hasattr(value, part):
        return True, getattr(value, part)
    return False, value


def _nearest(items: Sequence[_Item], depth: int, loc: tuple[Any, ...]) -> Iterator[Mistake]:
    """The mistakes at a place, to which ``depth`` steps lead, and of what is in it."""
    branches: dict[Any, list[_Item]] = {}
    kinds: dict[Any, list[_Item]] = {}
    for item in items:
        if len(item.led) == depth:
            yield item.mistake(loc)
        else:
            steps = branches if item.led[depth] else kinds
            steps.setdefault(item.details["loc"][depth], []).append(item)
    if len(kinds) == 1:  # no union: each of its kinds is wrong. A validator may have made it
        branches |= kinds
    for part, branch in branches.items():
        yield from _nearest(branch, depth + 1, loc if part == "[key]" else (*loc, part))
    if len(kinds) > 1:
        yield from _nearest_kind(list(kinds.values()), depth + 1, loc)


def _nearest_kind(
    kinds: Sequence[Sequence[_Item]], depth: int, loc: tuple[Any, ...]
) -> Iterator[Mistake]:
    """The mistakes by the kind of a union that a value comes nearest to."""
    roots = [[item for item in kind if len(item.led) == depth] for kind in kinds]
    fitting = [
        kind
        for kind, root in zip(kinds, roots, strict=True)
        if not any(item.is_of_another_kind for item in root)
    ]
    nearest = [kind for kind in fitting if len(kind) == min(map(len, fitting))]
    if len(nearest) == 1:
        yield from _nearest(nearest[0], depth, loc)
    elif nearest:  # it may be any of them: each is told with its name
        for kind in nearest:
            yield from _nearest(kind, depth, (*loc, kind[0].details["loc"][depth - 1]))
    else:
        firsts = [root[0] for root in roots]
        messages = dict.fromkeys(_message(first.details) for first in firsts)
        yield firsts[0].mistake(loc, _joined(list(messages)))


def _joined(messages: Sequence[str]) -> str:
    """``Input should be a or b``."""
    if all(message.startswith(_SHOULD) for message in messages):
        return _SHOULD + " or ".join(message.removeprefix(_SHOULD) for message in messages)
    return "; or ".join(messages)


def _message(details: Any) -> str:
    message = str(details["msg"]).removeprefix("Value error, ")
    value = details["input"]
    if isinstance(value, FromEnvironment) and details["type"] in ("value_error", "assertion_error"):
        quoted = [word for word in _WORD.findall(str(value)) if word in message]
        if any(word not in value.written for word in quoted):
            return f"what {value!r} stands for is not valid here"
    return message
