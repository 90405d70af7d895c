"""Asking the fork server for processes, as ``multiprocessing`` asks its own.

In the program, and in an engine's first process, which has workers.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import context, process
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from engineroom_vllm.compat_multiprocessing import ForkedPopen, spawn

__all__ = [
    "CONTEXT",
    "LOG",
    "MOST_BYTES",
    "MOST_FDS",
    "PATIENCE_S",
    "READY",
    "READ_LATER",
    "SEGMENTS",
    "Client",
    "Here",
    "at_start",
    "put_in",
]

logger = logging.getLogger("engineroom.vllm")

_READ_AT_START: Final = (
    "ATEN_", "BLIS_", "CUDA_", "DNNL_", "GLIBC_", "GOMP_", "HF_", "HOME", "KMP_", "LD_", "MALLOC_",
    "MKL_", "NUMEXPR_", "OMP_", "ONEDNN_", "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_",
    "SAFETENSORS_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "VIRTUAL_ENV",
    "VLLM_", "XDG_",
)  # fmt: skip
"""How names of variables begin that the loader or an import may have read: who needs other values
needs another server."""
LOG: Final = "VLLM_LOGGING_CONFIG_PATH"
_BOUND: Final = "GOMP_CPU_AFFINITY"
SEGMENTS: Final = "SEGMENTS_OF_ENGINE"
"""The variable that says how names of an engine's shared memory begin, without the slash."""
READ_LATER: Final = (
    LOG,
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_RPC_BASE_PATH",
)
"""Set anew in each process before vLLM reads them."""
READY: Final = b"ready"
MOST_FDS: Final = 250
MOST_BYTES: Final = 4096
PATIENCE_S: Final = 10.0
"""Seconds that the engine's processes have to end themselves after the program was killed."""


class Here:
    """What this process can ask, and what it was given when it was started."""

    client: Client | None = None
    received: ClassVar[list[int]] = []
    """File descriptors beside the arguments."""


class Client(NamedTuple):
    """Where this process asks for new ones, and what the server's environment was."""

    requests: socket.socket
    start: dict[str, str]
    more: dict[str, str]
    hooks: tuple[tuple[str, str], ...]


class _ReceivedFd:
    """A file descriptor that goes to a new process beside its arguments."""

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        return Here.received[self._place]


class _Popen(ForkedPopen):
    """``multiprocessing``'s handle of a process that the server has forked."""

    DupFd: ClassVar[Any] = _ReceivedFd

    def preamble(self) -> bytes:
        client = _client()
        return pickle.dumps(
            {
                "environment": {**os.environ, **client.more},
                "start": client.start,
                "hooks": client.hooks,
                "folder": str(Path.cwd()),
                "cpus": _cpus(os.environ.get(_BOUND)),
            }
        )

    def ask(self, fds: Sequence[int]) -> tuple[int, int]:
        if len(fds) > MOST_FDS:
            raise ValueError(f"{len(fds)} file descriptors are too many for a new process")
        requests = _client().requests
        status_r, status_w = os.pipe()
        work_r, work_w = os.pipe()
        try:
            socket.send_fds(requests, [b"f"], [work_r, status_w, requests.fileno(), *fds])
        except BaseException:
            os.close(status_r)
            os.close(work_w)
            raise
        finally:
            os.close(work_r)
            os.close(status_w)
        return status_r, work_w


def _client() -> Client:
    assert Here.client is not None
    return Here.client


def _cpus(bound: str | None) -> set[int]:
    """Processors for a new process's own thread: libgomp binds the one that loads it to the first
    of those it is told, but a forked process does not load it again. Unbound, that thread would
    share a core with another one that computes.
    """
    usable = os.sched_getaffinity(0)
    first = re.match(r"\s*(\d+)", bound or "")
    return (first and {int(first[1])} & usable) or usable


class ForkedProcess(process.BaseProcess):
    """A process that the server forks, if there is one that fits; else it is spawned."""

    _start_method: ClassVar[str] = "spawn"

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> Any:  # noqa: N802
        if (client := Here.client) is not None:
            if at_start({**os.environ, **client.more}) == client.start:
                return _Popen(process_obj)
            logger.debug("the environment has changed: the process is spawned")
        return spawn(process_obj)


class _Context(context.BaseContext):
    _name = "spawn"
    Process = ForkedProcess


CONTEXT: Final = _Context()
"""``multiprocessing``'s context whose processes are forked by the server."""


@contextmanager
def put_in(hooks: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Let functions that return the context of ``multiprocessing`` return :data:`CONTEXT`.

    :param hooks: modules, and names of functions in them.
    """
    before = []
    for module_name, name in hooks:
        module = importlib.import_module(module_name)
        before.append((module, name, getattr(module, name)))
        setattr(module, name, lambda: CONTEXT)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment has to be the same from the start of a process."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in READ_LATER
    }
