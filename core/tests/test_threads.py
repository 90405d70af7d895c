"""How many threads computing on the CPU uses by default."""

from __future__ import annotations

import os

import psutil
import pytest
from hypothesis import given, settings, strategies as st

from engineroom import default_threads


def machine(
    patch: pytest.MonkeyPatch, usable: int | None, logical: int | None, physical: int | None
) -> None:
    """A machine of so many processors, of which the process may use some (None: who knows)."""
    if usable is None:
        patch.delattr(os, "sched_getaffinity", raising=False)
    else:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
    patch.setattr(os, "cpu_count", lambda: logical)
    patch.setattr(psutil, "cpu_count", lambda logical=True: counts[logical])
    counts = {True: logical, False: physical}


@pytest.mark.parametrize(
    ("usable", "logical", "physical", "threads"),
    [
        (8, 8, 8, 8),
        (16, 16, 8, 8),  # two threads a core: they share what ggml needs
        (4, 16, 8, 2),  # a quarter of such a machine
        (1, 16, 8, 1),
        (3, 64, 64, 3),
        (2, 64, None, 2),  # who cannot tell cores from threads
        (4, None, None, 4),
        (2, 2, 8, 2),  # some containers count the host's cores
        (None, 16, 8, 8),  # no affinity on macOS and Windows
        (None, None, None, 1),
    ],
)
def test_threads_are_the_physical_cores_that_the_process_may_use(
    usable: int | None,
    logical: int | None,
    physical: int | None,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, usable, logical, physical)
    assert default_threads() == threads


@settings(deadline=None)
@given(
    usable=st.integers(1, 300),
    logical=st.none() | st.integers(1, 300),
    physical=st.none() | st.integers(1, 300),
)
def test_threads_are_never_more_than_the_process_may_use(
    usable: int, logical: int | None, physical: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine(patch, usable, logical, physical)
        assert 1 <= default_threads() <= usable


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="there is no affinity here")
def test_threads_fit_this_machine() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
