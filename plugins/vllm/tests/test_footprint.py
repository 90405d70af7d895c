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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc here")
def test_shared_memory_that_was_left_behind_is_removed() -> None:
    code = (
        "from multiprocessing import shared_memory, resource_tracker\n"
        "import time\n"
        "s = shared_memory.SharedMemory(create=True, size=4096)\n"
        "resource_tracker.unregister(s._name, 'shared_memory')\n"
        "print(s.name, flush=True); time.sleep(600)\n"
    )
    process = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    other = SharedMemory(create=True, size=4096)
    # As an engine's processes do, who share the resource tracker of the process that began them.
    from multiprocessing import resource_tracker

    resource_tracker.register(f"/{name}", "shared_memory")
    try:
        footprint = Footprint([process.pid])
        process.kill()
        process.wait()
        assert Path("/dev/shm", name).exists()
        footprint.remove(0)
        assert not Path("/dev/shm", name).exists()
        assert Path("/dev/shm", other.name).exists()
        footprint.remove(0)  # what is removed is no mistake
    finally:
        process.stdout.close()
        other.close()
        other.unlink()
