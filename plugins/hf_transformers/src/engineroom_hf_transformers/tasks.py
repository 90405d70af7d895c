"""What the engine has to do: requests on their way through it, and their parts of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from engineroom import InferenceRequest, TokenStep
from engineroom.engine import BatchSlice, EngineTask, MakeLogprob, SamplerState, TextTask
from engineroom_hf_transformers.attention import Span
from engineroom_hf_transformers.cache import Slot
from engineroom_hf_transformers.chunking import ReadingCost

if TYPE_CHECKING:
    from engineroom_hf_transformers.decoding import Decoder

__all__ = ["EmbeddingTask", "Job", "PackedSlice", "Task", "Work", "compose", "tokens_of"]


class Work(Protocol):
    """What is not done in the batch, but beside it, a piece each step."""

    def advance(self, make_logprob: MakeLogprob) -> TokenStep | None:
        """Do a piece.

        :returns: what came of it; ``None``: nothing that could be shown.
        """

    def close(self) -> None:
        """End it where it stands."""


@dataclass(eq=False, slots=True, kw_only=True)
class EmbeddingTask(EngineTask):
    """Texts that are to be turned into vectors.

    :param work: what does it.
    """

    work: Work | None


@dataclass(eq=False, slots=True, kw_only=True)
class Task(TextTask):
    """One request for text.

    :param work: what does it, unless the batch does.
    :param cache_invalid: until what it wrote to the cache was seen to be numbers.
    """

    request: InferenceRequest
    sampling: SamplerState
    decoder: Decoder
    work: Work | None = None
    slot: Slot | None = None
    cache_invalid: bool = True

    @property
    def sequence(self) -> int:
        """The index of its slot."""
        assert self.slot is not None
        return self.slot.index


Job: TypeAlias = Task | EmbeddingTask


@dataclass(slots=True)
class PackedSlice(BatchSlice[Task]):
    """A request's part of a step, and where it lies in the packed row."""

    span: Span


def compose(
    tasks: Sequence[Task],
    max_batch_tokens: int,
    prefill_chunk: int,
    cost: ReadingCost,
    prompt_rows: int,
) -> list[PackedSlice]:
    """Who has how many tokens in the step, and which logits.

    :param max_batch_tokens: most tokens of the step.
    :param prefill_chunk: most of them that are of prompts, where others decode; as many cost as
        much as may be read then.
    :param prompt_rows: most rows of logits that tell of prompts.
    """
    decoding = [task for task in tasks if task.decodes]
    slices: list[PackedSlice] = []
    place = first = 0

    def add(task: Task, count: int, outputs: int) -> None:
        nonlocal place, first
        span = Span(place, task.sequence, task.cached, count)
        of_prompt = task.prompt_rows(count)
        first += of_prompt
        slices.append(PackedSlice(task, count, first, outputs, span, prompt_rows=of_prompt))
        place += count
        first += outputs

    for task in sorted((t for t in decoding if not t.draft), key=lambda t: t.sequence):
        add(task, 1, 1)
    for task in decoding:
        if task.draft:
            add(task, 1 + len(task.draft), 1 + len(task.draft))
    room = max(1, max_batch_tokens - place)
    budget = cost(0, prefill_chunk) if slices else math.inf
    read = 0
    for task in tasks:
        todo = len(task.tokens) - task.cached
        if todo <= 1:
            continue
        count = min(todo, room - read)
        if budget < math.inf:
            # A step reads something, as late in a prompt as it may be.
            count = min(count, cost.most(task.cached, budget) or (0 if read else 1))
        while count and (more := task.prompt_rows(count) - prompt_rows) > 0:
            count -= min(count, more)
        if not count:
            continue
        prompt_rows -= task.prompt_rows(count)
        add(task, count, 1 if count == todo else 0)
        budget -= cost(task.cached, count)
        read += count
    return slices


def tokens_of(part: PackedSlice) -> list[int]:
    """The tokens that a request has in the step, its draft at the end."""
    known = part.task.tokens[part.span.start : part.span.end]
    return known + part.task.draft[: part.count - len(known)]
