"""Memory of models that were unloaded: what comes back, and what does not."""

from __future__ import annotations

import asyncio
import threading

import pytest
from core_doubles import FakeProbe, until
from manager_doubles import (
    FakeSizedHandler,
    FakeTransitions,
    cpu,
    manager_of,
    model,
    states,
    status,
)

from engineroom import (
    ConfigurationError,
    InferenceError,
    ResourceNotAvailableError,
)

GIB = 1 << 30


def leaking(**options):
    handler, probe = FakeSizedHandler(), FakeProbe()
    handler.probe = probe
    probe.usage["cpu"] = 5 * GIB
    manager = manager_of(
        model("a", 4 * GIB, options=options),
        memory={"cpu": 10 * GIB},
        handlers=[handler],
        probe=probe,
    )
    observer = FakeTransitions()
    manager.registry.register_plugin(observer, name="observer")
    return manager, observer


async def test_what_an_unload_does_not_give_back_is_logged_counted_and_shown(caplog):
    manager, observer = leaking(leaks=GIB)
    await manager.load("a")
    await manager.unload("a")
    assert "'a' did not give back 1.0 GiB on cpu" in caplog.text
    assert observer.unloaded == [{"cpu": GIB}]
    assert cpu(manager).not_returned == GIB and cpu(manager).free == 9 * GIB
    assert str(await manager.plan()).endswith("6.0 GiB free, 1.0 GiB not given back")


async def test_what_stayed_behind_and_is_used_again_is_not_counted_twice():
    manager, _ = leaking()
    handler = manager.registry.get("sized")
    load_model = handler.load_model

    async def reusing(config):
        loaded = await load_model(config)
        if handler.loads["a"] > 1:
            handler.probe.usage["cpu"] -= GIB
        return loaded

    async def keeping(loaded_model, unload_model=handler.unload_model):
        await unload_model(loaded_model)
        handler.probe.usage["cpu"] += GIB

    handler.load_model, handler.unload_model = reusing, keeping
    for _ in range(5):
        await manager.load("a")
        await manager.unload("a")
    assert cpu(manager).not_returned == GIB


async def test_what_a_model_left_behind_does_not_stand_in_its_own_way(caplog):
    """A pool that an allocator keeps is in the model's footprint, and was not given back."""
    manager, _ = leaking(leaks=6 * GIB, takes=8 * GIB)
    handler = manager.registry.get("sized")
    load_model = handler.load_model

    async def reusing(config):
        loaded = await load_model(config)
        if handler.loads["a"] > 1:
            handler.probe.usage["cpu"] -= 6 * GIB
        return loaded

    handler.load_model = reusing
    for _ in range(3):
        (planned,) = (await manager.plan()).models
        assert planned.action == "preload"
        await manager.load("a")
        assert (cpu(manager).held, cpu(manager).not_returned) == (8 * GIB, 0)
        await manager.unload("a")
        assert (cpu(manager).held, cpu(manager).not_returned) == (0, 6 * GIB)
    # It is nobody else's to use.
    await manager.reload(
        {"memory": {"cpu": 10 * GIB}, "models": [model("b", 5 * GIB), *manager.config.models]}
    )
    with pytest.raises(ResourceNotAvailableError, match="unloaded models did not give back"):
        await manager.load("b")
    await manager.load("a")


async def test_libraries_that_a_load_needs_are_not_counted_as_the_models():
    manager, observer = leaking()
    handler = manager.registry.get("sized")
    imported: list[int] = []

    def import_runtime():
        if not imported:  # it is asked before each load
            handler.probe.usage["cpu"] += 3 * GIB
        imported.append(threading.get_ident())

    handler.import_runtime = import_runtime
    for _ in range(2):
        await manager.load("a")
        held = cpu(manager).held
        await manager.unload("a")
        assert (held, cpu(manager).not_returned) == (4 * GIB, 0)
    assert observer.unloaded == [{}, {}]
    assert len(imported) == 2 and threading.get_ident() not in imported, "the loop was held up"


async def test_a_process_that_a_runtime_keeps_is_no_models_memory(caplog):
    """It starts with the first load, stays after the unload, and ends whenever it likes."""
    manager, observer = leaking()
    handler = manager.registry.get("sized")
    children, load_model = handler.probe.children, handler.load_model

    async def starting(config):
        children[77] = 2 * GIB
        return await load_model(config)

    handler.load_model = starting
    handler.runtime_processes = lambda: list(children)
    for _ in range(3):
        await manager.load("a")
        held = cpu(manager).held
        await manager.unload("a")
        assert (held, cpu(manager).not_returned) == (4 * GIB, 0)
        children.clear()
    assert observer.unloaded == [{}, {}, {}]
    assert "did not give back" not in caplog.text


