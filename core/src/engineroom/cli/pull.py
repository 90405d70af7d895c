"""``engineroom models pull`` and ``rm-cache``: models of the hub on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Final

import typer

from engineroom.cli.flags import CONFIG_OPTION, said_before
from engineroom.cli.output import CommandError, say, table, write
from engineroom.cli.resolve import NO_DEPLOYMENT, deployment_or_none
from engineroom.config.deployment import DeploymentConfig
from engineroom.sources.hub import HubFile, cached_repos, pull, remove_cached
from engineroom.sources.source import HubSource, parse_source
from engineroom.units import format_size

__all__ = ["PULL_EPILOG", "RM_CACHE_EPILOG", "pull_command", "rm_cache"]

PULL_EPILOG: Final = """\b
Examples:
  engineroom models pull hf:owner/name:model.gguf
  engineroom models pull chat --config deployment.yaml
  engineroom models pull --config deployment.yaml
"""
RM_CACHE_EPILOG: Final = """\b
Examples:
  engineroom models rm-cache
  engineroom models rm-cache owner/name
"""


def pull_command(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="hf:owner/name[:file], or models of the deployment; without any: all of them.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[Path | None, CONFIG_OPTION] = None,
) -> None:
    """Fetch models of the Hugging Face hub ahead of their use, and check size and hash.

    Files that are here already are checked, not fetched again. What was interrupted goes on
    where it was. The path of each file is printed.
    """
    for source in _sources(models or [], said_before(ctx, "config", config)):
        for _, path in pull(source, on_progress=_tell):
            write(f"{path}\n")


def rm_cache(
    repos: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OWNER/NAME]...", help="What to remove; without any: list what there is."
        ),
    ] = None,
) -> None:
    """Remove repositories of the hub from this machine; without arguments, list them."""
    if repos:
        freed = remove_cached(repo.removeprefix("hf:").partition(":")[0] for repo in repos)
        write(f"{format_size(freed)} freed\n")
        return
    rows = [
        (
            f"hf:{repo.repo}",
            format_size(repo.size),
            str(repo.files),
            time.strftime("%Y-%m-%d", time.localtime(repo.last_used)),
        )
        for repo in cached_repos()
    ]
    write(table(("repository", "size", "files", "last used"), rows))


def _tell(file: HubFile, what: str) -> None:
    if what in ("fetching", "fetching again"):
        say(f"{what} {file.name}" + (f" ({format_size(file.size)})" if file.size else ""))


def _sources(models: list[str], config: Path | None) -> list[HubSource]:
    """The hub sources that are meant, each once."""
    on_hub = bool(models) and all(model.startswith("hf:") for model in models)
    deployment = DeploymentConfig() if on_hub else deployment_or_none(config)
    if deployment is None:
        raise CommandError(f"{NO_DEPLOYMENT}; or give hf:owner/name", 1)
    sources: list[HubSource] = []
    for model in models or [entry.model_id for entry in deployment.models]:
        of_model = [_hub(model)] if model.startswith("hf:") else _of(deployment, model)
        if models and not of_model:
            raise CommandError(f"{model!r} is not on the hub; there is nothing to pull", 1)
        sources += of_model
    if not sources:
        say("no model of the deployment is on the hub; there is nothing to pull")
    return list(dict.fromkeys(sources))


def _hub(text: str) -> HubSource:
    parsed = parse_source(text)
    assert isinstance(parsed, HubSource)
    return parsed


def _of(deployment: DeploymentConfig, model: str) -> list[HubSource]:
    from engineroom.models.manager import LLMModelManager

    choices = LLMModelManager(config=deployment).get_config(model).choices()
    return [_hub(c.source) for c in choices if c.source and c.source.startswith("hf:")]
