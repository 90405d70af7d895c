"""What this machine gives the process: cores, memory, devices. No runtime is imported."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "Cpu",
    "Device",
    "Limits",
    "Memory",
    "cgroup_limits",
    "cgroup_used",
    "cpu",
    "devices",
    "memory",
]

_NVIDIA_SMI_TIMEOUT_S: Final = 5.0
_QUERY: Final = "index,name,memory.total,memory.free,driver_version"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control group allows; ``None``: no limit."""

    cpus: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Cpu:
    """:param usable: cores that the process may run on. :param limit: their time, in cores."""

    present: int | None
    usable: int
    limit: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """:param limit: what the control group allows."""

    total: int
    available: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator."""

    name: str
    description: str
    memory_total: int | None = None
    memory_free: int | None = None
    driver: str | None = None


def cpu(limits: Limits) -> Cpu:
    """The processor."""
    try:
        usable = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # only Linux can tell
        usable = os.cpu_count() or 1
    return Cpu(os.cpu_count(), usable, limits.cpus)


def memory(limits: Limits) -> Memory:
    """The main memory."""
    import psutil

    main, limit = psutil.virtual_memory(), limits.memory_bytes
    if limit is not None and limit >= main.total:
        limit = None
    return Memory(main.total, main.available, limit)


def devices() -> tuple[list[Device], str | None]:
    """Accelerators, and what kept them from being listed."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return [Device("metal", "Apple GPU; shares the main memory")], None
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program with fixed arguments
            [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_NVIDIA_SMI_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi failed: {type(error).__name__}: {error}"
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        return [], f"nvidia-smi failed with status {done.returncode}: {said or 'it said nothing'}"
    return [d for line in done.stdout.splitlines() if (d := _device(line)) is not None], None


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Limits:
    """The strictest limits of the process's control group and those above it (Linux)."""
    cpus: list[float] = []
    memories: list[int] = []
    for controllers, folder in _groups(root, membership):
        if controllers == "":  # version 2
            cpus += _quota(_words(folder / "cpu.max"))
            memories += _bytes(_words(folder / "memory.max"))
        elif controllers == "cpu":
            cpus += _quota(
                [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
            )
        else:
            memories += _bytes(_words(folder / "memory.limit_in_bytes"))
    return Limits(min(cpus, default=None), min(memories, default=None))


def cgroup_used(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes that the strictest limited control group has in use, without what it can drop."""
    groups: list[tuple[int, int]] = []
    for controllers, folder in _groups(root, membership):
        version2 = controllers == ""
        limit = _bytes(_words(folder / ("memory.max" if version2 else "memory.limit_in_bytes")))
        usage = _bytes(_words(folder / ("memory.current" if version2 else "memory.usage_in_bytes")))
        if limit and usage and controllers != "cpu":
            words = _words(folder / "memory.stat")
            statistics = dict(zip(words[::2], words[1::2], strict=False))
            name = "inactive_file" if version2 else "total_inactive_file"
            cached = _bytes([statistics.get(name, "")])
            groups.append((limit[0], max(0, usage[0] - sum(cached))))
    return min(groups, default=(0, 0))[1]


def _groups(root: Path, membership: Path) -> Iterator[tuple[str, Path]]:
    """Each controller (empty: version 2) and the folder of each group, from the inside out."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            if controllers == "":
                yield "", root.joinpath(*parts[:depth])
            elif "cpu" in controllers.split(","):
                yield "cpu", root.joinpath("cpu", *parts[:depth])
            elif controllers == "memory":
                yield "memory", root.joinpath("memory", *parts[:depth])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _quota(words: list[str]) -> list[float]:
    if len(words) != 2 or not all(word.isdecimal() for word in words) or words[1] == "0":
        return []  # "max", or -1 in version 1: no limit
    return [int(words[0]) / int(words[1])]


def _bytes(words: list[str]) -> list[int]:
    # Version 1 says "no limit" with a number that no machine has.
    return [int(w) for w in words[:1] if w.isdecimal() and int(w) < 1 << 62]


def _device(line: str) -> Device | None:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 5:
        return None
    index, name, total, free, driver = fields

    def mebibytes(text: str) -> int | None:
        return int(text) << 20 if text.isdecimal() else None  # "[N/A]" on shared memory

    return Device(f"cuda:{index}", name, mebibytes(total), mebibytes(free), driver)
