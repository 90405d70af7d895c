"""The first load of a file happens in a process of its own, which llama.cpp may end.

The header's checks (:mod:`.metadata`) know what all architectures have in common. There are more
than a hundred, and each asserts things of its own; an assertion that fails ends the process. So
the model, its context and its vocabulary are made once where nothing is lost, without reading the
weights. That a file stood the trial is noted in the cache folder, for as long as it stays as it is.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

from engineroom import ConfigurationError, EngineRoomError
from engineroom_llamacpp.cache_folder import cache_folder, fingerprint

__all__ = ["stand_trial"]

logger = logging.getLogger("engineroom.llamacpp")

_TIMEOUT_S: Final = 300.0
"""A trial takes a second; a vocabulary that catches llama.cpp in a loop takes for ever."""
_CODE: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from engineroom_llamacpp.trial import attempt; attempt(sys.argv[2])"
)
_TOKENS: Final = 64
_FAR: Final = (0xE000, 0xF000, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)
_MOST_BYTES: Final = 4 << 30
"""Of memory, for a trial, which takes some hundred MiB: no weights are read."""
_WATCH_S: Final = 0.05
_TOO_MUCH: Final = 70


def stand_trial(path: Path) -> None:
    """Try the file where nothing is lost, unless that was done before. Blocks.

    What llama.cpp refuses in words is left to the load itself.

    :raises ConfigurationError: the file ended the process.
    """
    if not sys.executable or getattr(sys, "frozen", False):  # inside of another program
        logger.debug("%s: no trial, since there is no Python to start", path)
        return
    note = cache_folder() / "trials" / fingerprint(path)
    if note.is_file():
        return
    try:
        process = subprocess.run(  # noqa: S603 - this Python, and a path as an argument
            [sys.executable, "-c", _CODE, json.dumps(sys.path), os.fspath(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(
            f"{str(path)!r} was not loaded in {_TIMEOUT_S:g} s: llama.cpp did not come to an end "
            "with its header; the file is damaged or hostile"
        ) from error
    if process.returncode == 0:
        _note(note)
        return
    lines = process.stderr.decode("utf-8", "replace").splitlines()
    why = next((line for line in lines if "ASSERT" in line), lines[-1] if lines else "")
    raise ConfigurationError(
        f"{str(path)!r} cannot be loaded: llama.cpp ended the process in which it was tried "
        f"(status {process.returncode}: {why.rpartition('/')[2][:200] or 'it does not say why'}); "
        "the file is damaged, or made for another version; download it again"
    )


def _note(note: Path) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError as error:
        logger.debug("the trial cannot be noted in %s, and is repeated: %s", note.parent, error)


def attempt(path: str) -> str | None:
    """Make model, context and vocabulary without weights; in the process that this may end.

    :returns: why llama.cpp or this runtime refuses the file in words, if so.
    """
    _quietly()
    _watch_memory()
    from engineroom_llamacpp.context import LlamaContext
    from engineroom_llamacpp.embedding import EmbeddingContext
    from engineroom_llamacpp.metadata import read_header
    from engineroom_llamacpp.model import LlamaModel
    from engineroom_llamacpp.options import LlamaCppOptions
    from engineroom_llamacpp.sizes import is_encoder, pooling_of

    options = LlamaCppOptions(n_ctx=_TOKENS, n_parallel=1, n_threads=1, n_gpu_layers=0)
    try:
        header = read_header(Path(path))
        pooling = pooling_of(header)
        model = LlamaModel(Path(path), options, weights=False)
        if not is_encoder(header):
            LlamaContext(model, options)
        if pooling is not None:
            EmbeddingContext(model, options, pooling, 1)
    except EngineRoomError as error:  # the load itself comes to it, and tells it
        return error.message
    # Every character of one byte, and every byte that one of several begins with.
    beginnings = (*range(0x100, 0x800, 0x40), *range(0x800, 0xD800, 0x400), *_FAR)
    for character in map(chr, (*range(0x100), *beginnings)):
        model.tokenize(f"a{character} b")
    for token in range(model.n_vocab):
        model.piece(token)
        model.token_bytes(token)
    return None


def _watch_memory() -> None:
    """End this process when it takes too much; a limit of the system's would count addresses, of
    which libraries for GPUs reserve far more than there is memory.
    """
    import psutil

    process = psutil.Process()

    def watch() -> None:
        while process.memory_info().rss < _MOST_BYTES:
            time.sleep(_WATCH_S)
        os.write(2, f"\nit took more than {_MOST_BYTES >> 20} MiB of memory\n".encode())
        os._exit(_TOO_MUCH)

    threading.Thread(target=watch, name="memory", daemon=True).start()


def _quietly() -> None:
    """Leave no core file and no window of the system's behind."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002)
    else:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
