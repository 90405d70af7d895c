"""How a suite says that it replaces a check, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["overrides", "reason_of"]

_F = TypeVar("_F", bound=Callable[..., object])


def overrides(reason: str) -> Callable[[_F], _F]:
    """Mark a method that replaces a check of the kit, and say why.

    :raises ValueError: no reason was given.
    """
    if not str(reason or "").strip() or callable(reason):
        raise ValueError('say why the check is replaced: @overrides("the reason")')

    def mark(function: _F) -> _F:
        function.__engineroom_override__ = reason  # type: ignore[attr-defined]
        return function

    return mark


def reason_of(function: object) -> str | None:
    """Why a method replaces a check; ``None``: it does not say."""
    return getattr(function, "__engineroom_override__", None)
