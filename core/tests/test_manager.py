"""The life of models: one load for many, leases, draining, failure, and every order of these."""

from __future__ import annotations

import asyncio
import logging

import pytest
from core_doubles import (
    GateHandler,
    PlainHandler,
    bare_registry,
    echo_config,
    until,
    without_threads,
)
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
    ConfigurationError,
    DeploymentConfig,
    InferenceError,
    LLMModelManager,
    LoadedModel,
    ModelConfig,
    ModelNotFoundError,
    ModelVariant,
    NoSuitableHandlerError,
    ResourceNotAvailableError,
)
from engineroom.testing import EchoHandler


def managed(handler, *models, **config) -> LLMModelManager:
    found = bare_registry()
    found.register(handler)
    configs = list(models) or [ModelConfig(model_id="m", source=f"{handler.name}:", **config)]
    return LLMModelManager(config=configs, registry=found)


def gated(*kinds: str) -> tuple[GateHandler, LLMModelManager]:
    handler = GateHandler(gated=frozenset(kinds))
    return handler, managed(handler)


def status(manager: LLMModelManager, model_id: str = "m"):
    (found,) = [s for s in manager.list_models() if s.model_id == model_id]
    return found


def state(manager: LLMModelManager) -> str:
    return status(manager).state


# ── loading ──────────────────────────────────────────────────────────────────────────────────


async def test_many_callers_share_one_load():
    handler, manager = gated("load")
    callers = [asyncio.create_task(manager.load("m")) for _ in range(5)]
    await until(lambda: handler.loading == 1)
    assert state(manager) == "loading" and manager.get_loaded_model("m") is None
    handler.gates["load"][0].set_result(None)
    loaded = await asyncio.gather(*callers)
    assert handler.loads == 1 and all(model is loaded[0] for model in loaded)
    assert state(manager) == "ready"


async def test_a_failing_load_is_told_to_all_who_wait_and_tried_again_for_the_next():
    handler, manager = gated("load")
    callers = [asyncio.create_task(manager.load("m")) for _ in range(3)]
    await until(lambda: handler.loading == 1)
    handler.gates["load"][0].set_exception(OSError("no such disk"))
    for result in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(result, InferenceError) and result.model_id == "m"
        assert "'gate': load_model failed: OSError: no such disk" in str(result)
        assert isinstance(result.__cause__, OSError)
    assert handler.loads == 1 and state(manager) == "failed"
    assert "no such disk" in status(manager).error
    again = asyncio.create_task(manager.load("m"))
    await until(lambda: handler.loading == 1)
    assert state(manager) == "loading"
    handler.gates["load"][1].set_result(None)
    await again
    assert state(manager) == "ready" and status(manager).error is None


async def test_a_typed_error_of_a_load_keeps_its_type():
    handler, manager = gated("load")
    caller = asyncio.create_task(manager.load("m"))
    await until(lambda: handler.loading == 1)
    handler.gates["load"][0].set_exception(ModelNotFoundError("no such file"))
    with pytest.raises(ModelNotFoundError) as caught:
        await caller
    assert caught.value.model_id == "m"


@pytest.mark.parametrize("which", [0, 1], ids=["the first", "one that joined"])
async def test_a_cancelled_caller_leaves_the_load_to_the_others(which):
    handler, manager = gated("load")
    callers = [asyncio.create_task(manager.load("m")) for _ in range(3)]
    await until(lambda: handler.loading == 1)
    gone = callers.pop(which)
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled() and handler.loading == 1
    handler.gates["load"][0].set_result(None)
    for loaded in await asyncio.gather(*callers):
        assert loaded is manager.get_loaded_model("m")
    assert handler.loads == 1


async def test_a_load_whose_every_caller_was_cancelled_goes_on():
    handler, manager = gated("load")
    caller = asyncio.create_task(manager.load("m"))
    await until(lambda: handler.loading == 1)
    caller.cancel()
    await asyncio.wait([caller])
    handler.gates["load"][0].set_result(None)
    await until(lambda: state(manager) == "ready")


