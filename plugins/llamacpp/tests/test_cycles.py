"""200 loads and unloads: what a model takes comes back, and the account knows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engineroom import LLMModelManager, ModelConfig
from engineroom.testing import load_cycles


@pytest.mark.long
async def test_200_loads_and_unloads_leave_memory_flat(tiny_model: Path) -> None:
    options = {"n_ctx": 512, "n_threads": 1}
    config = ModelConfig(model_id="tiny", source=str(tiny_model), options=options)
    manager = LLMModelManager(config=[config])
    cycles = await load_cycles(manager, "tiny")
    (memory,) = manager.memory()
    await manager.close()
    # A leak of one context, or of the weights, would be more than ten times this.
    assert cycles.growth < 8 << 20, cycles
    assert (memory.held, memory.reserved) == (0, 0)
    assert memory.not_returned <= 64 << 20, memory
