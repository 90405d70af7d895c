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
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest

from engineroom import ModelConfig
from engineroom_vllm import forkserver_main, loading
from engineroom_vllm.compat_multiprocessing import ForkedContext
from engineroom_vllm.environment import forked_binding
from engineroom_vllm.forkserver import ForkServer, ForkServers, UnusableError
from engineroom_vllm.loading import EngineStart
from engineroom_vllm.options import VLLMOptions
from engineroom_vllm.scratch import SEGMENTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux only")
HERE = (__name__, "context_of_the_library")
CONTEXT = ForkedContext()


def context_of_the_library() -> object:
    """Stands for vLLM's function of that kind."""
    return None


def server(modules: tuple[str, ...] = ("json",), **more: str) -> ForkServer:
    return ForkServer({**os.environ, **more}, modules)


@pytest.fixture
def running() -> Iterator[ForkServer]:
    started = server()
    with started.used(*HERE):
        yield started
    started.close()


def tell(pipe: Connection, name: str) -> None:
    pipe.send((os.getpid(), os.getppid(), os.environ.get(name), "json" in sys.modules))


def end(code: int) -> None:
    raise SystemExit(code)


def sleep() -> None:
    time.sleep(600)


def start_a_worker(pipe: Connection, target: Callable[..., None], *arguments: object) -> None:
    """As vLLM does in an engine's first process."""
    context: Any = get_context(os.environ["VLLM_WORKER_MULTIPROC_METHOD"])
    child = context.Process(target=target, args=(pipe, *arguments))
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


def tell_of_the_family(pipe: Connection) -> None:
    pipe.send((os.getppid(), psutil.Process().parent().ppid(), None, "json" in sys.modules))


def test_an_engine_forks_its_worker_itself(running: ForkServer) -> None:
    engine, parent, _, imported = answer(start_a_worker, tell_of_the_family)
    assert engine != running.pid and parent == running.pid and imported


def tell_the_working_folder(pipe: Connection) -> None:
    pipe.send((0, 0, str(Path.cwd()), True))


def test_a_process_works_in_the_folder_of_who_asks(
    running: ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert answer(tell_the_working_folder)[2] == str(tmp_path)


def tell_processors(pipe: Connection) -> None:
    pipe.send((0, 0, str(sorted(os.sched_getaffinity(0))), True))


def test_only_a_process_that_computes_is_bound_to_its_first_core() -> None:
    usable = sorted(os.sched_getaffinity(0))
    first = usable[-1]
    running = server(GOMP_CPU_AFFINITY=f"{first} {usable[0]}")
    try:
        with running.used(*HERE):
            assert answer(tell_processors)[2] == str(usable)  # the engine's first process
            assert answer(start_a_worker, tell_processors)[2] == str([first])
    finally:
        running.close()


@pytest.mark.parametrize("bound", [None, "", "nonsense", "100000 0"])
def test_what_binds_to_no_core_there_is_leaves_all_of_them(
    monkeypatch: pytest.MonkeyPatch, bound: str | None
) -> None:
    monkeypatch.delenv("GOMP_CPU_AFFINITY", raising=False)
    if bound is not None:
        monkeypatch.setenv("GOMP_CPU_AFFINITY", bound)
    usable = os.sched_getaffinity(0)
    forkserver_main._bind()
    assert os.sched_getaffinity(0) == usable


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
        with running.used(*HERE):
            assert answer(tell_where_temporary_files_are)[2:] == (str(tmp_path), True)
            monkeypatch.setenv("TMPDIR", usual)
            assert answer(tell_where_temporary_files_are)[2:] == (usual, True)
    finally:
        running.close()


def test_an_engines_own_folder_needs_no_other_server(
    running: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/somewhere")
    assert running.fits(os.environ)
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
    monkeypatch.setenv(SEGMENTS, "psm_abcdefgh_")
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
    children = psutil.Process(running.pid).children
    assert [child.pid] == [process.pid for process in children()] and child.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    assert wait([child.sentinel], 20)
    assert child.exitcode == -signal.SIGKILL
    assert not children()


def test_only_what_is_read_at_the_start_needs_another_server(running: ForkServer) -> None:
    assert not running.fits({**os.environ, "OMP_NUM_THREADS": "17"})
    assert not running.fits({**os.environ, "LD_PRELOAD": "/of/vllm.so"})
    assert running.fits({**os.environ, "ENGINEROOM_A": "now", "TMPDIR": "/somewhere"})


def test_what_it_cannot_import_is_told() -> None:
    with pytest.raises(UnusableError, match=r"no_such_module.*ModuleNotFoundError"):
        server(("no_such_module",))


def test_an_import_that_ends_the_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "that_leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnusableError, match=r"that_leaves.*SystemExit: 3"):
        server(("that_leaves",))


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
        ForkServer(dict(os.environ), ["endless"], given_up=lambda: True)
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
import multiprocessing
from engineroom_vllm.forkserver import ForkServer
server = ForkServer(dict(os.environ), ["json"])
with server.used("multiprocessing", "get_context"):
    child = multiprocessing.get_context().Process(target=time.sleep, args=(600,))
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
    running = server()
    with running.used(*HERE):
        assert isinstance(context_of_the_library(), ForkedContext)
    assert context_of_the_library() is None
    running.close()


# ── who has it ───────────────────────────────────────────────────────────────────────────────────


def take(servers: ForkServers, **environment: str) -> ForkServer:
    return servers.take({**os.environ, **environment}, ["json"])


def test_engines_share_a_server_and_the_last_one_ends_it() -> None:
    servers = ForkServers()
    server = take(servers)
    assert take(servers) is server
    servers.give_back(server)
    assert server.usable
    servers.give_back(server)
    assert not server.usable


def test_a_load_gives_its_server_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = ForkServers()
    monkeypatch.setattr(loading, "SERVERS", servers)
    start = EngineStart(ModelConfig(model_id="m", source="x"), VLLMOptions())
    start._server = server = take(servers)
    assert take(servers) is server
    start._give_back()
    start._give_back()
    assert server.usable
    servers.give_back(server)
    assert not server.usable


def test_its_processes_are_the_servers_and_not_what_they_have_started() -> None:
    servers = ForkServers()
    assert servers.processes() == frozenset()
    first, second = take(servers), take(servers, OMP_NUM_THREADS="17")
    assert servers.processes() == {first.pid, second.pid}
    servers.give_back(first, keep_s=600)
    servers.give_back(second)
    assert servers.processes() == {first.pid}
    servers.close_idle()
    assert servers.processes() == frozenset()


def test_another_environment_gets_another_server() -> None:
    servers = ForkServers()
    first, second = take(servers), take(servers, OMP_NUM_THREADS="17")
    assert first is not second and first.usable
    servers.give_back(first)
    servers.give_back(second)
    assert not first.usable and not second.usable


def test_a_server_stays_for_the_time_that_was_asked_for() -> None:
    servers = ForkServers()
    server = take(servers)
    servers.give_back(server, keep_s=600)
    assert take(servers) is server
    servers.give_back(server, keep_s=0.01)
    for thread in threading.enumerate():
        if thread.name == "vllm-forkserver":  # the first one's may be about to end, too
            thread.join(20)
    assert not server.usable


def test_a_server_that_was_killed_is_replaced() -> None:
    servers = ForkServers()
    first = take(servers)
    first._process.kill()
    first._process.wait()
    second = take(servers)
    assert second is not first and second.usable
    servers.give_back(first)
    servers.give_back(second)


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
