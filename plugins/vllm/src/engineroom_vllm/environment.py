"""What vLLM reads from the process's environment, set for the time of a load only."""

from __future__ import annotations

import multiprocessing.process
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from engineroom import ConfigurationError

__all__ = [
    "available_memory",
    "cpu_settings",
    "cpus",
    "engine_processes",
    "forked_binding",
    "hidden_main",
    "variables",
]

SMALL_MACHINE: Final = 4
"""Up to so many cores all of them compute; beyond, one is left for the other processes."""
_LIST: Final = frozenset("0123456789,")
_CHANGED_BY_VLLM: Final = (
    "LD_PRELOAD",
    "LOCAL_WORLD_SIZE",
    "NUMEXPR_MAX_THREADS",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
"""What vLLM sets while it configures an engine, for the processes that it is about to start.
Left there, ``LD_PRELOAD`` would go on to every program that this process starts later."""


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put back at the end what was there before.

    The environment is the process's own: callers take turns (see :mod:`.loading`).
    """
    names = {*values, *_CHANGED_BY_VLLM}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def hidden_main(started: Callable[[], bool]) -> Iterator[None]:
    """Keep new processes from running the program's main module again.

    ``multiprocessing`` imports it in each process that it spawns, and a script without
    ``if __name__ == "__main__":`` would then start over. vLLM's processes need nothing of it.

    :param started: whether the processes run; the module is shown again from then on.
    """
    main = sys.modules["__main__"]
    before = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    done = threading.Event()

    def wait() -> None:
        try:
            while not done.wait(0.05) and not started():
                pass
        finally:
            for name, value in before.items():
                setattr(main, name, value)

    if "__file__" in before:
        del main.__file__
    main.__spec__ = None
    thread = threading.Thread(target=wait, name="vllm-main", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def cpus() -> list[int]:
    """Numbers of the processors to compute with: one for each physical core that may be used."""
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return list(range(os.cpu_count() or 1))
    cores: dict[str, int] = {}
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = siblings.read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, cpu)
    return sorted(cores.values())


def cpu_settings(
    usable: Sequence[int], threads: int | None, *, bind: bool, ranks: int = 1
) -> tuple[dict[str, str], str]:
    """Variables for vLLM on CPUs, and a line for the log that says what they mean.

    :param usable: processors to compute with, one a core.
    :param threads: how many of them; ``None``: all on a small machine, else all but one.
    :param bind: keep each thread on its own processor.
    :param ranks: processes that compute; each gets its part of the processors.
    :raises ConfigurationError: there are fewer processors than processes.
    """
    count = len(usable)
    if threads is None:
        threads = count if count <= SMALL_MACHINE else count - 1
    if threads < ranks:
        raise ConfigurationError(
            f"{ranks} processes on {threads} cores: each needs one; lower tensor_parallel_size "
            "or pipeline_parallel_size"
        )
    share = threads // ranks
    settings = {"OMP_NUM_THREADS": str(share), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if not bind or threads > count:
        return settings, f"{threads} threads, not bound to cores"
    parts = [usable[rank * share : (rank + 1) * share] for rank in range(ranks)]
    settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, part)) for part in parts)
    names = ", ".join(str(cpu) for part in parts for cpu in part)
    return settings, f"{share * ranks} threads, bound to cores {names} of {count}"


def forked_binding(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What vLLM will set for its worker to bind threads, which libgomp reads when it is loaded.

    :param environment: as vLLM's own configuration has left it.
    :returns: variables that the process has to be started with from which the worker is forked;
        ``None``: another OpenMP, which binds a process before it is forked.
    """
    bind = environment.get("VLLM_CPU_OMP_THREADS_BIND")
    if bind == "nobind":
        return {}
    preloaded = environment.get("LD_PRELOAD", "")
    if bind is None or "libgomp" not in preloaded or "|" in bind or not set(bind) <= _LIST:
        return None
    return {"GOMP_CPU_AFFINITY": bind.replace(",", " ")}


def available_memory() -> int:
    """Bytes of main memory that this process and its children may still take."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        left = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no control group, or no limit
        return free
    return max(0, min(free, left))


def engine_processes() -> set[int]:
    """Process ids of the engines that this process has started and that have not been waited
    for.
    """
    children = multiprocessing.process.active_children()
    return {child.pid for child in children if child.pid and child.name.startswith("EngineCore")}
