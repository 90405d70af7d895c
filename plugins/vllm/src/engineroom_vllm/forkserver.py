"""A process that has imported vLLM already, and forks an engine's processes.

On a CPU nearly all of a load's time is imports: each of the engine's processes takes seconds to
import vLLM. They are forked here from one that has done so, as ``multiprocessing``'s own fork
server does. That one is not used, because it belongs to the program, cannot be ended, and listens
where others may connect; and because children get the environment of the server there, while an
engine's settings are its environment.

Three processes have a part in it: the program, which owns the server and asks it for the engine's
first process; the server, which has one thread and never computes; and the engine's first process,
which asks it for the workers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import logging.config
import os
import pickle
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from multiprocessing import (
    context,
    forkserver,
    popen_forkserver,
    popen_spawn_posix,
    process,
    reduction,
    resource_tracker,
    shared_memory,
    util,
)
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import psutil

__all__ = [
    "CONTEXT",
    "SEGMENTS",
    "SERVERS",
    "ForkServer",
    "Lease",
    "UnusableError",
    "put_in",
    "serve",
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
_LOG: Final = "VLLM_LOGGING_CONFIG_PATH"
_BOUND: Final = "GOMP_CPU_AFFINITY"
SEGMENTS: Final = "SEGMENTS_OF_ENGINE"
"""The variable that says how names of an engine's shared memory begin, without the slash."""
_READ_LATER: Final = (
    _LOG,
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_RPC_BASE_PATH",
)
"""Set anew in each process before vLLM reads them."""
_READY: Final = b"ready"
_MOST_FDS: Final = 250
_MOST_BYTES: Final = 4096
_PATIENCE_S: Final = 10.0
"""Seconds that the engine's processes have to end themselves after the program was killed."""


class UnusableError(Exception):
    """There is no server; why, is the message."""


class _Here:
    """What this process can ask, and what it was given when it was started."""

    client: _Client | None = None
    received: ClassVar[list[int]] = []
    """File descriptors beside the arguments."""


class _Client(NamedTuple):
    """Where this process asks for new ones, and what the server's environment was."""

    requests: socket.socket
    start: dict[str, str]
    more: dict[str, str]
    hooks: tuple[tuple[str, str], ...]


# ── in the program, and in an engine's first process ─────────────────────────────────────────────


class _ReceivedFd:
    """A file descriptor that goes to a new process beside its arguments."""

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        return _Here.received[self._place]


class _Popen(popen_forkserver.Popen):
    """``multiprocessing``'s handle of a process that the server has forked."""

    DupFd: ClassVar[Any] = _ReceivedFd
    _fds: list[int]

    def _launch(self, process_obj: process.BaseProcess) -> None:
        client = _Here.client
        assert client is not None
        state = {
            "environment": {**os.environ, **client.more},
            "start": client.start,
            "hooks": client.hooks,
            "folder": str(Path.cwd()),
            "cpus": _cpus(os.environ.get(_BOUND)),
        }
        data = BytesIO()
        context.set_spawning_popen(self)
        try:
            pickle.dump(state, data)
            reduction.dump(process_obj, data)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, to_child = _ask(client.requests, self._fds)
        # The child's sentinel of its parent: it sees when this end is closed.
        kept = os.dup(to_child)
        self.finalizer = util.Finalize(self, _close, (kept, self.sentinel))
        with os.fdopen(to_child, "wb") as pipe:
            pipe.write(data.getbuffer())
        try:
            self.pid = forkserver.read_signed(self.sentinel)
        except EOFError as error:
            raise OSError("the process that starts vLLM's processes has ended") from error


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
        if (client := _Here.client) is not None:
            if _at_start({**os.environ, **client.more}) == client.start:
                return _Popen(process_obj)
            logger.debug("the environment has changed: the process is spawned")
        return popen_spawn_posix.Popen(process_obj)


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


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _ask(requests: socket.socket, fds: Sequence[int]) -> tuple[int, int]:
    """Ask for a new process.

    :returns: a file to read its process id and its exit code from, and one to write what it is to
        do to.
    """
    if len(fds) > _MOST_FDS:
        raise ValueError(f"{len(fds)} file descriptors are too many for a new process")
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


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment has to be the same from the start of a process."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in _READ_LATER
    }


