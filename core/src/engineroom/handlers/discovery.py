"""What is installed: plugins as their metadata tells, before any of them is imported."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Literal, TypeAlias

__all__ = [
    "API_GROUP",
    "HANDLER_GROUP",
    "PLUGIN_GROUP",
    "PluginRecord",
    "PluginStatus",
    "install_hint",
    "installed_plugins",
]

logger = logging.getLogger("engineroom.plugins")

HANDLER_GROUP: Final = "engineroom.handlers"
"""Entry points of handlers; the entry's name is the handler's name."""
PLUGIN_GROUP: Final = "engineroom.plugins"
"""Entry points of observers: objects or modules with hooks."""
API_GROUP: Final = "engineroom.api"
"""Optional: ``<handler name> = "engineroom.api:v1"`` tells the contract's version up front."""

PluginStatus: TypeAlias = Literal[
    "found", "active", "disabled", "not listed", "unavailable", "quarantined"
]

_KNOWN_RUNTIMES: Final = {
    "llamacpp": "engineroom-llamacpp",
    "hf_transformers": "engineroom-hf-transformers",
    "vllm": "engineroom-vllm",
}


@dataclass(slots=True)
class PluginRecord:
    """An installed plugin and what became of it.

    :param status: ``found`` (not imported yet), ``active``, ``disabled``, ``not listed`` (an
        allow-list does not name it), ``unavailable`` (what it runs is not installed; ``reason``
        says what to do) or ``quarantined`` (``reason``, ``remedy`` and ``traceback`` say why).
    """

    name: str
    group: str
    value: str
    distribution: str = "?"
    version: str = "?"
    api_version: str | None = None
    status: PluginStatus = "found"
    reason: str = ""
    remedy: str = ""
    traceback: str = ""
    entry_point: EntryPoint | None = field(default=None, repr=False)


def installed_plugins() -> list[PluginRecord]:
    """All plugins of this environment, sorted by name; nothing is imported."""
    api = {
        (_owner(entry)[0], entry.name): _version_named(entry.value) for entry in _entries(API_GROUP)
    }
    records = [
        PluginRecord(
            name=entry.name,
            group=group,
            value=entry.value,
            distribution=_owner(entry)[0],
            version=_owner(entry)[1],
            api_version=api.get((_owner(entry)[0], entry.name)),
            entry_point=entry,
        )
        for group in (HANDLER_GROUP, PLUGIN_GROUP)
        for entry in _entries(group)
    ]
    return sorted(records, key=lambda record: (record.group, record.name, record.distribution))


def install_hint(runtime: str | None = None) -> str:
    """The command that installs a runtime, or the choice there is."""
    if runtime is not None:
        return f"pip install {_KNOWN_RUNTIMES.get(runtime, f'engineroom-{runtime}')}"
    return (
        "pip install engineroom-llamacpp (GGUF files, CPU and GPU), "
        "engineroom-hf-transformers (Hugging Face models) or engineroom-vllm (GPU servers)"
    )


def _entries(group: str) -> Iterator[EntryPoint]:
    # An editable install can list the same entry twice, once for each path it is found on.
    seen: set[tuple[str, str, str]] = set()
    for entry in entry_points(group=group):
        key = (_owner(entry)[0], entry.name, entry.value)
        if key not in seen:
            seen.add(key)
            yield entry


def _version_named(value: str) -> str:
    """``engineroom.api:v1`` names version 1.0, ``engineroom.api:v1_2`` version 1.2."""
    name = value.rpartition(":")[2]
    match = re.fullmatch(r"v(\d+)(?:[._](\d+))?", name)
    return f"{match[1]}.{match[2] or 0}" if match else name


def _owner(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution; question marks where its metadata is damaged."""
    try:
        if entry.dist is not None:
            return entry.dist.name or "?", entry.dist.version or "?"
    except Exception:
        logger.debug("the metadata of plugin %r cannot be read", entry.name, exc_info=True)
    return "?", "?"
