"""What the tests of the engine share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar

import pytest

from engineroom import GenerationParams, InferenceRequest, InferenceResponse
from engineroom_llamacpp import moving
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.engine import LlamaEngine

T = TypeVar("T")
EOS: Final = 2
NO_END: Final = {EOS: -100.0}
"""Keeps the tiny model from ending by itself."""
EXACT: Final[dict[str, Any]] = {
    "cache_type_k": "f32",
    "cache_type_v": "f32",
    "flash_attn": "off",
    "n_threads": 1,
}
"""Random weights magnify rounding: with half precision a prompt that is read anew, or in another
batch, can come to other tokens. And the model is too small to be shared by threads."""


def ask(prompt: str = "hello", stream: bool = False, **kw: Any) -> InferenceRequest:
    request = {k: kw.pop(k) for k in list(kw) if k in InferenceRequest.model_fields}
    kw.setdefault("temperature", 0.0)
    kw.setdefault("max_new_tokens", 24)
    kw.setdefault("logit_bias", NO_END)
    return InferenceRequest(
        model_id="m", prompt=prompt, stream=stream, params=GenerationParams(**kw), **request
    )


def move_eagerly(patch: pytest.MonkeyPatch) -> None:
    """Everything idle leaves the cache at once, and comes back however long it takes."""
    patch.setattr(moving, "_FEW", 0)
    patch.setattr(moving, "_PATIENCE", 0)
    patch.setattr(moving.Mover, "_worth_moving", lambda _: True)
    patch.setattr(moving.Mover, "_worth_bringing", lambda *_: True)


def no_leak(engine: LlamaEngine) -> None:
    """Nobody has a sequence; without idle ones, llama.cpp has no cell in use either."""
    sequences, context = engine.sequences, engine._context
    assert sequences.unused == sequences.count
    assert sequences.cells.busy == 0
    sequences.forget_idle()
    assert sorted(sequences._free) == list(range(sequences.count))
    assert sequences.cells.used == 0
    assert [context.length(index) for index in range(sequences.count)] == [0] * sequences.count


async def together(bench: Any, requests: list[InferenceRequest]) -> list[InferenceResponse]:
    """Answers of requests that are all there before the first step, however busy the machine."""
    return await begun_together(bench, [bench.service.infer(request) for request in requests])


async def begun_together(bench: Any, asking: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What comes of those that send one request each, which are all there before the first step."""
    here = threading.Event()
    decode = LlamaContext.decode

    def held(context: LlamaContext) -> int:
        here.wait(30)
        return decode(context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaContext, "decode", held)
        tasks = [asyncio.create_task(each) for each in asking]
        await bench.until(
            lambda: (
                (health := bench.engine.health()).num_requests_running + health.num_requests_waiting
                == len(tasks)
            )
        )
        here.set()
        return await asyncio.gather(*tasks)
