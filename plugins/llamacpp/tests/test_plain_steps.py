"""Steps in which each request has a token and nothing else are put together in a shorter way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from llama_benches import EXACT, ask

from engineroom.engine import BatchSlice
from engineroom_llamacpp import engine as engines
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.pace import PromptPace
from engineroom_llamacpp.sequences import Sequences
from engineroom_llamacpp.tasks import Task, compose, compose_tokens

Make = Callable[..., Awaitable[Any]]

PARAMS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 40},
    {"temperature": 0.9, "seed": 7, "max_new_tokens": 30},
    {"logprobs": 3, "max_new_tokens": 35},
    {"num_beams": 2, "max_new_tokens": 6},
]


def batch_of(context: LlamaContext) -> list[list[int]]:
    """What llama.cpp is about to be given."""
    count = int(context._batch.n_tokens)
    rows = context._tokens, context._positions, context._sequences, context._outputs
    return [np.array(row[:count]).tolist() for row in rows]


@pytest.mark.parametrize("unified", [True, False])
async def test_the_short_way_gives_the_batch_of_the_long_one(
    make: Make, monkeypatch: pytest.MonkeyPatch, unified: bool
) -> None:
    bench = await make(n_parallel=6, kv_unified=unified, **EXACT)
    compared: list[int] = []

    def both(
        tasks: Sequence[Task], context: LlamaContext, sequences: Sequences
    ) -> list[BatchSlice[Task]]:
        long = compose(tasks, context, sequences, PromptPace(128))
        batch = batch_of(context)
        short = compose_tokens(tasks, context, sequences)
        assert batch_of(context) == batch
        assert short == long
        compared.append(len(short))
        return short

    monkeypatch.setattr(engines, "compose_tokens", both)
    requests = [ask(f"prompt {i} " * (3 * i + 1), **params) for i, params in enumerate(PARAMS)]
    answers = await asyncio.gather(*(bench.service.infer(request) for request in requests))
    assert [answer.error_message for answer in answers] == [None] * len(PARAMS)
    assert max(compared) > 2
    await bench.idle()


@pytest.mark.parametrize("unified", [True, False])
async def test_the_short_way_changes_no_answer(make: Make, unified: bool) -> None:
    bench = await make(n_parallel=6, kv_unified=unified, **EXACT)
    requests = [ask(f"prompt {i} " * (3 * i + 1), **params) for i, params in enumerate(PARAMS)]

    async def answers() -> list[tuple[str, Any]]:
        answers = await asyncio.gather(*(bench.service.infer(request) for request in requests))
        return [(a.generated_text, a.finish_reason) for a in answers]

    assert bench.engine._plain
    short = await answers()
    bench.engine._plain = False
    assert await answers() == short
    await bench.idle()
