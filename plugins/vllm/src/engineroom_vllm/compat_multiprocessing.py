"""What relies on how ``multiprocessing`` works inside: handles of processes, trackers, names.

Its own fork server belongs to the program and cannot be ended, and its children get the server's
environment; so there is another one here (:mod:`.forkserver`), which needs what only is meant for
``multiprocessing`` itself.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from io import BytesIO
from multiprocessing import (
    context,
    forkserver,
    popen_forkserver,
    popen_spawn_posix,
    process,
    reduction,
    resource_tracker,
    shared_memory,
    util,
)
from typing import Any, Final

__all__ = [
    "BELOW",
    "ForkedPopen",
    "adopt_tracker",
    "name_segments",
    "run_process",
    "spawn",
    "write_number",
]

BELOW: Final = "3.15"
"""The first version of Python for which nobody has read that what is used here still works so.

The distribution's ``requires-python`` has it as its upper bound. To lift it, read the new
``multiprocessing`` for the names in this module, and run the plugin's ``test_forkserver.py``.
"""


class ForkedPopen(popen_forkserver.Popen):
    """``multiprocessing``'s handle of a process that a server of ours forks."""

    _fds: list[int]

    @abstractmethod
    def ask(self, fds: Sequence[int]) -> tuple[int, int]:
        """Ask for a process that gets these file descriptors.

        :returns: a file to read its process id and its exit code from, and one to write what it is
            to do to.
        """

    @abstractmethod
    def preamble(self) -> bytes:
        """What the new process is to read before what it is to do."""

    def _launch(self, process_obj: process.BaseProcess) -> None:
        data = BytesIO(self.preamble())
        data.seek(0, os.SEEK_END)
        context.set_spawning_popen(self)
        try:
            reduction.dump(process_obj, data)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, to_child = self.ask(self._fds)
        # The child's sentinel of its parent: it sees when this end is closed.
        kept = os.dup(to_child)
        self.finalizer = util.Finalize(self, _close, (kept, self.sentinel))
        with os.fdopen(to_child, "wb") as pipe:
            pipe.write(data.getbuffer())
        try:
            self.pid = forkserver.read_signed(self.sentinel)
        except EOFError as error:
            raise OSError("the process that starts vLLM's processes has ended") from error


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def spawn(process_obj: process.BaseProcess) -> Any:
    """Start a process as ``multiprocessing`` does by itself; its handle."""
    return popen_spawn_posix.Popen(process_obj)


def run_process(process_obj: process.BaseProcess, sentinel: int) -> int:
    """Do what a process is for, in the process that was forked for it; its exit code.

    :param sentinel: a file that is closed when the parent ends.
    """
    running: Any = process_obj
    code: int = running._bootstrap(sentinel)
    return code


def write_number(file: int, number: int) -> None:
    """Write what the handle reads: a process id, or an exit code."""
    forkserver.write_signed(file, number)


def adopt_tracker(file: int) -> None:
    """Leave segments of shared memory to the tracker of the program, over a file of its."""
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = file


def name_segments(prefix: str) -> None:
    """Let names of Python's shared memory begin so in this process: they tell whose it is."""
    if prefix and hasattr(shared_memory, "_SHM_NAME_PREFIX"):
        naming: Any = shared_memory
        naming._SHM_NAME_PREFIX = f"/{prefix}"
        naming._SHM_SAFE_NAME_LENGTH = len(naming._SHM_NAME_PREFIX) + 8
