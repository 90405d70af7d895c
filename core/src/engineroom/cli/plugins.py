"""``engineroom plugins``: what is installed, in which order it is asked, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from engineroom.cli import EXIT_FAILED
from engineroom.cli.flags import CONFIG_OPTION, JSON_FLAG, flag
from engineroom.cli.output import say, show, table, write, write_json
from engineroom.cli.resolve import deployment_or_none, registry_for, resolve
from engineroom.cli.settings import Settings
from engineroom.handlers.discovery import HANDLER_GROUP, PluginRecord, install_hint
from engineroom.handlers.registry import HandlerRegistry

__all__ = ["PLUGINS_EPILOG", "in_order", "plugin_facts", "plugin_table", "plugins"]

PLUGINS_EPILOG: Final = """\b
Examples:
  engineroom plugins
  engineroom plugins --why ./model.gguf
  engineroom plugins --why smollm2 --config deployment.yaml
  engineroom --debug plugins          with the tracebacks of quarantined ones
"""


def plugins(
    ctx: typer.Context,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
    why: Annotated[
        str | None,
        flag(
            "Say which handler would load this model or source, and why none of the others. "
            "Nothing is loaded. Exit status 1 where there is none.",
            "--why",
            metavar="MODEL",
        ),
    ] = None,
) -> None:
    """List the installed plugins in the order in which they are asked.

    The status of a plugin: active; disabled (by ENGINEROOM_DISABLED_HANDLERS or the deployment);
    not listed (the deployment's handlers, or ENGINEROOM_HANDLERS, leave it out); unavailable (the
    runtime itself is not installed); quarantined (it failed). Why, and what mends it, is said below
    the list.
    """
    if why is not None:
        _explain(why, config, as_json)
        return
    settings: Settings = ctx.obj
    registry = registry_for(deployment_or_none(config))
    records = in_order(registry)
    if as_json:
        write_json([plugin_facts(r, n, traceback=settings.debug) for n, r in records])
        return
    if not any(r.group == HANDLER_GROUP for _, r in records):
        say(f"No runtime is installed: {install_hint()}")
    if records:
        write(plugin_table(records))
    for _, record in records:
        if record.status == "unavailable":
            write(f"\n{record.name} is unavailable: {record.reason}\n")
        if record.status == "quarantined":
            write(f"\n{record.name} is quarantined: {record.reason}\n")
            write(f"  to use it: {record.remedy}\n")
            if settings.debug:
                write("".join(f"  {line}\n" for line in record.traceback.splitlines()))


def in_order(registry: HandlerRegistry) -> list[tuple[int | None, PluginRecord]]:
    """Plugins with their place in the order of consultation; those without a place come last.

    Observers are all called; they have no place.
    """
    places = {handler.name: place for place, handler in enumerate(registry.handlers, start=1)}
    numbered = [
        (
            places.get(r.name) if r.group == HANDLER_GROUP and r.status == "active" else None,
            r,
        )
        for r in registry.plugins
    ]
    return sorted(numbered, key=lambda item: (item[0] is None, item[0] or 0))


def plugin_facts(
    record: PluginRecord, place: int | None, *, traceback: bool = False
) -> dict[str, Any]:
    """What is told of a plugin in JSON."""
    facts = {"order": place, "name": record.name, "kind": _kind(record)}
    names = ("distribution", "version", "api_version", "status", "reason", "remedy")
    facts |= {name: getattr(record, name) for name in names}
    if traceback:
        facts["traceback"] = record.traceback
    return facts


def plugin_table(records: Sequence[tuple[int | None, PluginRecord]]) -> str:
    """The plugins as a table."""
    rows = [
        (
            str(place or "-"),
            r.name,
            _kind(r),
            r.distribution,
            r.version,
            r.api_version or "-",
            r.status,
        )
        for place, r in records
    ]
    return table(("order", "name", "kind", "distribution", "version", "api", "status"), rows)


def _kind(record: PluginRecord) -> str:
    return "handler" if record.group == HANDLER_GROUP else "observer"


def _explain(model: str, config: Path | None, as_json: bool) -> None:
    target = resolve(model, config)
    report = target.manager().explain(target.model_id)
    show(as_json, asdict(report), f"{report}\n")
    if report.chosen is None:
        if not report.verdicts:
            say(f"No runtime is installed: {install_hint()}")
        raise typer.Exit(EXIT_FAILED)
