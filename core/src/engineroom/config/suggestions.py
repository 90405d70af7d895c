"""The nearest known name, for messages about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

__all__ = ["did_you_mean", "known_keys"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where a known name is near, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def known_keys(schema: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys that there are beside the one at ``loc``, a place that pydantic tells of.

    :returns: nothing where no model of a fixed set of keys stands there.
    """
    places: list[Any] = [schema]
    for part in loc[:-1]:
        places = [inner for place in places for inner in _inside(place, part)]
    models = [place for union in places for place in _alternatives(union) if _is_model(place)]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _inside(annotation: Any, part: int | str) -> list[Any]:
    """What stands at ``part`` of a value of this type."""
    if _is_model(annotation):
        fields = annotation.model_fields
        return [fields[part].annotation] if part in fields else []
    alternatives = _alternatives(annotation)
    if len(alternatives) > 1:
        inside = [inner for one in alternatives for inner in _inside(one, part)]
        # Of a union, pydantic says which one was meant: by its name, or by its tag.
        named = [one for one in alternatives if getattr(one, "__name__", None) == part]
        return named or inside or alternatives
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return list(get_args(annotation)[1:])
    return list(get_args(annotation))


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for part in get_args(annotation) for one in _alternatives(part)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
