"""What relies on how ``multiprocessing`` works inside: handles of processes, trackers, names."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from io import BytesIO
from multiprocessing import (
    context,
    forkserver,
    popen_forkserver,
    process,
    reduction,
    resource_tracker,
    shared_memory,
    util,
)
from typing import Any, BinaryIO, ClassVar, Final

__all__ = [
    "BELOW",
    "ForkedContext",
    "adopt_tracker",
    "bootstrap",
    "name_segments",
    "write_number",
]

BELOW: Final = "3.15"
"""The first version of Python for which nobody has read that what is used here still works so.

The distribution's ``requires-python`` has it as its upper bound. To lift it, read the new
``multiprocessing`` for the names in this module, and run the plugin's ``test_forkserver.py``.
"""


class _ReceivedFd:
    """A file descriptor that goes to a new process beside its arguments."""

    received: ClassVar[Sequence[int]] = ()

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        return self.received[self._place]


class _Popen(popen_forkserver.Popen):
    """``multiprocessing``'s handle of a process that a server forks."""

    DupFd: ClassVar[Any] = _ReceivedFd
    _fds: list[int]

    def _launch(self, process_obj: process.BaseProcess) -> None:
        data = BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(process_obj, data)
        finally:
            context.set_spawning_popen(None)
        assert ForkedContext.fork is not None
        self.sentinel = ForkedContext.fork(data.getvalue(), self._fds)
        self.finalizer = util.Finalize(self, os.close, (self.sentinel,))
        try:
            self.pid = forkserver.read_signed(self.sentinel)
        except EOFError as error:
            raise OSError("the process that starts vLLM's processes has ended") from error


class _ForkedProcess(process.BaseProcess):
    _start_method: ClassVar[str] = "spawn"

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _Popen:  # noqa: N802
        return _Popen(process_obj)


class ForkedContext(context.BaseContext):
    """``multiprocessing``'s context whose processes are forked by a server."""

    _name = "spawn"
    Process = _ForkedProcess
    fork: ClassVar[Callable[[bytes, Sequence[int]], int] | None] = None
    """Has a process forked that gets a pickled process and file descriptors. Returns a file to read
    its process id and its exit code from; the new process sees when that is closed."""


def bootstrap(pipe: BinaryIO, fds: Sequence[int]) -> Callable[[int], int]:
    """Unpickle a process, in the one that was forked for it.

    :returns: does what it is for, and returns its exit code; takes a file that is closed when the
        parent ends.
    """
    _ReceivedFd.received = fds
    process_obj: Any = pickle.load(pipe)  # noqa: S301 - over a socket that only the program has
    run: Callable[[int], int] = process_obj._bootstrap
    return run


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
