"""A new deployment in the place of the old one: what differs, and when to read it again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from engineroom.config.deployment import DeploymentConfig, deployment_path, parse_deployment
from engineroom.config.model import ModelConfig
from engineroom.errors import ConfigurationError
from engineroom.status import ReloadReport

__all__ = ["compare", "load_settled", "read_settled"]

_SETTLE_S: Final = 0.05
_ATTEMPTS: Final = 40


def compare(old: DeploymentConfig, new: DeploymentConfig) -> ReloadReport:
    """What differs between two deployments."""
    before = {model.model_id: model for model in old.models}
    after = {model.model_id: model for model in new.models}
    both = [(before[name], model) for name, model in after.items() if name in before]
    changed = tuple(b.model_id for a, b in both if _substance(a) != _substance(b))
    soft = _differing(old, new, "keep_alive", "load_timeout_s", "fallback", "prefix_cache_scope")
    return ReloadReport(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=changed,
        adjusted=tuple(
            b.model_id for a, b in both if b.model_id not in changed and (a != b or soft)
        ),
        needs_restart=_differing(old, new, "handlers", "disabled_handlers", "on_unsupported"),
    )


def _differing(old: DeploymentConfig, new: DeploymentConfig, *keys: str) -> tuple[str, ...]:
    return tuple(key for key in keys if getattr(old, key) != getattr(new, key))


def _substance(model: ModelConfig) -> object:
    """What a loaded model is made from."""
    return [(c.source, c.runtime, c.options, c.memory) for c in model.choices()]


def load_settled(path: str | os.PathLike[str] | None) -> DeploymentConfig:
    """Read a deployment file that somebody may be writing just now. Blocks.

    :raises ConfigurationError: it has mistakes, or does not come to rest.
    """
    file = deployment_path(path)
    data = read_settled(file, "the deployment file")
    return parse_deployment(data, os.fspath(file), base=file.parent)


def read_settled(file: Path, what: str) -> bytes:
    """Read a file that somebody may be writing just now. Blocks.

    It is read until it is the same twice, a moment apart, so that half of a file does not count.

    :param what: what messages call it.
    :raises ConfigurationError: it cannot be read, or does not come to rest.
    """
    for _ in range(_ATTEMPTS):
        before = _read(file, what)
        time.sleep(_SETTLE_S)
        if before == _read(file, what):
            return before[0]
    raise ConfigurationError(
        f"{what} {os.fspath(file)!r} is being written all the time; write it to "
        "another name first and rename it"
    )


def _read(file: Path, what: str) -> tuple[bytes, int, int]:
    try:
        data = file.read_bytes()
        status = file.stat()
    except OSError as error:
        raise ConfigurationError(
            f"{what} {os.fspath(file)!r} cannot be read: {error.strerror or error}"
        ) from error
    return data, status.st_mtime_ns, status.st_ino