async def test_a_process_of_one_runtime_does_not_disturb_what_another_ones_model_takes():
    first, second, probe = FakeSizedHandler(), FakeSizedHandler(), FakeProbe()
    first.name, second.name = "first", "second"
    first.probe = second.probe = probe
    probe.usage["cpu"], probe.children[77] = GIB, 3 * GIB
    first.runtime_processes = lambda: (77,)
    models = [
        model(name, 4 * GIB, options={"says": None}, runtime=runtime)
        for name, runtime in (("a", "first"), ("b", "second"))
    ]
    manager = manager_of(*models, memory={"cpu": 20 * GIB}, handlers=[first, second], probe=probe)
    await manager.load("a")
    load_model = second.load_model

    async def while_it_ends(config):
        probe.children.clear()
        return await load_model(config)

    second.load_model = while_it_ends
    await manager.load("b")
    assert cpu(manager).holders == {"a": 4 * GIB, "b": 4 * GIB}


async def test_a_runtime_that_fails_to_name_its_processes_loads_nevertheless(caplog):
    manager, _ = leaking()

    def failing():
        raise OSError("no /proc")

    manager.registry.get("sized").runtime_processes = failing
    await manager.load("a")
    assert cpu(manager).held == 4 * GIB
    assert "'sized': runtime_processes failed" in caplog.text and "no /proc" in caplog.text


@pytest.mark.parametrize("error", [ConfigurationError("install it again"), OSError("no .so")])
async def test_libraries_that_cannot_be_imported_fail_the_load(error):
    handler = FakeSizedHandler()

    def import_runtime():
        raise error

    handler.import_runtime = import_runtime
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    kind = ConfigurationError if isinstance(error, ConfigurationError) else InferenceError
    with pytest.raises(kind, match=str(error)):
        await manager.load("a")
    assert handler.loads["a"] == 0 and states(manager)["a"] == "failed"
    assert cpu(manager).free == 10


async def test_what_the_deployment_says_counts_whole_after_the_next_load():
    """However little of it had to be free beside what was left behind."""
    manager, _ = leaking(leaks=GIB, says=None)
    config = manager.config.models[0].model_copy(update={"memory": {"cpu": 5 * GIB}})
    await manager.reload({"memory": {"cpu": 10 * GIB}, "models": [config]})
    for _ in range(2):
        await manager.load("a")
        assert cpu(manager).held == 5 * GIB
        await manager.unload("a")


async def test_what_leaks_is_found_out_when_it_is_not_used_again():
    manager, _ = leaking(leaks=3 * GIB)
    await manager.load("a")
    await manager.unload("a")
    await manager.load("a")
    assert (cpu(manager).held, cpu(manager).not_returned) == (4 * GIB, 3 * GIB)
    await manager.unload("a")
    assert cpu(manager).not_returned == 6 * GIB


async def test_an_unload_that_gives_all_back_says_nothing(caplog):
    manager, observer = leaking()
    for _ in range(3):
        await manager.load("a")
        await manager.unload("a")
    assert observer.unloaded == [{}, {}, {}] and cpu(manager).free == 10 * GIB
    assert "did not give back" not in caplog.text


async def test_what_was_measured_counts_where_the_handler_says_less():
    manager, _ = leaking(takes=6 * GIB, says=4 * GIB)
    await manager.load("a")
    assert cpu(manager).held == 6 * GIB
    assert status(manager, "a").memory_bytes == 4 * GIB


async def test_a_failing_unload_is_measured_as_well():
    manager, _ = leaking(leaks=3 * GIB, unload_fails=True)
    await manager.load("a")
    with pytest.raises(InferenceError, match="asked to fail in unloading"):
        await manager.unload("a")
    assert states(manager)["a"] == "failed"
    assert cpu(manager).not_returned == 3 * GIB and cpu(manager).holders == {}


async def test_measurements_that_something_else_overlapped_count_for_nothing():
    handler, probe = FakeSizedHandler(gated=("load",)), FakeProbe()
    handler.probe = probe
    probe.usage["cpu"] = GIB
    manager = manager_of(
        model("a", GIB, options={"says": GIB}),
        model("b", 4 * GIB, options={"says": 4 * GIB}),
        memory={"cpu": 10 * GIB},
        handlers=[handler],
        probe=probe,
    )
    loads = [asyncio.create_task(manager.load(name)) for name in "ab"]
    await until(lambda: len(handler.gates) == 2)
    handler.end("load", "b")
    await loads[1]
    handler.end("load", "a")  # the process grew by 5 GiB meanwhile
    await loads[0]
    assert cpu(manager).holders == {"a": GIB, "b": 4 * GIB}
    # The unload gives back 1 GiB, and the other model takes 4 meanwhile.
    handler.gated = ()
    await manager.unload("b")
    await manager.unload("a")
    await manager.load("a")
    handler.gated = ("unload",)
    unloading = asyncio.create_task(manager.unload("a"))
    await until(lambda: ("unload", "a") in handler.gates)
    await manager.load("b")
    handler.end("unload", "a")
    await unloading
    assert cpu(manager).not_returned == 0
