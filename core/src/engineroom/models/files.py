"""The files of a model on this machine, and whether somebody writes to them while it is loaded.

Runtimes map files into memory, and a page of one is read when it is first used, or used again after
a while. To put another file in the place of one (by renaming) leaves the model as it is. To write
into the file changes the model under its requests, and to cut it short ends the process (SIGBUS):
no code can catch that. So it is at least told in the log, before or after.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from engineroom.border import get_logger
from engineroom.errors import EngineRoomError
from engineroom.sources.gguf import gguf_part_paths
from engineroom.sources.source import PathSource, parse_source

__all__ = ["FileStamp", "FileWatch", "file_stamps", "overwritten"]

logger = get_logger("engineroom.loading")

_MOST_FILES: Final = 1000
_LOOK_S: Final = 15.0


class FileStamp(NamedTuple):
    """A file at one time; equal as long as nobody writes to it."""

    name: str
    inode: int
    size: int
    written_ns: int


def file_stamps(source: str | None) -> tuple[FileStamp, ...]:
    """The files that a source on this machine stands for. Blocks.

    Of a source that is not a path there are none, nor where one of the files is gone.
    """
    if source is None:
        return ()
    try:
        parsed = parse_source(source)
        if not isinstance(parsed, PathSource):
            return ()
        path = parsed.path
        if not path.is_dir():
            return tuple(_stamp(part) for part in gguf_part_paths(path))
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())[:_MOST_FILES]
        return tuple(_stamp(path / name) for name in names)
    except (EngineRoomError, OSError):  # a source of a runtime's own, or gone
        return ()


def _stamp(path: Path) -> FileStamp:
    facts = path.stat()
    return FileStamp(path.name, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def overwritten(before: tuple[FileStamp, ...], after: tuple[FileStamp, ...]) -> list[str]:
    """Names of files that were written into, rather than replaced by others.

    :param before: how they were.
    :param after: how they are.
    """
    known = {(stamp.name, stamp.inode): stamp for stamp in before}
    return [s.name for s in after if known.get((s.name, s.inode), s) != s]


@dataclass(slots=True, eq=False)
class FileWatch:
    """Looks at the files of a loaded model now and then. Belongs to the event loop.

    :param stamps: its files as they were loaded.
    """

    model_id: str
    source: str | None
    stamps: tuple[FileStamp, ...]
    _timer: asyncio.TimerHandle | None = field(default=None, init=False)

    def start(self) -> None:
        """Look from time to time, if there are files."""
        if self.stamps:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def stop(self) -> None:
        """The model is no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(None, file_stamps, self.source)
        looking.add_done_callback(self._compare)

    def _compare(self, looking: asyncio.Future[tuple[FileStamp, ...]]) -> None:
        if self._timer is None or looking.cancelled() or looking.exception() is not None:
            return
        seen = looking.result()
        for name in overwritten(self.stamps, seen):
            logger.warning(
                "model %r: somebody has written to its file %s while it is loaded. What it answers "
                "may be wrong from now on, and if the file is shorter now, the process may end "
                "(SIGBUS). Load the model anew, and replace its files by renaming others over them",
                self.model_id,
                name,
            )
        self.stamps = seen or self.stamps
        self.start()
