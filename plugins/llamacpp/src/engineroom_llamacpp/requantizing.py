"""Weights in another quantisation, made at the first load and kept in a cache folder.

Some quantisations have no kernel for this CPU that computes several requests at once (llama.cpp
calls it repacked): their prompts take several times as long. The option ``requantize`` has
llama.cpp make a copy in one that has. What the model answers changes, as its weights do.

A copy is named by all that tells its source from another file: path, size, times, inode and
samples of the content, and llama.cpp's build. A source that changes gets a copy of its own, and
the old one is deleted. Copies appear whole or not at all, one process makes each, and what a killed
one left is deleted by the next.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engineroom import ConfigurationError, ResourceNotAvailableError, default_threads
from engineroom.sources import GgufHeader, GgufTensor
from engineroom_llamacpp.cache_folder import CACHE_VARIABLE, cache_folder, fingerprint
from engineroom_llamacpp.library import last_error, load
from engineroom_llamacpp.metadata import read_header

if TYPE_CHECKING:
    from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["cached_copy", "hint", "requantized", "size_in"]

logger = logging.getLogger("engineroom.llamacpp")

_TARGETS: Final = {"q4_0": (2, 2, 18 / 32), "q8_0": (7, 8, 34 / 32)}
"""Name → llama.cpp's number of the file type, ggml's of the type, bytes of a value."""
_NAMES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 30: "BF16", 39: "MXFP4",
}  # fmt: skip
_ALWAYS_FAST: Final = frozenset({0, 1, 8, 30})
_FAST_WITH: Final = {
    "AVX2": frozenset({2, 12, 20, 39}),
    "AVX512": frozenset({10}),
    "DOTPROD": frozenset({2, 12, 13, 14, 20, 39}),
}
"""What ggml-cpu's ``repack.cpp`` has kernels for, by the processor's features."""
_PART: Final = ".part"
_SPARE: Final = 64 << 20
"""Bytes that are to stay free on the disk."""


def _copy_of(path: Path, target: str) -> Path:
    """Where the copy belongs that stands for the file as it is now."""
    return cache_folder() / f"{_family(path.resolve())}{fingerprint(path)}.{target}.gguf"


def _family(path: Path) -> str:
    """How the names of all copies of a file begin."""
    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in path.stem)
    return f"{stem[:80]}-{place}-"


def _is_already(header: GgufHeader, target: str) -> bool:
    return _main_type(header) == _TARGETS[target][1]


def _main_type(header: GgufHeader) -> int:
    """The type that most of the weights' bytes are of."""
    sizes: Counter[int] = Counter()
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.kind] += tensor.size
    return sizes.most_common(1)[0][0] if sizes else 0


def size_in(target: str, tensor: GgufTensor) -> int:
    """About as many bytes as the tensor will have; the output layer gets more than others."""
    if len(tensor.shape) < 2 or tensor.kind == _TARGETS[target][1] or tensor.shape[0] % 32:
        return tensor.size
    wide = target == "q4_0" and tensor.name in ("output.weight", "token_embd.weight")
    per_value = 34 / 32 if wide else _TARGETS[target][2]
    return int(math.prod(tensor.shape) * per_value)


def cached_copy(path: Path, options: LlamaCppOptions) -> Path | None:
    """The copy that stands for the file as it is now; ``None``: there is none yet."""
    if options.requantize is None:
        return None
    copy = _copy_of(path, options.requantize)
    return copy if _is_whole(copy) else None


def _is_whole(copy: Path) -> bool:
    """Whether the copy is there, and as large as it says. It appeared whole, but disks fail."""
    try:
        return copy.is_file() and bool(read_header(copy))
    except ConfigurationError as error:
        logger.warning("the requantised copy is damaged, and is made anew: %s", error)
        return False


