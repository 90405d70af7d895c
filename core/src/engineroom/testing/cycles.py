"""Loads and unloads, many times over: for tests that memory comes back."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from engineroom.models.manager import LLMModelManager

__all__ = ["LoadCycles", "load_cycles"]


@dataclass(frozen=True, slots=True)
class LoadCycles:
    """What :func:`load_cycles` measured, in bytes of resident memory of this process.

    :param settled: after the first cycles, in which libraries are loaded and pools are filled.
    :param ended: after the last.
    """

    settled: int
    ended: int

    @property
    def growth(self) -> int:
        """What the later cycles left behind; may be negative."""
        return self.ended - self.settled


async def load_cycles(
    manager: LLMModelManager, model_id: str, cycles: int = 200, settle: int = 50
) -> LoadCycles:
    """Load and unload a model ``cycles`` times.

    :param settle: cycles before the first measurement.
    """
    import psutil

    process = psutil.Process()
    measured = []
    for cycle in range(1, cycles + 1):
        await manager.load(model_id)
        await manager.unload(model_id)
        if cycle in (settle, cycles):
            gc.collect()
            measured.append(int(process.memory_info().rss))
    return LoadCycles(measured[0], measured[-1])
