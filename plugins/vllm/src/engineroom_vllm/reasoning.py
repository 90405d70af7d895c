"""Answers whose reasoning has a bound, made of requests that vLLM answers one after another.

vLLM holds a bound only for markers that an engine was started with. So a request whose reasoning
has spent its tokens is ended here, and another one goes on behind what closes the reasoning. What
was computed before is found again in the cache of prefixes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeAlias

from engineroom import InferenceRequest, TokenStep
from engineroom.engine import ReasoningBudget

__all__ = ["Part", "within_budget"]

Part: TypeAlias = Callable[
    [InferenceRequest, list[int], str | None, int | None], AsyncGenerator[TokenStep, None]
]
"""Answers a request: its prompt, how that ends, and the one token that may follow; ``None``: any
one. A step a token."""


async def within_budget(
    request: InferenceRequest,
    tokens: list[int],
    budget: ReasoningBudget,
    part: Part,
    *,
    tail: str | None,
    room: int,
    piece: Callable[[int], bytes],
) -> AsyncGenerator[TokenStep, None]:
    """The steps of an answer, of which only the first says what is known of the prompt.

    :param tokens: the prompt.
    :param tail: how it ends.
    :param room: tokens that the context has left for the answer.
    :param piece: the bytes of a token.
    """
    params = request.params
    limit = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
    ids = list(tokens)
    later = request.model_copy(
        update={"params": params.model_copy(update={"prompt_logprobs": None})}
    )
    if budget.forced is None:
        async with aclosing(part(request, tokens, tail, None)) as steps:
            async for step in steps:
                yield step
                if step.finish is not None:
                    return
                for written in step.token_ids:
                    budget.take(written, piece)
                    ids.append(written)
                if budget.forced is not None:
                    break
        request = later
    else:
        yield TokenStep(prompt_tokens=len(tokens), cached_prompt_tokens=0, prompt_tail=tail)
    while (token := budget.forced) is not None and len(ids) - len(tokens) < limit:
        if params.logprobs is None and request.params.prompt_logprobs is None:
            yield TokenStep((token,), piece(token))
        else:
            async with aclosing(part(request, ids, None, token)) as steps:
                async for step in steps:
                    if step.token_ids or step.prompt_logprobs:
                        yield replace(step, finish=None)
            request = later
        budget.take(token, piece)
        ids.append(token)
    if (left := limit - (len(ids) - len(tokens))) < 1:
        yield TokenStep(finish="length")
        return
    # Its draws are not those of the reasoning again.
    seed = None if params.seed is None else params.seed // 2 + 1
    rest = later.params.model_copy(update={"max_new_tokens": left, "seed": seed})
    # What goes on now is no message of the request's any more.
    anew = {"params": rest, "continue_final_message": False}
    closed = later.model_copy(update=anew)
    async with aclosing(part(closed, ids, budget.end, None)) as steps:
        async for step in steps:
            if step.prompt_tokens is None:
                yield step