async def test_a_failing_load_that_nobody_waits_for_any_more_is_not_lost():
    handler, manager = gated("load")
    caller = asyncio.create_task(manager.load("m"))
    await until(lambda: handler.loading == 1)
    caller.cancel()
    await asyncio.wait([caller])
    handler.gates["load"][0].set_exception(OSError("late"))
    await until(lambda: state(manager) == "failed")
    assert "late" in status(manager).error


async def test_a_load_that_is_cancelled_inside_the_runtime_is_a_failure():
    handler, manager = gated("load")
    caller = asyncio.create_task(manager.load("m"))
    await until(lambda: handler.loading == 1)
    handler.gates["load"][0].cancel()
    with pytest.raises(InferenceError, match="load_model failed: CancelledError"):
        await caller
    assert state(manager) == "failed"


@pytest.mark.parametrize("given", [None, "model"])
async def test_a_load_that_returns_no_model_is_named(given):
    class Wrong(PlainHandler):
        async def load_model(self, config):
            return given

    manager = managed(Wrong())
    with pytest.raises(InferenceError, match="'plain': load_model returned"):
        await manager.load("m")
    assert state(manager) == "failed"


async def test_the_handlers_name_is_noted_where_it_did_not_say():
    _, manager = gated()
    assert (await manager.load("m")).handler_name == "gate"
    assert status(manager).runtime == "gate"


async def test_no_handler_for_a_model_is_a_failure_of_its_load():
    manager = LLMModelManager(config=[echo_config("m")], registry=bare_registry())
    with pytest.raises(NoSuitableHandlerError, match="pip install"):
        await manager.load("m")
    assert state(manager) == "failed"


async def test_configured_models_are_loaded_but_those_that_wait_for_a_request():
    handler = EchoHandler()
    lazy = ModelConfig(model_id="lazy", source="echo:", preload=False)
    manager = managed(handler, echo_config("eager"), lazy)
    await manager.load_configured_models()
    assert status(manager, "eager").state == "ready"
    assert status(manager, "lazy").state == "unloaded"
    async with manager.lease("lazy"):
        assert status(manager, "lazy").state == "ready"


async def test_a_failing_preload_is_told_after_the_others_were_loaded(caplog):
    bad = echo_config("bad", fail="load")
    manager = managed(EchoHandler(), bad, echo_config("good"))
    with pytest.raises(InferenceError, match="asked to fail in loading"):
        await manager.load_configured_models()
    assert status(manager, "good").state == "ready"
    assert "preload of 'bad' failed" in caplog.text


# ── names ────────────────────────────────────────────────────────────────────────────────────


async def test_an_alias_is_the_same_model():
    manager = managed(
        EchoHandler(), ModelConfig(model_id="m", source="echo:", aliases=["default", "gpt"])
    )
    async with manager.lease("default") as one, manager.lease("m") as other:
        assert one is other and status(manager).leases == 2
    assert manager.get_loaded_model("gpt") is one
    assert manager.get_config("gpt").model_id == "m"
    assert status(manager).aliases == ("default", "gpt")
    await manager.unload("gpt")
    assert state(manager) == "unloaded"


async def test_an_unknown_name_is_told_by_every_way_in():
    manager = managed(EchoHandler(), echo_config("smollm"))
    for ask in (manager.get_config, manager.get_loaded_model, manager.explain):
        with pytest.raises(ModelNotFoundError, match="did you mean 'smollm'"):
            ask("smolm")
    for wait in (manager.load, manager.unload):
        with pytest.raises(ModelNotFoundError, match="models: smollm"):
            await wait("smolm")
    lease = manager.lease("smolm")
    with pytest.raises(ModelNotFoundError):
        await lease.__aenter__()


async def test_an_empty_deployment_says_so():
    with pytest.raises(ModelNotFoundError, match="none; add one"):
        await LLMModelManager(config=[]).load("m")


def test_a_deployment_is_given_once_and_right(tmp_path):
    with pytest.raises(ConfigurationError, match="not both"):
        LLMModelManager(config_path=tmp_path / "x.yaml", config=[])
    with pytest.raises(ConfigurationError, match="ENGINEROOM_CONFIG"):
        LLMModelManager()
    with pytest.raises(ConfigurationError, match=r"models\.0\.source"):
        LLMModelManager(config={"models": [{"model_id": "m", "source": 3}]})
    with pytest.raises(ConfigurationError, match="the id of model .m., and the id of model .m."):
        LLMModelManager(config=[echo_config("m"), echo_config("m")])
    config = DeploymentConfig(models=[echo_config("m")])
    assert LLMModelManager(config=config).config is config


