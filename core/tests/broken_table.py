"""The table of broken handlers, and how they get into it."""

from __future__ import annotations

from collections.abc import Callable

from engineroom import InferenceHandler

BROKEN: dict[str, type[InferenceHandler]] = {}
"""Name of the defect → the handler that has it."""


def defect(make: Callable[[], type[InferenceHandler]]) -> None:
    rule, _, kind = make.__name__.partition("__")
    name = rule.replace("_", "-") + (f"__{kind}" if kind else "")
    BROKEN[name] = make()
