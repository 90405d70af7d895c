"""LitServe's side of :mod:`benchmarks.server_load`: it says the last message back, word by word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import litserve

__all__ = ["run"]


class Echo(litserve.LitAPI):  # type: ignore[misc]
    """A word a step. In a module of its own, for it is sent to the worker."""

    def setup(self, device: str) -> None:
        """Nothing is to be loaded."""

    def predict(self, prompt: Any) -> Iterator[str]:
        """The words."""
        for word in prompt.messages[-1].content.split():
            yield f" {word}"


def run(port: int) -> None:
    """Serve OpenAI's API. Blocks."""
    server = litserve.LitServer(
        Echo(spec=litserve.OpenAISpec()), accelerator="cpu", workers_per_device=1
    )
    server.run(host="127.0.0.1", port=port, log_level="critical", generate_client_file=False)