# ── leases and unloading ─────────────────────────────────────────────────────────────────────


async def test_a_lease_is_counted_and_its_release_is_the_last_use():
    _, manager = gated()
    assert status(manager).last_used is None
    async with manager.lease("m") as loaded:
        assert isinstance(loaded, LoadedModel)
        assert (status(manager).leases, status(manager).last_used) == (1, None)
    assert status(manager).leases == 0 and status(manager).last_used is not None


async def test_a_lease_is_given_back_on_errors():
    _, manager = gated()
    with pytest.raises(ValueError, match="mine"):
        async with manager.lease("m"):
            raise ValueError("mine")
    assert status(manager).leases == 0


async def test_a_lease_that_is_cancelled_while_it_loads_is_none():
    handler, manager = gated("load")
    task = asyncio.create_task(manager.lease("m").__aenter__())
    await until(lambda: handler.loading == 1)
    task.cancel()
    await asyncio.wait([task])
    handler.gates["load"][0].set_result(None)
    await until(lambda: state(manager) == "ready")
    assert status(manager).leases == 0


async def test_unloading_waits_for_the_last_lease():
    handler, manager = gated()
    async with manager.lease("m"):
        async with manager.lease("m"):
            unloading = asyncio.create_task(manager.unload("m"))
            await until(lambda: state(manager) == "draining")
        await asyncio.sleep(0)
        assert handler.unloads == 0 and not unloading.done()
    await unloading
    assert handler.unloads == 1 and state(manager) == "unloaded"
    assert manager.get_loaded_model("m") is None


async def test_a_lease_during_draining_waits_and_loads_anew():
    handler, manager = gated("unload")
    old = await manager.load("m")
    async with manager.lease("m"):
        unloading = asyncio.create_task(manager.unload("m"))
        await until(lambda: state(manager) == "draining")
        lease = manager.lease("m")
        waiting = asyncio.create_task(lease.__aenter__())
        await asyncio.sleep(0)
    await until(lambda: handler.unloads == 1)
    assert not waiting.done() and handler.loads == 1
    handler.gates["unload"][0].set_result(None)
    new = await waiting
    await unloading
    assert new is not old and handler.loads == 2 and status(manager).leases == 1
    await lease.__aexit__(None, None, None)


async def test_unloading_gives_up_after_its_time_and_the_model_goes_on_serving():
    handler, manager = gated()
    async with manager.lease("m") as held:
        with pytest.raises(ResourceNotAvailableError, match=r"held by 1 requests after 0\.001 s"):
            await manager.unload("m", timeout_s=0.001)
        assert state(manager) == "ready" and handler.unloads == 0
        async with manager.lease("m") as other:
            assert other is held
    await manager.unload("m", timeout_s=0.001)
    assert state(manager) == "unloaded"


async def test_those_who_waited_for_an_unload_that_gave_up_are_served():
    handler, manager = gated()
    async with manager.lease("m") as held:
        unloading = asyncio.create_task(manager.unload("m", timeout_s=0.001))
        await until(lambda: state(manager) == "draining")
        async with manager.lease("m") as other:
            assert other is held
        with pytest.raises(ResourceNotAvailableError):
            await unloading
    assert handler.loads == 1


async def test_a_patient_unload_outlives_an_impatient_one():
    handler, manager = gated()
    async with manager.lease("m"):
        impatient = asyncio.create_task(manager.unload("m", timeout_s=0.001))
        await until(lambda: state(manager) == "draining")
        patient = asyncio.create_task(manager.unload("m"))
        with pytest.raises(ResourceNotAvailableError):
            await impatient
        await until(lambda: state(manager) == "draining")
    await patient
    assert handler.unloads == 1


