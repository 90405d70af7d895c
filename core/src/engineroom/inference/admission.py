"""Which work is let in and runs: requests of every kind, counted, observed and drained alike."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

from engineroom.errors import QueueFullError, RequestTimeoutError, ResourceNotAvailableError
from engineroom.handlers.registry import HandlerRegistry
from engineroom.inference import request_log
from engineroom.inference.blocking import BlockingPortal
from engineroom.inference.scope import RequestScope
from engineroom.schemas import InferenceRequest, InferenceResponse

__all__ = ["Admission"]


class Admission:
    """Counts work in and out, and tells the observers.

    :param registry: whose observers are told.
    :param portal: notes which event loop the work runs on.
    :param max_requests: most at one time; more are refused.
    """

    def __init__(
        self, registry: HandlerRegistry, portal: BlockingPortal, max_requests: int
    ) -> None:
        self.registry = registry
        self.closed = False
        """Nothing is let in any more."""
        self._portal = portal
        self._max_requests = max_requests
        self._running: set[RequestScope] = set()
        self._by_key: Counter[str | None] = Counter()  # those of them that were not pushed out
        self._idle: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[RequestScope]:
        return iter(self._running)

    def admit(self, scope: RequestScope) -> None:
        """Count the request in, or refuse it at once.

        :raises ConfigurationError: the service belongs to another process.
        :raises ResourceNotAvailableError: the service is closed.
        :raises QueueFullError: there are ``max_requests`` already, and no other key has more of
            them than this one's.
        :raises RequestTimeoutError: its time is over before it began.
        """
        self._portal.home.check()
        request = scope.request
        if self.closed:
            self._reject(scope, "closed")
            raise ResourceNotAvailableError("the service is closed; it takes no more requests")
        if len(self._running) >= self._max_requests and not self._make_room(request):
            self._reject(scope, "queue_full")
            raise QueueFullError(
                f"{len(self._running)} requests are running or waiting, which is the bound "
                "(max_requests); send it again later"
            )
        self._portal.bind()
        self._running.add(scope)
        self._by_key[request.key_name] += 1
        scope.arm(
            RequestTimeoutError(f"it was not done after timeout_s={request.timeout_s} seconds")
        )
        request_log.started(request)
        self.registry.notify("engineroom_request_started", request=request)
        if scope.deadline is not None and asyncio.get_running_loop().time() >= scope.deadline:
            raise RequestTimeoutError(
                f"timeout_s={request.timeout_s} seconds were over before it began"
            )

    def _make_room(self, newcomer: InferenceRequest) -> bool:
        """Where another key has most of what is here, stop its latest one that has not begun yet.

        :returns: whether there was one. It leaves soon, and counts no more.
        """
        owner = max(self._by_key, key=self._by_key.__getitem__, default=None)
        if self._by_key[owner] <= self._by_key[newcomer.key_name] + 1:
            return False
        theirs = (s for s in self._running if s.request.key_name == owner and s.waits)
        latest = max(theirs, key=attrgetter("started"), default=None)
        if latest is None:
            return False
        latest.pushed_out = True
        self._count_out(owner)
        latest.interrupt(
            QueueFullError(
                f"{self._max_requests} requests are running or waiting, which is the bound "
                "(max_requests), and most of them are of this key; send it again later"
            )
        )
        return True

    def _count_out(self, owner: str | None) -> None:
        self._by_key[owner] -= 1
        if not self._by_key[owner]:
            del self._by_key[owner]

    def turn_away(self, request: InferenceRequest, reason: str) -> None:
        """Tell that a limit turned a request away, and count it nowhere."""
        request_log.rejected(request, reason)
        self.registry.notify("engineroom_request_rejected", request=request, reason=reason)

    def _reject(self, scope: RequestScope, reason: str) -> None:
        scope.turned_away = True
        self.turn_away(scope.request, reason)

    def finish(self, scope: RequestScope, response: InferenceResponse) -> None:
        """End the request with this response: count it out and tell the observers, if it was in."""
        if scope not in self._running:
            if not scope.turned_away:
                request_log.finished(scope, response, self.registry.request_log_level)
            scope.stop(response)
            return
        request = scope.request
        response.inference_time_ms = (time.perf_counter() - scope.started) * 1000
        scope.stop(response)
        self._running.discard(scope)
        if not scope.pushed_out:
            self._count_out(request.key_name)
        request_log.finished(scope, response, self.registry.request_log_level)
        self.registry.notify("engineroom_request_finished", request=request, response=response)
        if not self._running:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()

    def interrupt(self, reason: str) -> None:
        """Stop everything that runs; its callers are told why."""
        for scope in list(self._running):
            scope.interrupt(ResourceNotAvailableError(reason))

    async def wait_idle(self, timeout_s: float | None = None) -> None:
        """Wait until nothing runs any more, but no longer than ``timeout_s``."""
        if self._running:
            future = asyncio.get_running_loop().create_future()
            self._idle.append(future)
            await asyncio.wait([future], timeout=timeout_s)
