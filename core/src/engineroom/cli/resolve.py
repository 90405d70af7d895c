"""What MODEL on the command line means: a model of the deployment, or a source given directly."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pydantic import ValidationError

from engineroom.cli.output import CommandError, warning_line
from engineroom.config.deployment import DeploymentConfig, load_deployment
from engineroom.config.environment import CONFIG_VARIABLE
from engineroom.config.model import ModelConfig
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import ConfigurationError, ModelNotFoundError
from engineroom.handlers.discovery import install_hint
from engineroom.handlers.registry import HandlerRegistry
from engineroom.models.manager import LLMModelManager
from engineroom.sources.source import HubSource, PackageSource, parse_source

__all__ = [
    "NO_DEPLOYMENT",
    "Target",
    "deployment_or_none",
    "registry_for",
    "resolve",
    "warn_of_quarantined",
]

NO_DEPLOYMENT: Final = (
    f"no deployment file is named; give one with --config FILE, or set {CONFIG_VARIABLE}"
)


@dataclass(frozen=True, slots=True)
class Target:
    """A model to work with.

    :param model_id: what the manager calls it.
    :param deployment: the deployment that has it; one of its own for a source.
    :param registry: the handlers, in the deployment's order.
    :param source: the source, where MODEL was one.
    """

    model_id: str
    deployment: DeploymentConfig
    registry: HandlerRegistry
    source: str | None = None

    def manager(self) -> LLMModelManager:
        """A manager that has the model."""
        return LLMModelManager(config=self.deployment, registry=self.registry)


def deployment_or_none(config: Path | None) -> DeploymentConfig | None:
    """The deployment file that is named; ``None`` where none is.

    :raises ConfigurationError: it has mistakes.
    """
    if config is None and not os.environ.get(CONFIG_VARIABLE):
        return None
    return load_deployment(config)


def registry_for(deployment: DeploymentConfig | None) -> HandlerRegistry:
    """The handlers that the deployment uses; without one, those that are installed."""
    if deployment is None:
        return HandlerRegistry()
    return HandlerRegistry(allow=deployment.handlers, disabled=deployment.disabled_handlers)


def resolve(
    model: str,
    config: Path | None,
    runtime: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Target:
    """Find out what ``model`` means; nothing is loaded.

    In this order: an id or alias of the deployment; a source, which is anything that begins
    with ``hf:`` or ``package:``, that is a file or folder, that an installed handler takes, or
    that ``runtime`` is named for.

    :raises ModelNotFoundError: it is neither.
    :raises ConfigurationError: the deployment has mistakes, or the source is badly written.
    :raises CommandError: runtime or options were given for a model of the deployment.
    """
    deployment = deployment_or_none(config)
    registry = registry_for(deployment)
    names = [name for entry in (deployment.models if deployment else ()) for name in _names(entry)]
    if deployment is not None and model in names:
        if runtime is not None or options:
            raise CommandError(
                f"--runtime and --option go with a source, but {model!r} is a model of the "
                "deployment file, which says both; change it there, or give the model's source"
            )
        return Target(model, deployment, registry)
    if not model:
        raise ModelNotFoundError("MODEL is empty; give a model id, a path or another source")
    if runtime == "":
        raise CommandError("--runtime is empty; give the name of a handler, or leave it out")
    try:
        entry = ModelConfig(
            model_id=_label(model), source=model, runtime=runtime, options=dict(options or {})
        )
    except ValidationError as error:
        raise ConfigurationError(
            f"MODEL {model!r}: {error.errors(include_url=False)[0]['msg']}"
        ) from error
    if not _is_source(entry, registry):
        raise ModelNotFoundError(_neither(model, deployment, names, registry))
    base = deployment or DeploymentConfig()
    return Target(
        entry.model_id, base.model_copy(update={"models": [entry]}), registry, source=model
    )


def warn_of_quarantined(registry: HandlerRegistry) -> None:
    """Tell about plugins that could not be used, a line each."""
    for record in registry.plugins:
        if record.status == "quarantined":
            warning_line(
                f"plugin {record.name!r} of {record.distribution} {record.version} is not used: "
                f"{' '.join(record.reason.split())}; `engineroom plugins` tells more"
            )


def _names(entry: ModelConfig) -> list[str]:
    return [entry.model_id, *entry.aliases]


def _is_source(entry: ModelConfig, registry: HandlerRegistry) -> bool:
    assert entry.source is not None
    parsed = parse_source(entry.source)
    if isinstance(parsed, HubSource | PackageSource) or entry.runtime is not None:
        return True
    try:
        if parsed.path.exists():
            return True
    except OSError:  # no path of this system at all
        pass
    return registry.explain(entry).chosen is not None


def _neither(
    model: str, deployment: DeploymentConfig | None, names: list[str], registry: HandlerRegistry
) -> str:
    if deployment is None:
        message = (
            f"{model!r} is no file, no folder and no source that an installed handler takes, and "
            f"no deployment file is named (--config FILE or {CONFIG_VARIABLE}); give a path, "
            "package:module/file or hf:owner/name, or name the file that has the model"
        )
    else:
        known = ", ".join(entry.model_id for entry in deployment.models) or "none"
        near = did_you_mean(model, names) or (
            "; give one of them, a path, package:module/file or hf:owner/name"
        )
        message = (
            f"{model!r} is neither a model of the deployment (models: {known}) nor a file, a "
            f"folder or a source that an installed handler takes{near}"
        )
    if not registry.handlers:
        message += f". No handler is in use either: {install_hint()}"
    return message


def _label(source: str) -> str:
    """A short name for a source: its file's or its repository's."""
    parsed = parse_source(source)
    if isinstance(parsed, HubSource):
        name = PurePosixPath(parsed.file).stem if parsed.file else parsed.repo.partition("/")[2]
    elif isinstance(parsed, PackageSource):
        name = PurePosixPath(parsed.file).stem
    else:
        path = parsed.path
        try:
            name = path.stem if path.is_file() else path.resolve().name
        except (OSError, RuntimeError):
            name = path.name
        if not path.exists():
            name = source  # a scheme of some handler's own, or no source at all
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", name)[:256] or "model"
