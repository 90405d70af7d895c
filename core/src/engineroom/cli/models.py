"""``engineroom models``: what the deployment has, what it comes to, and a server's models."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from engineroom.cli.flags import CONFIG_OPTION, JSON_FLAG, MODEL_ARGUMENT, flag, said_before
from engineroom.cli.output import CommandError, show, table
from engineroom.cli.pull import PULL_EPILOG, RM_CACHE_EPILOG, pull_command, rm_cache
from engineroom.cli.remote import KEY_VARIABLE, URL_VARIABLE, RemoteManager
from engineroom.cli.resolve import NO_DEPLOYMENT, deployment_or_none, resolve, warn_of_quarantined
from engineroom.config.deployment import DeploymentConfig
from engineroom.config.interpolation import as_written
from engineroom.models.manager import LLMModelManager
from engineroom.models.plan import sizes
from engineroom.units import format_size

__all__ = ["models_app"]

_EPILOG: Final = f"""\b
Examples:
  engineroom models --config deployment.yaml
  engineroom models ls --json
  engineroom models plan --config deployment.yaml
  engineroom models load chat --url http://127.0.0.1:8000

\b
Environment:
  {URL_VARIABLE}  the server, where --url is not given
  {KEY_VARIABLE}  an admin key of the server
"""
_PLAN_EPILOG: Final = """\b
Examples:
  engineroom models plan --config deployment.yaml
  engineroom models plan --json
  engineroom models plan --url http://127.0.0.1:8000
"""
_SHOW_EPILOG: Final = """\b
Examples:
  engineroom models show chat --config deployment.yaml
  engineroom models show ./model.gguf
"""
_LOAD_EPILOG: Final = """\b
Examples:
  engineroom models load chat
  engineroom models unload chat --url http://10.0.0.5:8000
"""
_RELOAD_EPILOG: Final = """\b
Examples:
  engineroom models reload
  engineroom models reload --url http://10.0.0.5:8000
