"""What the engine has to do: requests on their way through it, and their parts of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from engineroom import InferenceRequest, TokenStep
from engineroom.engine import EngineTask, MakeLogprob, SamplerState
from engineroom_hf_transformers.attention import Span
from engineroom_hf_transformers.cache import Slot
from engineroom_hf_transformers.chunking import ReadingCost

if TYPE_CHECKING:
    from engineroom_hf_transformers.decoding import Decoder

__all__ = ["Job", "Row", "Task", "Work", "compose", "tokens_of"]


class Work(Protocol):
    """What is not done in the batch, but beside it, a piece each step."""

    def advance(self, make_logprob: MakeLogprob) -> TokenStep | None:
        """Do a piece.

        :returns: what came of it; ``None``: nothing that could be shown.
        """

    def close(self) -> None:
        """End it where it stands."""


@dataclass(eq=False, slots=True, kw_only=True)
class Job(EngineTask):
    """What the engine has to do.

    :param work: what does it, unless the batch does.
    """

    work: Work | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class Task(Job):
    """One request for text on its way through the engine.

    :param tokens: the prompt's tokens, then the generated ones.
    :param limit: length at which it ends with ``length``.
    :param cached: how many of them are in the cache; what comes after is still to be computed.
    :param reused: how many of the prompt's an earlier request had computed.
    :param proposed: tokens that may come next, to be checked in the step.
    :param doubtful: whether what it wrote to the cache was not seen to be numbers.
    """

    request: InferenceRequest
    tokens: list[int]
    prompt_tokens: int
    sampling: SamplerState
    decoder: Decoder
    limit: int
    logprobs: int | None
    slot: Slot | None = None
    cached: int = 0
    reused: int = 0
    proposed: list[int] = field(default_factory=list)
    announced: bool = False
    doubtful: bool = True

    @property
    def decodes(self) -> bool:
        """Whether all but its last token is computed."""
        return len(self.tokens) - self.cached == 1


@dataclass(frozen=True, slots=True)
class Row:
    """A request's part of a step: which of the step's logits are its own."""

    task: Task
    span: Span
    first: int
    outputs: int


def compose(
    tasks: Sequence[Task], max_batch_tokens: int, prefill_chunk: int, cost: ReadingCost
) -> list[Row]:
    """Who has how many tokens in the step, and which logits.

    :param max_batch_tokens: most tokens of the step.
    :param prefill_chunk: most of them that are of prompts, where others decode; as many cost as
        much as may be read then.
    """
    decoding = sorted(
        (task for task in tasks if task.decodes and not task.proposed), key=_slot_index
    )
    checking = [task for task in tasks if task.decodes and task.proposed]
    rows: list[Row] = []
    place = 0
    first = 0

    def add(task: Task, count: int, outputs: int) -> None:
        nonlocal place, first
        span = Span(place, _slot_index(task), task.cached, count)
        rows.append(Row(task, span, first, outputs))
        place += count
        first += outputs

    for task in decoding:
        add(task, 1, 1)
    for task in checking:
        add(task, 1 + len(task.proposed), 1 + len(task.proposed))
    room = max(1, max_batch_tokens - place)
    budget = cost(0, prefill_chunk) if rows else math.inf
    read = 0
    for task in tasks:
        todo = len(task.tokens) - task.cached
        if todo <= 1:
            continue
        count = min(todo, room - read)
        if budget < math.inf:
            # A step reads something, as late in a prompt as it may be.
            count = min(count, cost.most(task.cached, budget) or (0 if read else 1))
        if not count:
            continue
        add(task, count, 1 if count == todo else 0)
        budget -= cost(task.cached, count)
        read += count
    return rows


def _slot_index(task: Task) -> int:
    assert task.slot is not None
    return task.slot.index


def tokens_of(row: Row) -> list[int]:
    """The tokens that a row has in the step, proposed ones at its end."""
    task, span = row.task, row.span
    known = task.tokens[span.start : span.end]
    return known + task.proposed[: span.count - len(known)]
