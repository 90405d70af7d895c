"""What only the garbage collector frees: for tests that a request leaves nothing of that kind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from engineroom.schemas import InferenceRequest, InferenceResponse

__all__ = ["uncollected"]

_TEXT: Final = 1024
"""Bytes of a text that counts."""


@contextmanager
def uncollected() -> Iterator[Callable[[], Counter[str]]]:
    """Run a block without the garbage collector.

    :returns: what tells, inside of the block, what only a collection would free of all that was
        dropped since it was last asked: frames, errors, requests, responses, and texts of a KiB
        and more. Empty is right: reference counts alone have freed everything.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # what was there before is not looked at
    try:
        yield _garbage
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _garbage() -> Counter[str]:
    flags = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return _kinds(gc.garbage)
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.collect()


def _kinds(unreachable: Iterable[object]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    texts: dict[int, str | bytes | bytearray] = {}
    for item in unreachable:
        if isinstance(item, FrameType):
            kinds[f"frame of {item.f_code.co_qualname}"] += 1
        elif isinstance(item, BaseException | InferenceRequest | InferenceResponse):
            kinds[type(item).__name__] += 1
        texts |= {
            id(value): value
            for value in gc.get_referents(item)
            if isinstance(value, str | bytes | bytearray) and len(value) >= _TEXT
        }
    if size := sum(map(len, texts.values())):
        kinds["characters of texts"] = size
    return kinds
