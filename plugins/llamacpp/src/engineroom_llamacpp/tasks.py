"""Requests on their way through the engine, and their parts of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from engineroom.engine import BatchSlice, BeamSearch, Sampler, TextTask, common_prefix
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.pace import PromptPace
from engineroom_llamacpp.prompt_store import Piece
from engineroom_llamacpp.saved import SavedSequence
from engineroom_llamacpp.sequences import CellSequence, Origin, Sequences

__all__ = ["Task", "compose", "compose_tokens", "contents", "decode_alone"]

_WORTH_WAITING: Final = 32
"""So many common tokens are not read twice in a step, but once, and shared in the next one."""


@dataclass(eq=False, slots=True, kw_only=True)
class Task(TextTask):
    """One request. ``tokens`` of a beam search are the prompt's.

    :param beams: its beam search, if it is one.
    :param run_alone: it may be what made others compute no numbers.
    :param saved: what it had in the cache when it gave way.
    :param coming: pieces of its prompt that are still to be brought from host memory, and how many
        tokens of each, the first ones last.
    :param common: tokens at its beginning that another had in common with it when it started.
    :param adapter: the named LoRA adapter that it is computed with.
    :param sequences: its sequences in the context: one, or one a beam; none: it waits.
    """

    sampler: Sampler
    beams: BeamSearch | None = None
    run_alone: bool = False
    saved: SavedSequence | None = None
    coming: list[tuple[Piece[SavedSequence], int]] = field(default_factory=list)
    common: int = 0
    adapter: str | None = None
    sequences: list[CellSequence] = field(default_factory=list)
    origin: Origin = field(init=False)
    """What its cells are computed in and with."""

    def __post_init__(self) -> None:
        self.origin = Origin(self.cache_scope, self.adapter)

    @property
    def sequence(self) -> int:
        """llama.cpp's number of its first sequence."""
        return self.sequences[0].index

    @property
    def width(self) -> int:
        """Sequences that it needs at one time."""
        return 1 if self.beams is None else self.beams.beams

    @property
    def searches(self) -> bool:
        """Whether its beams go on from a prompt that is computed."""
        return self.beams is not None and self.cached >= len(self.tokens)

    @property
    def cells_needed(self) -> int:
        """Cells that it needs to read what it has, and for a token more."""
        return max(0, len(self.tokens) - self.cached) + self.width


def contents(tasks: Iterable[Task]) -> Iterator[tuple[CellSequence, list[int]]]:
    """The sequences of running requests, with the tokens whose cells they have."""
    for task in tasks:
        if task.sequences and not task.cache_invalid:
            yield task.sequences[0], task.tokens[: task.cached]


def compose(
    tasks: Sequence[Task], context: LlamaContext, sequences: Sequences, pace: PromptPace
) -> list[BatchSlice[Task]]:
    """Fill the context's batch: who has how many tokens in the step, and which logits.

    First come the tokens of requests that decode, and what is proposed for them as far as there
    is room; then chunks of prompts. Where attention computes tokens in blocks, a block takes the
    time of all the cells that one of its tokens attends to: there the two kinds have steps in turn.

    :param tasks: running requests with one adapter.
    :param pace: says how many tokens of prompts, where others decode.
    :returns: nothing, where one that decodes has no room: it must not be left behind.
    """
    decoding = [task for task in tasks if task.decodes]
    reading = [task for task in tasks if not task.decodes and not task.coming]
    pace.begin(len(reading), len(decoding))
    needed = sum(len(task.sequences) for task in decoding)
    drafts = sum(len(task.draft) for task in decoding)
    if not sequences.make_room(needed + drafts) and not sequences.make_room(needed):
        return []
    spare = min(sequences.cells.free, context.n_batch, context.n_outputs - len(reading)) - needed
    parts: list[tuple[Task, int]] = []
    for task in decoding:
        if task.draft:
            del task.draft[max(0, spare) :]
            spare -= len(task.draft)
        parts.append((task, 1 + len(task.draft)))
    rows = needed + drafts + sum(len(task.tokens) - task.cached for task in reading)
    in_turn = 0 < context.tile <= rows and bool(parts)
    # The end of a prompt, which is no block, does not come right behind a step that read alone.
    waited = pace.read_last if in_turn else pace.read_alone and bool(parts)
    if reading and not waited:
        prompts = _prompts(
            tasks, reading, 0 if in_turn else needed + drafts, context, sequences, pace
        )
        if prompts and in_turn:
            for task in decoding:
                task.draft = []
            parts = prompts
        else:
            parts += prompts
    if not sequences.shared:  # neighbours are computed at one go
        parts.sort(key=lambda part: part[0].sequence)
    context.begin()
    slices = [_add(task, count, context) for task, count in parts]
    return sorted(slices, key=lambda part: not part.task.decodes)


def decode_alone(tasks: Iterable[Task]) -> bool:
    """Whether there is one, and each has a token in the step: no prompt, no beams."""
    some = False
    for task in tasks:
        if len(task.tokens) - task.cached != 1 or task.beams is not None:
            return False
        some = True
    return some


