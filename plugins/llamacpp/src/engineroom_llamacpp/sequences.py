"""The sequences of a context: who has which, what is in those that nobody has, who goes for whom.

What a request leaves behind stays until its sequence or its cells are needed, so that a prompt
with the same beginning need not be computed again. A beginning is shared by telling llama.cpp
that its cells belong to another sequence, too: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from engineroom.engine import common_prefix
from engineroom_llamacpp.cells import Cells, Chain

__all__ = ["BLOCK", "CellMemory", "CellSequence", "Origin", "Sequences"]

_TRIMMED: Final = 64
"""Cells that are taken from an idle sequence at a time, at least: looking through the cache for
them costs about as much for one."""
BLOCK: Final = 16
"""Fewer common tokens are as soon read again; from there on, all are shared."""


class Origin(NamedTuple):
    """What cells were computed in and with: they are of use to requests of the same origin alone.

    :param scope: the cache scope of the request.
    :param adapter: the named adapter.
    """

    scope: str = ""
    adapter: str | None = None


_PLAIN: Final = Origin()


class CellMemory(Protocol):
    """What is asked of a context."""

    def forget(self, sequence: int, position: int = 0) -> None:
        """Free the sequence's cells from ``position`` on."""

    def share(self, source: int, target: int, length: int) -> None:
        """Let ``target``, which is empty, have the first ``length`` cells of ``source``."""


@dataclass(eq=False, slots=True)
class CellSequence:
    """One sequence of the context.

    :param index: llama.cpp's number for it.
    :param origin: what it is computed in and with.
    :param tokens: those whose cells it has, while nobody has it.
    :param since: the clock of :class:`Sequences` when it was last used.
    """

    index: int
    chain: Chain
    origin: Origin = _PLAIN
    tokens: list[int] = field(default_factory=list)
    since: int = 0


