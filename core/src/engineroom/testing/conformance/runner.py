"""Run the kit from a program: no test file is written, and pytest says nothing.

Needs pytest when it runs, not when it is imported.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from engineroom.config.model import ModelConfig
from engineroom.errors import ConfigurationError
from engineroom.handlers.base import InferenceHandler

__all__ = ["CheckResult", "Job", "Outcome", "SelectionError", "current_job", "run_suite"]

Outcome: TypeAlias = Literal["passed", "failed", "skipped"]

_SUITE: Final = "engineroom.testing.conformance.command_suite"
_QUIET: Final = ("terminal", "logging")
_UNWANTED: Final = (
    "cacheprovider",
    "doctest",
    "faulthandler",
    "junitxml",
    "pastebin",
    "threadexception",
    "unraisableexception",
    "warnings",
)
_NOTHING_COLLECTED: Final = 5
_INTERRUPTED: Final = 2


class SelectionError(ConfigurationError):
    """The expression that selects checks selects none, or is no expression."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be tested.

    :param make_handler: gives the handler.
    :param settings: attributes of the suite that are not as usual, such as ``timeout_s``.
    """

    make_handler: Callable[[], InferenceHandler]
    model_config: ModelConfig
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came of a check.

    :param check: the rule's id.
    :param reason: why it failed or was skipped; empty where it passed.
    """

    check: str
    outcome: Outcome
    reason: str = ""
    duration_s: float = 0.0


_jobs: Final[list[Job]] = []


def current_job() -> Job:
    """The job that is being run.

    :raises ConfigurationError: there is none.
    """
    if not _jobs:
        raise ConfigurationError(f"{_SUITE} is run by run_suite() only")
    return _jobs[-1]


def run_suite(job: Job, select: str | None = None, *, verbose: bool = False) -> list[CheckResult]:
    """Run the checks, and say what came of each, in order.

    :param select: an expression as for ``pytest -k``; ``None``: all of them.
    :param verbose: let pytest write its own report as well.
    :raises ConfigurationError: pytest is not installed.
    :raises SelectionError: ``select`` fits no check.
    :raises KeyboardInterrupt: it was interrupted.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ConfigurationError(
            'the conformance kit needs pytest; pip install "engineroom[testing]"'
        )
    import pytest

    collector = _Collector()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        environment.delenv("PYTEST_ADDOPTS", raising=False)
        environment.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        # A configuration of our own: that of the folder we are in is for other tests.
        ini = Path(folder) / "pytest.ini"
        ini.write_text("[pytest]\n", encoding="utf-8")
        arguments = ["--pyargs", _SUITE, "-c", str(ini), "--rootdir", folder]
        unwanted = _UNWANTED if verbose else (*_UNWANTED, *_QUIET)
        arguments += [a for name in unwanted for a in ("-p", f"no:{name}")]
        arguments += ["-v", "-rs"] if verbose else []
        arguments += ["-k", select] if select else []
        _jobs.append(job)
        try:
            with redirect_stderr(sys.stderr if verbose else io.StringIO()):
                status = pytest.main(arguments, plugins=[collector])
        finally:
            _jobs.pop()
    if status == _INTERRUPTED and collector.interrupted:
        raise KeyboardInterrupt
    if not collector.results:
        why = "fits no check" if status == _NOTHING_COLLECTED else "cannot be read"
        raise SelectionError(f"-k {select!r} {why}; write parts of their names: -k 'stop or top'")
    return list(collector.results.values())


class _Collector:
    """A plugin of pytest's that keeps what comes of each check."""

    def __init__(self) -> None:
        self.results: dict[str, CheckResult] = {}
        self.interrupted = False

    def pytest_keyboard_interrupt(self) -> None:
        self.interrupted = True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", "-")
        reason = ""
        if report.outcome == "skipped":
            reason = str(report.longrepr[2]).removeprefix("Skipped: ").removeprefix(f"{name}: ")
        elif report.outcome == "failed":
            reason = str(report.longreprtext).strip()
        self.results[name] = CheckResult(name, report.outcome, reason, report.duration)
