"""Whose turn it is: priority, waiting that grows into it, and owner by owner. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterator
from operator import attrgetter
from typing import Final, Protocol, TypeVar

__all__ = ["SECONDS_A_STEP", "Waiter", "WaitingLine", "turn_of"]

SECONDS_A_STEP: Final = 2.0
"""So many seconds of waiting are worth one step of priority. From the lowest priority to the
highest there are 200 steps: whoever came 400 s later goes later, whatever its priority. That is
less than the 600 s that a server gives a request by default."""


def turn_of(priority: int, arrived: float) -> float:
    """What waiting requests are sorted by: the smallest goes first.

    Every second of waiting raises all who wait by the same amount, so that their order never
    changes: it is known when they come. Among equal priorities, the one that came first goes first.

    :param priority: a higher one goes first.
    :param arrived: when it came, in seconds, on a clock that all of them share.
    """
    return arrived - priority * SECONDS_A_STEP


class Waiter(Protocol):
    """Who can stand in a :class:`WaitingLine`."""

    @property
    def owner(self) -> str:
        """Whose it is: the name of a key, or empty."""
        ...

    @property
    def priority(self) -> int:
        """A higher one goes first."""
        ...

    @property
    def rank(self) -> tuple[float, int]:
        """:func:`turn_of` it, and then its number in the order of coming. Never changes."""
        ...


_T = TypeVar("_T", bound=Waiter)
_rank: Final = attrgetter("rank")


class WaitingLine(Collection[_T]):
    """Those who wait, owner by owner: how much one has waiting makes no difference to the others.

    Of one owner's, the smallest rank goes first. Among owners it goes by turns as well, but what
    counts as waiting begins anew whenever an owner is served: of equal priority, the one is next
    that was served, or began to wait, longest ago. So whoever waits with ``n`` of its own before
    it, among ``m`` owners of its priority, is served after ``m`` times ``n + 1`` at the latest.

    Whoever gave way after it had been served (:meth:`put_back`) goes by its rank alone.

    :param weight_of: what one counts for where a full line has to choose; by default 1.
    """

    def __init__(self, weight_of: Callable[[_T], int] = lambda _: 1) -> None:
        self._weight_of = weight_of
        self._lanes: dict[str, list[_T]] = {}  # none is empty
        self._gave_way: set[_T] = set()
        self._served: dict[str, float] = {}  # when, of those who have a lane

    def __len__(self) -> int:
        return sum(map(len, [*self._lanes.values()]))

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[_T]:
        """All of them, owner by owner; the line may change meanwhile."""
        for lane in [*self._lanes.values()]:
            yield from [*lane]

    def __contains__(self, waiter: object) -> bool:
        return any(waiter is one for one in self)

    def add(self, waiter: _T) -> None:
        """One more waits."""
        insort(self._lanes.setdefault(waiter.owner, []), waiter, key=_rank)

    def put_back(self, waiter: _T) -> None:
        """One that was served gave way, and waits again."""
        self.add(waiter)
        self._gave_way.add(waiter)

    def remove(self, waiter: _T) -> None:
        """One waits no more. :raises ValueError: it did not."""
        lane = self._lanes.get(waiter.owner, [])
        lane.remove(waiter)
        self._gave_way.discard(waiter)
        if not lane:
            del self._lanes[waiter.owner]
            self._served.pop(waiter.owner, None)

    def serve(self, waiter: _T, now: float) -> None:
        """Its turn has come: it waits no more, and its owner's next one goes behind the others'.

        :param now: in seconds, on the clock of the ranks.
        """
        again = waiter in self._gave_way
        self.remove(waiter)
        if not again and waiter.owner in self._lanes:
            self._served[waiter.owner] = now

    def heads(self) -> list[_T]:
        """Each owner's first, in the order of their turns."""
        heads = [lane[0] for lane in self._lanes.values()]
        return heads if len(heads) == 1 else sorted(heads, key=self._turn)

    def _turn(self, waiter: _T) -> tuple[float, int]:
        turn, order = waiter.rank
        served = self._served.get(waiter.owner)
        if served is None or waiter in self._gave_way:
            return turn, order
        return max(turn, turn_of(waiter.priority, served)), order

    def yield_to(self, newcomer: _T, room: int) -> list[_T] | None:
        """Who would have to leave a full line for a newcomer: the last of those who have most.

        :param room: how much less has to wait.
        :returns: ``None``: nobody, since no other owner has more waiting than the newcomer's would.
        """
        left = {o: [w for w in lane if w not in self._gave_way] for o, lane in self._lanes.items()}
        weights = {owner: sum(map(self._weight_of, lane)) for owner, lane in left.items()}
        mine = weights.pop(newcomer.owner, 0) + self._weight_of(newcomer)
        leaving: list[_T] = []
        while room > 0:
            most = max(weights, key=weights.__getitem__, default="")
            if weights.get(most, 0) <= mine:
                return None
            last = left[most].pop()
            leaving.append(last)
            weights[most] -= self._weight_of(last)
            room -= self._weight_of(last)
        return leaving
