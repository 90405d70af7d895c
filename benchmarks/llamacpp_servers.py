"""The servers that llama.cpp's bars compare with, and clients that ask them by HTTP.

llama.cpp's own, which xllamacpp carries, and llama-cpp-python's. Both are asked on the loopback
interface for streams.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from benchmarks.foreign_servers import Clients, ServerProcess, events
from benchmarks.harness import UnavailableError
from benchmarks.llamacpp_sides import OPTIONS, instructions
from benchmarks.service import EIGHT

__all__ = ["NativeServerSide", "PythonServerSide"]

_STARTING: Final = 60.0
_PYTHON_SERVER: Final = (
    "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings", "yaml",
)  # fmt: skip


class NativeServerSide(Clients):
    """llama.cpp's own server, which xllamacpp carries, and clients that ask it by HTTP.

    Its threads need no interpreter, so that the clients of the same process do not hold it up.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = OPTIONS["n_ctx"]
        params.n_parallel = EIGHT
        params.n_gpu_layers = 0
        params.kv_unified = True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cont_batching = True
        params.cache_prompt = False
        params.port = 0
        params.warmup = False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)
        self._address = urlsplit(self._server.listening_address)

    def built_for(self) -> str:
        """Which of the processor's instructions its library uses."""
        import xllamacpp

        return instructions(xllamacpp.get_system_info())

    def _ask(self, prompt: str, count: int) -> int:
        """The number of tokens of an answer."""
        body = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "top_k": 1,
            "samplers": ["top_k"],
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        tokens = 0
        for event in events(self._address.port or 0, "/completion", body, "llama.cpp's server"):
            if event.get("stop"):
                tokens = int(event["tokens_predicted"])
        return tokens

    def close(self) -> None:
        """End the server."""
        del self._server


class PythonServerSide(ServerProcess, Clients):
    """llama-cpp-python's own server in a process of its own, and clients. Use in a ``with``.

    It answers one request after another. It is told not to break off an answer when the next
    request comes, which it would by itself, and to keep no logits but the last ones.

    :param ends: tokens that end an answer, which it is not to choose.
    :raises UnavailableError: it cannot be started.
    """

    def __init__(self, path: Path, threads: int, ends: Sequence[int]) -> None:
        self._no_end = {str(token): -100.0 for token in ends}
        if any(importlib.util.find_spec(name) is None for name in _PYTHON_SERVER):
            raise UnavailableError(
                "llama-cpp-python's server is not whole; pip install 'llama-cpp-python[server]'"
            )
        options = {
            "model": path,
            "n_ctx": OPTIONS["n_ctx"],
            "n_threads": threads,
            "n_threads_batch": threads,
            "flash_attn": True,
            "logits_all": False,
            "interrupt_requests": False,
            "verbose": False,
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        super().__init__(
            "llama-cpp-python's server",
            [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", *arguments],
            {},
            ready="/v1/models",
            starting_s=_STARTING,
        )

    def _ask(self, prompt: str, count: int) -> int:
        """The number of tokens of an answer: ``count``, if that is what ended it."""
        body = {
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0.0,
            "top_k": 1,
            "repeat_penalty": 1.0,
            "logit_bias": self._no_end,
            "stream": True,
        }
        reason = None
        for event in events(self.port, "/v1/completions", body, self.who):
            reason = event["choices"][0]["finish_reason"] or reason
        return count if reason == "length" else 0
