"""Processes forked by the server, without vLLM: any function may be what they do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from engineroom_vllm import forkserver, forkserver_context
from engineroom_vllm.environment import forked_binding
from engineroom_vllm.forkserver import ForkServer, ForkServers, UnusableError
from engineroom_vllm.forkserver_context import CONTEXT, put_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux only")
HERE = (__name__, "context_of_the_library")


def context_of_the_library() -> object:
    """Stands for vLLM's function of that kind."""
    return None


def server(modules: tuple[str, ...] = ("json",), **more: str) -> ForkServer:
    return ForkServer(dict(os.environ), modules, more=more, hooks=())


@pytest.fixture
def running() -> Iterator[ForkServer]:
    found = server()
    with found.used():
        yield found
    found.close()


def tell(pipe: Connection, name: str) -> None:
    pipe.send((os.getpid(), os.getppid(), os.environ.get(name), "json" in sys.modules))


def end(code: int) -> None:
    raise SystemExit(code)


def sleep() -> None:
    time.sleep(600)


def ask_for_another(pipe: Connection) -> None:
    child = CONTEXT.Process(target=tell, args=(pipe, "X"))
    child.start()
    child.join()


def answer(target: object, *arguments: object) -> tuple[int, int, str | None, bool]:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=target, args=(theirs, *arguments))
    child.start()
    theirs.close()
    found: tuple[int, int, str | None, bool] = ours.recv()
    child.join(20)
    assert child.exitcode == 0
    ours.close()
    return found