# ── the server's owner ───────────────────────────────────────────────────────────────────────────


class ForkServer:
    """A server, started and ready. Who made it closes it.

    :param environment: of the processes that it is to start.
    :param more: variables that they get beside those of the process that asks.
    :param modules: what to import.
    :param hooks: see :func:`put_in`; those of the engine's first process.
    :param given_up: whether nobody waits for it any more.
    :raises UnusableError: it cannot be used here, or ``given_up`` became true.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        modules: Sequence[str],
        *,
        more: Mapping[str, str],
        hooks: Sequence[tuple[str, str]],
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        own = {k: v for k, v in environment.items() if k not in _READ_LATER} | dict(more)
        self.start = _at_start(own)
        # Threads of its linear algebra would not survive the fork; an engine does without them.
        # It outlives the engine whose folder TMPDIR names.
        own |= {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()}
        if _LOG in environment:
            own["VLLM_CONFIGURE_LOGGING"] = "0"
        requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        alive_r, self._alive = os.pipe()
        self._client = _Client(requests, self.start, dict(more), tuple(hooks))
        tracker = resource_tracker.getfd()
        assert tracker is not None
        passed = (theirs.fileno(), alive_r, tracker)
        given = json.dumps([sys.path, *passed, list(modules)])
        code = (
            "import json, sys; sys.path[:], *given = json.loads(sys.argv[1]); "
            "from engineroom_vllm.forkserver import serve; serve(*given)"
        )
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, and code of ours
                [sys.executable, "-c", code, given],
                env=own,
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
            )
        except BaseException:
            requests.close()
            os.close(self._alive)
            raise
        finally:
            theirs.close()
            os.close(alive_r)
        self._lock = threading.Lock()
        self._open = True
        # After the engines, which multiprocessing waits for when the program ends.
        self._finalizer = util.Finalize(None, self.close, exitpriority=-100)
        try:
            self._wait(given_up)
        except BaseException:
            self.close()
            raise

    def _wait(self, given_up: Callable[[], bool]) -> None:
        requests = self._client.requests
        requests.settimeout(0.1)
        while True:
            if given_up():
                raise UnusableError("nobody waits for it any more")
            try:
                said = requests.recv(_MOST_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise UnusableError(f"it ended: {error}") from error
            break
        requests.settimeout(None)
        if said != _READY:
            raise UnusableError(said.decode() or f"it ended with status {self._process.wait()}")

    @property
    def usable(self) -> bool:
        """Whether it runs."""
        return self._open and self._process.poll() is None

    def fits(self, environment: Mapping[str, str], more: Mapping[str, str]) -> bool:
        """Whether it can start processes that are to have this environment."""
        return _at_start({**environment, **more}) == self.start and dict(more) == self._client.more

    @contextmanager
    def used(self) -> Iterator[None]:
        """Meanwhile processes of :data:`CONTEXT` are forked by it. One at a time in a program."""
        _Here.client = self._client
        try:
            yield
        finally:
            _Here.client = None

    @property
    def pid(self) -> int:
        """Its own process id."""
        return self._process.pid

    def children(self) -> set[int]:
        """Process ids of all that it has started and that run."""
        try:
            return {child.pid for child in psutil.Process(self._process.pid).children()}
        except psutil.Error:
            return set()

    def close(self) -> None:
        """End it, and the processes that it has started, if there are any left. May block for some
        seconds. Harmless when done twice.
        """
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._finalizer.cancel()
        children = self.children()
        self._client.requests.close()
        os.close(self._alive)
        try:
            self._process.wait(_PATIENCE_S + 5 if children else 1)
        except subprocess.TimeoutExpired:  # it imports, perhaps
            self._process.kill()
            self._process.wait()


# ── the server ───────────────────────────────────────────────────────────────────────────────────


def serve(requests_fd: int, alive_fd: int, tracker_fd: int, modules: Sequence[str]) -> None:
    """Import, and fork for whoever asks, until the program that started this process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Segments of shared memory are the business of one tracker, as with multiprocessing's own ways.
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker_fd
    requests = socket.socket(fileno=requests_fd)
    try:
        for name in modules:
            importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - an import may raise anything, and is told
        _say(requests, f"it cannot import {name}: {type(error).__name__}: {error}")
        return
    if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
        _say(requests, f"imports have started threads ({threads - 1}), which no fork survives")
        return
    if not hasattr(os, "pidfd_open"):
        _say(requests, "this system has no pidfd_open")
        return
    with contextlib.suppress(ImportError):
        # It finds the place of a process's title now or never: the environment is set anew.
        importlib.import_module("setproctitle").getproctitle()
    gc.collect()
    gc.freeze()  # what is never looked at is never copied
    _say(requests, _READY.decode())
    _Server(requests, alive_fd).run()
    # Libraries that finalise themselves would only say what they have left behind.
    os._exit(0)


