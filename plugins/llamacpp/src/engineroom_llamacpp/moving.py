"""Idle prompts leave the cache for host memory, and come back when a request begins with them.

Attention goes over every cell up to the last used one, also those of sequences that nobody computes
with. So they stay only where that is cheap: when they are few, and for as many computed tokens as
make moving them the smaller loss. Copies are made in pieces, a few in a step beside requests
that decode, so that nobody waits long for them. What copying takes and what reading takes is
measured on the way: pieces come back only where that is quicker.

A stream of a sequence's own costs nobody anything. What is idle there stays until its stream is
needed, and is copied then, at one go as llama.cpp has it; so it comes back, too. Of several
requests that come together, those start in later steps whose streams take too long to copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Final

from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.pace import Usual
from engineroom_llamacpp.prompt_store import PIECE, Piece, PromptStore
from engineroom_llamacpp.saved import SavedSequence
from engineroom_llamacpp.sequences import BLOCK, CellSequence, Sequences
from engineroom_llamacpp.tasks import Task, contents

__all__ = ["Mover"]

_FEW: Final = 256
"""So many idle cells stay: llama.cpp rounds what attention goes over up to as many."""
_PATIENCE: Final = 256
"""Computed tokens after which an idle sequence has cost about as much as to move it. Beside SmolLM2
on two cores a cell costs a token some 0.06 µs, and is copied out and in again in some 20."""
_SAVED: Final = 2
"""What is saved of requests that pause has at most this fraction of the cache's tokens."""
_WORTH_BRINGING: Final = 32
"""Fewer tokens are read again: bringing them back would unshare what is shared."""
_SHARE: Final = 0.2
"""Of what steps take, for copies beside requests that decode; but a piece a step at least."""


