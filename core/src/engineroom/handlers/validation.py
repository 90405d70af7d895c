"""The checks of a handler that pluggy leaves out; each error names plugin, method and remedy."""

from __future__ import annotations

import inspect
from typing import Final

from engineroom.errors import ConfigurationError
from engineroom.handlers.base import API_VERSION, InferenceHandler
from engineroom.handlers.markers import PROJECT

__all__ = ["HANDLER_METHODS", "validate_handler"]

_GENERATOR: Final = "async def with yield"


def _kind(function: object) -> str:
    if inspect.isasyncgenfunction(function):
        return _GENERATOR
    return "async def" if inspect.iscoroutinefunction(function) else "def"


_KINDS: Final = {
    name: _kind(method)
    for name, method in vars(InferenceHandler).items()
    if hasattr(method, f"{PROJECT}_spec")
} | {"stream_infer": _GENERATOR}  # which has no body there
HANDLER_METHODS: Final = frozenset(_KINDS)
"""The methods of :class:`~engineroom.InferenceHandler` that are hook specifications."""


def validate_handler(handler: object) -> InferenceHandler:
    """Check a handler before it is registered.

    :returns: the handler itself.
    :raises ConfigurationError: it is a class, no handler, nameless, of another API version, or
        one of its methods has the wrong parameters or the wrong kind.
    """
    if isinstance(handler, type):
        raise ConfigurationError(
            f"handler {handler.__name__}: a class was given where an instance belongs; "
            f"write {handler.__name__}()"
        )
    if not isinstance(handler, InferenceHandler):
        raise ConfigurationError(
            f"handler {type(handler).__name__}: not an InferenceHandler; "
            "derive its class from engineroom.InferenceHandler or engineroom.TokenHandler"
        )
    name = getattr(handler, "name", None)
    who = f"handler {name!r} ({type(handler).__module__}.{type(handler).__qualname__})"
    if not isinstance(name, str) or not name or name != name.strip():
        raise ConfigurationError(
            f'{who}: it has no name; set name = "my_runtime" in the class, as in its entry point'
        )
    _check_api_version(who, handler.api_version)
    for method, kind in _KINDS.items():
        _check_method(who, handler, method, kind)
    return handler


def _check_api_version(who: str, version: object) -> None:
    major = version.partition(".")[0] if isinstance(version, str) else None
    if major is None or not major.isdecimal():
        raise ConfigurationError(
            f"{who}: api_version is {version!r}, not a version; write "
            f'api_version = "{API_VERSION}" in the class'
        )
    ours = API_VERSION.partition(".")[0]
    if major != ours:
        newer = int(major) > int(ours)
        raise ConfigurationError(
            f"{who}: written for version {version} of the handler contract, this engineroom "
            f"has {API_VERSION}; "
            + ("pip install --upgrade engineroom" if newer else "upgrade the plugin")
        )


def _check_method(who: str, handler: InferenceHandler, method: str, kind: str) -> None:
    function = getattr(handler, method)
    own = list(inspect.signature(getattr(InferenceHandler, method)).parameters)
    expected = own[1:]
    correct = f"`{kind.partition(' with')[0]} {method}({', '.join(own)})`"
    if not callable(function):
        raise ConfigurationError(f"{who}.{method} is not a method; write {correct}")
    if _kind(function) != kind:
        raise ConfigurationError(
            f"{who}.{method} is written with {_kind(function)!r}, but it must be {kind!r}; "
            f"write {correct}" + (" and yield its pieces" if kind == _GENERATOR else "")
        )
    parameters = inspect.signature(function).parameters
    required = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if missing := [name for name in expected if name not in parameters]:
        raise ConfigurationError(
            f"{who}.{method} lacks the parameter {missing[0]!r}; write {correct}"
        )
    if extra := [name for name in required if name not in expected]:
        raise ConfigurationError(
            f"{who}.{method} asks for a parameter {extra[0]!r} that it will not be given; "
            f"write {correct}"
        )
    if by_keyword := [n for n in expected if parameters[n].kind is inspect.Parameter.KEYWORD_ONLY]:
        raise ConfigurationError(
            f"{who}.{method} takes {by_keyword[0]!r} by keyword only, but it is given by place; "
            f"write {correct}"
        )
    if list(parameters)[: len(expected)] != expected:
        raise ConfigurationError(
            f"{who}.{method} has its parameters in another order; write {correct}"
        )
