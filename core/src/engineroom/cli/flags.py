"""Flags that several commands have."""

from __future__ import annotations

from typing import Any, Final

import typer

__all__ = [
    "CONFIG_OPTION",
    "JSON_FLAG",
    "MODEL_ARGUMENT",
    "OPTION_FLAG",
    "RUNTIME_FLAG",
    "TEMPERATURE_FLAG",
    "flag",
    "said_before",
]


def flag(text: str, *names: str, metavar: str | None = None, **more: Any) -> Any:
    """A flag whose help says its default, if it has any."""
    return typer.Option(*names, help=text, metavar=metavar, **{"show_default": False, **more})


def said_before(ctx: typer.Context, name: str, value: Any) -> Any:
    """A flag's value, or what it was given before the subcommand: `models --json ls`."""
    return value or (ctx.parent.params.get(name) if ctx.parent is not None else None)


JSON_FLAG: Final = typer.Option("--json", help="Print JSON.")
MODEL_ARGUMENT: Final = typer.Argument(
    metavar="MODEL", help="A model of the deployment, or a source."
)


CONFIG_OPTION: Final = typer.Option(
    "--config",
    "-c",
    metavar="FILE",
    help="The deployment file.  [default: the one that ENGINEROOM_CONFIG names]",
)
RUNTIME_FLAG: Final = flag("Load the source with this runtime.", "--runtime", metavar="NAME")
OPTION_FLAG: Final = flag(
    "An option of the runtime for a source; may be repeated.",
    "--option",
    "-o",
    metavar="KEY=VALUE",
)
TEMPERATURE_FLAG: Final = flag("0 (greedy) to 2.  [default: 0.7]", "--temperature", "-t")
