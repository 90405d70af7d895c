"""A model behind the service, in this process: one side of the runtimes' comparisons."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import DiscardError

if TYPE_CHECKING:
    from engineroom import InferenceRequest, InferenceStream

__all__ = ["EIGHT", "ServiceSide", "checked"]

EIGHT: Final = 8


class ServiceSide:
    """The service with one model and one handler.

    :param path: the model's file or folder.
    :param handler: name of the runtime.
    :param options: the model's ``options:``.
    """

    def __init__(self, path: Path, handler: str, options: Mapping[str, Any]) -> None:
        from engineroom import LLMInferenceService, LLMModelManager, ModelConfig

        self._runner = asyncio.Runner()
        model = ModelConfig(model_id="smollm2", source=str(path), options=dict(options))
        self._manager = LLMModelManager(config=[model])
        self._service = LLMInferenceService(self._manager, handlers=[handler])
        self._runner.run(self._manager.load_configured_models())

    def long_answers(self, prompts: Sequence[str], count: int) -> list[str]:
        """Those prompts whose answers have ``count`` tokens, in company and alone.

        Company changes the last digits, and with them now and then an answer. Warms up, too.
        """
        found: list[str] = []
        for at in range(0, len(prompts), EIGHT):
            eight = prompts[at : at + EIGHT]
            counts = self._runner.run(self._all(eight, count))
            long = [p for p, n in zip(eight, counts, strict=True) if n == count]
            found += [p for p in long if self._runner.run(self._count(p, count)) == count]
            if len(found) >= EIGHT:
                break
        return found

    def at_once(self, prompts: Sequence[str], count: int) -> float:
        """Seconds for all of them at one time."""
        began = time.perf_counter()
        counts = self._runner.run(self._all(prompts, count))
        return checked(time.perf_counter() - began, counts, count)

    def one_by_one(self, prompts: Sequence[str], count: int) -> float:
        """Seconds for one after another."""

        async def work() -> list[int]:
            return [await self._count(prompt, count) for prompt in prompts]

        began = time.perf_counter()
        counts = self._runner.run(work())
        return checked(time.perf_counter() - began, counts, count)

    async def _all(self, prompts: Sequence[str], count: int) -> list[int]:
        return await asyncio.gather(*(self._count(prompt, count) for prompt in prompts))

    def answer_all(self, requests: Sequence[InferenceRequest]) -> list[int]:
        """How many tokens the answers have, of all of them at one time."""

        async def work() -> list[int]:
            return await asyncio.gather(*map(self._answer, requests))

        return self._runner.run(work())

    async def _count(self, prompt: str, count: int) -> int:
        return await self._answer(self._request(prompt, count))

    async def _answer(self, request: InferenceRequest) -> int:
        stream = self._service.stream(request)
        async for _ in stream:
            pass
        response = stream.response
        assert response is not None
        response.raise_for_error()
        return response.generated_tokens or 0

    def _stream(self, prompt: str, count: int) -> InferenceStream:
        return self._service.stream(self._request(prompt, count))

    def _request(self, prompt: str, count: int) -> InferenceRequest:
        from engineroom import GenerationParams, InferenceRequest

        params = GenerationParams(temperature=0.0, max_new_tokens=count)
        return InferenceRequest(model_id="smollm2", prompt=prompt, params=params)

    def close(self) -> None:
        """Unload the model."""
        self._runner.run(self._service.close())
        self._runner.close()


def checked(seconds: float, counts: Sequence[int], wanted: int) -> float:
    """``seconds``, if all answers have as many tokens as they should.

    :raises DiscardError: one has not.
    """
    if any(count != wanted for count in counts):
        raise DiscardError(f"answers of {list(counts)} tokens instead of {wanted}")
    return seconds
