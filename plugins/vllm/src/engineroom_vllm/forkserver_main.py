"""The fork server itself: it imports, has one thread, and forks for the program that started it.

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
import re
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

from engineroom_vllm.compat_multiprocessing import (
    adopt_tracker,
    bootstrap,
    name_segments,
    write_number,
)
from engineroom_vllm.scratch import SEGMENTS

__all__ = ["LOG", "MOST_BYTES", "MOST_FDS", "PATIENCE_S", "READY", "serve"]

LOG: Final = "VLLM_LOGGING_CONFIG_PATH"
READY: Final = b"ready"
MOST_FDS: Final = 250
MOST_BYTES: Final = 4096
PATIENCE_S: Final = 10.0
"""Seconds that engines have to end themselves when the server ends."""


def serve(requests_fd: int, tracker_fd: int, modules: Sequence[str]) -> None:
    """Import, and fork for the program that started this process, until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Segments of shared memory are the business of one tracker, as with multiprocessing's own ways.
    adopt_tracker(tracker_fd)
    requests = socket.socket(fileno=requests_fd)
    obstacle = _import(modules)
    with contextlib.suppress(OSError):
        requests.send(obstacle.encode()[:MOST_BYTES] or READY)
    if obstacle:
        return
    gc.collect()
    gc.freeze()  # what is never looked at is never copied
    _fork_for(requests)
    engines = psutil.Process().children()
    processes = psutil.Process().children(recursive=True)
    for engine in engines:
        engine.terminate()
    for process in psutil.wait_procs(processes, PATIENCE_S)[1]:
        process.kill()
    # Libraries that finalise themselves would only say what they have left behind.
    os._exit(0)


def _import(modules: Sequence[str]) -> str:
    """:returns: why nothing can be forked from this process; empty if it can."""
    try:
        for name in modules:
            importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001 - an import may raise anything, and is told
        return f"it cannot import {name}: {type(error).__name__}: {error}"
    if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
        return f"imports have started threads ({threads - 1}), which no fork survives"
    if not hasattr(os, "pidfd_open"):
        return "this system has no pidfd_open"
    with contextlib.suppress(ImportError):
        # It finds the place of a process's title now or never: the environment is set anew.
        importlib.import_module("setproctitle").getproctitle()
    return ""


def _fork_for(requests: socket.socket) -> None:
    """Fork, and tell how each process ended, until nobody is left who could ask."""
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not requests:
                selector.unregister(key.fileobj)
                os.close(key.fd)
                pid, connection = key.data
                _tell(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(connection)
                continue
            _, fds, _, _ = socket.recv_fds(requests, 1, MOST_FDS + 1)
            if not fds:
                return
            connection, *others = fds
            try:
                pid = os.fork()
            except OSError:  # no memory, or too many processes: who has asked reads the end
                traceback.print_exc()
                others.append(connection)
            else:
                if pid == 0:
                    for child in selector.get_map().values():
                        os.close(child.fd)
                        if child.data is not None:
                            os.close(child.data[1])
                    _be_the_process(connection, others)
                _tell(connection, pid)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            for fd in others:
                os.close(fd)


def _tell(connection: int, number: int) -> None:
    with contextlib.suppress(OSError):  # who has asked is gone
        write_number(connection, number)


def _be_the_process(connection: int, fds: Sequence[int]) -> None:
    """In the child: be the process that was asked for. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with os.fdopen(connection, "rb", closefd=False) as file:
            environment, folder, processors = pickle.load(file)  # noqa: S301 - of the program
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = None  # the server may have looked for its own
            name_segments(environment.get(SEGMENTS, ""))
            os.chdir(folder)
            os.sched_setaffinity(0, processors)
            os.register_at_fork(after_in_child=_bind)
            if (path := environment.get(LOG)) is not None:
                logging.config.dictConfig(json.loads(Path(path).read_text(encoding="utf-8")))
            run = bootstrap(file, fds)
        code = run(connection)
    except BaseException:  # noqa: BLE001 - told, and the end of the process
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # As after every fork: what is left to finalise is the server's, too.
        os._exit(code)


def _bind() -> None:
    """In an engine's worker: libgomp binds the thread that loads it to the first of the processors
    that it is told, but a forked process does not load it again. Unbound, its own thread would
    share a core with another one that computes.
    """
    first = re.match(r"\s*(\d+)", os.environ.get("GOMP_CPU_AFFINITY", ""))
    if first and int(first[1]) in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {int(first[1])})
