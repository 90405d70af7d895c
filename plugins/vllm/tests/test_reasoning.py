"""An answer of several requests, where its reasoning has a bound; what vLLM would do is made up."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engineroom import InferenceRequest, TokenStep
from engineroom.engine import ReasoningBudget
from engineroom.generation.answer_grammars import Thoughts
from engineroom_vllm.reasoning import within_budget

PROMPT = list(b"why?<think>")
CLOSING = list(b"</think>\n\n")


def piece(token: int) -> bytes:
    return bytes([token])


class Engine:
    """Writes what it is told to, a letter a token, and knows what it was asked."""

    def __init__(self, *texts: bytes) -> None:
        self.texts = list(texts)
        self.asked: list[tuple[bytes, str | None, int | None, int | None]] = []
        self.closed = 0

    async def part(
        self, request: InferenceRequest, ids: list[int], tail: str | None, forced: int | None
    ) -> AsyncGenerator[TokenStep, None]:
        limit = request.params.max_new_tokens
        self.asked.append((bytes(ids), tail, forced, limit))
        try:
            yield TokenStep(prompt_tokens=len(ids), cached_prompt_tokens=2, prompt_tail=tail)
            text = bytes([forced]) if forced is not None else self.texts.pop(0)
            for place, token in enumerate(text):
                last = place + 1 == (1 if forced is not None else limit)
                yield TokenStep((token,), bytes([token]), finish="length" if last else None)
            yield TokenStep(finish="eos_token")
        finally:
            self.closed += 1


async def answered(
    engine: Engine, budget: int, *, begin: str = "", room: int = 1000, **params: Any
) -> tuple[bytes, list[TokenStep]]:
    request = InferenceRequest(model_id="m", prompt="why?", params=params)
    bound = ReasoningBudget(Thoughts(begin, "</think>"), budget, CLOSING)
    steps = within_budget(
        request, PROMPT, bound, engine.part, tail="<think>", room=room, piece=piece
    )
    every = [step async for step in steps]
    assert engine.closed == len(engine.asked)
    return b"".join(bytes(step.token_ids) for step in every), every


async def test_reasoning_is_ended_and_another_request_goes_on() -> None:
    engine = Engine(b"hmm, well, perhaps", b"so")
    text, steps = await answered(engine, 5, max_new_tokens=100, seed=7)
    assert text == b"hmm, </think>\n\nso"
    assert [step.prompt_tokens for step in steps if step.prompt_tokens is not None] == [11]
    assert steps[0].prompt_tail == "<think>" and steps[-1].finish == "eos_token"
    assert engine.asked[1] == (b"why?<think>hmm, </think>\n\n", "</think>", None, 85)


async def test_no_reasoning_at_all() -> None:
    engine = Engine(b"so")
    text, steps = await answered(engine, 0)
    assert text == b"</think>\n\nso" and len(engine.asked) == 1
    assert (steps[0].prompt_tokens, steps[0].prompt_tail) == (11, "<think>")


async def test_what_ends_by_itself_is_one_request() -> None:
    engine = Engine(b"hm</think>so it is, at length")
    assert (await answered(engine, 12))[0] == b"hm</think>so it is, at length"
    assert len(engine.asked) == 1
    engine = Engine(b"so it is, at length, and no thought")
    assert (await answered(engine, 3, begin="<think>"))[0].startswith(b"so it is, at")
    assert len(engine.asked) == 1


@pytest.mark.parametrize("most", [{"max_new_tokens": 8}, {"room": 8}])
async def test_the_limit_may_come_within_what_closes(most: dict[str, int]) -> None:
    engine = Engine(b"hmm, well, perhaps")
    text, steps = await answered(engine, 5, **most)
    assert text == b"hmm, </t" and steps[-1].finish == "length" and len(engine.asked) == 1


async def test_the_limit_may_come_with_the_last_thought() -> None:
    engine = Engine(b"hmm, well, perhaps")
    text, steps = await answered(engine, 5, max_new_tokens=5)
    assert text == b"hmm, " and [s.finish for s in steps if s.finish] == ["length"]


async def test_with_log_probabilities_what_closes_is_asked_token_by_token() -> None:
    engine = Engine(b"hmm", b"so")
    text, steps = await answered(engine, 2, logprobs=1)
    assert text == b"hm</think>\n\nso"
    assert [forced for *_, forced, _ in engine.asked] == [None, *CLOSING, None]
    assert [step.finish for step in steps if step.finish] == ["eos_token"]