class Mover:
    """Moves what is idle in the cache out, and what requests begin with in.

    :param budget: most bytes of host memory for it; 0: nothing moves.
    """

    def __init__(self, context: LlamaContext, sequences: Sequences, budget: int) -> None:
        self._context = context
        self._sequences = sequences
        self.store: PromptStore[SavedSequence] = PromptStore(budget if sequences.reuse else 0)
        self._out, self._into, self._reading = Usual(), Usual(), Usual()  # seconds a token
        self._step = Usual()
        self._left = math.inf  # seconds of copying that this step still may take
        self._copied = 0.0  # seconds of copying since the last step began
        if self.store.budget:
            sequences.leaving = self._keep

    def begin(self, tasks: Sequence[Task], most: int) -> None:
        """Before a step: move out what has been idle for long.

        :param tasks: running requests.
        :param most: tokens that a step has at most.
        """
        self._copied = 0.0
        if not self.store.budget:
            return
        beside = any(task.decodes for task in tasks)
        self._left = _SHARE * (self._step.value or 0.0) if beside else math.inf
        cells = self._sequences.cells
        if not self._sequences.shared or cells.used - cells.busy <= _FEW:
            return
        if not self._worth_moving():
            return
        for sequence in self._sequences.idle_since(_PATIENCE - _rows(tasks, most)):
            if cells.used - cells.busy <= _FEW or not self._keep(sequence):
                return
            self._sequences.drop_idle(sequence)

    def may_displace(self, tasks: Sequence[Task], most: int) -> bool:
        """Whether another request may start before the step, if what is idle in a stream has to be
        copied for that. Those that have started wait for the copy.

        :param tasks: running requests.
        :param most: tokens that a step has at most.
        """
        sequences = self._sequences
        if sequences.shared or sequences.unused > sequences.idle:
            return True
        read = _rows(tasks, most) * (self._reading.value or 0.0)
        return self._copied <= _SHARE * max(read, self._step.value or 0.0)

    def look_up(self, task: Task) -> None:
        """See whether more of a prompt is in host memory than in the cache, for :meth:`bring`."""
        if not self.store.budget:
            return
        path = self.store.find(task.origin, task.tokens[:-1])
        if not path:
            return
        last, common = path[-1]
        gain = last.start + common - task.cached
        known = task.cached if self._sequences.shared else 0
        pieces = [(piece, length) for piece, length in path if piece.end > known]
        copied = sum(len(piece.tokens) for piece, _ in pieces)
        if gain < BLOCK or not self._worth_bringing(copied, gain):
            return
        self.store.touch([piece for piece, _ in path])
        task.coming = pieces[::-1]

    def bring(self, tasks: Sequence[Task]) -> None:
        """Before a batch is composed: copy what its requests begin with into the cache.

        At least one that can be computed is left; those that wait go on in the next step.
        """
        some = any(not task.coming for task in tasks)
        for task in tasks:
            while task.coming and (self._left > 0 or not some):
                self._bring(task, tasks)
            some = some or not task.coming

    def computed(self, rows: int, read: int, seconds: float) -> None:
        """A step took so long.

        :param read: how many of its tokens were prompts'.
        """
        self._sequences.clock += rows
        if read < rows:
            self._step.see(seconds)
        if 2 * read > rows and read >= BLOCK:
            self._reading.see(seconds / read)

    def pause(self, task: Task, waiting: Iterable[Task]) -> None:
        """Copy what a request has, before it gives it back for a while.

        :param waiting: those that wait; copies of all take at most half of the cache's tokens.
        """
        saved = sum(len(other.saved) for other in waiting if other.saved is not None)
        room = self._context.n_ctx // _SAVED - saved
        copied = self._context.keeps_all and task.beams is None
        if copied and _WORTH_BRINGING <= task.cached <= room:
            task.saved = self._context.save(task.sequences[0].index, task.cached)

    def go_on(self, task: Task) -> None:
        """Bring back what a request had before it paused, unless as good as all of it is there."""
        saved, task.saved = task.saved, None
        if saved is None or len(saved) - task.cached < _WORTH_BRINGING:
            return
        (sequence,) = task.sequences
        if not self._sequences.make_room(len(saved)):
            return
        if not self._sequences.shared:
            self._sequences.cut(sequence, 0)
            task.cached = 0
        # In a cache for all, what it has by now in common with others stays so.
        if self._context.restore(sequence.index, saved, task.cached):
            self._sequences.cells.grow(sequence.chain, len(saved) - task.cached)
            task.cached = len(saved)

    def keep_all(self) -> None:
        """Copy what is idle, and leave the cache without it."""
        self._left = math.inf
        for sequence in self._sequences.idle_since(0):
            self._keep(sequence)
        self._sequences.forget_idle()

    def _worth_moving(self) -> bool:
        out, reading = self._out.value, self._reading.value
        return not out or not reading or out + (self._into.value or out) < reading

    def _worth_bringing(self, copied: int, spared: int) -> bool:
        into, reading = self._into.value or self._out.value, self._reading.value
        return not into or not reading or copied * into < spared * reading

    def _bring(self, task: Task, tasks: Iterable[Task]) -> None:
        """A piece, or what another request of the step has come to have of it."""
        (sequence,) = task.sequences
        same = contents(t for t in tasks if t is not task and t.origin == task.origin)
        known = self._sequences.longer(sequence, task.tokens, task.cached, same)
        if known > task.cached:
            task.cached = known
            task.reused = max(task.reused or 0, known)
        if not self._sequences.shared:
            self._bring_stream(task)
            return
        piece, common = task.coming.pop()
        end = piece.start + common
        if end <= task.cached:
            return
        if not self._copy_in(sequence, piece, task.cached, end):
            task.coming.clear()
            task.reused = min(task.reused or 0, task.cached)
        else:
            task.cached = end

    def _bring_stream(self, task: Task) -> None:
        """All of it, in place of what is in the stream."""
        (sequence,) = task.sequences
        parts, end = [], 0
        while task.coming:
            piece, common = task.coming.pop()
            # It may have gone, with what comes after it; or only the other layout can use it.
            if piece.data is None or not piece.data.blocks():
                task.coming.clear()
                break
            end = piece.start + common  # all of the last one may be more than a stream has
            parts.append(piece.data.part(piece.start, end))
        if end - task.cached >= BLOCK:
            self._sequences.cut(sequence, 0)
            task.cached = 0
            began = perf_counter()
            copied = self._context.restore(sequence.index, SavedSequence.joined(parts))
            self._spent(self._into, began, sum(map(len, parts)))
            if copied:
                self._sequences.cells.grow(sequence.chain, end)
                task.cached = end
        task.reused = min(task.reused or 0, task.cached)

    def _copy_in(
        self, sequence: CellSequence, piece: Piece[SavedSequence], start: int, end: int
    ) -> bool:
        room = self._sequences.make_room(len(piece.tokens))
        data = piece.data  # making room may have put others in its place
        if not room or data is None:
            return False
        began = perf_counter()
        copied = self._context.restore(sequence.index, data, start, end)
        self._spent(self._into, began, len(piece.tokens))
        if copied:
            self._sequences.cells.grow(sequence.chain, end - start)
        return copied

    def _keep(self, sequence: CellSequence) -> bool:
        """Copy what an idle sequence has, as far as it is not there already.

        :returns: whether that is all; else the step has no more time for it.
        """
        if not self.store.budget:
            return False
        tokens, origin, shared = sequence.tokens, sequence.origin, self._sequences.shared
        path = [p for p, common in self.store.find(origin, tokens) if common == len(p.tokens)]
        start = sum(len(piece.tokens) for piece in path if len(piece.tokens) == PIECE)
        if sum(len(piece.tokens) for piece in path) == len(tokens):
            start = len(tokens)
        if len(tokens) - start < BLOCK:
            self.store.touch(path)
            return True
        whole = None if shared or not self._worth_moving() else self._copy_out(sequence, 0)
        if not shared and whole is None:
            return True
        while len(tokens) - start >= BLOCK:
            end = min(start + PIECE, len(tokens))
            if whole is not None:
                data: SavedSequence | None = whole.part(start, end)
            elif self._left <= 0:
                return False
            else:
                data = self._copy_out(sequence, start, end)
            if data is None or not self.store.add(origin, start, tokens[:end], data):
                break
            start = end
        return True

    def _copy_out(
        self, sequence: CellSequence, start: int, end: int | None = None
    ) -> SavedSequence | None:
        count = (len(sequence.tokens) if end is None else end) - start
        began = perf_counter()
        data = self._context.save(sequence.index, count, start)
        self._spent(self._out, began, count)
        return data

    def _spent(self, usual: Usual, began: float, tokens: int) -> None:
        seconds = perf_counter() - began
        self._left -= seconds
        self._copied += seconds
        usual.see(seconds / tokens)


def _rows(tasks: Iterable[Task], most: int) -> int:
    """Tokens that the next step computes of these."""
    return min(most, sum(max(1, len(task.tokens) - task.cached) for task in tasks))
