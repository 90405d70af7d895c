"""``engineroom conformance``: the kit over a handler, without a test file."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from engineroom.border import is_interrupt, words
from engineroom.cli import EXIT_FAILED
from engineroom.cli.flags import flag
from engineroom.cli.output import CommandError, table, write, write_json
from engineroom.cli.parameters import parse_options
from engineroom.config.model import ModelConfig
from engineroom.config.suggestions import did_you_mean
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.discovery import HANDLER_GROUP, PluginRecord, installed_plugins
from engineroom.handlers.token_handler import effective_capabilities
from engineroom.printable import printable, printable_lines

__all__ = ["CONFORMANCE_EPILOG", "conformance"]

CONFORMANCE_EPILOG: Final = """\b
Examples:
  engineroom conformance llamacpp --model ./model.gguf
  engineroom conformance my_package.handler:MyHandler --model ./model --json report.json
  engineroom conformance my_runtime --model ./model -o n_ctx=512 -k "stop or seed"

\b
Exit status: 0 no rule is broken, 1 one is, 2 wrong arguments, 130 interrupted.
"""
_STYLES: Final = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


@dataclass(frozen=True, slots=True)
class _Subject:
    """The handler's class, or the object that a plugin publishes, and where it is from."""

    target: Any
    record: PluginRecord | None

    def make(self) -> InferenceHandler:
        made: InferenceHandler = self.target() if isinstance(self.target, type) else self.target
        return made


