"""What is used of ``multiprocessing``'s insides does what it is used for."""

from __future__ import annotations

import os
import sys
from multiprocessing import shared_memory

import pytest

from engineroom_vllm.compat_multiprocessing import name_segments


@pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux only")
def test_segments_get_the_name_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_SHM_NAME_PREFIX", shared_memory._SHM_NAME_PREFIX)
    monkeypatch.setattr(shared_memory, "_SHM_SAFE_NAME_LENGTH", shared_memory._SHM_SAFE_NAME_LENGTH)
    prefix = f"er{os.getpid()}-"
    name_segments(prefix)
    segment = shared_memory.SharedMemory(create=True, size=1)
    try:
        assert segment.name.startswith(prefix)
    finally:
        segment.close()
        segment.unlink()