"""
_URL_OPTION: Final = flag("Ask this running server instead.", "--url", metavar="URL")
_SERVER_OPTION: Final = flag(
    f"The server.  [default: what {URL_VARIABLE} says, or http://127.0.0.1:8000]",
    "--url",
    metavar="URL",
)
_SERVED: Final = typer.Argument(metavar="MODEL", help="A model of the server.")

models_app = typer.Typer(rich_markup_mode=None, epilog=_EPILOG)
models_app.command(
    "pull", short_help="Fetch models of the hub ahead of their use.", epilog=PULL_EPILOG
)(pull_command)
models_app.command(
    "rm-cache", short_help="Remove the hub's models from this machine.", epilog=RM_CACHE_EPILOG
)(rm_cache)


@models_app.callback(invoke_without_command=True)
def models(
    ctx: typer.Context,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """List the models of the deployment file; the same as `models ls`."""
    if ctx.invoked_subcommand is None:
        _list(config, as_json)


@models_app.command("ls", short_help="List the models, or those of a server.", epilog=_EPILOG)
def ls(
    ctx: typer.Context,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    url: Annotated[str | None, _URL_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """List the models of the deployment file, or with --url those of a running server.

    Nothing is loaded, and no plugin is imported. The runtime 'auto' is the first one that takes
    the source; `engineroom plugins --why MODEL` tells which that is.
    """
    as_json = bool(said_before(ctx, "as_json", as_json))
    if url is not None:
        _list_of_server(url, as_json)
    else:
        _list(said_before(ctx, "config", config), as_json)


@models_app.command(
    "plan", short_help="Say what would be loaded, and what would go.", epilog=_PLAN_EPILOG
)
def plan(
    ctx: typer.Context,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    url: Annotated[str | None, _URL_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """Say what would be loaded, by which runtime, with what memory, and what would have to go.

    Nothing is loaded. Memory is what the deployment says, what was measured before (on a running
    server), or what the runtime estimates from the model's files.
    """
    as_json = bool(said_before(ctx, "as_json", as_json))
    if url is not None:
        facts: Mapping[str, Any] = RemoteManager(url).plan()
    else:
        manager = LLMModelManager(config=_deployment(said_before(ctx, "config", config)))
        facts = asdict(asyncio.run(manager.plan()))
        warn_of_quarantined(manager.registry)
    show(as_json, facts, lambda: _plan_text(facts.get("models", []), facts.get("devices", [])))


@models_app.command("show", short_help="Show a model and what it would take.", epilog=_SHOW_EPILOG)
def show_model(
    ctx: typer.Context,
    model: Annotated[str, MODEL_ARGUMENT],
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """Show a model: how it is configured, what would run it, and what it would take."""
    target = resolve(model, said_before(ctx, "config", config))
    warn_of_quarantined(target.registry)
    manager = target.manager()
    configured = manager.get_config(target.model_id)
    planned = next(
        m for m in asyncio.run(manager.plan()).models if m.model_id == configured.model_id
    )
    shown = configured.model_dump(mode="json") | {
        name: as_written(value)  # what came from the environment may be a secret
        for name, value in configured.model_dump(include={"options", "variants"}).items()
    }
    shown["prefix_cache_scope"] = manager.prefix_cache_scope(configured.model_id)
    facts = {"config": shown, "plan": asdict(planned)}
    rows = [
        (key, str(value))
        for key, value in shown.items()
        if value not in (None, []) and key != "variants"
    ]
    variants = [
        (str(number), v.runtime or "auto", v.source, sizes(v.memory), v.memory_from,
         v.verdict + (f": {v.reason}" if v.reason else ""))
        for number, v in enumerate(planned.variants, 1)
    ]  # fmt: skip
    heads = ("variant", "runtime", "source", "memory", "says", "verdict")
    text = f"{table(('key', 'value'), rows)}\n{table(heads, variants)}"
    show(bool(said_before(ctx, "as_json", as_json)), facts, text)


@models_app.command("load", epilog=_LOAD_EPILOG)
def load(
    model: Annotated[str, _SERVED],
    url: Annotated[str | None, _SERVER_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """Load a model of a running server; returns when it is ready."""
    _show_state(RemoteManager(url).load(model), as_json)


@models_app.command("unload", short_help="Unload a model of a running server.", epilog=_LOAD_EPILOG)
def unload(
    model: Annotated[str, _SERVED],
    url: Annotated[str | None, _SERVER_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """Unload a model of a running server, once its requests have ended.

    Its next request loads it anew.
    """
    _show_state(RemoteManager(url).unload(model), as_json)


@models_app.command("reload", epilog=_RELOAD_EPILOG)
def reload(
    url: Annotated[str | None, _SERVER_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """Have a running server read its deployment file anew.

    Running requests end on the models that they have. A file with mistakes changes nothing.
    """
    report = RemoteManager(url).reload()
    lines = (f"{key}: {', '.join(map(str, names))}\n" for key, names in report.items() if names)
    show(as_json, report, lambda: "".join(lines) or "nothing changed\n")


def _deployment(config: Path | None) -> DeploymentConfig:
    deployment = deployment_or_none(config)
    if deployment is None:
        raise CommandError(NO_DEPLOYMENT, 1)
    return deployment


def _list(config: Path | None, as_json: bool) -> None:
    statuses = LLMModelManager(config=_deployment(config)).list_models()
    rows = [
        (s.model_id, ", ".join(s.aliases) or "-", s.runtime or "auto", s.state, s.source)
        for s in statuses
    ]
    text = table(("id", "aliases", "runtime", "state", "source"), rows)
    show(as_json, [asdict(status) for status in statuses], text)


def _list_of_server(url: str, as_json: bool) -> None:
    models = RemoteManager(url).models()
    rows = [
        (_id_of(m), ", ".join(m.get("aliases") or ()) or "-", str(m.get("runtime") or "auto"),
         str(m.get("state", "?")), str(m.get("leases", "-")), _size(m.get("memory_bytes")))
        for m in models
    ]  # fmt: skip
    heads = ("id", "aliases", "runtime", "state", "requests", "memory")
    show(as_json, models, table(heads, rows))


def _show_state(state: Mapping[str, Any], as_json: bool) -> None:
    show(as_json, state, f"{_id_of(state)}: {state.get('state', '?')}\n")


def _id_of(model: Mapping[str, Any]) -> str:
    return str(model.get("id", model.get("model_id", "?")))


def _size(size: int | None) -> str:
    return format_size(size) if size else "-"


def _plan_text(models: Sequence[Mapping[str, Any]], devices: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (m["model_id"], m["action"], m["runtime"] or "-",
         sizes(m["memory"]) if m["action"] != "impossible" else "-", ", ".join(m["evicts"]) or "-")
        for m in models
    ]  # fmt: skip
    text = table(("model", "action", "runtime", "memory", "unloads first"), rows)
    for model in models:
        name, variants = model["model_id"], model["variants"]
        text += f"{name}: {model['reason']}\n" if model["reason"] else ""
        for number, v in enumerate(variants if len(variants) > 1 else (), 1):
            reason = f": {v['reason']}" if v["reason"] else ""
            which = f"{name}, variant {number} ({v['runtime'] or 'auto'}, {v['source']})"
            text += f"{which}: {v['verdict']}{reason}\n"
    budgets = [
        (d["device"], _budget(d), format_size(d["held"] + d["reserved"]),
         _size(d.get("not_returned")), "-" if d["free"] is None else format_size(d["free"]))
        for d in devices
    ]  # fmt: skip
    heads = ("device", "budget", "taken", "not given back", "free")
    return f"{text}\n{table(heads, budgets)}"


def _budget(device: Mapping[str, Any]) -> str:
    if device["budget"] is None:
        return "unlimited"
    return format_size(device["budget"]) + (" (detected)" if device["detected"] else "")
