"""A process that has imported vLLM already, and forks engines.

On a CPU nearly all of a load's time is imports. An engine's first process is forked here from one
that has done them, and forks its worker itself. ``multiprocessing``'s own fork server belongs to
the program, cannot be ended, outlives a killed program with its engines, and gives its children the
environment that it was started with, while an engine's settings are its environment.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker, util
from pathlib import Path
from typing import Final

from engineroom_vllm.compat_multiprocessing import ForkedContext
from engineroom_vllm.forkserver_main import LOG, MOST_BYTES, MOST_FDS, PATIENCE_S, READY

__all__ = ["SERVERS", "ForkServer", "ForkServers", "UnusableError"]

_READ_AT_START: Final = (
    "ATEN_", "BLIS_", "CUDA_", "DNNL_", "GLIBC_", "GOMP_", "HF_", "HOME", "KMP_", "LD_", "MALLOC_",
    "MKL_", "NUMEXPR_", "OMP_", "ONEDNN_", "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_",
    "SAFETENSORS_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "VIRTUAL_ENV",
    "VLLM_", "XDG_",
)  # fmt: skip
"""How names of variables begin that the loader or an import may have read: who needs other values
needs another server."""
_READ_LATER: Final = (
    LOG, "VLLM_CONFIGURE_LOGGING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_RPC_BASE_PATH",
)  # fmt: skip
"""Set anew in each engine before vLLM reads them."""
_FORK_WORKERS: Final = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}


class UnusableError(Exception):
    """There is no server; why, is the message."""


class ForkServer:
    """A server, started and ready. Who made it closes it.

    :param environment: of the engines that it is to start, as their workers need it.
    :param modules: what to import.
    :param given_up: whether nobody waits for it any more.
    :raises UnusableError: it cannot be used here, or ``given_up`` became true.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        modules: Sequence[str],
        *,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._start = _at_start(environment)
        own = {k: v for k, v in environment.items() if k not in _READ_LATER}
        # Threads of its linear algebra would not survive the fork; an engine does without them.
        # It outlives the engine whose folder TMPDIR names.
        own |= {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()}
        if LOG in environment:
            own["VLLM_CONFIGURE_LOGGING"] = "0"
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tracker = resource_tracker.getfd()
        assert tracker is not None
        passed = (theirs.fileno(), tracker)
        code = (
            "import json, sys; sys.path[:], *arguments = json.loads(sys.argv[1]); "
            "from engineroom_vllm.forkserver_main import serve; serve(*arguments)"
        )
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, and code of ours
                [sys.executable, "-c", code, json.dumps([sys.path, *passed, list(modules)])],
                env=own,
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
            )
        except BaseException:
            self._requests.close()
            raise
        finally:
            theirs.close()
        # After the engines, which multiprocessing waits for when the program ends.
        self._close_once = util.Finalize(None, self._close, exitpriority=-100)
        try:
            self._wait(given_up)
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def _wait(self, given_up: Callable[[], bool]) -> None:
        self._requests.settimeout(0.1)
        message: bytes | None = None
        while message is None:
            if given_up():
                raise UnusableError("nobody waits for it any more")
            with suppress(TimeoutError):
                message = self._requests.recv(MOST_BYTES)
        self._requests.settimeout(None)
        if message != READY:
            raise UnusableError(message.decode() or f"it ended with status {self._process.wait()}")

    @property
    def usable(self) -> bool:
        """Whether it runs."""
        return bool(self._close_once.still_active()) and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its own process id."""
        return self._process.pid

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether it can start engines that are to have this environment."""
        return _at_start(environment) == self._start

    @contextmanager
    def used(self, module_name: str, function: str) -> Iterator[None]:
        """Meanwhile a function returns a context of ``multiprocessing`` whose processes are forked
        by this server. One at a time in a program.
        """
        module = importlib.import_module(module_name)
        before = getattr(module, function)
        ForkedContext.fork = self._fork
        setattr(module, function, ForkedContext)
        try:
            yield
        finally:
            setattr(module, function, before)
            ForkedContext.fork = None

    def _fork(self, process: bytes, fds: Sequence[int]) -> int:
        if len(fds) > MOST_FDS:
            raise ValueError(f"{len(fds)} file descriptors are too many for a new process")
        environment = {**os.environ, **self._start, **_FORK_WORKERS}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(self._requests, [b"f"], [theirs.fileno(), *fds])
            theirs.close()
            with ours.makefile("wb") as file:
                pickle.dump((environment, str(Path.cwd()), os.sched_getaffinity(0)), file)
                file.write(process)
            return ours.detach()

    def close(self) -> None:
        """End it, and the engines that it has started, if there are any left. May block for some
        seconds. Harmless when done twice.
        """
        self._close_once()

    def _close(self) -> None:
        self._requests.close()
        try:
            self._process.wait(PATIENCE_S + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment has to be the same from the start of a process."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in _READ_LATER
    }


class ForkServers:
    """Servers of this program: one, unless engines with different environments run."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Have no server yet, or none any more: those of the program that forked are its own."""
        self._lock = threading.Lock()
        self._engines: dict[ForkServer, int] = {}
        """How many engines each has; -1: it is being closed."""
        self._timers: dict[ForkServer, threading.Timer] = {}

    def processes(self) -> frozenset[int]:
        """Process ids of the servers, without those of the engines."""
        with self._lock:
            return frozenset(server.pid for server in self._engines)

    def take(
        self,
        environment: Mapping[str, str],
        modules: Sequence[str],
        *,
        given_up: Callable[[], bool] = lambda: False,
    ) -> ForkServer:
        """A server that fits; a new one, if there is none. Blocks for seconds. Callers take turns.

        :raises UnusableError: there can be none.
        """
        with self._lock:
            for server, engines in self._engines.items():
                if engines >= 0 and server.usable and server.fits(environment):
                    self._engines[server] += 1
                    self._cancel_timer(server)
                    return server
        self.close_idle()  # another environment is wanted now
        server = ForkServer(environment, modules, given_up=given_up)
        with self._lock:
            self._engines[server] = 1
        return server

    def give_back(self, server: ForkServer, keep_s: float = 0.0) -> None:
        """An engine is no more. The last one ends the server, ``keep_s`` seconds later."""
        with self._lock:
            self._engines[server] -= 1
            if self._engines[server]:
                return
            if keep_s > 0 and server.usable:
                timer = threading.Timer(keep_s, self._close, [server])
                timer.name, timer.daemon = "vllm-forkserver", True
                self._timers[server] = timer
                timer.start()
                return
        self._close(server)

    def close_idle(self) -> None:
        """End those that have no engine."""
        with self._lock:
            idle = [server for server, engines in self._engines.items() if not engines]
        for server in idle:
            self._close(server)

    def _close(self, server: ForkServer) -> None:
        with self._lock:
            if self._engines.get(server) != 0:  # an engine came, or it is closed already
                return
            self._engines[server] = -1
            self._cancel_timer(server)
        try:
            server.close()
        finally:
            with self._lock:
                del self._engines[server]

    def _cancel_timer(self, server: ForkServer) -> None:
        if timer := self._timers.pop(server, None):
            timer.cancel()


SERVERS: Final = ForkServers()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=SERVERS.begin)