def requantized(path: Path, header: GgufHeader, options: LlamaCppOptions, name: str) -> Path:
    """The file to load in place of ``path``: a copy, made now where there is none yet, or a
    damaged one.

    Blocks: seconds to minutes for the making, and for another process that makes the same.

    :param name: the model's, for the log.
    :raises ConfigurationError: llama.cpp cannot make it of these weights.
    :raises ResourceNotAvailableError: the folder cannot be written, or has no room for it.
    """
    target = options.requantize
    if target is None:
        return path
    if _is_already(header, target):
        logger.info("model %r: its weights are %s already", name, target)
        return path
    copy = _copy_of(path, target)
    if not _is_whole(copy):
        _make(path, header, options, copy)
    logger.warning(
        "model %r: its weights are requantised from %s to %s (%s); it answers otherwise than the "
        "file it was made of",
        name,
        _NAMES.get(_main_type(header), "another type"),
        target,
        copy,
    )
    return copy


def _make(path: Path, header: GgufHeader, options: LlamaCppOptions, copy: Path) -> None:
    from filelock import FileLock

    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_suffix(".lock")):
            # The source may have changed, or another process made it, while this one waited.
            if not _is_whole(copy):
                for part in copy.parent.glob(f"{_escaped(copy.stem)}*{_PART}"):
                    part.unlink()  # of a process that was killed: nobody else makes this copy
                _check_room(header, options, copy.parent)
                _write(path, options, copy)
    except OSError as error:
        raise ResourceNotAvailableError(
            f"requantize: {str(copy.parent)!r} cannot be written: {error.strerror or error}; make "
            f"room there, name another folder in {CACHE_VARIABLE}, or leave requantize out"
        ) from error
    for old in copy.parent.glob(f"{_escaped(_family(path.resolve()))}*.{options.requantize}.*"):
        if old.stem != copy.stem:
            with contextlib.suppress(OSError):  # another process may have it open
                old.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def _check_room(header: GgufHeader, options: LlamaCppOptions, folder: Path) -> None:
    assert options.requantize is not None
    needed = sum(size_in(options.requantize, tensor) for tensor in header.tensors) + _SPARE
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB are needed and {free >> 20} MiB are free")


def _write(path: Path, options: LlamaCppOptions, copy: Path) -> None:
    """Make the copy under another name, look at it, and give it its own."""
    assert options.requantize is not None
    library = load()
    params = library.llama_model_quantize_default_params()
    params.ftype = _TARGETS[options.requantize][0]
    params.nthread = options.n_threads or default_threads()
    params.allow_requantize = True
    handle, temporary = tempfile.mkstemp(prefix=copy.stem, suffix=_PART, dir=copy.parent)
    os.close(handle)
    made = Path(temporary)
    try:
        before = _identity(path)
        if library.llama_model_quantize(os.fsencode(path), os.fsencode(made), params):
            _raise(path, options.requantize)
        read_header(made)
        if _identity(path) != before:
            raise ConfigurationError(
                f"requantize: {str(path)!r} changed while it was read; load it again"
            )
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.replace(copy)
    finally:
        made.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[Any, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _raise(path: Path, target: str) -> None:
    why = last_error("it does not say why")
    if "basic_ios" in why or "iostream" in why:  # C++ for a write that failed
        raise OSError(errno.ENOSPC, f"the disk is full, or the file too large for it ({why})")
    raise ConfigurationError(
        f"requantize: llama.cpp cannot make {target} of {str(path)!r}: {why}; leave requantize out"
    )


def hint(header: GgufHeader, options: LlamaCppOptions, name: str) -> None:
    """Tell of slow weights in the log, with the option that helps."""
    kind = _main_type(header)
    if kind in _ALWAYS_FAST:
        return
    system = load().llama_print_system_info().decode("utf-8", "replace")
    fast = set().union(*(types for key, types in _FAST_WITH.items() if f"{key} = 1" in system))
    if "REPACK = 1" in system and kind not in fast and options.requantize is None:
        logger.info(
            "model %r: most of its weights are %s, for which llama.cpp has no fast kernel on this "
            "CPU; the option requantize: q4_0 (or q8_0) makes it faster, and changes its answers",
            name,
            _NAMES.get(kind, f"of type {kind}"),
        )
