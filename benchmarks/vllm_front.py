"""vLLM's side of :mod:`benchmarks.server_load`: its own server, over a stand-in for its engine.

The server, its routes, its chat template and its tokeniser are vLLM's; what is behind it computes
nothing. Written for vLLM 0.32, whose parts have other places in other versions.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from benchmarks.smollm2 import float32_folder

__all__ = ["run"]


class FakeAsyncLLM(AsyncLLM):  # type: ignore[misc]
    """Stands in for an engine: each request is answered with so many words, one a step."""

    def __init__(self, configuration: Any, words: int) -> None:
        self.vllm_config = configuration
        self.model_config = configuration.model_config
        self.log_requests = False
        self.renderer = renderer_from_config(configuration)
        self.input_processor = InputProcessor(configuration, self.renderer)
        self._words = words

    def __del__(self) -> None:
        """There is nothing to end."""

    def shutdown(self, timeout: float | None = None) -> None:
        """There is nothing to end."""

    @property
    def errored(self) -> bool:
        """It never is."""
        return False

    @property
    def is_running(self) -> bool:
        """Always."""
        return True

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Everyone is let in."""

    async def check_health(self) -> None:
        """It is well."""

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Text is all that it gives."""
        return ("generate",)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[Any, None]:
        """The words."""
        for number in range(self._words):
            await asyncio.sleep(0)
            last = number == self._words - 1
            output = CompletionOutput(
                index=0,
                text=f" word{number}",
                token_ids=[number],
                cumulative_logprob=None,
                logprobs=None,
                finish_reason="length" if last else None,
            )
            yield RequestOutput(request_id, None, [1], None, [output], last)


def run(port: int, words: int) -> None:
    """Serve OpenAI's API. Blocks."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        import uvloop
    except ImportError:
        asyncio.run(_serve(port, words))
    else:
        uvloop.run(_serve(port, words))


async def _serve(port: int, words: int) -> None:
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        [
            f"--model={float32_folder('nox -s bench -- vllm installs it')}",
            "--served-model-name=m",
            "--dtype=float32",
            "--max-model-len=1024",
            "--generation-config=vllm",
            "--disable-log-stats",
            "--disable-uvicorn-access-log",
            "--uvicorn-log-level=critical",
        ]
    )
    configuration = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        engine = FakeAsyncLLM(configuration, words)
        ended = await build_and_serve(engine, f"http://127.0.0.1:{port}", listening, arguments)
        await ended
