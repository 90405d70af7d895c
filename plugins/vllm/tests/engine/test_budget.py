"""Models of one deployment share its budget, and what an engine gave back is free again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engineroom import (
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    ResourceNotAvailableError,
    hookimpl,
)
from engineroom.memory.account import DeviceMemory
from engineroom_vllm import VLLMHandler
from engineroom_vllm.environment import engine_processes
from engineroom_vllm.forkserver import SERVERS

OPTIONS = {"n_ctx": 512, "kv_cache_memory": "64MiB", "keep_ready_s": 60}
MIB = 1 << 20


class AtOneTime:
    """Notes which models are loaded together."""

    def __init__(self) -> None:
        self.now: set[str] = set()
        self.together: set[frozenset[str]] = set()
        self.not_returned: list[Mapping[str, int]] = []

    @hookimpl
    def engineroom_model_loaded(self, loaded_model: LoadedModel) -> None:
        self.now.add(loaded_model.model_id)
        self.together.add(frozenset(self.now))

    @hookimpl
    def engineroom_model_unloaded(
        self, loaded_model: LoadedModel, not_returned: Mapping[str, int]
    ) -> None:
        self.now.discard(loaded_model.model_id)
        self.not_returned.append(not_returned)


class House:
    """A deployment file with models ``a`` and ``b``, under a budget in MiB of main memory."""

    def __init__(self, folder: Path, source: Path, budget_mib: int, **of_a: Any) -> None:
        models = [
            {"model_id": name, "source": str(source), "runtime": "vllm", "options": OPTIONS}
            for name in "ab"
        ]
        models[0] |= of_a
        file = folder / "deployment.json"
        memory = {"cpu": f"{budget_mib}MiB"}
        file.write_text(json.dumps({"memory": memory, "models": models}), encoding="utf-8")
        self.budget = budget_mib * MIB
        self.seen = AtOneTime()
        self.manager = LLMModelManager(file)
        self.service = LLMInferenceService(self.manager, handlers=[VLLMHandler()])
        self.service.registry.register_plugin(self.seen)

    async def ask(self, *names: str) -> list[InferenceResponse]:
        """All at one time."""
        greedy = GenerationParams(temperature=0, max_new_tokens=8)
        requests = [InferenceRequest(model_id=n, prompt="x", params=greedy) for n in names]
        return await asyncio.gather(*map(self.service.infer, requests))

    @property
    def memory(self) -> DeviceMemory:
        [found] = [each for each in self.manager.memory() if each.device == "cpu"]
        return found


@pytest.fixture
def estimate(tiny_model: Path) -> int:
    """MiB that one of the models is expected to take."""
    from engineroom_vllm.loading import estimate as of
    from engineroom_vllm.options import VLLMOptions

    return -(-of(str(tiny_model), VLLMOptions(**OPTIONS))["cpu"] // MIB)


async def test_two_models_that_fit_are_loaded_and_answer_together(
    tmp_path: Path, tiny_model: Path, estimate: int
) -> None:
    house = House(tmp_path, tiny_model, 2 * estimate)
    async with house.service:
        plan = await house.manager.plan()
        assert [(m.action, m.evicts) for m in plan.models] == [("preload", ())] * 2
        await house.manager.load_configured_models()
        assert len(engine_processes()) == 2
        answers = await house.ask("a", "b", "a", "b")
        assert [r.generated_tokens for r in answers] == [8] * 4, answers
        assert len({r.generated_text for r in answers}) == 1  # of the same weights
        assert house.seen.now == {"a", "b"}
        shares = house.memory.holders
        assert set(shares) == {"a", "b"} and all(share > 64 * MIB for share in shares.values())
        assert sum(shares.values()) <= house.budget
        assert house.memory.free == house.budget - sum(shares.values())


async def test_two_models_of_which_one_fits_answer_in_turn_as_the_plan_said(
    tmp_path: Path, tiny_model: Path, estimate: int
) -> None:
    house = House(tmp_path, tiny_model, estimate * 5 // 4)
    async with house.service:
        first, second = (await house.manager.plan()).models
        assert (first.action, first.evicts) == ("preload", ())
        assert (second.action, second.evicts) == ("on demand", ("a",))
        await house.manager.load_configured_models()
        answers = await house.ask("b", "a", "b", "a")
        assert [r.generated_tokens for r in answers] == [8] * 4, answers
        assert house.seen.together == {frozenset("a"), frozenset("b")}
        assert len(engine_processes()) == 1
        assert house.memory.not_returned == 0


async def test_a_model_that_a_pinned_one_leaves_no_room_for_is_told_who_has_it(
    tmp_path: Path, tiny_model: Path, estimate: int
) -> None:
    house = House(tmp_path, tiny_model, estimate * 5 // 4, pinned=True)
    async with house.service:
        _, second = (await house.manager.plan()).models
        assert second.action == "impossible" and "a (" in second.reason
        await house.manager.load("a")
        held = house.memory.holders["a"]
        with pytest.raises(ResourceNotAvailableError) as caught:
            await house.manager.load("b")
        said = str(caught.value)
        assert "no room for model 'b': it needs" in said and "is free" in said
        assert "the rest is held by a (" in said and "unload what is pinned" in said
        [answer] = await house.ask("b")
        assert answer.error_type == "ResourceNotAvailableError"
        [answer] = await house.ask("a")
        assert answer.generated_tokens == 8
        assert house.memory.holders == {"a": held}


async def test_two_models_of_which_none_fits_are_refused_before_anything_starts(
    tmp_path: Path, tiny_model: Path, estimate: int
) -> None:
    house = House(tmp_path, tiny_model, estimate // 2)
    async with house.service:
        assert {m.action for m in (await house.manager.plan()).models} == {"impossible"}
        for answer in await house.ask("a", "b"):
            assert answer.error_type == "ResourceNotAvailableError"
            assert answer.error_message is not None
            assert "it needs" in answer.error_message and "is free" in answer.error_message
            assert "raise memory: in the deployment" in answer.error_message
    assert house.seen.together == set() and engine_processes() == set()


async def test_the_process_that_engines_are_forked_from_is_no_models_memory(
    tmp_path: Path, tiny_model: Path, estimate: int
) -> None:
    """It may be there before a load or not, and stay after an unload or not."""
    SERVERS.close_idle()
    house = House(tmp_path, tiny_model, 2 * estimate)
    async with house.service:
        for _ in range(3):
            await house.manager.load("a")
            assert len(SERVERS.processes()) == 1
            await house.manager.unload("a")
            assert house.memory.not_returned == 0
            SERVERS.close_idle()
            assert SERVERS.processes() == frozenset()
    assert house.seen.not_returned == [{}, {}, {}]
