"""What an engine has outside of this process: its processes, its shared memory and its files.

vLLM ends them itself where it can. Where one was killed, the others may live on and a segment
stays behind; who has looked at them while they ran can end and remove them. Files and sockets stay
behind always.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Final

import psutil

__all__ = ["Footprint"]

logger = logging.getLogger("engineroom.vllm")

_SEGMENT: Final = re.compile(r"\s(/dev/shm/(?:psm_|vllm|VLLM)[^\s]*)(?: \(deleted\))?$")
"""Segments of Python's ``shared_memory`` and of vLLM's own, in ``/proc/<pid>/maps``."""
_PYTHONS: Final = "psm_"
_SHARED: Final = Path("/dev/shm")  # noqa: S108 - where the system has shared memory


class Footprint:
    """The processes of one engine, and the shared memory that they have mapped.

    :param roots: the processes that this process has started; their descendants count as well.
    :param folders: where the engine's own files are.
    :param segments: how names of shared memory begin that is the engine's, whoever has it mapped.
    """

    def __init__(
        self, roots: Iterable[int] = (), folders: Iterable[Path] = (), segments: str = ""
    ) -> None:
        self._folders = tuple(folders)
        self._prefix = segments
        self._processes: dict[int, psutil.Process] = {}
        self._segments: set[Path] = set()
        self._roots: tuple[int, ...] = ()
        self.look(roots)

    @property
    def roots(self) -> tuple[int, ...]:
        """The engine's own processes, without the workers that they have started."""
        return self._roots

    def look(self, roots: Iterable[int] = ()) -> None:
        """Note what there is now, in addition to what was there before.

        :param roots: processes that belong to it, too.
        """
        self._roots = tuple(dict.fromkeys((*self._roots, *roots)))
        for root in self._roots:
            try:
                process = psutil.Process(root)
                family = [process, *process.children(recursive=True)]
            except psutil.Error:
                continue
            for member in family:
                self._processes.setdefault(member.pid, member)
        for process in self._processes.values():
            self._segments |= _segments(process.pid)

    @property
    def memory_bytes(self) -> int:
        """Resident memory of all processes; what they share counts for each."""
        total = 0
        for process in self._processes.values():
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        return total

    def alive(self) -> list[psutil.Process]:
        """Those that still run. A process that took over the number of one is another."""
        return [p for p in self._processes.values() if _runs(p)]

    def remove(self, patience_s: float) -> int:
        """End what still runs after ``patience_s`` seconds; remove shared memory and files. Blocks.

        :returns: how many processes had to be killed.
        """
        left = self._wait(patience_s)
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        self._wait(5.0)
        if self._prefix:  # also of processes that ended before anybody looked
            self._segments |= set(_SHARED.glob(f"{self._prefix}*"))
        for segment in self._segments:
            try:
                segment.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("shared memory %s cannot be removed: %s", segment, error)
                continue
            if segment.name.startswith(_PYTHONS):
                # Else it would be missed, with a warning, when this process ends.
                resource_tracker.unregister(f"/{segment.name}", "shared_memory")
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        return len(left)

    def _wait(self, limit_s: float) -> list[psutil.Process]:
        # Not with psutil's wait: it would take the exit status, which multiprocessing waits for.
        end = time.monotonic() + limit_s
        while (left := self.alive()) and time.monotonic() < end:
            time.sleep(0.05)
        return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _segments(pid: int) -> set[Path]:
    """Segments that a process has mapped; none where there is no ``/proc``."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {Path(match[1]) for line in maps.splitlines() if (match := _SEGMENT.search(line))}
