"""``multiprocessing``'s private parts stand in one module, with a bound on Python's version."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from engineroom import ModelConfig
from engineroom_vllm import compat_multiprocessing, loading
from engineroom_vllm.loading import EngineStart
from engineroom_vllm.options import VLLMOptions


def test_this_python_is_below_the_bound() -> None:
    """Fails when the bound is to be lifted: how, says the module's ``BELOW``."""
    assert sys.version_info < compat_multiprocessing.BELOW
    assert compat_multiprocessing.supported()


def test_from_the_bound_on_processes_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def can_fork(self, configuration: object) -> bool:
            return True

    leased: list[Any] = []
    monkeypatch.setattr(loading, "forked_binding", lambda environment: {})
    monkeypatch.setattr(loading.SERVERS, "lease", lambda *a, **k: leased.append(a))
    start = EngineStart(ModelConfig(model_id="m", source="x"), VLLMOptions())
    start._leased(Library(), None)  # type: ignore[arg-type]
    assert len(leased) == 1
    monkeypatch.setattr(compat_multiprocessing, "BELOW", (3, 11))
    assert not compat_multiprocessing.supported()
    assert start._leased(Library(), None) is None  # type: ignore[arg-type]
    assert len(leased) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux only")
def test_segments_get_the_name_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from multiprocessing import shared_memory

    monkeypatch.setattr(shared_memory, "_SHM_NAME_PREFIX", shared_memory._SHM_NAME_PREFIX)
    monkeypatch.setattr(shared_memory, "_SHM_SAFE_NAME_LENGTH", shared_memory._SHM_SAFE_NAME_LENGTH)
    prefix = f"er{os.getpid()}-"
    compat_multiprocessing.name_segments(prefix)
    segment = shared_memory.SharedMemory(create=True, size=1)
    try:
        assert segment.name.startswith(prefix)
    finally:
        segment.close()
        segment.unlink()