async def test_an_impatient_unload_does_not_wait_for_a_patient_one():
    handler, manager = gated()
    async with manager.lease("m"):
        patient = asyncio.create_task(manager.unload("m"))
        await until(lambda: state(manager) == "draining")
        with pytest.raises(ResourceNotAvailableError, match=r"after 0\.001 s"):
            await manager.unload("m", timeout_s=0.001)
        assert state(manager) == "draining"
    await patient
    assert handler.unloads == 1


async def test_many_unloads_are_one():
    handler, manager = gated()
    await manager.load("m")
    await asyncio.gather(*(manager.unload("m") for _ in range(3)))
    assert handler.unloads == 1


async def test_unloading_what_is_not_loaded_does_nothing():
    handler, manager = gated()
    await manager.unload("m")
    assert handler.unloads == 0 and state(manager) == "unloaded"


async def test_unloading_what_is_being_loaded_waits_for_it():
    handler, manager = gated("load")
    loading = asyncio.create_task(manager.load("m"))
    await until(lambda: handler.loading == 1)
    unloading = asyncio.create_task(manager.unload("m"))
    await asyncio.sleep(0)
    handler.gates["load"][0].set_result(None)
    await asyncio.gather(loading, unloading)
    assert handler.unloads == 1 and state(manager) == "unloaded"


async def test_unloading_what_fails_to_load_is_quiet():
    handler, manager = gated("load")
    loading = asyncio.create_task(manager.load("m"))
    await until(lambda: handler.loading == 1)
    unloading = asyncio.create_task(manager.unload("m"))
    handler.gates["load"][0].set_exception(OSError("broken"))
    await unloading
    with pytest.raises(InferenceError):
        await loading
    assert state(manager) == "failed" and handler.unloads == 0


async def test_a_failing_unload_is_told_and_the_next_lease_loads_anew(caplog):
    handler, manager = gated("unload")
    await manager.load("m")
    callers = [asyncio.create_task(manager.unload("m")) for _ in range(2)]
    await until(lambda: handler.unloads == 1)
    handler.gates["unload"][0].set_exception(OSError("stuck"))
    for result in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(result, InferenceError) and "unload_model failed" in str(result)
    assert state(manager) == "failed" and "stuck" in status(manager).error
    assert manager.get_loaded_model("m") is None
    async with manager.lease("m"):
        assert state(manager) == "ready"
    assert handler.loads == 2


async def test_a_cancelled_unload_goes_on():
    handler, manager = gated("unload")
    await manager.load("m")
    caller = asyncio.create_task(manager.unload("m"))
    await until(lambda: handler.unloads == 1)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    handler.gates["unload"][0].set_result(None)
    await until(lambda: state(manager) == "unloaded")
    await manager.load("m")


# ── closing ──────────────────────────────────────────────────────────────────────────────────


async def test_closing_unloads_all_and_loads_nothing_more():
    manager = managed(EchoHandler(), echo_config("a"), echo_config("b"))
    await manager.load_configured_models()
    await manager.close()
    assert [s.state for s in manager.list_models()] == ["unloaded"] * 2
    with pytest.raises(ResourceNotAvailableError, match="closed"):
        await manager.load("a")
    await manager.close()


async def test_closing_waits_for_leases():
    handler, manager = gated("load")
    lease = manager.lease("m")
    leasing = asyncio.create_task(lease.__aenter__())
    await until(lambda: handler.loading == 1)
    handler.gates["load"][0].set_result(None)
    await leasing
    closing = asyncio.create_task(manager.close())
    await until(lambda: state(manager) == "draining")
    assert not closing.done()
    await lease.__aexit__(None, None, None)
    await closing
    assert state(manager) == "unloaded"


async def test_who_waits_for_a_draining_model_is_told_of_the_close():
    _, manager = gated("unload")
    async with manager.lease("m"):
        closing = asyncio.create_task(manager.close())
        await until(lambda: state(manager) == "draining")
        waiting = asyncio.create_task(manager.load("m"))
        await asyncio.sleep(0)
    await until(lambda: bool(manager.registry.get("gate").gates["unload"]))
    manager.registry.get("gate").gates["unload"][0].set_result(None)
    with pytest.raises(ResourceNotAvailableError, match="closed"):
        await waiting
    await closing


