"""The life of an engine: loads that fail, loads nobody waits for, death, and what is left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engineroom import (
    ConfigurationError,
    ModelConfig,
    ResourceNotAvailableError,
)
from engineroom_vllm import VLLMHandler
from engineroom_vllm.environment import available_memory, engine_processes

Make = Callable[..., Any]
SMALL = {"n_ctx": 512, "kv_cache_memory": "256MiB"}
CHANGED = ("LD_PRELOAD", "VLLM_LOGGING_CONFIG_PATH", "VLLM_CPU_OMP_THREADS_BIND")


def shared_memory() -> set[str]:
    return {file.name for file in Path("/dev/shm").glob("psm_*")}


@pytest.fixture(autouse=True)
def nothing_temporary_is_left(temporary: Path) -> Iterator[None]:
    """Whatever becomes of an engine."""
    yield
    assert list(temporary.iterdir()) == []


def sockets(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


def config(source: Path, **options: Any) -> ModelConfig:
    return ModelConfig(model_id="m", source=str(source), options={**SMALL, **options})


def copy_of(model: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(model, to)
    file = to / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return to


async def failure(source: Path, **options: Any) -> Exception:
    before = shared_memory()
    with pytest.raises((ConfigurationError, ResourceNotAvailableError)) as caught:
        await VLLMHandler().load_model(config(source, **options))
    assert engine_processes() == set()
    assert shared_memory() <= before
    return caught.value


# ── loads that fail ──────────────────────────────────────────────────────────────────────────────


async def test_an_unknown_architecture_is_told(tiny_model: Path, tmp_path: Path) -> None:
    odd = copy_of(tiny_model, tmp_path / "odd", architectures=["OddForCausalLM"], model_type="odd")
    error = await failure(odd)
    assert isinstance(error, ConfigurationError)
    assert "odd" in str(error).lower()


async def test_an_unknown_engine_argument_is_told_with_the_nearest(tiny_model: Path) -> None:
    error = await failure(tiny_model, engine_args={"block_sise": 32})
    assert isinstance(error, ConfigurationError)
    assert "block_sise: there is no such argument" in str(error)
    assert "'block_size'" in str(error)


async def test_more_memory_than_there_is_is_refused_before_anything_starts(
    tiny_model: Path,
) -> None:
    error = await failure(tiny_model, kv_cache_memory="64TiB")
    assert isinstance(error, ResourceNotAvailableError)
    assert "kv_cache_memory" in str(error) and "are free" in str(error)


async def test_a_cache_smaller_than_one_context_is_told_by_the_engine_itself(
    tiny_model: Path,
) -> None:
    # Its own processes find that out, after they have started.
    error = await failure(tiny_model, kv_cache_memory="4KiB")
    assert isinstance(error, ResourceNotAvailableError)
    assert "kv_cache_memory" in str(error)


@pytest.mark.parametrize("victim", ["engine core", "worker"])
async def test_a_load_whose_process_is_killed_says_that_memory_was_short(
    tiny_model: Path, victim: str
) -> None:
    """As the kernel does where memory runs out."""
    loading = asyncio.create_task(failure(tiny_model, keep_ready_s=60))
    while not (cores := engine_processes()):
        assert not loading.done()
        await asyncio.sleep(0.02)
    found = cores if victim == "engine core" else set()
    while not found:  # forked by the core
        assert not loading.done()
        await asyncio.sleep(0.02)
        found = {child.pid for core in cores for child in psutil.Process(core).children()}
    os.kill(found.pop(), signal.SIGKILL)
    error = await loading
    assert isinstance(error, ResourceNotAvailableError)
    assert "killed while it loaded, most often for want of memory" in str(error)
    assert "lower max_model_len or kv_cache_memory" in str(error)


async def test_weights_of_another_model_are_told(tiny_model: Path, tmp_path: Path) -> None:
    odd = copy_of(tiny_model, tmp_path / "odd", num_hidden_layers=2, hidden_size=64)
    error = await failure(odd)
    assert isinstance(error, ConfigurationError)


async def test_a_load_that_takes_too_long_ends(tiny_model: Path) -> None:
    error = await failure(tiny_model, load_timeout_s=0.5)
    assert isinstance(error, ResourceNotAvailableError)
    assert "load_timeout_s" in str(error)


async def test_a_load_that_nobody_waits_for_leaves_nothing(
    temporary: Path, tiny_model: Path
) -> None:
    before = shared_memory()
    load = asyncio.create_task(VLLMHandler().load_model(config(tiny_model)))
    while not engine_processes():
        assert not load.done()
        await asyncio.sleep(0.05)
    children = psutil.Process().children(recursive=True)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    while engine_processes():
        await asyncio.sleep(0.05)
    while list(temporary.iterdir()):
        await asyncio.sleep(0.05)
    assert shared_memory() <= before
    left = [p for p in children if p.is_running() and "VLLM" in p.name()]
    assert not left


# ── death ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("victim", ["engine core", "worker"])
def test_a_killed_engine_ends_its_requests_at_once_and_leaves_nothing(
    make: Make, temporary: Path, victim: str
) -> None:
    before = shared_memory()
    bench = make()
    loaded = bench.load()
    engine = bench.engine
    processes = engine.footprint.alive()
    core = engine.footprint.roots[0]
    worker = next(p.pid for p in processes if p.pid != core)
    assert sockets(temporary)

    async def die() -> tuple[Any, float]:
        running = asyncio.create_task(
            bench.service.infer(bench.request(max_new_tokens=400, temperature=1.0))
        )
        stream = bench.service.stream(bench.request(max_new_tokens=400, temperature=1.0))
        await anext(stream)
        os.kill(core if victim == "engine core" else worker, signal.SIGKILL)
        killed = time.monotonic()
        async for _ in stream:
            pass
        return (await running, stream.response), time.monotonic() - killed

    responses, took = bench.run(die())
    for response in responses:
        assert response.error_type == "EngineDeadError", response
        assert "unload the model and load it again" in response.error_message
        assert response.generated_text is not None
    assert took < 60, took  # it would wait for ever
    health = bench.handler.health(loaded)
    assert not health.ok and "has died" in health.detail
    assert health.num_requests_running == health.num_requests_waiting == 0
    bench.run(bench.until(lambda: not engine.footprint.alive()))
    bench.run(bench.until(lambda: not sockets(temporary)))
    bench.run(bench.manager.unload("m"))  # which the manager may have done already
    assert shared_memory() <= before
    assert engine_processes() == set()
    # And it can be loaded anew.
    assert bench.answer().error_message is None


def test_unloading_ends_what_runs_without_force_and_leaves_nothing(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    before = shared_memory()
    environment = {name: os.environ.get(name) for name in CHANGED}
    bench = make()
    bench.load()
    engine = bench.engine
    assert {name: os.environ.get(name) for name in CHANGED} == environment

    async def unload() -> Any:
        stream = bench.handler.stream_infer(bench.loaded, bench.request(max_new_tokens=400))
        await anext(stream)
        await bench.handler.unload_model(bench.loaded)
        with pytest.raises(ResourceNotAvailableError, match="was unloaded"):
            async for _ in stream:
                pass

    bench.run(unload())
    assert engine.footprint.alive() == []
    assert shared_memory() <= before
    assert not [r for r in caplog.records if "killed" in r.getMessage()]


def test_a_load_tells_how_far_it_is(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    bench = make()
    with caplog.at_level("INFO", logger="engineroom.vllm"):
        bench.load()
    said = [r.getMessage() for r in caplog.records if r.name == "engineroom.vllm"]
    stages = [
        r"model 'm': \d+ threads, ",
        r"model 'm': vLLM \S+, 512 tokens of context, 8 requests at one time, 256 MiB of cache",
        r"model 'm': loading the weights",
        r"model 'm': the weights were loaded in [\d.]+ s",
        r"model 'm': the cache has room for [\d,]+ tokens",
        r"model 'm': the engine is ready after \d+ s",
    ]
    places = [next((i for i, m in enumerate(said) if re.match(s, m)), -1) for s in stages]
    assert places == sorted(places) and places[0] >= 0, said


def test_a_second_engine_runs_beside_the_first_where_there_is_memory_for_both(
    make: Make, tiny_model: Path
) -> None:
    first = make()
    first.load()
    free = available_memory()
    second = make(kv_cache_memory=free)
    # Whoever sees it first: the manager's account, or the plugin, which looks at the machine.
    with pytest.raises(ResourceNotAvailableError, match="is free|are free"):
        second.load()
    assert first.answer().error_message is None


SCRIPT = """
import psutil
from engineroom import InferenceRequest, LLMInferenceService, LLMModelManager
from engineroom_vllm import VLLMHandler
print("begin", flush=True)
model = {"model_id": "m", "source": SOURCE, "runtime": "vllm", "options": OPTIONS}
manager = LLMModelManager(config={"models": [model]})
with LLMInferenceService(manager, handlers=[VLLMHandler()]) as service:
    response = service.run(
        InferenceRequest(model_id="m", prompt="x", params={"max_new_tokens": 4})
    )
    response.raise_for_error()
    print(response.generated_tokens, flush=True)
children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
assert not [child for child in children if "forkserver" in child], children
print("end", flush=True)
"""


def test_a_script_without_a_guard_runs_once_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    before = shared_memory()
    script = tmp_path / "script.py"
    text = SCRIPT.replace("SOURCE", repr(str(tiny_model))).replace("OPTIONS", repr(SMALL))
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=400
    )
    assert done.stdout.split() == ["begin", "4", "end"], done.stderr
    assert done.returncode == 0
    assert "leaked" not in done.stderr
    assert shared_memory() <= before
