"""What vLLM reads from the environment: set for a load, and put back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engineroom import ConfigurationError
from engineroom_vllm import environment
from engineroom_vllm.environment import available_memory, cpu_settings, cpus, variables


def test_variables_are_put_back_with_what_vllm_sets_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    before = dict(os.environ)
    with variables({"OMP_NUM_THREADS": "2", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}):
        assert os.environ["OMP_NUM_THREADS"] == "2"
        os.environ["LD_PRELOAD"] = "/of/vllm.so"  # as vLLM does
    assert dict(os.environ) == before
    with pytest.raises(ValueError, match="fails"), variables({"OMP_NUM_THREADS": "3"}):
        raise ValueError("fails")
    assert dict(os.environ) == before


def test_a_small_machine_leaves_no_core_idle_and_a_larger_one_leaves_one() -> None:
    found, said = cpu_settings([0, 1], None, bind=True)
    assert found == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "0,1"}
    assert "2 threads, bound to cores 0, 1 of 2" in said
    found, _ = cpu_settings([0, 2, 4, 6], None, bind=True)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0,2,4,6"
    found, _ = cpu_settings(range(0, 16, 2), None, bind=True)
    assert found == {
        "OMP_NUM_THREADS": "7",
        "VLLM_CPU_OMP_THREADS_BIND": "0,2,4,6,8,10,12",
    }


def test_threads_may_be_chosen_and_left_unbound() -> None:
    found, _ = cpu_settings([3, 5, 7], 2, bind=True)
    assert found == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "3,5"}
    found, said = cpu_settings([3, 5, 7], 2, bind=False)
    assert found == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert "not bound" in said
    found, _ = cpu_settings([0], 4, bind=True)
    assert found == {"OMP_NUM_THREADS": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def test_several_processes_share_the_cores() -> None:
    found, _ = cpu_settings([0, 1, 2, 3], None, bind=True, ranks=2)
    assert found == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}
    with pytest.raises(ConfigurationError, match="3 processes on 2 cores"):
        cpu_settings([0, 1], None, bind=True, ranks=3)


def test_the_cores_are_some_that_the_process_may_use() -> None:
    found = cpus()
    assert found
    if hasattr(os, "sched_getaffinity"):
        assert set(found) <= os.sched_getaffinity(0)


def test_there_is_some_memory() -> None:
    assert available_memory() > 0


def test_no_engine_runs_here() -> None:
    assert environment.engine_processes() == set()


SCRIPT = """
import multiprocessing, threading
from engineroom_vllm.environment import hidden_main
print("the script runs")
context = multiprocessing.get_context("spawn")
with hidden_main(lambda: False):
    process = context.Process(target=threading.main_thread)
    process.start()
    process.join()
assert process.exitcode == 0, process.exitcode
import __main__
assert __main__.__file__.endswith("script.py")
print("the end")
"""


@pytest.mark.parametrize("arguments", [["script.py"], ["-m", "script"]])
def test_a_script_without_a_guard_is_not_run_again_by_its_processes(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:2] == ["the script runs", "the end"], done.stderr


def test_the_main_module_is_shown_again_once_the_processes_run() -> None:
    main = sys.modules["__main__"]
    before = (getattr(main, "__file__", None), main.__spec__)
    shown = threading.Event()
    with environment.hidden_main(shown.is_set):
        assert getattr(main, "__file__", None) is None
        shown.set()
        while main.__spec__ is not before[1] or getattr(main, "__file__", None) != before[0]:
            pass
    assert (getattr(main, "__file__", None), main.__spec__) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_is_shown_again_where_it_cannot_be_said_whether_they_run() -> None:
    main = sys.modules["__main__"]
    before = (getattr(main, "__file__", None), main.__spec__)

    asked = threading.Event()

    def fail() -> bool:
        asked.set()
        raise SystemExit(3)

    with environment.hidden_main(fail):
        assert asked.wait(20)
    assert (getattr(main, "__file__", None), main.__spec__) == before