def conformance(
    handler: Annotated[
        str,
        typer.Argument(metavar="HANDLER", help="package.module:Class, or an installed name."),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="SOURCE", help="A small model to test it with.")
    ],
    option: Annotated[
        list[str] | None,
        flag(
            "An option of the runtime, its value in YAML; may be repeated.",
            "--option",
            "-o",
            metavar="KEY=VALUE",
        ),
    ] = None,
    model_id: Annotated[
        str, typer.Option("--model-id", metavar="ID", help="What the model is called.")
    ] = "conformance",
    report: Annotated[
        Path | None,
        flag(
            "Write a report in JSON; '-': to standard output, without the table.",
            "--json",
            metavar="FILE",
        ),
    ] = None,
    select: Annotated[
        str | None, flag("Only these checks, as for pytest -k.", "-k", metavar="EXPR")
    ] = None,
    timeout: Annotated[
        float,
        flag(
            "What takes longer than this (a request, a chunk, a load) hangs.",
            "--timeout",
            metavar="SECONDS",
            min=0.1,
            show_default=True,
        ),
    ] = 30.0,
    foreign: Annotated[
        bool, flag("The model is not in the runtime's own format: name the runtime.", "--foreign")
    ] = False,
    batch_varies: Annotated[
        bool,
        typer.Option(
            "--batch-varies",
            help="Requests side by side change each other's last digits: compare with four tries.",
        ),
    ] = False,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Two models at once do not fit in memory.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show pytest's output.")] = False,
) -> None:
    """Check that a handler keeps the contract, and report what it can do.

    Each check is skipped where it does not apply, with the reason. Needs the extra
    engineroom[testing].
    """
    from engineroom.testing.conformance.runner import Job, SelectionError, run_suite

    subject = _find(handler)
    options = parse_options(option or [])
    try:
        config = ModelConfig(
            model_id=model_id,
            source=model,
            options=options,
            runtime=getattr(subject.target, "name", None) if foreign else None,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CommandError(f"--{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    quiet = report is not None and str(report) == "-"
    varied = {"batch_invariant": not batch_varies, "exclusive": exclusive}
    job = Job(subject.make, config, {"timeout_s": timeout, **varied})
    try:
        results = run_suite(job, select, verbose=verbose and not quiet)
    except SelectionError as error:
        raise CommandError(error.message) from error
    facts = _report(handler, subject, config, results)
    if quiet:
        write_json(facts)
    else:
        _show(facts)
    if report is not None and not quiet:
        try:
            report.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise CommandError(
                f"--json {str(report)!r} cannot be written: {error.strerror}", EXIT_FAILED
            ) from error
    if facts["summary"]["failed"]:
        raise typer.Exit(EXIT_FAILED)


def _find(name: str) -> _Subject:
    """The handler that is named.

    :raises CommandError: it cannot be found.
    """
    records = [record for record in installed_plugins() if record.group == HANDLER_GROUP]
    module, colon, path = name.partition(":")
    if not colon:
        for record in records:
            if record.name == name and record.entry_point is not None:
                return _Subject(_imported(name, record.entry_point.load), record)
        known = [record.name for record in records]
        raise CommandError(
            f"handler {name!r} is not installed (there is: {', '.join(known) or 'none'})"
            f"{did_you_mean(name, known)}; give one of them, or package.module:Class"
        )
    sys.path.insert(0, str(Path.cwd()))  # as with `python -m`

    def load() -> Any:
        target: Any = importlib.import_module(module)
        for part in path.split("."):
            target = getattr(target, part)
        return target

    target = _imported(name, load)
    return _Subject(target, next((r for r in records if r.value == name), None))


def _imported(name: str, load: Any) -> Any:
    try:
        target = load()
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise CommandError(f"handler {name!r} cannot be imported: {words(error)}") from error
    if not callable(target) and not isinstance(target, InferenceHandler):
        raise CommandError(f"{name!r} is {type(target).__name__}, not a handler's class")
    return target


def _report(
    name: str, subject: _Subject, config: ModelConfig, results: list[Any]
) -> dict[str, Any]:
    from engineroom.testing.conformance.rules import RULES, rule_page

    target = subject.target
    owner = target if isinstance(target, type) else type(target)
    counts = Counter(result.outcome for result in results)
    return {
        "handler": {
            "given": name,
            "name": getattr(target, "name", None),
            "class": f"{owner.__module__}:{owner.__qualname__}",
            "api_version": getattr(target, "api_version", None),
            "distribution": subject.record.distribution if subject.record else None,
            "version": subject.record.version if subject.record else None,
        },
        "versions": {
            "engineroom": version("engineroom"),
            "python": platform.python_version(),
            "pytest": version("pytest"),
            "platform": platform.platform(),
        },
        "model": {"model_id": config.model_id, "source": config.source, "options": config.options},
        "capabilities": _capabilities(subject),
        "summary": {name: counts[name] for name in ("passed", "failed", "skipped")},
        "checks": [
            {
                "check": result.check,
                "title": RULES[result.check].title,
                "outcome": result.outcome,
                "reason": result.reason,
                "rule": rule_page(result.check),
                "duration_s": round(result.duration_s, 3),
            }
            for result in results
        ],
    }


def _capabilities(subject: _Subject) -> dict[str, Any] | None:
    try:
        capabilities = asdict(effective_capabilities(subject.make()))
    except BaseException as error:
        if is_interrupt(error):
            raise
        return None  # the checks have told why
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in capabilities.items()
    }


def _show(facts: dict[str, Any]) -> None:
    """The table, what is broken in full, and the sum."""
    checks = facts["checks"]
    rows = [(c["check"], c["outcome"], _brief(c)) for c in checks]
    if not (sys.stdout.isatty() and _show_in_colour(rows)):
        write(table(("check", "result", "reason"), rows))
    for check in checks:
        if check["outcome"] == "failed":
            write(f"\n{check['check']}: {check['reason']}\n")
    counted = ", ".join(f"{count} {name}" for name, count in facts["summary"].items())
    write(f"\n{facts['handler']['name'] or facts['handler']['given']}: {counted}\n")


def _show_in_colour(rows: list[tuple[str, str, str]]) -> bool:
    """Whether rich is installed, which shows the rows."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    shown = Table(box=None, pad_edge=False)
    for header in ("check", "result", "reason"):
        shown.add_column(header.upper(), no_wrap=header != "reason")
    for name, outcome, reason in rows:
        shown.add_row(
            Text(printable(name)),
            Text(outcome, style=_STYLES[outcome]),
            Text(printable_lines(reason)),
        )
    Console().print(shown)
    return True


def _brief(check: dict[str, Any]) -> str:
    """A reason on one line: what was seen, where a rule is broken."""
    lines = [line.strip() for line in str(check["reason"]).splitlines()]
    saw = next((line.removeprefix("saw:").strip() for line in lines if line.startswith("saw:")), "")
    return saw or (lines[0] if lines else "")
