"""llama.cpp itself: one initialisation a process, its log in Python's, its names by word."""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from engineroom import ConfigurationError

__all__ = ["CACHE_TYPES", "FLASH_ATTENTION", "AbortFlag", "device_name", "gpu_devices", "load"]

logger = logging.getLogger("engineroom.llamacpp.library")

CACHE_TYPES: Final = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8,
                      "bf16": 30}  # fmt: skip
"""Values of ``enum ggml_type``."""
FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}
"""Values of ``enum llama_flash_attn_type``."""

_GPU: Final = 1
_INTEGRATED: Final = 2
"""Of ``enum ggml_backend_dev_type``."""
_GPU_LIBRARIES: Final = ("cuda", "hip", "musa", "vulkan", "sycl", "metal", "opencl", "cann")
_DEBUG: Final = 1
_WARNING: Final = 3
_ERROR: Final = 4
_LEVELS: Final = {_WARNING: logging.WARNING, _ERROR: logging.WARNING}
"""Of ``enum ggml_log_level``, what is not for debugging. An error of the library's is a warning
here: whoever called it raises an error of its own, with :func:`last_error` in it."""


class _Thread(threading.local):
    flag: AbortFlag | None = None
    """What may abort the computation that this thread waits for."""


_thread: Final = _Thread()
_lock: Final = threading.Lock()
_state: dict[str, Any] = {}
_errors: Final[deque[str]] = deque(maxlen=4)


def load() -> Any:
    """The ``llama_cpp`` module, initialised.

    :raises ConfigurationError: it is not installed, or its shared library cannot be loaded.
    """
    with _lock:
        if (library := _state.get("library")) is not None:
            return library
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:
            raise ConfigurationError(
                f"llama-cpp-python cannot be loaded: {error}; reinstall it: "
                "pip install --force-reinstall --no-deps llama-cpp-python"
            ) from error

        _close_at_the_end(llama_cpp)

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def write(level: int, text: bytes | None, _: Any) -> None:
            line = (text or b"").decode("utf-8", "replace").strip()
            if line and line != ".":
                if (flag := _thread.flag) is not None and flag.raised:
                    level = _DEBUG  # it tells of what it was asked to do
                _remember(level, line)
                logger.log(_LEVELS.get(level, logging.DEBUG), "%s", line)

        _state["callback"] = write  # llama.cpp keeps only a pointer to it
        llama_cpp.llama_log_set(write, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _state["library"] = llama_cpp
        return llama_cpp


def gpu_devices() -> list[tuple[str, int]]:
    """The GPUs that this build of llama.cpp uses, in its order: name and free bytes.

    Names are core's where it has one (``cuda:0``), else made like it (``vulkan:0``). A build
    without any is told by its files, without loading it.
    """
    if not _may_have_gpus():
        return []
    library = load()
    if not library.llama_supports_gpu_offload():
        return []
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(_shared(folder, "ggml-base")))
    devices = ctypes.CDLL(str(_shared(folder, "ggml")))
    devices.ggml_backend_dev_count.restype = ctypes.c_size_t
    devices.ggml_backend_dev_get.restype = ctypes.c_void_p
    devices.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    base.ggml_backend_dev_name.restype = ctypes.c_char_p
    base.ggml_backend_dev_name.argtypes = base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    by_kind: dict[int, list[tuple[str, int]]] = {_GPU: [], _INTEGRATED: []}
    for index in range(devices.ggml_backend_dev_count()):
        device = devices.ggml_backend_dev_get(index)
        kind = base.ggml_backend_dev_type(device)
        if kind in by_kind:
            free, whole = ctypes.c_size_t(), ctypes.c_size_t()
            base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(whole))
            name = base.ggml_backend_dev_name(device).decode()
            by_kind[kind].append((device_name(name), free.value))
    return by_kind[_GPU] or by_kind[_INTEGRATED]


def device_name(name: str) -> str:
    """llama.cpp's name of a device (``CUDA0``) as core writes it (``cuda:0``)."""
    kind = name.rstrip("0123456789")
    number = name[len(kind) :] or "0"
    # torch's builds for AMD's cards call these cuda, too.
    return f"{'cuda' if kind in ('CUDA', 'ROCm', 'MUSA') else kind.lower()}:{number}"


def _may_have_gpus() -> bool:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return False
    names = [path.name for path in (Path(spec.origin).parent / "lib").glob("*ggml*")]
    return not names or any(kind in name for name in names for kind in _GPU_LIBRARIES)


def _shared(folder: Path, name: str) -> Path:
    for pattern in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll", f"lib{name}.so.*"):
        for path in folder.glob(pattern):
            return path
    raise ConfigurationError(f"{str(folder)!r} has no library {name}; reinstall llama-cpp-python")


def _remember(level: int, line: str) -> None:
    if level == _ERROR and line not in _errors:
        _errors.append(line)


def last_error(default: str) -> str:
    """What llama.cpp logged as errors since the last call, for messages of our own.

    More than one line: the first says what is wrong, the last only that something is.
    """
    lines = list(_errors)
    _errors.clear()
    return "; ".join(lines) or default


class AbortFlag:
    """Lets another thread stop ``llama_decode`` without the GIL.

    llama.cpp asks ``bool callback(void *data)`` at every node of its graph. A callback written
    in Python would cost 2 %. C's ``strlen`` has a fitting signature: over a buffer of one byte
    and a terminator it returns 1 where the byte is set and 0 where it is not.
    """

    def __init__(self, library: Any) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        runtime = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        self.callback = ctypes.cast(runtime.strlen, library.ggml_abort_callback)
        self.data = ctypes.cast(self._buffer, ctypes.c_void_p)
        self._runtime = runtime

    def set(self, value: bool) -> None:
        """Raise or lower the flag."""
        self._buffer[0] = b"\1" if value else b"\0"

    @property
    def raised(self) -> bool:
        """Whether it is."""
        return self._buffer[0] != b"\0"

    def compute(self, call: Callable[..., int], *arguments: Any) -> int:
        """Call what the flag aborts. An abort is no failure, and what llama.cpp logs of it goes to
        those who debug.

        :returns: llama.cpp's status.
        """
        _thread.flag = self
        try:
            return int(call(*arguments))
        finally:
            _thread.flag = None


def _close_at_the_end(library: Any) -> None:
    """llama-cpp-python opens the null device at import and leaves it to warn of that at exit."""
    for name in ("outnull_file", "errnull_file"):
        file = getattr(getattr(library, "_utils", None), name, None)
        if file is not None:
            atexit.register(file.close)
