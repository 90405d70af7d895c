"""``${NAME}`` and ``${NAME:-default}`` in the values of a deployment file.

A value is exchanged after the file was read: whatever a variable holds, it is a text or a number in
that place, never YAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = [
    "FromEnvironment",
    "WrongReferenceError",
    "as_written",
    "interpolated",
    "without_secrets",
]

_REFERENCE: Final = re.compile(
    r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\})?"
)
_SHORTEST_SECRET: Final = 4
"""A shorter text is also a part of other words."""
_NUMBER_OR_WORD: Final = re.compile(r"[-+]?[\w.]+(?:[eE][-+]\d+)?", re.ASCII)


class FromEnvironment(str):
    """A text that came from the environment, and may be a secret.

    What runs with it gets the text; what shows it should show ``written``, as its ``repr`` does.
    """

    __slots__ = ("written",)
    written: str

    def __new__(cls, text: str, written: str) -> FromEnvironment:
        self = super().__new__(cls, text)
        self.written = written
        return self

    def __reduce__(self) -> tuple[type[FromEnvironment], tuple[str, str]]:
        return FromEnvironment, (str(self), self.written)

    def __repr__(self) -> str:
        return repr(self.written)


class WrongReferenceError(ValueError):
    """A reference that cannot be followed."""


def interpolated(text: str, environ: Mapping[str, str], *, plain: bool) -> Any:
    """A value with what its references stand for.

    :param plain: it stands in the file without quotes: one that is nothing but a reference is read
        as YAML would read its value: as a number, a truth value, nothing, or text.
    :raises WrongReferenceError: a variable is not set and has no default, or a reference is none.
    """
    if "${" not in text:
        return text
    secret = False

    def follow(match: re.Match[str]) -> str:
        nonlocal secret
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        if name is None:
            shown = text[match.start() : match.start() + 40]
            raise WrongReferenceError(
                f"{shown!r} is no reference to a variable; write ${{NAME}} or ${{NAME:-default}}, "
                "or $${ for the characters themselves"
            )
        value = environ.get(name)
        if value is None or (value == "" and default is not None):
            if default is None:
                raise WrongReferenceError(
                    f"the environment has no variable {name}; set it, or give a default: "
                    f"${{{name}:-default}}"
                )
            return default
        if not value.isascii():
            _check_text(name, value)
        secret = True
        return value

    value = _REFERENCE.sub(follow, text)
    whole = _REFERENCE.fullmatch(text)
    if plain and whole is not None and whole["name"] is not None:
        typed = _typed(value)
        if typed is not value:
            return typed
    return FromEnvironment(value, text) if secret else value


def as_written(value: Any) -> Any:
    """The value to show: with references in the place of what the environment says."""
    if isinstance(value, FromEnvironment):
        return value.written
    if isinstance(value, Mapping):
        return {key: as_written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_written(item) for item in value]
    return value


def without_secrets(text: str, value: Any) -> str:
    """The text, with references in the place of what the environment says in ``value``."""
    for secret in sorted(_secrets(value), key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(str(secret), secret.written)
    return text


def _secrets(value: Any) -> Iterator[FromEnvironment]:
    if isinstance(value, FromEnvironment):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _secrets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item)


def _check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise WrongReferenceError(f"what the variable {name} holds is no valid text") from None


def _typed(value: str) -> Any:
    """What YAML reads as a number, a truth value or nothing; all else is the text itself."""
    if value == "":
        return None
    if not _NUMBER_OR_WORD.fullmatch(value):
        return value
    from ruamel.yaml import YAML

    try:
        read = YAML(typ="safe", pure=True).load(value)
    except Exception:  # noqa: BLE001 - the reader raises much for odd numbers: then it is text
        return value
    return read if read is None or isinstance(read, bool | int | float) else value