def _say(requests: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):
        requests.send(text.encode()[:_MOST_BYTES])


class _Server:
    def __init__(self, requests: socket.socket, alive_fd: int) -> None:
        self._requests = requests
        self._alive = alive_fd
        self._selector = selectors.DefaultSelector()
        self._selector.register(requests, selectors.EVENT_READ)
        self._selector.register(alive_fd, selectors.EVENT_READ)
        self._children: dict[int, tuple[int, int]] = {}
        """Of each child, by the file that tells its end: process id, and where its exit code is
        written to."""

    def run(self) -> None:
        while self._once(None):
            pass
        self._end()

    def _once(self, timeout: float | None) -> bool:
        """:returns: whether the program lives."""
        ready = {key.fd for key, _ in self._selector.select(timeout)}
        for fd in ready & self._children.keys():
            self._reap(fd)
        if self._requests.fileno() in ready:
            _, fds, _, _ = socket.recv_fds(self._requests, 1, _MOST_FDS + 3)
            if fds:
                self._fork(fds)
            else:  # nobody is left who could ask
                self._selector.unregister(self._requests)
        return self._alive not in ready

    def _fork(self, fds: list[int]) -> None:
        status = fds[1]
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes: who has asked reads that there is none
            traceback.print_exc()
            for fd in fds:
                os.close(fd)
            return
        if pid == 0:
            self._leave(status)
            _child(fds)
        for fd in fds:
            if fd != status:
                os.close(fd)
        _tell(status, pid)
        end = os.pidfd_open(pid)
        self._children[end] = (pid, status)
        self._selector.register(end, selectors.EVENT_READ)

    def _leave(self, status: int) -> None:
        """In the child: close what is the server's."""
        self._selector.close()
        self._requests.close()
        for fd in (self._alive, status):
            os.close(fd)
        for end, (_, other) in self._children.items():
            os.close(end)
            os.close(other)

    def _reap(self, end: int) -> None:
        pid, status = self._children.pop(end)
        self._selector.unregister(end)
        os.close(end)
        _, code = os.waitpid(pid, 0)
        _tell(status, os.waitstatus_to_exitcode(code))
        os.close(status)

    def _end(self) -> None:
        """The program is gone, whether it wanted to or was killed: nothing may live on."""
        for pid, _ in self._children.values():
            os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + _PATIENCE_S
        self._selector.unregister(self._alive)
        while self._children and (left := end - time.monotonic()) > 0:
            self._once(left)
        for pid, _ in self._children.values():
            os.kill(pid, signal.SIGKILL)


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # who has asked is gone
        forkserver.write_signed(status, number)


