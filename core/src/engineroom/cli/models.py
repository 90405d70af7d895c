"""``engineroom models``: what the deployment has."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from engineroom.cli.output import CommandError, table, write, write_json
from engineroom.cli.resolve import NO_DEPLOYMENT, deployment_or_none
from engineroom.cli.run import CONFIG_OPTION
from engineroom.manager import LLMModelManager

__all__ = ["models_app"]

_EPILOG: Final = """\b
Examples:
  engineroom models --config deployment.yaml
  engineroom models ls --json
"""
_JSON_OPTION: Final = typer.Option("--json", help="Print a JSON list.")

models_app = typer.Typer(rich_markup_mode=None, epilog=_EPILOG)


@models_app.callback(invoke_without_command=True)
def models(
    ctx: typer.Context,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    as_json: Annotated[bool, _JSON_OPTION] = False,
) -> None:
    """List the models of the deployment file; the same as `models ls`."""
    if ctx.invoked_subcommand is None:
        _list(config, as_json)


@models_app.command("ls", epilog=_EPILOG)
def ls(
    ctx: typer.Context,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    as_json: Annotated[bool, _JSON_OPTION] = False,
) -> None:
    """List the models of the deployment file.

    Nothing is loaded, and no plugin is imported. The runtime 'auto' is the first one that takes
    the source; `engineroom plugins --why MODEL` tells which that is.
    """
    given = ctx.parent.params if ctx.parent is not None else {}  # `models --json ls` is said, too
    _list(config or given.get("config"), as_json or bool(given.get("as_json")))


def _list(config: Path | None, as_json: bool) -> None:
    deployment = deployment_or_none(config)
    if deployment is None:
        raise CommandError(NO_DEPLOYMENT, 1)
    statuses = LLMModelManager(config=deployment).list_models()
    if as_json:
        write_json([asdict(status) for status in statuses])
        return
    rows = [
        (s.model_id, ", ".join(s.aliases) or "-", s.runtime or "auto", s.state, s.source)
        for s in statuses
    ]
    write(table(("id", "aliases", "runtime", "state", "source"), rows))
