"""The account of a unified cache's cells, in which sequences share beginnings. Pure.

llama.cpp does not say how many cells are used, so that is counted here. A sequence's cells are a
chain of runs from its beginning on; sequences that share a beginning share its runs, and each run
counts once.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Cells", "Chain"]

_ALL: Final = 0
_BUSY: Final = 1


class _Run:
    """Cells that belong to the same sequences.

    ``holders`` has how many chains and runs build upon it: all of them, and those that are busy.
    """

    __slots__ = ("holders", "length", "parent", "start")

    def __init__(self, parent: _Run | None, start: int, length: int, holders: list[int]) -> None:
        self.parent = parent
        self.start = start
        self.length = length
        self.holders = holders


class Chain:
    """The cells of one sequence. Made and changed by :class:`Cells` alone."""

    __slots__ = ("busy", "length", "run")

    def __init__(self, run: _Run | None, length: int, busy: bool) -> None:
        self.run = run
        self.length = length
        self.busy = busy

    @property
    def own(self) -> int:
        """Cells at its end that no other chain has."""
        return self.run.length if self.run is not None and self.run.holders[_ALL] == 1 else 0


class Cells:
    """How many cells are taken.

    :param count: how many there are.
    :param shared: chains can have cells in common; else a beginning is copied.
    """

    def __init__(self, count: int, *, shared: bool = True) -> None:
        self.count = count
        self._shared = shared
        self._totals = [0, 0]

    @property
    def used(self) -> int:
        """Cells that some chain has."""
        return self._totals[_ALL]

    @property
    def busy(self) -> int:
        """Cells that some busy chain has; the others could be had by dropping chains."""
        return self._totals[_BUSY]

    @property
    def free(self) -> int:
        """Cells that no chain has."""
        return self.count - self._totals[_ALL]

    def begin(self) -> Chain:
        """A busy chain without cells."""
        return Chain(None, 0, True)

    def grow(self, chain: Chain, count: int) -> None:
        """Add cells at the end."""
        run = chain.run
        if run is None or run.holders[_ALL] > 1:
            # What the chain held is held by the new run.
            run = chain.run = _Run(run, chain.length, 0, [1, int(chain.busy)])
        run.length += count
        chain.length += count
        self._totals[_ALL] += count
        if chain.busy:
            self._totals[_BUSY] += count

    def share(self, chain: Chain, length: int) -> Chain:
        """A busy chain that has the first ``length`` cells of another."""
        if not self._shared:
            copy = self.begin()
            self.grow(copy, length)
            return copy
        run = self._upto(chain, length)
        self._hold(run, _ALL)
        self._hold(run, _BUSY)
        return Chain(run, length, True)

    def cut(self, chain: Chain, length: int) -> None:
        """Leave a chain only its first ``length`` cells."""
        if length >= chain.length:
            return
        run = self._upto(chain, length)
        self._hold(run, _ALL)
        if chain.busy:
            self._hold(run, _BUSY)
            self._let_go(chain.run, _BUSY)
        self._let_go(chain.run, _ALL)
        chain.run, chain.length = run, length

    def drop(self, chain: Chain) -> None:
        """The chain has no cells any more."""
        self.rest(chain)
        self._let_go(chain.run, _ALL)
        chain.run, chain.length = None, 0

    def rest(self, chain: Chain) -> None:
        """The chain is no longer busy."""
        if chain.busy:
            chain.busy = False
            self._let_go(chain.run, _BUSY)

    def wake(self, chain: Chain) -> None:
        """The chain is busy again."""
        if not chain.busy:
            chain.busy = True
            self._hold(chain.run, _BUSY)

    def _upto(self, chain: Chain, length: int) -> _Run | None:
        """The run that ends where a chain has ``length`` cells; if need be, one is split there."""
        run = chain.run
        while run is not None and run.start >= length:
            run = run.parent
        if run is None or run.start + run.length == length:
            return run
        holders = [int(count > 0) for count in run.holders]
        head = _Run(run.parent, run.start, length - run.start, holders)
        run.parent = head
        run.start = length
        run.length -= head.length
        return head

    def _hold(self, run: _Run | None, which: int) -> None:
        while run is not None:
            run.holders[which] += 1
            if run.holders[which] > 1:
                return
            self._totals[which] += run.length
            run = run.parent

    def _let_go(self, run: _Run | None, which: int) -> None:
        while run is not None:
            run.holders[which] -= 1
            if run.holders[which]:
                return
            self._totals[which] -= run.length
            run = run.parent
