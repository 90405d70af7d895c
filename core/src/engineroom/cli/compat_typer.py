"""What relies on the parser inside of ``typer``, a copy of click that it does not show."""

from __future__ import annotations

from typing import Final

import typer

__all__ = ["BELOW", "help_alone", "parser_error", "refusal"]

BELOW: Final = "1"
"""The first version for which nobody has read that what is used here still works so.

The requirement of the distribution has it as its upper bound. To lift it, look for the class
``ClickException`` among the bases of ``typer.BadParameter``, with ``ctx``, ``exit_code`` and
``format_message()``, and run the tests of the command.
"""


def parser_error() -> type[Exception]:
    """The base of the parser's exceptions."""
    return next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def help_alone(error: Exception) -> str | None:
    """The help, where arguments are missing altogether; else ``None``."""
    if type(error).__name__ != "NoArgsIsHelpError":
        return None
    context = getattr(error, "ctx", None)
    return context.get_help().rstrip("\n") if context is not None else str(error)


def refusal(error: Exception) -> tuple[str, str, int]:
    """What the parser does not take, on one line; the command that was meant; the exit status."""
    text = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    text = text.replace(": Value error, ", ": ")  # pydantic's own words
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "engineroom"
    return text, path, getattr(error, "exit_code", 2)
