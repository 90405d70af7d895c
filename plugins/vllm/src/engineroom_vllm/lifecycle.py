"""The end of an engine, whatever its cause: its processes watched, and cleared up after."""

from __future__ import annotations

import logging
import multiprocessing.connection
import multiprocessing.process
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from engineroom import EngineDeadError, EngineRoomError, ResourceNotAvailableError
from engineroom_vllm.footprint import Footprint
from engineroom_vllm.library import Library
from engineroom_vllm.log import EngineLog

__all__ = ["Lifecycle"]

logger = logging.getLogger("engineroom.vllm")

_SHUTDOWN_S: Final = 20.0
"""Seconds for an engine to end by itself when its model is unloaded; it takes one or two."""
_WORKERS_S: Final = 3.0
"""Seconds for the workers of an engine that has ended."""


class Lifecycle:
    """Whether an engine's processes live; made when they do.

    :param llm: vLLM's ``AsyncLLM``, ready.
    :param footprint: the processes that belong to it.
    :param log: what they write.
    :param when_closed: called once the engine is closed.
    """

    def __init__(
        self,
        library: Library,
        llm: Any,
        name: str,
        footprint: Footprint,
        log: EngineLog,
        when_closed: Callable[[], None],
    ) -> None:
        self.llm: Any = llm
        self.closing = False
        """It is being closed, or it is closed."""
        self._library = library
        self._name = name
        self._footprint = footprint
        self._log = log
        self._when_closed = when_closed
        self._dead: str | None = None
        self._lock = threading.Lock()
        self._watch = threading.Thread(target=self._wait_for_death, name="vllm-watch", daemon=True)
        self._watch.start()

    @property
    def ended(self) -> bool:
        """Whether the engine takes nothing more, whatever the cause."""
        return self.closing or self._dead is not None or self._library.errored(self.llm)

    @property
    def death(self) -> str:
        """What it died of; empty: it has not."""
        if self._dead is None and not self.closing and self._library.errored(self.llm):
            return self.gone().message
        return self._dead or ""

    def gone(self, why: str = "") -> EngineRoomError:
        """What a request is told whose engine is no more.

        :param why: where that is known on this side; else the log of the engine's processes tells.
        """
        if self.closing:
            return ResourceNotAvailableError(
                f"model {self._name!r} was unloaded while the request ran; send it again"
            )
        if self._dead is None:
            cause = (
                why or self._log.cause() or "its processes ended without a word (killed, perhaps)"
            )
            self._dead = (
                f"the engine of model {self._name!r} has died: {cause}; unload the model and load "
                "it again"
            )
        return EngineDeadError(self._dead)

    def _wait_for_death(self) -> None:
        """In a thread: when one of the engine's processes ends unasked, clear up after it."""
        roots = set(self._footprint.roots)
        children = [c for c in multiprocessing.process.active_children() if c.pid in roots]
        if not children:
            return
        multiprocessing.connection.wait([child.sentinel for child in children])
        with self._lock:
            if self.closing:
                return
            message = str(self.gone())
        killed = self._footprint.remove(0)
        logger.error("%s; %d processes that it left have been ended", message, killed)

    async def stop(self, request_ids: Sequence[str]) -> None:
        """Take no more requests, and end those that run; each is told that it has ended."""
        with self._lock:
            self.closing = True
        if request_ids and not self._library.errored(self.llm):
            await self._library.abort(self.llm, request_ids)

    def close(self) -> None:
        """End the processes and remove what they have left. Blocks for some seconds.

        Harmless when it is done twice.
        """
        with self._lock:
            self.closing = True
            llm, self.llm = self.llm, _Closed()
        if isinstance(llm, _Closed):
            return
        self._footprint.look()
        self._library.shut_down(llm, _SHUTDOWN_S)
        if killed := self._footprint.remove(_WORKERS_S):
            logger.warning(
                "model %r: %d processes did not end by themselves and were killed",
                self._name,
                killed,
            )
        self._watch.join()
        self._when_closed()


class _Closed:
    """Stands where the engine was, for requests that come while it ends."""

    errored: Final = True
