"""How much memory there is, and how much this process takes of it. Every call here blocks.

The main memory is asked of psutil and of the control group (Linux); NVIDIA GPUs are asked through
NVML where ``nvidia-ml-py`` is installed (``engineroom[nvidia]``), else through ``nvidia-smi``.
What cannot be found out is left out: a device that is not known has no bound.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from engineroom.border import get_logger
from engineroom.memory.machine import cgroup_limits, cgroup_used, devices

__all__ = ["MachineProbe", "MemoryProbe", "give_back_memory"]

logger = get_logger("engineroom.meter")

KEPT_SHARE: Final = 0.05
"""Of what is free, the part that a detected budget leaves to everything else."""


class MemoryProbe(Protocol):
    """What the manager asks about memory; it asks from a worker thread."""

    def capacity(self, device: str) -> int | None:
        """Bytes that models may take on the device; ``None``: that cannot be told."""

    def used(self, devices: Iterable[str], without: Collection[int] = ()) -> dict[str, int]:
        """Bytes that this process (or, of a GPU, everybody) uses now.

        Devices that cannot be measured are left out.

        :param without: ids of child processes whose main memory does not count.
        """


class MachineProbe:
    """Measures this machine.

    :param cgroup_root: where control groups are mounted.
    :param membership: the file that says which one the process is in.
    """

    def __init__(
        self,
        cgroup_root: Path = Path("/sys/fs/cgroup"),
        membership: Path = Path("/proc/self/cgroup"),
    ) -> None:
        self._cgroup = (cgroup_root, membership)

    def capacity(self, device: str) -> int | None:
        """What is free now, or the control group still allows, less a twentieth."""
        gpu = None if device == "cpu" else _gpu(device)
        free = self._main_memory() if device == "cpu" else gpu and gpu[0]
        return None if free is None else int(free * (1 - KEPT_SHARE))

    def used(self, devices: Iterable[str], without: Collection[int] = ()) -> dict[str, int]:
        """Of ``cpu`` what this process and its children have resident; of a GPU what all use."""
        used = {}
        for device in devices:
            gpu = None if device == "cpu" else _gpu(device)
            amount = _resident(without) if device == "cpu" else gpu and gpu[1]
            if amount is not None:
                used[device] = amount
        return used

    def _main_memory(self) -> int | None:
        import psutil

        try:
            free = int(psutil.virtual_memory().available)
        except (OSError, psutil.Error):
            logger.debug("the main memory cannot be measured", exc_info=True)
            return None
        limit = cgroup_limits(*self._cgroup).memory_bytes
        if limit is not None:
            free = min(free, max(0, limit - cgroup_used(*self._cgroup)))
        return free


def _resident(without: Collection[int]) -> int | None:
    import psutil

    try:
        process = psutil.Process()
        total = int(process.memory_info().rss)
        children = process.children(recursive=True)
    except (OSError, psutil.Error):
        logger.debug("the process's memory cannot be measured", exc_info=True)
        return None
    for child in children:
        if child.pid in without:
            continue
        try:
            total += int(child.memory_info().rss)
        except (OSError, psutil.Error):  # it has ended since
            continue
    return total


def _gpu(device: str) -> tuple[int, int] | None:
    """Free and used bytes of ``cuda:N``."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        return None
    name, shown = (
        number,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )  # by any of CUDA's names; unset: all
    if shown is not None:
        visible = [part.strip() for part in shown.split(",") if part.strip()]
        name = visible[int(number)] if int(number) < len(visible) else ""
    if not name:
        return None
    with _nvml() as nvml:
        if nvml is not None:
            return _ask_nvml(nvml, name)
    for gpu in devices()[0]:
        total, free = gpu.memory_total, gpu.memory_free
        if gpu.name == f"cuda:{name}" and total is not None and free is not None:
            return free, total - free
    return None


@contextmanager
def _nvml() -> Iterator[Any]:
    """The library, ready to be asked; ``None``: it is not installed, or there is no driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        logger.debug("NVML cannot be used", exc_info=True)
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _ask_nvml(nvml: Any, name: str) -> tuple[int, int] | None:
    try:
        if name.isdecimal():
            handle = nvml.nvmlDeviceGetHandleByIndex(int(name))
        else:
            handle = nvml.nvmlDeviceGetHandleByUUID(name)
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:
        logger.debug("GPU %s cannot be measured", name, exc_info=True)
        return None
    return int(info.free), int(info.used)


def give_back_memory() -> None:
    """Ask the C library to return freed memory to the system, where it can (glibc)."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
