"""Where the threads of this process are, seen from one of them.

``sys._current_frames`` and ``f_back`` are not safe for that: on Python 3.11, a thread that goes
from frame to frame while the other one runs can end the process, as those who made profilers so
have found (getsentry/sentry-python#2386, DataDog/dd-trace-py#13567). What is written by
``faulthandler`` makes no frame objects, and all threads stand still meanwhile.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import tempfile
from itertools import dropwhile
from pathlib import PurePath
from typing import IO, Final, NamedTuple, Self

__all__ = ["Call", "StackReader", "stacks"]

_THREAD: Final = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_CALL: Final = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')


class Call(NamedTuple):
    """A place in a thread's calls: a file, a line (0: not known), a function's own name."""

    file: str
    line: int
    function: str

    @property
    def module(self) -> str:
        """The name of the module; where none that is imported has the file, its last part."""
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) == self.file:
                return name
        return PurePath(self.file).stem

    def __str__(self) -> str:
        return f"{self.module}:{self.line or '?'} {self.function}"


class StackReader:
    """Sees what each thread is in, at one moment, again and again; close it in the end.

    Its file is opened before: between a moment of interest and the look, nothing is done in which
    another thread could run on. For one thread alone.
    """

    def __init__(self) -> None:
        try:
            self._file: IO[bytes] | None = _file()
        except OSError:  # no more files, or no room: nothing is seen
            self._file = None

    def look(self) -> None:
        """Note what each thread is in. No other thread runs meanwhile."""
        if self._file is not None:
            faulthandler.dump_traceback(self._file, all_threads=True)

    def read(self) -> dict[int, list[Call]]:
        """The calls of each thread in the last look, by :func:`threading.get_ident`.

        The innermost come first; those of this module are left out. 100 threads are told of at
        most, and 100 calls of each. Empty, where no file could be written.
        """
        if self._file is None:
            return {}
        try:
            self._file.seek(0)
            text = self._file.read().decode("ascii", "backslashreplace")
            self._file.seek(0)
            self._file.truncate()
        except OSError:
            return {}
        threads: dict[int, list[Call]] = {}
        calls: list[Call] = []
        for line in text.splitlines():
            if thread := _THREAD.match(line):
                calls = threads.setdefault(int(thread[1], 16), [])
            elif call := _CALL.match(line):
                calls.append(Call(call[1], int(call[2]) if call[2].isdecimal() else 0, call[3]))
        for ident, calls in threads.items():
            threads[ident] = list(dropwhile(lambda call: call.file == __file__, calls))
        return threads

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stacks() -> dict[int, list[Call]]:
    """The calls of each thread now, as :meth:`StackReader.read` tells them."""
    with StackReader() as reader:
        reader.look()
        return reader.read()


def _file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stacks"), "w+b", buffering=0)  # noqa: PTH123 - it has no path
    return tempfile.TemporaryFile(buffering=0)
