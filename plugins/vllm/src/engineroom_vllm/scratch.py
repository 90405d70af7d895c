"""A place of an engine's own for its log, its sockets and its temporary files, gone with it.

vLLM makes Unix sockets and files in the folder for temporary files and leaves them there. Its
processes are given folders of ours instead, which nobody else may enter.

Who holds a folder holds a lock on it, which the system takes away from a process that ends, however
it ends. A folder that can be locked belongs to nobody any more: the next engine removes it.
"""

from __future__ import annotations

import fcntl
import getpass
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from engineroom import ResourceNotAvailableError

__all__ = ["SEGMENTS", "Scratch", "remove_abandoned"]

logger = logging.getLogger("engineroom.vllm")

SEGMENTS: Final = "SEGMENTS_OF_ENGINE"
"""The variable that says how names of an engine's shared memory begin, without the slash."""
_PREFIX: Final = "engineroom-vllm."
_MOST_BYTES: Final = 103
"""Of a Unix socket's path, where it is least (macOS; Linux takes 107)."""
_NAME_BYTES: Final = len("/01234567-89ab-cdef-0123-456789abcdef")
"""What vLLM appends to the folder of its sockets."""
_SOCKETS: Final = "VLLM_RPC_BASE_PATH"
_COMPILED: Final = "TORCHINDUCTOR_CACHE_DIR"


class Scratch:
    """Folders of one engine.

    :param socket_bases: where the folder for sockets may be, if its path is too long otherwise.
    :raises ResourceNotAvailableError: there is no place for them; says what to do.
    """

    def __init__(self, socket_bases: Iterable[str] = ("/tmp", "/var/tmp")) -> None:  # noqa: S108
        self._owned: list[_Owned] = []
        try:
            temporary = tempfile.gettempdir()
            self.folder = self._own(temporary)
            """For what this process writes."""
            self.segments = f"psm_{self.folder.name.removeprefix(_PREFIX)}_"
            """How names of shared memory of the engine's forked processes begin."""
            self.temporary = self.folder / "t"
            """For what the engine's processes write; may be removed before the rest."""
            self.temporary.mkdir(mode=0o700)
            self.sockets = self._sockets(os.environ.get(_SOCKETS), socket_bases)
            """For the engine's sockets; the same, if its path is short enough."""
        except OSError as error:
            self.close()
            raise ResourceNotAvailableError(
                f"no folder can be made for an engine's temporary files: {error}; make room "
                "there, or set TMPDIR to another one"
            ) from error
        except BaseException:
            self.close()
            raise

    def _own(self, base: str) -> Path:
        remove_abandoned(Path(base))
        self._owned.append(_Owned(base))
        return self._owned[-1].path

    def _sockets(self, asked: str | None, bases: Iterable[str]) -> Path:
        if asked is None and _short(self.temporary):
            return self.temporary
        for base in (*([] if asked is None else [asked]), *bases):
            if _short(Path(base, f"{_PREFIX}{'x' * 8}")) and os.access(base, os.W_OK | os.X_OK):
                return self._own(base)
        raise ResourceNotAvailableError(
            f"the paths of an engine's sockets may have {_MOST_BYTES} bytes, and would have more "
            f"in {asked or tempfile.gettempdir()}; set {_SOCKETS} to a folder whose path has at "
            f"most {_MOST_BYTES - _NAME_BYTES - len(_PREFIX) - 9} bytes"
        )

    def variables(self, *, elsewhere: bool = False) -> dict[str, str]:
        """Environment variables that make the engine's processes use them.

        :param elsewhere: variables of vLLM's own go on to other machines, too, where no such
            folder is.
        """
        variables = {"TMPDIR": str(self.temporary), SEGMENTS: self.segments}
        if not elsewhere:
            variables[_SOCKETS] = str(self.sockets)
        if _COMPILED not in os.environ:
            # Torch's own choice, which would else go with the engine.
            name = f"torchinductor_{_user()}"
            variables[_COMPILED] = str(Path(tempfile.gettempdir(), name))
        return variables

    def close(self) -> None:
        """Remove them with all that is in them. Harmless when done twice."""
        while self._owned:
            self._owned.pop().close()


class _Owned:
    """A new folder that is locked as long as this process wants it."""

    def __init__(self, base: str) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _locked(self._lock, self.path):
                    return
            except OSError as error:  # a file system without locks: nobody takes it for abandoned
                logger.debug("%s cannot be locked: %s", self.path, error)
                return
            os.close(self._lock)  # taken for abandoned before it was locked

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(base: Path) -> None:
    """Remove folders whose owners were killed. Those of other users are left alone."""
    for path in base.glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone since, another user's, or no folder
            continue
        try:
            if os.fstat(fd).st_uid == os.getuid() and _locked(fd, path):
                logger.debug("%s was left behind by a process that was killed", path)
                shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            logger.debug("%s cannot be locked: %s", path, error)
        finally:
            os.close(fd)


def _locked(fd: int, path: Path) -> bool:
    """Lock a folder.

    :returns: whether it is ours now, and still where it was.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False))
    except (BlockingIOError, FileNotFoundError):
        return False


def _short(folder: Path) -> bool:
    return len(os.fsencode(folder)) + _NAME_BYTES <= _MOST_BYTES


def _user() -> str:
    try:
        return getpass.getuser().replace("/", "_")
    except (KeyError, ModuleNotFoundError, OSError):  # no name: some containers
        return f"uid_{os.getuid()}"
