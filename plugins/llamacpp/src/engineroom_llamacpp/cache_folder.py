"""Where the runtime keeps what it makes, and how a file is told from every other one."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Final

from engineroom.sources import gguf_part_paths

__all__ = ["CACHE_VARIABLE", "cache_folder", "fingerprint"]

CACHE_VARIABLE: Final = "ENGINEROOM_CACHE"
_SAMPLE: Final = 1 << 18
_SAMPLES: Final = 16


def cache_folder() -> Path:
    """The runtime's folder, in the one that ``ENGINEROOM_CACHE`` names or in the user's; it need
    not be there yet.
    """
    import platformdirs

    chosen = os.environ.get(CACHE_VARIABLE)
    base = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("engineroom")
    return base / "llamacpp"


def fingerprint(path: Path) -> str:
    """24 digits for the model's file or files as they are now, and this build of llama.cpp.

    Of path, size, times, inode, and 16 samples of 256 KiB each: a file that changes has another.

    :raises OSError: it cannot be read.
    """
    digest = hashlib.sha256(version("llama-cpp-python").encode())
    for part in gguf_part_paths(path):
        stat = part.stat()
        known = (part.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        digest.update("\0".join(map(str, known)).encode("utf-8", "surrogateescape"))
        with part.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(0, stat.st_size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:24]
