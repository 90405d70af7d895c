"""The fork server itself: it imports, has one thread, and forks for whoever asks.

Run by :class:`engineroom_vllm.forkserver.ForkServer`, in a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging.config
import os
import pickle
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from engineroom_vllm.compat_multiprocessing import (
    adopt_tracker,
    name_segments,
    run_process,
    write_number,
)
from engineroom_vllm.forkserver_context import (
    LOG,
    MOST_BYTES,
    MOST_FDS,
    PATIENCE_S,
    READY,
    SEGMENTS,
    Client,
    Here,
    put_in,
)

__all__ = ["serve"]


def serve(requests_fd: int, alive_fd: int, tracker_fd: int, modules: Sequence[str]) -> None:
    """Import, and fork for whoever asks, until the program that started this process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Segments of shared memory are the business of one tracker, as with multiprocessing's own ways.
    adopt_tracker(tracker_fd)
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
    _say(requests, READY.decode())
    _Server(requests, alive_fd).run()
    # Libraries that finalise themselves would only say what they have left behind.
    os._exit(0)


def _say(requests: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):
        requests.send(text.encode()[:MOST_BYTES])


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
            _, fds, _, _ = socket.recv_fds(self._requests, 1, MOST_FDS + 3)
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
        end = time.monotonic() + PATIENCE_S
        self._selector.unregister(self._alive)
        while self._children and (left := end - time.monotonic()) > 0:
            self._once(left)
        for pid, _ in self._children.values():
            os.kill(pid, signal.SIGKILL)


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # who has asked is gone
        write_number(status, number)


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
    work, _, asked, *Here.received = fds
    sentinel = os.dup(work)
    with os.fdopen(work, "rb") as pipe:
        state = pickle.load(pipe)  # noqa: S301 - over a socket that only this program has
        start, environment = state["start"], state["environment"]
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # the server may have looked for its own
        name_segments(environment.get(SEGMENTS, ""))
        os.chdir(state["folder"])
        os.sched_setaffinity(0, state["cpus"])
        if (path := environment.get(LOG)) is not None:
            logging.config.dictConfig(json.loads(Path(path).read_text(encoding="utf-8")))
        Here.client = Client(socket.socket(fileno=asked), start, {}, state["hooks"])
        process = pickle.load(pipe)  # noqa: S301
    with put_in(state["hooks"]):
        return run_process(process, sentinel)
