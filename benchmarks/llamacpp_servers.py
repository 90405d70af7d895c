"""The servers that llama.cpp's bars compare with, and clients that ask them by HTTP.

llama.cpp's own, which xllamacpp carries, and llama-cpp-python's. Both are asked on the loopback
interface for streams.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.harness import UnavailableError
from benchmarks.llamacpp_sides import OPTIONS, instructions
from benchmarks.service import EIGHT, checked

__all__ = ["NativeServerSide", "PythonServerSide"]

_STARTING: Final = 60.0
_PYTHON_SERVER: Final = (
    "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings", "yaml",
)  # fmt: skip


class NativeServerSide:
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

    def at_once(self, prompts: Sequence[str], count: int) -> float:
        """Seconds until as many clients as there are prompts have their streamed answers."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            began = time.perf_counter()
            counts = list(clients.map(lambda prompt: self._ask(prompt, count), prompts))
            return checked(time.perf_counter() - began, counts, count)

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
        for event in _events(self._address.port or 0, "/completion", body, "llama.cpp's server"):
            if event.get("stop"):
                tokens = int(event["tokens_predicted"])
        return tokens

    def close(self) -> None:
        """End the server."""
        del self._server


class PythonServerSide:
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
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        options = {
            "host": "127.0.0.1",
            "port": self._port,
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
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", *arguments],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise

    def at_once(self, prompts: Sequence[str], count: int) -> float:
        """Seconds until as many clients as there are prompts have their streamed answers."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            began = time.perf_counter()
            counts = list(clients.map(lambda prompt: self._ask(prompt, count), prompts))
            return checked(time.perf_counter() - began, counts, count)

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
        for event in _events(self._port, "/v1/completions", body, "llama-cpp-python's server"):
            reason = event["choices"][0]["finish_reason"] or reason
        return count if reason == "length" else 0

    def _wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + _STARTING
        while time.monotonic() < end and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            try:
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.2)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        raise UnavailableError(f"llama-cpp-python's server did not start: {' | '.join(said[-3:])}")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> PythonServerSide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()


def _events(port: int, path: str, body: Mapping[str, Any], who: str) -> Iterator[dict[str, Any]]:
    """What a server streams in answer to a request.

    :raises UnavailableError: it refuses, or fails.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            text = response.read(500).decode(errors="replace")
            raise UnavailableError(f"{who} answered {response.status}: {text}")
        for line in response:
            if line.startswith(b"data: {"):
                event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise UnavailableError(f"{who} failed: {event['error']}")
                yield event
    finally:
        connection.close()
