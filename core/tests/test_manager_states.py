"""Many models on too little memory: whatever happens in whatever order, nothing is lost."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict

import pytest
from core_doubles import FakeProbe, bare_registry, without_threads
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from engineroom import (
    DeploymentConfig,
    EngineDeadError,
    InferenceError,
    InferenceHandler,
    LLMModelManager,
    LoadedModel,
    ModelNotFoundError,
    ResourceNotAvailableError,
)

SIZES = {"a": 4, "b": 4, "c": 6, "d": 3}
BUDGET = 10
EXPECTED = (InferenceError, ResourceNotAvailableError, ModelNotFoundError)


class FakeSlowLoads(InferenceHandler):
    """A fake runtime whose loads and unloads end when a test says so, and how it says."""

    name = "fake"

    def __init__(self) -> None:
        self.gates: dict[str, list[tuple[str, asyncio.Future]]] = defaultdict(list)
        self.in_memory: dict[int, LoadedModel] = {}
        self.every: list[LoadedModel] = []  # so that no id is used twice
        self.loading: Counter[str] = Counter()
        self.open = False

    def can_handle(self, loaded_model):
        return True

    def can_load(self, config):
        return True

    def estimate_memory(self, config):
        return {"cpu": config.options["size"]}

    async def _gate(self, kind, name):
        if not self.open:
            gate = asyncio.get_running_loop().create_future()
            self.gates[kind].append((name, gate))
            try:
                await gate
            finally:
                self.gates[kind].remove((name, gate))

    async def load_model(self, config):
        key = f"{config.model_id} {config.options}"
        self.loading[key] += 1
        assert self.loading[key] == 1, "two loads of one model at one time"
        try:
            await self._gate("load", config.model_id)
        finally:
            self.loading[key] -= 1
        loaded = LoadedModel(
            model_id=config.model_id,
            model_object=config.options,
            config=config,
            memory_bytes=config.options["size"],
        )
        self.in_memory[id(loaded)] = loaded
        self.every.append(loaded)
        return loaded

    async def unload_model(self, loaded_model):
        del self.in_memory[id(loaded_model)]  # KeyError: it was unloaded twice
        await self._gate("unload", loaded_model.model_id)

    async def infer(self, loaded_model, request):
        raise NotImplementedError("no rule sends a request: models are leased")

    async def stream_infer(self, loaded_model, request):
        raise NotImplementedError("no rule sends a request: models are leased")
        yield


def deployment(versions: dict[str, int], keep_alive=None) -> DeploymentConfig:
    return DeploymentConfig.model_validate(
        {
            "memory": {"cpu": BUDGET},
            "load_timeout_s": 1e6,
            "models": [
                {
                    "model_id": name,
                    "source": "fake:",
                    "options": {"size": SIZES[name], "version": version},
                    "preload": False,
                    "keep_alive": keep_alive,
                    "priority": 1 if name == "a" else 0,
                    # One that never waits for anybody.
                    "load_timeout_s": 0 if name == "d" else None,
                }
                for name, version in versions.items()
            ],
        }
    )


class ModelsLives(RuleBasedStateMachine):
    """Loads, leases, releases, unloads, evictions, deaths and reloads in any order."""

    leasing = Bundle("leasing")
    calls = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("engineroom").setLevel(logging.CRITICAL)
        self.loop = asyncio.new_event_loop()
        self.handler = FakeSlowLoads()
        registry = bare_registry()
        registry.register(self.handler)
        self.versions = dict.fromkeys(SIZES, 0)
        self.manager = without_threads(
            LLMModelManager(config=deployment(self.versions), registry=registry, probe=FakeProbe())
        )
        self.tasks: list[asyncio.Task] = []
        self.held: dict[asyncio.Task, LoadedModel] = {}
        self.cancelled: set[asyncio.Task] = set()

    # ── what happens ─────────────────────────────────────────────────────────────────────────

    @rule(times=st.integers(0, 12))
    def turn(self, times) -> None:
        async def turns():
            for _ in range(times):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def spawn(self, coroutine) -> asyncio.Task:
        task = self.loop.create_task(coroutine)
        self.tasks.append(task)
        return task

    def cancel(self, task) -> None:
        if not task.done():
            self.cancelled.add(task)
            task.cancel()

    async def hold(self, name, release: asyncio.Event, dies: asyncio.Event) -> None:
        task = asyncio.current_task()
        try:
            async with self.manager.lease(name) as loaded:
                self.held[task] = loaded
                try:
                    await release.wait()
                    if dies.is_set():
                        raise EngineDeadError("asked to die")
                finally:
                    del self.held[task]
        except EngineDeadError:
            pass

    @rule(target=leasing, name=st.sampled_from(sorted(SIZES)))
    def lease(self, name):
        release, dies = asyncio.Event(), asyncio.Event()
        return release, dies, self.spawn(self.hold(name, release, dies))

    @rule(lease=consumes(leasing), dies=st.booleans())
    def release(self, lease, dies):
        if dies:
            lease[1].set()
        lease[0].set()

    @rule(lease=consumes(leasing))
    def cancel_lease(self, lease):
        self.cancel(lease[2])

    @rule(target=calls, name=st.sampled_from(sorted(SIZES)))
    def load(self, name):
        return self.spawn(self.manager.load(name))

    @rule(
        target=calls,
        name=st.sampled_from(sorted(SIZES)),
        timeout_s=st.sampled_from([None, 0]),
    )
    def unload(self, name, timeout_s):
        return self.spawn(self.manager.unload(name, timeout_s))

    @rule(call=consumes(calls))
    def cancel_call(self, call):
        self.cancel(call)

    @rule(name=st.sampled_from(sorted(SIZES)))
    def expire(self, name):
        """Its idle time is over, whatever it is doing."""
        if (entry := self.manager._table.current.get(name)) is not None:
            entry.keep_alive_s = 1.0
            self.loop.call_soon(self.manager._lifecycle._expire, entry)

    @rule(
        change=st.dictionaries(st.sampled_from(sorted(SIZES)), st.sampled_from(["new", "gone"])),
    )
    def reload(self, change):
        for name, what in change.items():
            if what == "gone":
                self.versions.pop(name, None)
            else:
                self.versions[name] = self.versions.get(name, 0) + 1
        config = deployment(dict(self.versions))
        # At once: the tasks of the reloads are not ours to order.
        self.loop.run_until_complete(self.manager.reload(config))

    def waiting(self, kind: str) -> list[tuple[str, asyncio.Future]]:
        return [(name, gate) for name, gate in self.handler.gates[kind] if not gate.done()]

    @precondition(lambda self: self.waiting("load") or self.waiting("unload"))
    @rule(data=st.data(), fails=st.booleans())
    def end_one(self, data, fails):
        gates = [gate for kind in ("load", "unload") for _, gate in self.waiting(kind)]
        gate = gates[data.draw(st.integers(0, len(gates) - 1))]
        if fails:
            gate.set_exception(OSError("asked to fail"))
        else:
            gate.set_result(None)

    # ── what holds ───────────────────────────────────────────────────────────────────────────

    @invariant()
    def every_lease_is_on_a_model_in_memory(self):
        for loaded in self.held.values():
            assert id(loaded) in self.handler.in_memory

    @invariant()
    def leases_add_up(self):
        assert sum(e.leases for e in self.manager._table) == len(self.held)

    @invariant()
    def the_account_adds_up(self):
        (report,) = [d for d in self.manager.memory() if d.device == "cpu"]
        account = self.manager._account
        holding = {e for e in self.manager._table if account.holding(e)}
        assert {*account.owners} == holding, "a reservation that belongs to nobody"
        for entry in self.manager._table:
            if entry.state in ("unloaded", "failed"):
                assert entry not in holding
            if entry.usable:
                assert entry in holding
        assert report.held + report.reserved + report.free == BUDGET
        assert report.free >= 0 and report.not_returned == 0
        in_memory = sum(m.memory_bytes for m in self.handler.in_memory.values())
        assert in_memory <= report.held + report.reserved

    @invariant()
    def the_state_tells_the_truth(self):
        for entry in self.manager._table:
            if entry.state == "ready":
                assert entry.loaded is not None and id(entry.loaded) in self.handler.in_memory
            if entry.state in ("unloaded", "failed", "loading"):
                assert entry.loaded is None and not entry.leases
        for status in self.manager.list_models():
            assert status.leases >= 0 and status.waiting >= 0

    def teardown(self):
        try:
            self.handler.open = True
            for kind in ("load", "unload"):
                for _, gate in self.waiting(kind):
                    gate.set_result(None)
            for task in self.tasks:
                if "hold" in repr(task.get_coro()):
                    self.cancel(task)

            async def finish():
                async with asyncio.timeout(20):  # a deadlock ends here
                    if self.tasks:
                        await asyncio.wait(self.tasks)
                    await self.manager.close()

            self.loop.run_until_complete(finish())
            for task in self.tasks:
                if task.cancelled():
                    assert task in self.cancelled, "cancelled by another's cancellation"
                elif (error := task.exception()) is not None:
                    assert isinstance(error, EXPECTED), error
            assert not self.handler.in_memory and not self.manager._account.owners
            assert all(e.waiting_callers == 0 for e in self.manager._table)
            assert all(s.state in ("unloaded", "failed") for s in self.manager.list_models())
        finally:
            self.loop.close()
            logging.getLogger("engineroom").setLevel(logging.NOTSET)


TestModelsLives = pytest.mark.long(ModelsLives.TestCase)
TestModelsLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
