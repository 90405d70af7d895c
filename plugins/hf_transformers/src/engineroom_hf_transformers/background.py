"""A load in a thread, and what becomes of what it makes when nobody waits for it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from engineroom import ModelConfig
from engineroom_hf_transformers.loading import Parts, load_parts, release
from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["Engine", "Load"]


class Engine(Protocol):
    """What is built around the parts, and closed before they are released."""

    def close(self) -> None: ...


_E = TypeVar("_E", bound=Engine)


class Load(Generic[_E]):
    """A load in a thread. It cannot be stopped there, but what it makes can be given back.

    :param build: makes the engine, in the same thread.
    """

    def __init__(
        self, config: ModelConfig, options: HfTransformersOptions, build: Callable[[Parts], _E]
    ) -> None:
        self._config = config
        self._options = options
        self._build = build
        self._lock = threading.Lock()
        self._abandoned = False
        self._made: tuple[_E, Parts] | None = None

    def run(self) -> _E:
        """Load and build; in the thread."""
        parts = load_parts(self._config, self._options)
        try:
            engine = self._build(parts)
        except BaseException:
            release(parts)
            raise
        with self._lock:
            abandoned = self._abandoned
            self._made = None if abandoned else (engine, parts)
        if abandoned:
            _unload(engine, parts)
        return engine

    def abandon(self) -> None:
        """Nobody wants the engine any more, whether it is there already or comes later."""
        with self._lock:
            self._abandoned = True
            made, self._made = self._made, None
        if made is not None:  # it came, but nobody got it
            threading.Thread(
                target=_unload, args=made, name="hf_transformers-unload", daemon=True
            ).start()


def _unload(engine: Engine, parts: Parts) -> None:
    engine.close()
    release(parts)
