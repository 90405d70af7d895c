"""Servers of others, each in a process of its own, and clients that ask them for streams.

What is served, and how it is asked, is each benchmark's own (:mod:`benchmarks.bare_transformers`,
:mod:`benchmarks.llamacpp_servers`, :mod:`benchmarks.vllm_sides`). All is on the loopback interface.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from benchmarks.harness import UnavailableError
from benchmarks.service import checked

__all__ = ["Clients", "ServerProcess", "events"]


class ServerProcess:
    """A server in a process. Use in a ``with``.

    :param who: its name, for messages.
    :param command: what starts it, but ``--host`` and ``--port``.
    :param environment: variables beside those of this process.
    :param ready: path that answers with 200 once it serves.
    :param starting_s: seconds that it may take until then.
    :raises UnavailableError: it did not start; says what it wrote last.
    """

    def __init__(
        self,
        who: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        ready: str,
        starting_s: float,
    ) -> None:
        self.who = who
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait(ready, starting_s)
        except BaseException:
            self._end()
            raise

    def _wait(self, ready: str, starting_s: float) -> None:
        """Until it answers."""
        end = time.monotonic() + starting_s
        while time.monotonic() < end and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", ready)
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.2)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        raise UnavailableError(f"{self.who} did not start: {' | '.join(said[-3:])}")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()


class Clients(ABC):
    """Clients in threads, one a prompt."""

    def at_once(self, prompts: Sequence[str], count: int) -> float:
        """Seconds until as many clients as there are prompts have their streamed answers."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            began = time.perf_counter()
            counts = list(clients.map(lambda prompt: self._ask(prompt, count), prompts))
            return checked(time.perf_counter() - began, counts, count)

    @abstractmethod
    def _ask(self, prompt: str, count: int) -> int:
        """The number of tokens of an answer."""


def events(port: int, path: str, body: Mapping[str, Any], who: str) -> Iterator[dict[str, Any]]:
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
