"""Folders of an engine's own: where they are, who may enter, and that they go."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from engineroom import ResourceNotAvailableError
from engineroom_vllm import scratch as scratch_module
from engineroom_vllm.scratch import SEGMENTS, Scratch, remove_abandoned

HOLD = (
    "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
    "from engineroom_vllm.scratch import Scratch\n"
    "print(Scratch().folder, flush=True); sys.stdin.read()"
)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files, with a path as short as such folders have."""
    folder = Path(tempfile.mkdtemp(prefix="e-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "VLLM_RPC_BASE_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    shutil.rmtree(folder)


def test_nobody_else_may_enter_and_nothing_stays(base: Path) -> None:
    scratch = Scratch()
    assert scratch.folder.parent == base
    for folder in (scratch.folder, scratch.temporary, scratch.sockets):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (scratch.temporary / "deep").mkdir()
    (scratch.temporary / "deep" / "file").touch()
    (scratch.folder / "engine.log").touch()
    scratch.close()
    scratch.close()
    assert list(base.iterdir()) == []


def test_the_engine_is_told_where_they_are(base: Path) -> None:
    scratch = Scratch()
    found = scratch.variables()
    assert found["TMPDIR"] == found["VLLM_RPC_BASE_PATH"] == str(scratch.temporary)
    assert found[SEGMENTS] == scratch.segments
    assert scratch.folder.name.rpartition(".")[2] in scratch.segments
    # What torch has compiled is for the next engine, too.
    assert Path(found["TORCHINDUCTOR_CACHE_DIR"]).parent == base
    scratch.close()


def test_who_has_a_place_for_what_is_compiled_keeps_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    scratch = Scratch()
    assert "TORCHINDUCTOR_CACHE_DIR" not in scratch.variables()
    scratch.close()


def test_what_goes_to_other_machines_names_no_folder_of_this_one(base: Path) -> None:
    scratch = Scratch()
    assert "VLLM_RPC_BASE_PATH" not in scratch.variables(elsewhere=True)
    scratch.close()


def test_sockets_are_where_their_path_is_short_enough(base: Path) -> None:
    deep = base / ("x" * 60)
    deep.mkdir()
    tempfile.tempdir = str(deep)  # which the fixture puts back
    scratch = Scratch([str(base)])
    assert scratch.temporary.is_relative_to(deep)
    assert scratch.sockets.parent == base
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{scratch.sockets}/{uuid4()}")
    scratch.close()
    assert list(base.iterdir()) == [deep] and list(deep.iterdir()) == []


def test_sockets_are_where_the_user_wants_them(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = base / "wanted"
    wanted.mkdir()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(wanted))
    scratch = Scratch()
    assert scratch.sockets.parent == wanted
    assert scratch.variables()["VLLM_RPC_BASE_PATH"] == str(scratch.sockets)
    scratch.close()
    assert list(wanted.iterdir()) == []


def test_no_path_that_is_short_enough_is_told(base: Path) -> None:
    deep = base / ("x" * 60)
    deep.mkdir()
    tempfile.tempdir = str(deep)
    with pytest.raises(ResourceNotAvailableError, match=r"VLLM_RPC_BASE_PATH.*at most 41 bytes"):
        Scratch([str(deep)])
    assert list(deep.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told(base: Path) -> None:
    tempfile.tempdir = str(base / "none")
    with pytest.raises(ResourceNotAvailableError, match="TMPDIR"):
        Scratch()


def test_what_a_killed_program_left_is_removed_by_the_next_one(base: Path) -> None:
    ours = Scratch()
    held: list[subprocess.Popen[str]] = []
    for _ in range(2):
        command = [sys.executable, "-c", HOLD, str(base)]
        held.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
            )
        )
    folders = []
    for each in held:
        assert each.stdout is not None
        folders.append(Path(each.stdout.readline().strip()))
    killed, living = held
    killed.kill()
    killed.wait()
    (base / "engineroom-vllm.file").touch()  # not one of ours
    (base / "engineroom-vllm.link").symlink_to("/")
    next_one = Scratch()
    assert {ours.folder, next_one.folder, folders[1]} < set(base.iterdir())
    assert not folders[0].exists()
    next_one.close()
    ours.close()
    living.kill()
    living.wait()
    for each in held:
        assert each.stdin is not None and each.stdout is not None
        each.stdin.close()
        each.stdout.close()
    remove_abandoned(base)
    assert sorted(p.name for p in base.iterdir()) == [
        "engineroom-vllm.file",
        "engineroom-vllm.link",
    ]


def test_a_folder_that_is_taken_for_abandoned_before_it_is_locked_is_made_anew(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, asked = fcntl.flock, []

    def another_is_quicker(fd: int, how: int) -> None:
        asked.append(fd)
        if len(asked) == 1:  # it has the lock
            raise BlockingIOError
        if len(asked) == 2:  # it had the lock, and has removed the folder
            mine = os.fstat(fd)
            shutil.rmtree(next(p for p in base.iterdir() if os.path.samestat(p.stat(), mine)))
        lock(fd, how)

    monkeypatch.setattr(scratch_module.fcntl, "flock", another_is_quicker)
    scratch = Scratch()
    assert len(asked) == 3
    assert scratch.temporary.is_dir()
    scratch.close()


def test_a_file_system_without_locks_loses_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(scratch_module.fcntl, "flock", no_locks)
    first, second = Scratch(), Scratch()
    assert first.folder.is_dir()
    for each in (first, second):
        each.close()
    assert list(base.iterdir()) == []
