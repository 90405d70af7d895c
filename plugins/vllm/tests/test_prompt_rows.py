"""Entries of a prompt's tokens, made of the arrays that come from vLLM, some at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engineroom import PromptLogprob
from engineroom.engine import logprob_maker
from engineroom_vllm.prompt_rows import _AT_A_TIME, PromptRows, keep_rows, prompt_steps

make = logprob_maker(lambda token: b"<%d>" % token)


async def entries(rows: object, tokens: list[int], count: int) -> list[list[PromptLogprob]]:
    return [
        list(step.prompt_logprobs or ()) async for step in prompt_steps(rows, tokens, count, make)
    ]


@pytest.mark.parametrize("length", [1, 2, _AT_A_TIME, _AT_A_TIME + 1, 3 * _AT_A_TIME + 7])
async def test_there_is_one_for_each_token_and_few_at_a_time(length: int) -> None:
    tokens = list(range(100, 100 + length))
    others = np.array(tokens[1:])
    ids = np.stack([others, others + 1, others], axis=1)
    values = np.stack([-0.5 * others, -0.25 * others, -0.5 * others], axis=1)
    # vLLM has a list with nothing in it for a prompt of one token.
    parts = await entries(PromptRows((ids, values, None)) if length > 1 else [None], tokens, 2)
    assert max(map(len, parts)) <= _AT_A_TIME + 1
    first, *rest = [entry for part in parts for entry in part]
    assert (first.token_id, first.token, first.logprob) == (100, "<100>", None)
    assert [entry.token_id for entry in rest] == tokens[1:]
    for entry in rest:
        token = entry.token_id
        assert entry.logprob == -0.5 * token
        assert [(i, value) for i, _, value in entry.top] == [
            (token + 1, -0.25 * token),
            (token, -0.5 * token),
        ]


async def test_no_more_alternatives_are_told_than_were_asked_for() -> None:
    rows = PromptRows((np.array([[7, 8]]), np.array([[-1.0, -0.5]]), None))
    ((_, entry),) = await entries(rows, [1, 7], 0)
    assert (entry.logprob, entry.top) == (-1.0, ())


def test_vllms_own_objects_are_not_made() -> None:
    class Processor:
        def __init__(self) -> None:
            self.prompt_logprobs: Any = [None]

        def _update_prompt_logprobs(self, tensors: Any) -> None:
            raise AssertionError("one object a token")

    keep_rows(Processor)
    keep_rows(Processor)
    processor = Processor()
    processor._update_prompt_logprobs(("ids", "values", "ranks"))
    kept = processor.prompt_logprobs
    assert kept, "what vLLM asks before it hands them on"
    assert (kept.ids, kept.values) == ("ids", "values")
