"""What is installed: plugins as their metadata tells, and how one is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Literal, TypeAlias

from engineroom.border import formatted, get_logger, log_failure, words
from engineroom.errors import ConfigurationError, EngineRoomError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.validation import validate_handler

__all__ = [
    "API_GROUP",
    "HANDLER_GROUP",
    "PLUGIN_GROUP",
    "PluginRecord",
    "PluginStatus",
    "handler_of",
    "install_hint",
    "installed_plugins",
    "load_plugin",
]

logger = get_logger("engineroom.registry")

HANDLER_GROUP: Final = "engineroom.handlers"
"""Entry points of handlers; the entry's name is the handler's name."""
PLUGIN_GROUP: Final = "engineroom.plugins"
"""Entry points of observers: objects or modules with hooks."""
API_GROUP: Final = "engineroom.api"
"""Optional: ``<handler name> = "engineroom.api:v1"`` tells the contract's version up front."""

PluginStatus: TypeAlias = Literal[
    "found", "active", "disabled", "not listed", "unavailable", "quarantined"
]


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

    def quarantine(self, error: BaseException, remedy: str) -> None:
        """Note and log what went wrong and what to do; the plugin is not used."""
        self.status = "quarantined"
        self.reason = words(error)
        self.remedy = remedy
        self.traceback = formatted(error)
        log_failure(
            logger,
            error,
            "plugin %r of %s %s was quarantined: %s; to use it, %s; the rest goes on without it",
            self.name,
            self.distribution,
            self.version,
            self.reason,
            remedy,
        )


def installed_plugins() -> list[PluginRecord]:
    """All plugins of this environment, sorted by name; nothing is imported."""
    api = {(owner, e.name): _version_named(e.value) for e, owner, _ in _entries(API_GROUP)}
    records = [
        PluginRecord(
            e.name, group, e.value, owner, version, api.get((owner, e.name)), entry_point=e
        )
        for group in (HANDLER_GROUP, PLUGIN_GROUP)
        for e, owner, version in _entries(group)
    ]
    return sorted(records, key=lambda record: (record.group, record.name, record.distribution))


def load_plugin(record: PluginRecord, use: Callable[[PluginRecord, object], None]) -> None:
    """Import a plugin and use it. The border to foreign code: whatever it does ends here.

    :param record: told what became of the plugin: active, unavailable or quarantined.
    :param use: registers what the entry point names.
    """
    assert record.entry_point is not None
    try:
        plugin = record.entry_point.load()
    except BaseException as error:  # noqa: BLE001 - foreign code
        record.quarantine(error, f"reinstall or upgrade it: pip install -U {record.distribution}")
        return
    try:
        use(record, plugin)
    except BaseException as error:  # noqa: BLE001 - foreign code
        remedy = "mend the plugin" if isinstance(error, EngineRoomError) else "report it"
        record.quarantine(error, f"{remedy} ({record.distribution} {record.version})")
        return
    if record.status == "found":
        record.status = "active"


def handler_of(record: PluginRecord, plugin: object) -> InferenceHandler | None:
    """The handler that an entry point names; ``None``: its runtime cannot be used here.

    :param plugin: the handler, or its class.
    :raises ConfigurationError: it is no proper handler, or not of the entry point's name.
    """
    handler = plugin() if isinstance(plugin, type) else plugin
    name = getattr(handler, "name", None)
    if name != record.name:
        raise ConfigurationError(
            f"handler {record.value}: its entry point is called {record.name!r} but its "
            f"class has name = {name!r}; give both the same name"
        )
    valid = validate_handler(handler)
    record.api_version = valid.api_version
    if reason := valid.unavailable():
        record.status, record.reason = "unavailable", str(reason)
        logger.info("plugin %r cannot be used here: %s", record.name, reason)
        return None
    return valid


def install_hint(runtime: str | None = None) -> str:
    """The command that installs a runtime, or the choice there is."""
    if runtime is not None:
        return f"pip install engineroom-{runtime.replace('_', '-')}"
    return (
        "pip install engineroom-llamacpp (GGUF files, CPU and GPU), "
        "engineroom-hf-transformers (Hugging Face models) or engineroom-vllm (GPU servers)"
    )


def _entries(group: str) -> Iterable[tuple[EntryPoint, str, str]]:
    """Entry points, with the names and versions of the distributions that they belong to."""
    entries: dict[tuple[str, str, str], tuple[EntryPoint, str, str]] = {}
    # An editable install can list the same entry twice, once for each path it is found on.
    for entry in entry_points(group=group):
        owner, version = _owner(entry)
        entries.setdefault((owner, entry.name, entry.value), (entry, owner, version))
    return entries.values()


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
        log = get_logger("engineroom.plugins")
        log.debug("the metadata of plugin %r cannot be read", entry.name, exc_info=True)
    return "?", "?"
