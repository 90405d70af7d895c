"""200 loads and unloads: what a model takes comes back, and the account knows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hf_benches import EXACT

from engineroom import LLMModelManager, ModelConfig
from engineroom.testing import load_cycles


@pytest.mark.long
async def test_200_loads_and_unloads_leave_memory_flat(tiny: Callable[[str], Path]) -> None:
    config = ModelConfig(model_id="tiny", source=str(tiny("llama")), options=EXACT)
    manager = LLMModelManager(config=[config])
    cycles = await load_cycles(manager, "tiny")
    (memory,) = manager.memory()
    await manager.close()
    # A leak of one cache would be more than this.
    assert cycles.growth < 16 << 20, cycles
    assert (memory.held, memory.reserved) == (0, 0)
    assert memory.not_returned <= 64 << 20, memory
