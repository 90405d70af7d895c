"""Many clients, many models, little memory: every request ends, and rightly."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from core_doubles import gate_bench
from manager_doubles import FakeSizedHandler, cpu, manager_of, model

from engineroom import InferenceRequest, LLMInferenceService, ResourceNotAvailableError
from engineroom.memory.probe import MachineProbe
from engineroom.testing import EchoHandler, load_cycles

pytestmark = pytest.mark.long

MODELS = "abcdef"
TYPED = {"InferenceError", "ResourceNotAvailableError", "RequestTimeoutError", "EngineDeadError"}


class FakeBusyHandler(FakeSizedHandler):
    """A fake whose loads and unloads take turns of the loop, and sometimes fail."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.dice = dice

    async def load_model(self, config):
        for _ in range(self.dice.randrange(20)):
            await asyncio.sleep(0)
        if self.dice.random() < 0.05:
            raise OSError("asked to fail in loading")
        return await super().load_model(config)

    async def unload_model(self, loaded_model):
        await super().unload_model(loaded_model)
        for _ in range(self.dice.randrange(10)):
            await asyncio.sleep(0)
        if self.dice.random() < 0.02:
            raise OSError("asked to fail in unloading")


async def clients(service, number: int, requests: int, dice: random.Random) -> Counter[str]:
    """Each client sends its share, one request after another, to models as they come."""
    ends: Counter[str] = Counter()

    async def client(which: int) -> None:
        for turn in range(requests // number):
            prompt = f"client {which} says {turn} to a model"
            request = InferenceRequest(
                model_id=dice.choice(MODELS),
                prompt=prompt,
                timeout_s=0.002 if dice.random() < 0.02 else None,
            )
            if dice.random() < 0.02:
                task = asyncio.create_task(service.infer(request))
                for _ in range(dice.randrange(30)):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                ends["cancelled" if task.cancelled() else "answered"] += 1
                continue
            response = await service.infer(request)
            if response.error_type is None:
                assert response.generated_text == prompt
                ends["answered"] += 1
            else:
                assert response.error_type in TYPED, response.error_message
                ends[response.error_type] += 1

    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        for which in range(number):
            group.create_task(client(which))
    return ends


@pytest.mark.parametrize("seed", [1, 2])
async def test_32_clients_ask_6_models_of_which_3_fit(seed, caplog):
    caplog.set_level("CRITICAL", "engineroom")
    dice = random.Random(seed)
    handler = FakeBusyHandler(dice)
    manager = manager_of(
        *(model(name, 3, pinned=name == "a", priority=dice.randrange(3)) for name in MODELS),
        memory={"cpu": 10},
        keep_alive=0.05,
        load_timeout_s=30,
        handlers=[handler],
    )
    service = LLMInferenceService(manager)
    ends = await clients(service, 32, 2000, dice)
    assert sum(ends.values()) == 32 * (2000 // 32)
    assert ends["answered"] > 1500, ends
    await service.close()
    assert handler.most_bytes <= 10 and handler.bytes == 0
    assert cpu(manager).free == 10 and not manager._account.owners
    # Loads are shared: without that there would be about as many as requests.
    assert sum(handler.loads.values()) < 1000, handler.loads


async def test_the_toy_runtime_under_the_same_load(caplog):
    handler = EchoHandler()
    models = [
        {"model_id": name, "source": "echo:", "memory": {"cpu": "1GiB"}, "options": {}}
        for name in MODELS
    ]
    manager = manager_of(*models, memory={"cpu": "3GiB"}, handlers=[handler])
    service = LLMInferenceService(manager)
    ends = await clients(service, 8, 240, random.Random(3))
    assert ends["answered"] > 200, ends
    assert set(ends) <= {"answered", "cancelled", "RequestTimeoutError"}
    await service.close()
    assert handler.loads == handler.unloads and cpu(manager).holders == {}


async def test_200_loads_and_unloads_leave_nothing_behind():
    """The toy runtime, on the real probe of this machine; runtimes have this test, too."""
    manager = manager_of(
        {"model_id": "echo", "source": "echo:"},
        handlers=[EchoHandler()],
        memory={"cpu": "1GiB"},
        probe=MachineProbe(),
    )
    cycles = await load_cycles(manager, "echo")
    assert cycles.growth < 4 << 20, cycles
    assert cpu(manager).free == 1 << 30


async def test_a_system_that_opens_no_file_is_no_defect(monkeypatch):
    bench = gate_bench()

    def none_left(_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(bench.service.registry, "select_loader", none_left)
    with pytest.raises(ResourceNotAvailableError, match="Too many open files; send it again"):
        await bench.manager.load("gate")
    assert (await bench.service.infer(bench.request())).error_type == "ResourceNotAvailableError"
