"""Log probabilities of prompts, as they come from vLLM's engine.

vLLM makes an object of each of them, for all of a prompt at once and on the event loop, which a
prompt of some thousand tokens would keep for longer than anybody may. Here they stay the arrays
that they came in, and entries are made of some at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from engineroom import PromptLogprob, TokenStep
from engineroom.engine import MakeLogprob, first_of_prompt

__all__ = ["PromptRows", "keep_rows", "prompt_steps"]

_AT_A_TIME: Final = 64
_UPDATE: Final = "_update_prompt_logprobs"


class PromptRows:
    """For each token of a prompt but the first, tokens and how likely they were behind those before
    it: the token itself, then the likeliest ones.

    :param tensors: vLLM's, ``token_ids`` and ``logprobs``, rows × tokens.
    """

    __slots__ = ("ids", "values")

    def __init__(self, tensors: Any) -> None:
        self.ids, self.values, *_ = tensors

    def __bool__(self) -> bool:
        return True  # what vLLM asks before it hands them on


def keep_rows(processor: Any) -> None:
    """Have vLLM's class that makes log probabilities of a request hand arrays on.

    Harmless when done twice.
    """
    getattr(processor, _UPDATE)  # there is one to be replaced

    def keep(self: Any, tensors: Any) -> None:
        self.prompt_logprobs = PromptRows(tensors)

    setattr(processor, _UPDATE, keep)


async def prompt_steps(
    rows: object, tokens: Sequence[int], count: int, make: MakeLogprob
) -> AsyncGenerator[TokenStep, None]:
    """The entries of a prompt's tokens, some in each round of the event loop.

    :param rows: what came from vLLM; no :class:`PromptRows` for a prompt of one token.
    :param count: how many of the likeliest to tell with each.
    """
    entries: list[PromptLogprob] = [first_of_prompt(make, tokens[0])]
    if isinstance(rows, PromptRows):
        for start in range(0, len(tokens) - 1, _AT_A_TIME):
            some = slice(start, start + _AT_A_TIME)
            ids, values = rows.ids[some].tolist(), rows.values[some].tolist()
            for row_ids, row_values in zip(ids, values, strict=True):
                likeliest = list(zip(row_ids[1:], row_values[1:], strict=True))[:count]
                entries.append(make(row_ids[0], row_values[0], likeliest))
            yield TokenStep(prompt_logprobs=entries)
            entries = []
            await asyncio.sleep(0)
    if entries:
        yield TokenStep(prompt_logprobs=entries)