def _child(fds: list[int]) -> None:
    """In the child: be the process that was asked for. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = _work(fds)
    except BaseException:  # noqa: BLE001 - told, and the end of the process
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # As after every fork: what is left to finalise is the server's, too.
        os._exit(code)


def _work(fds: list[int]) -> int:
    work, _, asked, *_Here.received = fds
    sentinel = os.dup(work)
    with os.fdopen(work, "rb") as pipe:
        state = pickle.load(pipe)  # noqa: S301 - over a socket that only this program has
        start, environment = state["start"], state["environment"]
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # the server may have looked for its own
        _name_segments(environment.get(SEGMENTS, ""))
        os.chdir(state["folder"])
        os.sched_setaffinity(0, state["cpus"])
        if (path := environment.get(_LOG)) is not None:
            logging.config.dictConfig(json.loads(Path(path).read_text(encoding="utf-8")))
        _Here.client = _Client(socket.socket(fileno=asked), start, {}, state["hooks"])
        found: Any = pickle.load(pipe)  # noqa: S301
    with put_in(state["hooks"]):
        code: int = found._bootstrap(sentinel)
    return code


def _name_segments(prefix: str) -> None:
    """Let names of Python's shared memory begin so in this process: they tell whose it is."""
    if prefix and hasattr(shared_memory, "_SHM_NAME_PREFIX"):
        naming: Any = shared_memory
        naming._SHM_NAME_PREFIX = f"/{prefix}"
        naming._SHM_SAFE_NAME_LENGTH = len(naming._SHM_NAME_PREFIX) + 8


# ── which server ─────────────────────────────────────────────────────────────────────────────────


class Lease:
    """The right to a server, for as long as an engine lives that was started by it."""

    def __init__(self, server: ForkServer, give_back: Callable[[ForkServer, float], None]) -> None:
        self.server = server
        self._give_back = give_back
        self._lock = threading.Lock()
        self._held = True

    def release(self, keep_s: float = 0.0) -> None:
        """The engine is no more. Harmless when done twice.

        :param keep_s: seconds that the server stays if this was the last engine.
        """
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._give_back(self.server, keep_s)


class ForkServers:
    """Servers of this program: one, unless engines with different environments run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: dict[ForkServer, int] = {}
        self._timers: dict[ForkServer, threading.Timer] = {}
        self._ending: set[ForkServer] = set()

    def processes(self) -> frozenset[int]:
        """Process ids of the servers, without those of the engines."""
        with self._lock:
            return frozenset(server.pid for server in (*self._leases, *self._ending))

    def lease(
        self,
        environment: Mapping[str, str],
        modules: Sequence[str],
        *,
        more: Mapping[str, str],
        hooks: Sequence[tuple[str, str]],
        given_up: Callable[[], bool],
    ) -> Lease:
        """A server that fits; a new one, if there is none. Blocks for seconds. Callers take turns.

        :raises UnusableError: there can be none.
        """
        with self._lock:
            fitting = (s for s in self._leases if s.usable and s.fits(environment, more))
            server = next(fitting, None)
            if server is not None:
                self._take(server)
        if server is None:
            self._close_idle()
            server = ForkServer(environment, modules, more=more, hooks=hooks, given_up=given_up)
            with self._lock:
                self._take(server)
        return Lease(server, self._give_back)

    def _take(self, server: ForkServer) -> None:
        self._leases[server] = self._leases.get(server, 0) + 1
        if (timer := self._timers.pop(server, None)) is not None:
            timer.cancel()

    def _give_back(self, server: ForkServer, keep_s: float) -> None:
        with self._lock:
            self._leases[server] -= 1
            if self._leases[server]:
                return
            if keep_s > 0 and server.usable:
                timer = threading.Timer(keep_s, self._close, [server])
                timer.name, timer.daemon = "vllm-forkserver", True
                self._timers[server] = timer
                timer.start()
                return
        self._close(server)

    def _close_idle(self) -> None:
        """Another environment is wanted now: those that only wait will wait in vain."""
        for server in [s for s, count in self._leases.items() if not count]:
            self._close(server)

    def _close(self, server: ForkServer) -> None:
        with self._lock:
            if self._leases.get(server) != 0:  # an engine came, or it is closed already
                return
            del self._leases[server]
            if (timer := self._timers.pop(server, None)) is not None:
                timer.cancel()
            self._ending.add(server)
        try:
            server.close()
        finally:
            with self._lock:
                self._ending.discard(server)


SERVERS: Final = ForkServers()