class Sequences:
    """Gives sequences out and takes them back.

    :param count: how many the context has.
    :param cells: cells of its cache.
    :param reuse: keep what is in sequences that are given back, and look for common beginnings.
    :param shared: sequences can have cells in common; else each has its part of ``cells``, and a
        beginning is copied.
    """

    def __init__(
        self, memory: CellMemory, count: int, cells: int, *, reuse: bool, shared: bool = True
    ) -> None:
        self._memory = memory
        self.reuse = reuse
        self.lay_out(count, cells, shared=shared)
        self.clock = 0
        """Tokens that have been computed so far."""
        self.leaving: Callable[[CellSequence], object] = lambda _: None
        """Told of an idle sequence before it loses cells to others."""

    def lay_out(self, count: int, cells: int, *, shared: bool) -> None:
        """Begin anew with an empty cache; nobody has a sequence. Arguments are the class's."""
        self.shared = shared
        self.count = count
        self.cells = Cells(cells, shared=shared)
        self._free = list(range(count - 1, -1, -1))
        self._idle: list[CellSequence] = []  # the longest unused first

    @property
    def room(self) -> int:
        """Cells that are free or can be made so."""
        return self.cells.count - self.cells.busy

    @property
    def idle(self) -> int:
        """Sequences that nobody has and that have something in them."""
        return len(self._idle)

    @property
    def unused(self) -> int:
        """Sequences that nobody has."""
        return len(self._free) + len(self._idle)

    def take(
        self,
        tokens: Sequence[int],
        busy: Iterable[tuple[CellSequence, Sequence[int]]] = (),
        origin: Origin = _PLAIN,
    ) -> tuple[CellSequence, int]:
        """A sequence for a prompt. One must be unused.

        :param busy: sequences in use of the same origin, with the tokens whose cells they have.
        :returns: the sequence, and how many of the tokens it has already: not all, because the
            last one's logits are needed.
        """
        best: CellSequence | None = None
        common = 0
        if self.reuse:
            needed = tokens[:-1]
            idle = ((s, s.tokens) for s in self._idle if s.origin == origin)
            for sequence, content in (*idle, *busy):
                if (length := _worth(common_prefix(needed, content))) > common:
                    best, common = sequence, length
        if best is None:
            return self._fresh(None, origin), 0
        is_idle = not best.chain.busy
        alone = is_idle and not self._free and len(self._idle) == 1
        if alone or (is_idle and len(best.tokens) - common < BLOCK):
            if len(best.tokens) - common >= BLOCK:
                self.leaving(best)
            self._idle.remove(best)
            self.cut(best, common)
            self.cells.wake(best.chain)
            best.tokens = []
            return best, common
        return self._fork(best, common), common

    def begin(self, origin: Origin = _PLAIN) -> CellSequence:
        """An empty sequence. One must be unused."""
        return self._fresh(None, origin)

    def common(
        self, tokens: Sequence[int], busy: Iterable[tuple[CellSequence, Sequence[int]]]
    ) -> int:
        """How many of a prompt's tokens have cells in a sequence that is in use."""
        if not self.reuse:
            return 0
        return max((_worth(common_prefix(tokens[:-1], content)) for _, content in busy), default=0)

    def longer(
        self,
        sequence: CellSequence,
        tokens: Sequence[int],
        known: int,
        busy: Iterable[tuple[CellSequence, Sequence[int]]],
    ) -> int:
        """Let a sequence have more of its prompt, if another has come to have it meanwhile.

        :param known: how many of the tokens it has.
        :param busy: as for :meth:`take`.
        :returns: how many it has now.
        """
        if not self.reuse:
            return known
        needed = tokens[:-1]
        longest: CellSequence | None = None
        for other, content in busy:
            if len(content) > known and other is not sequence:
                length = _worth(common_prefix(needed, content))
                if length - known >= BLOCK:
                    longest, known = other, length
        if longest is not None:
            self._memory.forget(sequence.index)
            self.cells.drop(sequence.chain)
            self._memory.share(longest.index, sequence.index, known)
            sequence.chain = self.cells.share(longest.chain, known)
        return known

    def fork(self, source: CellSequence) -> CellSequence:
        """Another sequence with the same cells. One must be unused."""
        return self._fork(source, source.chain.length)

    def cut(self, sequence: CellSequence, length: int) -> None:
        """Leave a sequence only its first ``length`` cells."""
        if length < sequence.chain.length:
            self._memory.forget(sequence.index, length)
            self.cells.cut(sequence.chain, length)

    def give_back(self, sequence: CellSequence, tokens: Sequence[int] = ()) -> None:
        """Nobody has the sequence any more.

        :param tokens: those at its beginning whose cells are right, to be kept.
        """
        kept = [s for s in self._idle if s.origin == sequence.origin]
        if not self.reuse or len(tokens) < BLOCK or self._is_known(tokens, kept):
            self._drop(sequence)
            return
        for other in [s for s in kept if common_prefix(s.tokens, tokens) == len(s.tokens)]:
            self._idle.remove(other)
            self._drop(other)
        self.cut(sequence, len(tokens))
        self.cells.rest(sequence.chain)
        sequence.tokens = list(tokens)
        sequence.since = self.clock
        self._idle.append(sequence)

    def make_room(self, count: int) -> bool:
        """See to it that so many cells are free: what was unused longest goes, from its end on.

        :returns: whether they are.
        """
        while (missing := count - self.cells.free) > 0 and self._idle:
            sequence = self._idle[0]
            self.leaving(sequence)
            own = sequence.chain.own
            length = len(sequence.tokens) - min(own, max(missing, _TRIMMED))
            # What shares all of its cells frees none, and is in the sequence that it shares with.
            if own and length >= BLOCK:
                self.cut(sequence, length)
                del sequence.tokens[length:]
            else:
                self._drop(self._idle.pop(0))
        return self.cells.free >= count

    def idle_since(self, age: int) -> list[CellSequence]:
        """Sequences that nobody has used while so many tokens were computed."""
        return [s for s in self._idle if self.clock - s.since >= age]

    def drop_idle(self, sequence: CellSequence) -> None:
        """Free a sequence that nobody has."""
        self._idle.remove(sequence)
        self._drop(sequence)

    def forget_idle(self) -> None:
        """Free all sequences that nobody has."""
        while self._idle:
            self._drop(self._idle.pop())

    def _is_known(self, tokens: Sequence[int], idle: Sequence[CellSequence]) -> bool:
        """Whether one of these idle sequences has all of it; then it counts as used now."""
        for sequence in idle:
            if common_prefix(sequence.tokens, tokens) == len(tokens):
                self._idle.remove(sequence)
                self._idle.append(sequence)
                sequence.since = self.clock
                return True
        return False

    def _fresh(self, keep: CellSequence | None, origin: Origin) -> CellSequence:
        """An empty sequence; where none is free, another than ``keep`` is emptied."""
        if not self._free:
            victim = next(sequence for sequence in self._idle if sequence is not keep)
            self.leaving(victim)
            self.drop_idle(victim)
        # Neighbours are computed at one go, where each has its own part of the cells.
        index = self._free.pop() if self.shared else self._free.pop(_least(self._free))
        return CellSequence(index, self.cells.begin(), origin)

    def _fork(self, source: CellSequence, length: int) -> CellSequence:
        sequence = self._fresh(source, source.origin)
        self._memory.share(source.index, sequence.index, length)
        sequence.chain = self.cells.share(source.chain, length)
        return sequence

    def _drop(self, sequence: CellSequence) -> None:
        self._memory.forget(sequence.index)
        self.cells.drop(sequence.chain)
        sequence.tokens = []
        self._free.append(sequence.index)


def _worth(length: int) -> int:
    """As many tokens as are shared of so many."""
    return length if length >= BLOCK else 0


def _least(numbers: Sequence[int]) -> int:
    """The place of the least one."""
    return min(range(len(numbers)), key=numbers.__getitem__)
