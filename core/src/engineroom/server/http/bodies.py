"""How many bytes of requests' bodies the server has at one time, and whose they are.

A body counts from when its bytes come until its request is answered: the prompt is made of it, and
whoever waits for a place, or for a long answer, keeps it as long. The first bytes of each are free,
for the limit of connections bounds them: so small requests get through whatever the large ones do.

Each caller may have as many as are left for all others. One alone comes to half of them, two who
come together to a third each, and so on; who comes after others have their fill has half of the
rest. There is always a share left for the next one, and nobody has to say how many callers there
will be (Choudhury and Hahne's dynamic threshold, 1998, over bytes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engineroom.server.http.errors import RETRY_AFTER_S, ApiError

__all__ = ["FREE_BYTES", "BodyBudget", "BodyShare"]

FREE_BYTES: Final = 64 << 10
"""Of each body these do not count: as much may be read of a connection before anybody asks."""


class BodyBudget:
    """The bytes of all bodies. Belongs to the event loop.

    :param limit: most at one time, together.
    :param refused: is called when one is refused.
    """

    def __init__(self, limit: int, refused: Callable[[], object] = lambda: None) -> None:
        self.limit = limit
        self.held = 0
        """Bytes that count now."""
        self._refused = refused
        self._by_owner: Counter[str] = Counter()

    def share(self, owner: str) -> BodyShare:
        """What a request's body will take.

        :param owner: whose it is, among whom the bytes are divided.
        """
        return BodyShare(self, owner)

    def check(self, owner: str, more: int) -> None:
        """Refuse ``more`` bytes that would be too many. :raises ApiError: 503."""
        left = self.limit - self.held - more
        if self._by_owner[owner] + more > left:
            self._refused()
            raise ApiError(
                503,
                "the server has as many bytes of requests as it may; send this one again later, "
                "or a smaller one",
                "too_many_bytes",
                retry_after_s=RETRY_AFTER_S,
            )

    def take(self, owner: str, more: int) -> None:
        """Count bytes in. :raises ApiError: 503."""
        self.check(owner, more)
        self.held += more
        self._by_owner[owner] += more

    def give_back(self, owner: str, count: int) -> None:
        """Count bytes out."""
        self.held -= count
        self._by_owner[owner] -= count
        if self._by_owner[owner] <= 0:
            del self._by_owner[owner]


@dataclass(slots=True, eq=False)
class BodyShare:
    """What one request's body takes of the budget."""

    budget: BodyBudget
    owner: str
    size: int = 0
    """Bytes that have come."""
    counted: int = 0

    def announce(self, size: int) -> None:
        """Refuse a body of this size at once, rather than when half of it has come.

        Nothing is counted yet: who says that much will come, and sends nothing, takes nothing.

        :raises ApiError: 503.
        """
        if size > FREE_BYTES:
            self.budget.check(self.owner, size - FREE_BYTES)

    def add(self, count: int) -> None:
        """So many bytes have come. :raises ApiError: 503: they are too many, and let go."""
        self.size += count
        more = max(0, self.size - FREE_BYTES) - self.counted
        if more > 0:
            self.budget.take(self.owner, more)
            self.counted += more

    def release(self) -> None:
        """The request has let go of its body. May be called twice."""
        counted, self.counted = self.counted, 0
        if counted:
            self.budget.give_back(self.owner, counted)
