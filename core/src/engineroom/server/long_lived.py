"""Keeps the garbage collector from walking over models and libraries while requests wait.

A full collection looks at every object of the process. With a runtime's libraries and models in it
that takes a third of a second, in which nothing else runs; it comes when enough new objects have
lived for a while, so that requests bring it about. What has survived a long collection is alive and
stays so: it is set aside (``gc.freeze``), and later ones look at what came after it. Before a model
goes it is taken back, since only the collector frees some of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from engineroom.handlers.markers import hookimpl
from engineroom.handlers.registry import HandlerRegistry
from engineroom.status import ModelState

__all__ = ["LongLived"]

LONG_S: Final = 0.01
"""Seconds of a collection after which what is left is set aside."""
LARGE: Final = 300_000
"""Objects of a process in which a collection takes long."""
_FULL: Final = 2


class LongLived:
    """Sets aside what lives long, while no model comes or goes."""

    def __init__(self) -> None:
        self._moving: set[str] = set()
        self._began = 0.0
        self._active = False

    @contextmanager
    def set_aside(self, registry: HandlerRegistry) -> Iterator[None]:
        """Do so inside the ``with``. The process is taken to be the server's own.

        :param registry: tells of the models.
        """
        registry.register_plugin(self, name=f"server-long-lived-{id(self):x}")
        gc.callbacks.append(self._collected)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            gc.callbacks.remove(self._collected)
            gc.unfreeze()

    @staticmethod
    def settle() -> None:
        """Collect now, if that takes long; while nobody waits for the process."""
        if len(gc.get_objects(_FULL)) > LARGE:
            gc.collect()

    @hookimpl
    def engineroom_model_state_changed(self, model_id: str, new_state: ModelState) -> None:
        """Take everything back before a model goes, or where one did not come."""
        if new_state in ("loading", "draining"):
            self._moving.add(model_id)
        else:
            self._moving.discard(model_id)
        if self._active and new_state in ("draining", "failed"):
            gc.unfreeze()

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < _FULL:
            return
        if phase == "start":
            self._began = time.perf_counter()
        elif time.perf_counter() - self._began >= LONG_S and not self._moving:
            gc.freeze()