async def test_one_failing_unload_does_not_keep_the_rest_loaded(caplog):
    bad = echo_config("bad", fail="unload")
    manager = managed(EchoHandler(), bad, echo_config("good"))
    await manager.load_configured_models()
    with pytest.raises(InferenceError, match="asked to fail in unloading"):
        await manager.close()
    assert [s.state for s in manager.list_models()] == ["failed", "unloaded"]


async def test_closing_is_not_stopped_by_another_callers_impatience():
    handler, manager = gated()
    async with manager.lease("m"):
        impatient = asyncio.create_task(manager.unload("m", timeout_s=0.001))
        await until(lambda: state(manager) == "draining")
        closing = asyncio.create_task(manager.close())
        await asyncio.wait([impatient])
        await until(lambda: state(manager) == "draining")
    await closing
    assert isinstance(impatient.exception(), ResourceNotAvailableError)
    assert handler.unloads == 1


# ── variants ─────────────────────────────────────────────────────────────────────────────────


def with_variants(*runtimes: str | None) -> ModelConfig:
    variants = [
        ModelVariant(source=f"{runtime or 'echo'}:", runtime=runtime, options={})
        for runtime in runtimes
    ]
    return ModelConfig(model_id="m", variants=variants)


async def test_the_first_variant_whose_runtime_is_installed_is_used():
    manager = managed(EchoHandler(), with_variants("vllm", "echo", None))
    assert manager.explain("m").chosen == "echo"
    loaded = await manager.load("m")
    assert loaded.config.runtime == "echo" and loaded.config.variants == []
    assert status(manager).source == "echo:"
    assert manager.explain("m").question == "can_handle"


async def test_when_no_variant_will_do_every_reason_is_told():
    manager = managed(EchoHandler(), with_variants("vllm", "llamacpp"))
    with pytest.raises(ConfigurationError, match="none of the 2 variants") as caught:
        await manager.load("m")
    assert "pip install engineroom-vllm" in str(caught.value)
    assert "pip install engineroom-llamacpp" in str(caught.value)
    assert manager.explain("m").chosen is None


def test_a_relisting_costs_no_load():
    handler, manager = gated()
    assert state(manager) == "unloaded" and manager.get_loaded_model("m") is None
    assert handler.loads == 0 and manager.explain("m").chosen == "gate"


# ── every order ──────────────────────────────────────────────────────────────────────────────


class Ledger(GateHandler):
    """Notes which models are in memory, and whether two loads ever overlapped."""

    def __init__(self):
        super().__init__(gated=frozenset({"load", "unload"}))
        self.in_memory: set[int] = set()
        self.kept: list[LoadedModel] = []  # so that no id is used twice
        self.most_loading = 0

    async def load_model(self, config):
        self.most_loading = max(self.most_loading, self.loading + 1)
        loaded = await super().load_model(config)
        self.in_memory.add(id(loaded))
        self.kept.append(loaded)
        return loaded

    async def unload_model(self, loaded_model):
        assert id(loaded_model) in self.in_memory, "unloaded twice"
        self.in_memory.discard(id(loaded_model))
        await super().unload_model(loaded_model)


