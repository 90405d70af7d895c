"""Which layout the cache has: one that all sequences share, or a stream for each.

With streams nobody passes over cells of others, and none has more than its part; but what many
have in common is there as many times. So each has a stream for as long as that is enough for every
request and they have not nearly everything in common; else all share the whole. Going over takes
copies of what running requests have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from engineroom import ResourceNotAvailableError
from engineroom.engine import common_prefix
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.sequences import Sequences
from engineroom_llamacpp.tasks import Task

__all__ = ["Layout"]

_PATIENCE: Final = 2
"""Times a stream's cells: so many tokens are computed before it goes over to streams again."""
_MOST_PATIENCE: Final = 64
"""The same where streams were too small soon each time: it doubles until there."""
_MUCH: Final = 2
"""Times a stream's cells: what is in common is worth going over for."""
_NEARLY_ALL: Final = 0.75
"""Of their tokens. With 32 requests of 128 tokens, of which 96 are in common, streams read a fifth
faster and decode a tenth slower; with 2,000 in common of 2,070, all takes twice as long."""


class Layout:
    """Says when the layout is to change, and changes it.

    :param more: tokens that a request may have in a step beyond its next one.
    """

    def __init__(self, context: LlamaContext, sequences: Sequences, more: int) -> None:
        self._context = context
        self._sequences = sequences
        self._more = more
        self._patience = _PATIENCE
        self._since = -_MOST_PATIENCE * context.stream
        self.refused: ResourceNotAvailableError | None = None
        """Why it could not be changed where it had to: there was no memory for it."""
        self._needed = False
        self._stays = False  # there was none, and no need

    def fits(self, task: Task) -> bool:
        """Whether a stream is enough for the request's next step."""
        return task.width == 1 and len(task.tokens) + self._more <= self._context.stream

    def started(self, task: Task, running: Iterable[Task]) -> None:
        """Look what a request has in common with those that run."""
        if self._context.changes:
            others = (other for other in running if other is not task)
            same = (other.tokens for other in others if other.origin == task.origin)
            task.common = max((common_prefix(task.tokens, other) for other in same), default=0)

    def is_wrong(self, running: Sequence[Task]) -> bool:
        """Whether these requests are to be computed in the other layout."""
        if not self._context.changes:
            return False
        if not self._context.unified:
            self._needed = not all(map(self.fits, running))
            return self._needed or (not self._stays and self._have_much_in_common(running))
        if self._stays or self._have_much_in_common(running):
            return False
        self._needed = False
        stream = self._context.stream
        return self._rested(self._patience) and all(
            task.width == 1 and 2 * len(task.tokens) <= stream for task in running
        )

    def change(self) -> None:
        """Go over to the other one; nobody has a sequence, and none has anything in it."""
        context = self._context
        if not context.unified:
            soon = not self._rested(2 * self._patience)
            self._patience = min(2 * self._patience, _MOST_PATIENCE) if soon else _PATIENCE
        self._since = self._sequences.clock
        try:
            context.lay_out(unified=not context.unified)
        except ResourceNotAvailableError as error:
            self._stays = True
            self.refused = error if self._needed else None
        self._sequences.lay_out(context.sequences, context.cells, shared=context.unified)

    def _have_much_in_common(self, running: Sequence[Task]) -> bool:
        common = sum(task.common for task in running)
        if not self._sequences.reuse or common < _MUCH * self._context.stream:
            return False
        return common >= _NEARLY_ALL * sum(len(task.tokens) for task in running)

    def _rested(self, patience: int) -> bool:
        """Whether so many times a stream's cells were computed since it changed."""
        return self._sequences.clock - self._since >= patience * self._context.stream
