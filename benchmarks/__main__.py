"""Measure the bars and print the table.

``python -m benchmarks`` measures all of them; ``python -m benchmarks core 4`` a group, and a bar
wherever it is; ``python -m benchmarks llamacpp:4`` that bar of that group alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib
import json
import os
import platform
import signal
import statistics
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import Bar, Measurement, Settings, Ticks, UnavailableError

GROUPS: Final = {
    "core": "benchmarks.core",
    "llamacpp": "benchmarks.llamacpp",
    "llamacpp_cache": "benchmarks.llamacpp_cache",
    "hf_transformers": "benchmarks.hf_transformers",
    "structured": "benchmarks.structured",
    "vllm": "benchmarks.vllm",
    "server": "benchmarks.server",
}
"""Name of a group → the module that has its bars in ``bar``."""

COLUMNS: Final = ("bar", "what", "target", "median", "min–max", "met", "rounds", "discarded")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Missed targets are no failure; a bar that breaks is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="group, number or group:number; none: all"
    )
    parser.add_argument("--rounds", type=int, default=0, help="pairs of each comparison (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--quick", action="store_true", help="less work, 3 rounds: to try it out")
    parser.add_argument("--llm-python", metavar="PATH", help="bar 14: Python with llm installed")
    options = parser.parse_args(arguments)
    with contextlib.suppress(ValueError):  # so that servers which were started end, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        bars = chosen(options.names)
    except LookupError as error:
        parser.error(error.args[0])
    rounds = options.rounds if options.rounds > 0 else (3 if options.quick else 5)
    settings = Settings(rounds, options.quick, options.llm_python)

    head = machine()
    before = Ticks.now()
    lines: list[tuple[int, Measurement]] = []
    missing: list[str] = []
    broken = False
    for each in bars:
        print(f"bar {each.number} …", file=sys.stderr, flush=True)
        try:
            for measurement in each.measure(settings):
                lines.append((each.number, measurement))
                print(f"  {measurement.what}: {measurement.median:.3g}", file=sys.stderr)
        except UnavailableError as error:
            missing.append(f"bar {each.number} was not measured: {error}")
        except KeyboardInterrupt:
            broken = True
            missing.append(f"bar {each.number} was interrupted, and those after it left out")
            break
        except Exception as error:  # noqa: BLE001 - the other bars are measured nevertheless
            broken = True
            missing.append(f"bar {each.number} failed: {type(error).__name__}: {error}")
    after = Ticks.now()
    stolen = after.stolen_since(before) if before and after else None
    head["steal"] = "not known" if stolen is None else f"{stolen:.2%} of the run"
    head["settings"] = f"{settings.rounds} rounds" + (", quick" if settings.quick else "")
    report(head, lines, missing)
    if options.json:
        rows = [as_json(number, measurement) for number, measurement in lines]
        content = {"machine": head, "bars": rows, "not_measured": missing}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        options.json.write_text(text, encoding="utf-8")
    return 1 if broken else 0


def chosen(names: Sequence[str]) -> list[Bar]:
    """The bars that the names stand for, in the order of their groups.

    :raises LookupError: a name is none of a group or bar.
    """
    available = {
        name: sorted(importlib.import_module(module).bar.all, key=lambda each: each.number)
        for name, module in GROUPS.items()
    }
    numbers = {str(each.number) for group in available.values() for each in group}
    both = {f"{name}:{each.number}" for name, group in available.items() for each in group}
    if unknown := [n for n in names if n not in {*available, *numbers, *both}]:
        known = ", ".join([*available, *sorted(numbers, key=int)])
        raise LookupError(f"there is no group or bar {unknown[0]!r}; there is: {known}")
    return [
        each
        for name, group in available.items()
        for each in group
        if not names or {name, str(each.number), f"{name}:{each.number}"} & {*names}
    ]


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
                break
    except OSError:
        pass
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    runtimes = dict.fromkeys(("llama-cpp-python", "torch", "transformers"), "not installed")
    for name in runtimes:
        with contextlib.suppress(PackageNotFoundError):
            runtimes[name] = version(name)
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{model}, {cores} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **runtimes,
    }


def report(
    head: dict[str, str], lines: Sequence[tuple[int, Measurement]], missing: Sequence[str]
) -> None:
    """Print everything."""
    for key, text in head.items():
        print(f"{key + ':':18}{text}")
    if lines:
        rows = [COLUMNS, *(as_row(number, measurement) for number, measurement in lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        print()
        for row in rows:
            print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    notes = [f"bar {n}, {m.what}: {m.note}" for n, m in lines if m.note]
    for text in (*notes, *missing):
        print()
        print(textwrap.fill(text, 100, subsequent_indent="  "))


def as_row(number: int, measurement: Measurement) -> tuple[str, ...]:
    """A measurement as the cells of the table."""
    values, unit = measurement.values, measurement.target.unit
    return (
        str(number),
        measurement.what,
        str(measurement.target),
        f"{measurement.median:.2f}{unit}",
        f"{min(values):.2f}–{max(values):.2f}",
        "yes" if measurement.met else "no",
        str(len(values)),
        str(measurement.discarded),
    )


def as_json(number: int, measurement: Measurement) -> dict[str, Any]:
    """A measurement with each of its values."""
    return {
        "bar": number,
        "what": measurement.what,
        "target": str(measurement.target),
        "median": statistics.median(measurement.values),
        "values": list(measurement.values),
        "discarded": measurement.discarded,
        "met": measurement.met,
        "note": measurement.note,
    }


if __name__ == "__main__":
    sys.exit(main())
