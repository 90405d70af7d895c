"""A process that has imported vLLM already, and forks an engine's processes.

On a CPU nearly all of a load's time is imports: each of the engine's processes takes seconds to
import vLLM. They are forked here from one that has done so, as ``multiprocessing``'s own fork
server does. That one is not used, because it belongs to the program, cannot be ended, and listens
where others may connect; and because children get the environment of the server there, while an
engine's settings are its environment.

Three processes have a part in it: the program, which owns the server and asks it for the engine's
first process; the server (:mod:`.forkserver_main`), which has one thread and never computes; and
the engine's first process, which asks it for the workers. How they ask is in
:mod:`.forkserver_context`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker, util
from typing import Final

import psutil

from engineroom_vllm.forkserver_context import (
    LOG,
    MOST_BYTES,
    PATIENCE_S,
    READ_LATER,
    READY,
    Client,
    Here,
    at_start,
)

__all__ = ["SERVERS", "ForkServer", "ForkServers", "Lease", "UnusableError"]


class UnusableError(Exception):
    """There is no server; why, is the message."""


class ForkServer:
    """A server, started and ready. Who made it closes it.

    :param environment: of the processes that it is to start.
    :param more: variables that they get beside those of the process that asks.
    :param modules: what to import.
    :param hooks: see :func:`.forkserver_context.put_in`; those of the engine's first process.
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
        own = {k: v for k, v in environment.items() if k not in READ_LATER} | dict(more)
        self.start = at_start(own)
        # Threads of its linear algebra would not survive the fork; an engine does without them.
        # It outlives the engine whose folder TMPDIR names.
        own |= {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()}
        if LOG in environment:
            own["VLLM_CONFIGURE_LOGGING"] = "0"
        requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        alive_r, self._alive = os.pipe()
        self._client = Client(requests, self.start, dict(more), tuple(hooks))
        tracker = resource_tracker.getfd()
        assert tracker is not None
        passed = (theirs.fileno(), alive_r, tracker)
        arguments = json.dumps([sys.path, *passed, list(modules)])
        code = (
            "import json, sys; sys.path[:], *arguments = json.loads(sys.argv[1]); "
            "from engineroom_vllm.forkserver_main import serve; serve(*arguments)"
        )
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, and code of ours
                [sys.executable, "-c", code, arguments],
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
                message = requests.recv(MOST_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise UnusableError(f"it ended: {error}") from error
            break
        requests.settimeout(None)
        if message != READY:
            raise UnusableError(message.decode() or f"it ended with status {self._process.wait()}")

    @property
    def usable(self) -> bool:
        """Whether it runs."""
        return self._open and self._process.poll() is None

    def fits(self, environment: Mapping[str, str], more: Mapping[str, str]) -> bool:
        """Whether it can start processes that are to have this environment."""
        return at_start({**environment, **more}) == self.start and dict(more) == self._client.more

    @contextmanager
    def used(self) -> Iterator[None]:
        """Meanwhile processes of :data:`.forkserver_context.CONTEXT` are forked by it. One at a
        time in a program.
        """
        Here.client = self._client
        try:
            yield
        finally:
            Here.client = None

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
            self._process.wait(PATIENCE_S + 5 if children else 1)
        except subprocess.TimeoutExpired:  # it imports, perhaps
            self._process.kill()
            self._process.wait()


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