def compose_tokens(
    tasks: Sequence[Task], context: LlamaContext, sequences: Sequences
) -> list[BatchSlice[Task]]:
    """As :func:`compose`, where :func:`decode_alone` says yes and nothing is proposed.

    :returns: nothing, where there is no room for all of them.
    """
    if sequences.cells.free < len(tasks) and not sequences.make_room(len(tasks)):
        return []
    if len(tasks) > 1 and not sequences.shared:  # neighbours are computed at one go
        tasks = sorted(tasks, key=_place)
    context.begin()
    return [
        BatchSlice(
            task, 1, context.add(task.sequences[0].index, task.cached, task.tokens[-1:], 1), 1
        )
        for task in tasks
    ]


def _place(task: Task) -> int:
    return task.sequences[0].index


def _add(task: Task, count: int, context: LlamaContext) -> BatchSlice[Task]:
    """So many tokens of a request."""
    if task.searches:
        return _add_beams(task, context)
    if task.decodes:  # its last token, and what may come after it
        tokens = task.tokens[-1:] + task.draft
        first = context.add(task.sequence, task.cached, tokens, count)
        return BatchSlice(task, count, first, count)
    chunk = task.tokens[task.cached : task.cached + count]
    outputs = int(task.cached + count == len(task.tokens))
    of_prompt = task.prompt_rows(count)
    first = context.add(task.sequence, task.cached, chunk, of_prompt + outputs)
    return BatchSlice(task, count, first + of_prompt, outputs, prompt_rows=of_prompt)


def _add_beams(task: Task, context: LlamaContext) -> BatchSlice[Task]:
    """The last token of each beam."""
    assert task.beams is not None
    places = [
        context.add(sequence.index, task.cached, beam.tokens[-1:], 1)
        for sequence, beam in zip(task.sequences, task.beams.running, strict=True)
    ]
    return BatchSlice(task, 1, places[0], len(places))


def _prompts(
    tasks: Sequence[Task],
    reading: Sequence[Task],
    taken: int,
    context: LlamaContext,
    sequences: Sequences,
    pace: PromptPace,
) -> list[tuple[Task, int]]:
    """Tokens of prompts, as many as there is room for; a beginning that many have only once.

    :param taken: tokens that those that decode have of the step.
    """
    budget = context.n_batch - taken
    beside = len(reading) < len(tasks) and any(task.decodes for task in tasks)
    now: list[tuple[Task, int]] = []
    # A prompt that is shorter by half need not wait for those that came before. The first of these
    # gets half of the step nevertheless, so that none waits for ever.
    half = (min(budget, pace.most_tokens) if beside else budget) // 2
    oldest = reading[0]
    ends = False
    rows = context.prompt_rows
    kept = rows // 2 if oldest.prompt_rows(2) else 0  # for the oldest, as of the tokens
    for task in sorted(reading, key=lambda task: (len(task.tokens) - task.cached).bit_length()):
        whole = task.reusable == len(task.tokens)
        if sequences.reuse and len(tasks) > 1 and task.beams is None and whole:
            # What has to be copied is copied once, when all of it has been read.
            if not sequences.shared and any(_same(task, other) for other, _ in now):
                continue
            beside_it = (other for other in tasks if other is not task)
            busy = contents(other for other in beside_it if other.origin == task.origin)
            known = sequences.longer(task.sequences[0], task.tokens, task.cached, busy)
            if known > task.cached:
                task.cached = task.reused = known
            if any(_same(task, other) for other, _ in now):
                continue
        count = min(len(task.tokens) - task.cached, budget)
        if task is oldest:
            half = budget
        else:
            count = min(count, half)
            if count < 1:
                continue
        kept = 0 if task is oldest else kept
        while count > 0 and (more := task.prompt_rows(count) - rows + kept) > 0:
            count -= more
        if count < 1:
            continue
        rest = len(task.tokens) - task.cached
        cells = sequences.cells.used + taken if sequences.shared else 0
        place = pace.place(task.cached, cells)
        if beside:
            count = pace.most(place, count)
        sequences.make_room(taken + count)
        count = min(count, sequences.cells.free - taken)
        if count < 1:
            break
        if now and count < min(rest, pace.least):
            continue
        # Parts are computed one after another: who has its last tokens in the step would wait for
        # those of the next prompt, which come no sooner here than in the step after this one.
        if ends and count < rest and task is not oldest and not sequences.shared:
            continue
        ends = ends or count == rest
        pace.add(place, count)
        rows -= task.prompt_rows(count)
        now.append((task, count))
        taken += count
        budget -= count
        half -= count
    return now


def _same(task: Task, other: Task) -> bool:
    """Whether much of what a request has to read is being read by another, and of use to it."""
    if task.origin != other.origin:
        return False
    common = common_prefix(task.tokens[:-1], other.tokens)
    return common - max(task.cached, other.cached) >= _WORTH_WAITING
