"""What requests get of a step: tokens, text, log probabilities and the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engineroom import FinishReason, TokenLogprob, TokenStep
from engineroom.engine import MakeLogprob
from engineroom_hf_transformers.sampling import logprobs_of
from engineroom_hf_transformers.tasks import Row, Task

if TYPE_CHECKING:
    import torch

__all__ = ["Outcome", "logprobs", "step_of", "take"]


@dataclass(slots=True)
class Outcome:
    """What a request gets of a step."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


def take(
    task: Task, outcome: Outcome, token: int, probability: TokenLogprob | None, *, ends: bool
) -> None:
    """Give a request its next token.

    :param ends: the token ends the generation, and is not shown.
    """
    if ends:
        outcome.finish = "eos_token"
    else:
        task.tokens.append(token)
        outcome.tokens.append(token)
        outcome.text += task.decoder.feed(token)
        if probability is not None:
            outcome.logprobs.append(probability)
        if len(task.tokens) >= task.limit:
            outcome.finish = "length"
    if outcome.finish is not None:
        outcome.text += task.decoder.finish()


def step_of(task: Task, outcome: Outcome) -> TokenStep:
    """What a request's reader gets of a step; the first time with the counts of its prompt."""
    step = TokenStep(outcome.tokens, outcome.text, outcome.logprobs or None, finish=outcome.finish)
    if not task.announced:
        task.announced = True
        step.prompt_tokens = task.prompt_tokens
        step.cached_prompt_tokens = task.reused
    return step


def logprobs(
    logits: torch.Tensor,
    pending: Sequence[tuple[Row, int]],
    tokens: Sequence[int | None],
    make_logprob: MakeLogprob,
) -> list[TokenLogprob | None]:
    """Of the requests that want some, the log probabilities of the tokens that they got.

    :param pending: rows, and which of their outputs it is; one for each row of ``logits``.
    :param tokens: what was chosen for each; ``None``: nothing could be.
    """
    found: list[TokenLogprob | None] = [None] * len(pending)
    wanting = [
        i
        for i, (row, _) in enumerate(pending)
        if row.task.logprobs is not None and tokens[i] is not None
    ]
    if wanting:
        chosen = [token for i in wanting if (token := tokens[i]) is not None]
        counts = [pending[i][0].task.logprobs or 0 for i in wanting]
        for i, token, (own, best) in zip(
            wanting, chosen, logprobs_of(logits[wanting], chosen, counts), strict=True
        ):
            found[i] = make_logprob(token, own, best)
    return found