def test_a_process_is_forked_with_the_environment_of_who_asks(
    running: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINEROOM_A", "now")
    pid, parent, value, imported = answer(tell, "ENGINEROOM_A")
    assert parent == running._process.pid and pid != parent
    assert value == "now" and imported


def test_a_forked_process_has_others_forked_beside_it(running: ForkServer) -> None:
    _, parent, _, _ = answer(ask_for_another)
    assert parent == running._process.pid


def tell_processors(pipe: Connection) -> None:
    pipe.send((0, 0, str(sorted(os.sched_getaffinity(0))), True))


def ask_for_one_that_tells_processors(pipe: Connection) -> None:
    child = CONTEXT.Process(target=tell_processors, args=(pipe,))
    child.start()
    child.join()


def test_only_a_process_that_computes_is_bound_to_its_first_core() -> None:
    usable = sorted(os.sched_getaffinity(0))
    first = usable[-1]
    running = server(GOMP_CPU_AFFINITY=f"{first} {usable[0]}")
    try:
        with running.used():
            assert answer(tell_processors)[2] == str(usable)  # the engine's first process
            assert answer(ask_for_one_that_tells_processors)[2] == str([first])  # its worker
    finally:
        running.close()


@pytest.mark.parametrize("bound", [None, "", "nonsense", "100000 0"])
def test_what_binds_to_no_core_there_is_leaves_all_of_them(bound: str | None) -> None:
    assert forkserver_context._cpus(bound) == os.sched_getaffinity(0)


def tell_where_temporary_files_are(pipe: Connection) -> None:
    looked = os.environ["USUAL"] == sys.modules["looks"].WHERE
    pipe.send((0, 0, tempfile.gettempdir(), looked))


def test_each_process_has_the_folder_for_temporary_files_of_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tempfile.gettempdir()
    monkeypatch.setenv("USUAL", usual)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # an engine's, which the server outlives
    # The import looks for the folder, as vLLM's do.
    (tmp_path / "looks.py").write_text("import tempfile\nWHERE = tempfile.gettempdir()\n")
    monkeypatch.syspath_prepend(tmp_path)
    running = server(("looks",))
    try:
        with running.used():
            assert answer(tell_where_temporary_files_are)[2:] == (str(tmp_path), True)
            monkeypatch.setenv("TMPDIR", usual)
            assert answer(tell_where_temporary_files_are)[2:] == (usual, True)
    finally:
        running.close()


def test_an_engines_own_folder_needs_no_other_server(
    running: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/somewhere")
    assert running.fits(os.environ, {})
    assert answer(tell, "VLLM_RPC_BASE_PATH")[1:3] == (running._process.pid, "/somewhere")


def make_shared_memory(pipe: Connection) -> None:
    segment = SharedMemory(create=True, size=64)
    pipe.send((0, 0, segment.name, True))
    segment.close()
    segment.unlink()


def test_shared_memory_is_named_after_the_engine(
    running: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.fullmatch(r"psm_[0-9a-f]{8}", answer(make_shared_memory)[2] or "")
    monkeypatch.setenv(forkserver_context.SEGMENTS, "psm_abcdefgh_")
    names = {answer(make_shared_memory)[2] for _ in range(2)}
    assert len(names) == 2
    assert all(re.fullmatch(r"psm_abcdefgh_[0-9a-f]{8}", name or "") for name in names)


def test_how_a_process_ended_is_told(running: ForkServer) -> None:
    child = CONTEXT.Process(target=end, args=(7,))
    child.start()
    child.join(20)
    assert child.exitcode == 7
    child = CONTEXT.Process(target=sleep)
    child.start()
    assert child.pid in running.children() and child.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    assert wait([child.sentinel], 20)
    assert child.exitcode == -signal.SIGKILL
    assert not running.children()


def test_another_environment_at_the_start_is_another_process(
    running: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    assert not running.fits(os.environ, {})
    _, parent, value, _ = answer(tell, "OMP_NUM_THREADS")
    assert (parent, value) == (os.getpid(), "17")  # spawned


def test_what_it_cannot_import_is_told() -> None:
    with pytest.raises(UnusableError, match=r"no_such_module.*ModuleNotFoundError"):
        server(("no_such_module",))


def test_threads_of_an_import_are_not_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnusableError, match="threads"):
        server(("with_a_thread",))


def test_who_gives_up_does_not_wait_for_the_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(psutil.Process().children())
    with pytest.raises(UnusableError, match="nobody waits"):
        ForkServer(dict(os.environ), ["endless"], more={}, hooks=(), given_up=lambda: True)
    assert set(psutil.Process().children()) <= before


def test_closing_ends_what_it_has_started(running: ForkServer) -> None:
    child = CONTEXT.Process(target=sleep)
    child.start()
    running.close()
    assert wait([child.sentinel], 20)
    child.join()
    assert not running.usable
    with pytest.raises(OSError):
        CONTEXT.Process(target=sleep).start()


SCRIPT = """
import os, signal, time
from engineroom_vllm.forkserver import ForkServer
from engineroom_vllm.forkserver_context import CONTEXT
server = ForkServer(dict(os.environ), ["json"], more={}, hooks=())
with server.used():
    child = CONTEXT.Process(target=time.sleep, args=(600,))
    child.start()
print(server._process.pid, child.pid, flush=True)
time.sleep(600)
"""


def test_nothing_outlives_a_program_that_is_killed() -> None:
    program = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in program.stdout.readline().split()]
    program.kill()
    program.wait()
    program.stdout.close()
    assert len(processes) == 2
    _, alive = psutil.wait_procs(processes, 30)
    assert not alive


def test_a_function_is_replaced_for_a_time() -> None:
    with put_in([HERE]):
        assert context_of_the_library() is CONTEXT
    assert context_of_the_library() is None


# ── who has it ───────────────────────────────────────────────────────────────────────────────────


def lease(servers: ForkServers, **environment: str) -> forkserver.Lease:
    return servers.lease(
        {**os.environ, **environment}, ["json"], more={}, hooks=(), given_up=lambda: False
    )


def test_engines_share_a_server_and_the_last_one_ends_it() -> None:
    servers = ForkServers()
    first, second = lease(servers), lease(servers)
    assert first.server is second.server
    first.release()
    first.release()
    assert second.server.usable
    second.release()
    assert not second.server.usable


def test_its_processes_are_the_servers_and_not_what_they_have_started() -> None:
    servers = ForkServers()
    assert servers.processes() == frozenset()
    first, second = lease(servers), lease(servers, OMP_NUM_THREADS="17")
    assert servers.processes() == {first.server.pid, second.server.pid}
    first.release(keep_s=600)
    second.release()
    assert servers.processes() == {first.server.pid}
    servers._close_idle()
    assert servers.processes() == frozenset()


def test_another_environment_gets_another_server() -> None:
    servers = ForkServers()
    first, second = lease(servers), lease(servers, OMP_NUM_THREADS="17")
    assert first.server is not second.server and first.server.usable
    first.release()
    second.release()
    assert not first.server.usable and not second.server.usable


def test_a_server_stays_for_the_time_that_was_asked_for() -> None:
    servers = ForkServers()
    first = lease(servers)
    first.release(keep_s=600)
    second = lease(servers)
    assert second.server is first.server
    second.release(keep_s=0.01)
    for thread in threading.enumerate():
        if thread.name == "vllm-forkserver":  # the first one's may be about to end, too
            thread.join(20)
    assert not second.server.usable


def test_a_server_that_was_killed_is_replaced() -> None:
    servers = ForkServers()
    first = lease(servers)
    first.server._process.kill()
    first.server._process.wait()
    second = lease(servers)
    assert second.server is not first.server and second.server.usable
    first.release()
    second.release()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, {}),
        (
            {"VLLM_CPU_OMP_THREADS_BIND": "0,2", "LD_PRELOAD": "/x/libgomp-1.so"},
            {"GOMP_CPU_AFFINITY": "0 2"},
        ),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0|1", "LD_PRELOAD": "/x/libgomp-1.so"}, None),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0,2", "LD_PRELOAD": "/x/libiomp5.so"}, None),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0,2"}, None),
        ({"VLLM_CPU_OMP_THREADS_BIND": "auto", "LD_PRELOAD": "/x/libgomp-1.so"}, None),
        ({}, None),
    ],
)
def test_threads_are_bound_as_the_worker_will_be(
    environment: dict[str, str], wanted: dict[str, str] | None
) -> None:
    assert forked_binding(environment) == wanted
