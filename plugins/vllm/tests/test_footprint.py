"""Processes and shared memory of an engine, with processes and segments that are no engine's."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from engineroom_vllm.footprint import Footprint

PARENT = """
import subprocess, sys, time
code = "import time; print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
time.sleep(600)
"""


@pytest.fixture
def family() -> Iterator[psutil.Popen]:
    """A process with a child: what stands in for an engine with its worker."""
    parent = psutil.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    everyone = [*parent.children(recursive=True), parent]
    yield parent
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    parent.wait()
    parent.stdout.close()


def test_a_process_counts_with_its_children(family: psutil.Popen) -> None:
    footprint = Footprint([family.pid])
    assert len(footprint.alive()) == 2
    assert footprint.memory_bytes > 0
    assert footprint.roots == (family.pid,)


def test_what_lives_on_is_ended(family: psutil.Popen) -> None:
    footprint = Footprint([family.pid])
    assert footprint.remove(0) == 2
    assert footprint.alive() == []
    assert footprint.remove(0) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory has files on Linux only")
def test_shared_memory_that_nobody_was_seen_with_is_known_by_its_name() -> None:
    footprint = Footprint(segments="psm_engine7_")
    ours, other = (SharedMemory(f"psm_engine{n}_a", create=True, size=64) for n in (7, 8))
    for segment in (ours, other):
        segment.close()
    footprint.remove(0)
    left = {path.name for path in Path("/dev/shm").glob("psm_engine*")}
    other.unlink()
    assert left == {"psm_engine8_a"}


def test_files_and_sockets_go_with_the_processes(family: psutil.Popen, tmp_path: Path) -> None:
    folders = [tmp_path / "files", tmp_path / "sockets"]
    for folder in folders:
        folder.mkdir()
        (folder / "left").touch()
    footprint = Footprint([family.pid], folders)
    assert footprint.remove(0) == 2
    assert list(tmp_path.iterdir()) == []
    assert footprint.remove(0) == 0


def test_a_child_is_ended_whose_parent_was_killed(family: psutil.Popen) -> None:
    footprint = Footprint([family.pid])
    family.kill()
    family.wait()
    assert len(footprint.alive()) == 1
    assert footprint.remove(0) == 1
    assert footprint.alive() == []


def test_what_ends_by_itself_is_waited_for() -> None:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0.3,))
    process.start()
    assert process.pid is not None
    footprint = Footprint([process.pid])
    assert footprint.remove(30) == 0
    # The exit status is multiprocessing's to take.
    process.join()
    assert process.exitcode == 0


def test_processes_that_are_gone_already_are_no_mistake() -> None:
    done = psutil.Popen([sys.executable, "-c", ""])
    done.wait()
    footprint = Footprint([done.pid])
    assert footprint.alive() == [] and footprint.memory_bytes == 0
    assert footprint.remove(0) == 0


LEAVES = """
from multiprocessing import get_context, shared_memory
import os, sys, time
from engineroom_vllm.footprint import Footprint

def leave(pipe):
    segment = shared_memory.SharedMemory(create=True, size=4096)
    pipe.send(segment.name)
    time.sleep(600)

if __name__ == "__main__":
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=leave, args=(theirs,))
    process.start()
    name = ours.recv()
    other = shared_memory.SharedMemory(create=True, size=4096)
    footprint = Footprint([process.pid])
    process.kill()
    process.join()
    assert os.path.exists(f"/dev/shm/{name}")
    footprint.remove(0)
    assert not os.path.exists(f"/dev/shm/{name}")
    assert os.path.exists(f"/dev/shm/{other.name}")
    footprint.remove(0)  # what is removed already is no mistake
    other.close()
    other.unlink()
    print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc here")
def test_shared_memory_that_a_killed_process_left_is_removed_and_not_missed(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(LEAVES, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "done", done.stderr
    # Python's resource tracker would tell of what it thinks has leaked.
    assert done.stderr == ""