class ModelsLife(RuleBasedStateMachine):
    """Loads, leases, releases, unloads and cancellations in any order."""

    leasing = Bundle("leasing")
    calls = Bundle("calls")

    def __init__(self):
        super().__init__()
        logging.getLogger("engineroom").setLevel(logging.CRITICAL)
        self.loop = asyncio.new_event_loop()
        self.handler = Ledger()
        self.manager = without_threads(managed(self.handler))
        self.tasks: list[asyncio.Task] = []
        self.held: dict[asyncio.Task, LoadedModel] = {}
        self.cancelled: set[asyncio.Task] = set()

    @rule(times=st.integers(0, 12))
    def turn(self, times) -> None:
        """Other rules do not let the loop run: what they ask for happens at once, or overlaps."""

        async def turns():
            for _ in range(times):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def spawn(self, coroutine):
        task = self.loop.create_task(coroutine)
        self.tasks.append(task)
        return task

    def cancel(self, task):
        if not task.done():
            self.cancelled.add(task)
            task.cancel()

    async def hold(self, release: asyncio.Event) -> None:
        task = asyncio.current_task()
        async with self.manager.lease("m") as loaded:
            self.held[task] = loaded
            try:
                await release.wait()
            finally:
                del self.held[task]

    @rule(target=leasing)
    def lease(self):
        release = asyncio.Event()
        return release, self.spawn(self.hold(release))

    @rule(lease=consumes(leasing))
    def release(self, lease):
        lease[0].set()

    @rule(lease=consumes(leasing))
    def cancel_lease(self, lease):
        self.cancel(lease[1])

    @rule(target=calls)
    def load(self):
        return self.spawn(self.manager.load("m"))

    @rule(target=calls, timeout_s=st.sampled_from([None, 0]))
    def unload(self, timeout_s):
        return self.spawn(self.manager.unload("m", timeout_s))

    @rule(call=consumes(calls))
    def cancel_call(self, call):
        self.cancel(call)

    def waiting(self, kind: str) -> list[asyncio.Future]:
        return [gate for gate in self.handler.gates[kind] if not gate.done()]

    def open(self, kind: str, fails: bool) -> None:
        (gate,) = self.waiting(kind)
        if fails:
            gate.set_exception(OSError("asked to"))
        else:
            gate.set_result(None)

    @precondition(lambda self: self.waiting("load"))
    @rule(fails=st.booleans())
    def end_load(self, fails):
        self.open("load", fails)

    @precondition(lambda self: self.waiting("unload"))
    @rule(fails=st.booleans())
    def end_unload(self, fails):
        self.open("unload", fails)

    @invariant()
    def every_lease_is_on_a_model_in_memory(self):
        current = self.manager.get_loaded_model("m")
        for loaded in self.held.values():
            assert loaded is current and id(loaded) in self.handler.in_memory

    @invariant()
    def leases_add_up(self):
        assert status(self.manager).leases == len(self.held)

    @invariant()
    def one_thing_at_a_time(self):
        assert self.handler.most_loading <= 1
        assert len(self.waiting("load")) + len(self.waiting("unload")) <= 1
        assert len(self.handler.in_memory) <= 1

    @invariant()
    def the_state_tells_the_truth(self):
        now = state(self.manager)
        if self.waiting("load"):
            assert now == "loading"
        if self.waiting("unload"):
            assert now == "draining"
        if now == "ready":
            assert self.manager.get_loaded_model("m") is not None
        if now in ("unloaded", "failed"):
            assert not self.handler.in_memory and not self.held

    def teardown(self):
        try:
            self.handler.gated = frozenset()
            for kind in ("load", "unload"):
                for gate in self.waiting(kind):
                    gate.set_result(None)
            for task in self.tasks:
                if "hold" in repr(task.get_coro()):
                    self.cancel(task)

            async def finish():
                async with asyncio.timeout(20):
                    if self.tasks:
                        await asyncio.wait(self.tasks)
                    await self.manager.close()

            self.loop.run_until_complete(finish())
            for task in self.tasks:
                if task.cancelled():
                    assert task in self.cancelled, "cancelled by another's cancellation"
                elif (error := task.exception()) is not None:
                    assert isinstance(error, InferenceError | ResourceNotAvailableError), error
            assert status(self.manager).leases == 0 and not self.handler.in_memory
            assert state(self.manager) in ("unloaded", "failed")
        finally:
            self.loop.close()
            logging.getLogger("engineroom").setLevel(logging.NOTSET)


TestModelsLife = ModelsLife.TestCase
TestModelsLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def test_closing_stops_a_load_and_tells_those_who_wait_for_it():
    entered, stopped = asyncio.Event(), asyncio.Event()

    class Endless(EchoHandler):
        async def load_model(self, config):
            entered.set()
            try:
                return await asyncio.Future()
            finally:
                stopped.set()

    registry = bare_registry()
    registry.register(Endless())
    manager = LLMModelManager(config=[ModelConfig(model_id="m", source="echo:")], registry=registry)
    waiting = asyncio.create_task(manager.load("m"))
    await entered.wait()
    await manager.close()
    assert stopped.is_set()
    with pytest.raises(ResourceNotAvailableError, match="manager is closed"):
        await waiting
    assert manager.list_models()[0].state == "unloaded"
