"""Another deployment in the place of the old one, under load; and the plan."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from core_doubles import FakeProbe, bare_registry, until
from manager_doubles import (
    FakeSizedHandler,
    FakeTransitions,
    cpu,
    manager_of,
    model,
    states,
    status,
)
from raisers import PanicException

from engineroom import (
    ConfigurationError,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom.config.changes import compare, load_settled
from engineroom.config.deployment import parse_deployment
from engineroom.models.reloading import reloading


def deployment(*models: dict, **keys) -> dict:
    return {"models": list(models), "memory": {"cpu": 10}, **keys}


# ── what differs ─────────────────────────────────────────────────────────────────────────────

OLD = """\
handlers: [a]
models:
  - {model_id: same, source: x}
  - {model_id: gone, source: x}
  - {model_id: moved, source: x}
  - {model_id: grown, source: x, memory: {cpu: 1GiB}}
  - {model_id: tuned, source: x}
  - {model_id: renamed, source: x}
"""
NEW = """\
handlers: [b]
models:
  - {model_id: fresh, source: x}
  - {model_id: renamed, source: x, aliases: [other], priority: 3}
  - {model_id: moved, source: y}
  - {model_id: grown, source: x, memory: {cpu: 2GiB}}
  - {model_id: tuned, source: x, options: {n: 1}}
  - {model_id: same, source: x}
"""


def test_what_differs_between_two_deployments():
    report = compare(parse_deployment(OLD), parse_deployment(NEW))
    assert report.added == ("fresh",) and report.removed == ("gone",)
    assert report.changed == ("moved", "grown", "tuned") and report.adjusted == ("renamed",)
    assert report.needs_restart == ("handlers",)
    assert str(report) == (
        "added: fresh; removed: gone; changed: moved, grown, tuned; adjusted: renamed; "
        "after a restart only: handlers"
    )
    assert str(compare(parse_deployment(OLD), parse_deployment(OLD))) == "nothing changed"


def test_a_key_of_the_whole_adjusts_every_model():
    report = compare(parse_deployment(OLD), parse_deployment(f"keep_alive: 5m\n{OLD}"))
    assert report.adjusted == ("same", "gone", "moved", "grown", "tuned", "renamed")


# ── under load ───────────────────────────────────────────────────────────────────────────────


async def test_running_requests_end_on_the_old_model_and_new_ones_get_the_new():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    observer = FakeTransitions()
    manager.registry.register_plugin(observer, name="observer")
    async with manager.lease("a") as old:
        report = await manager.reload(deployment(model("a", 5)))
        assert report.changed == ("a",) and observer.reports == [report]
        async with manager.lease("a") as new:
            assert new is not old and new.config.options == {"size": 5}
            assert cpu(manager).holders == {"a (being replaced)": 4, "a": 5}
        assert handler.unloads["a"] == 0
    await until(lambda: not manager._table.retired)
    assert cpu(manager).holders == {"a": 5} and handler.unloads["a"] == 1


async def test_where_both_do_not_fit_the_new_one_waits_for_the_old():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 8), memory={"cpu": 10}, handlers=[handler])
    async with manager.lease("a"):
        await manager.reload(deployment(model("a", 9)))
        waiting = asyncio.create_task(manager.load("a"))
        await until(lambda: status(manager, "a").waits_for)
    assert (await waiting).config.options == {"size": 9}
    assert handler.most_bytes == 9


async def test_a_model_that_is_gone_ends_its_requests_and_takes_no_more():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), model("b", 4), handlers=[handler])
    async with manager.lease("a"):
        assert (await manager.reload(deployment(model("b", 4)))).removed == ("a",)
        with pytest.raises(ModelNotFoundError, match="models: b"):
            await manager.load("a")
    await until(lambda: handler.unloads["a"] == 1)


async def test_a_model_that_is_loading_is_stopped_and_its_requests_move_on():
    handler = FakeSizedHandler(gated=("load",))
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    waiting = asyncio.create_task(manager.load("a"))
    await until(lambda: ("load", "a") in handler.gates)
    await manager.reload(deployment(model("a", 5)))
    await until(lambda: handler.loads["a"] == 2 and ("load", "a") in handler.gates)
    handler.end("load", "a")
    assert (await waiting).config.options == {"size": 5}
    assert cpu(manager).holders == {"a": 5}


async def test_whoever_waits_for_a_model_that_goes_is_told():
    handler = FakeSizedHandler(gated=("load",))
    manager = manager_of(model("a", 4), model("b", 4), handlers=[handler])
    waiting = asyncio.create_task(manager.load("a"))
    await until(lambda: ("load", "a") in handler.gates)
    entry = manager._table.find("a")
    await manager.reload(deployment(model("b", 4)))
    with pytest.raises(ModelNotFoundError):
        await waiting
    assert entry.waiting_callers == 0


async def test_what_does_not_touch_the_model_itself_leaves_it_loaded():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    loaded = await manager.load("a")
    report = await manager.reload(
        deployment(model("a", 4, aliases=["new"], priority=5, keep_alive=0.01))
    )
    assert report.adjusted == ("a",)
    assert manager.get_loaded_model("new") is loaded and status(manager, "a").priority == 5
    await until(lambda: states(manager)["a"] == "unloaded")


async def test_new_models_with_preload_and_changed_ones_that_ran_are_loaded():
    manager = manager_of(model("a", 4), model("b", 1), memory={"cpu": 10})
    await manager.load("a")
    await manager.reload(
        deployment(model("a", 5), model("b", 2), model("c", 1), model("d", 1, preload=False))
    )
    await until(
        lambda: states(manager) == {"a": "ready", "b": "unloaded", "c": "ready", "d": "unloaded"}
    )


async def test_budgets_change_at_once():
    manager = manager_of(model("a", 4), memory={"cpu": 3}, probe=FakeProbe(cpu=7))
    with pytest.raises(ResourceNotAvailableError):
        await manager.load("a")
    await manager.reload({"models": [model("a", 4)], "memory": {"cpu": 5}})
    await manager.load("a")
    assert cpu(manager).free == 1
    await manager.unload("a")
    await manager.reload({"models": [model("a", 4)]})  # it is detected from now on
    await manager.load("a")
    assert (cpu(manager).budget, cpu(manager).detected) == (7, True)


async def test_what_models_hold_already_is_part_of_a_detected_budget():
    both = [model("a", 4), model("b", 4)]
    manager = manager_of(*both, memory={"cpu": 9}, probe=FakeProbe(cpu=5))
    await manager.load("a")
    await manager.reload({"models": both})
    await manager.load("b")  # 5 are free beside the one that is loaded
    assert (cpu(manager).budget, cpu(manager).free) == (9, 1)


async def test_a_broken_deployment_changes_nothing():
    manager = manager_of(model("a", 4), memory={"cpu": 10})
    loaded = await manager.load("a")
    before = manager.config
    for broken in ({"models": [{"model_id": "b"}]}, {"modles": []}):
        with pytest.raises(ConfigurationError, match="the deployment has mistakes"):
            await manager.reload(broken)
    assert manager.config is before and manager.get_loaded_model("a") is loaded


async def test_a_manager_without_a_file_says_so():
    manager = manager_of(model("a", 4))
    with pytest.raises(ConfigurationError, match="without a deployment file"):
        await manager.reload()
    await manager.close()
    with pytest.raises(ResourceNotAvailableError, match="closed"):
        await manager.reload(deployment())


async def test_an_unload_that_gives_up_does_not_keep_a_replaced_model():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), handlers=[handler])
    async with manager.lease("a"):
        unloading = asyncio.create_task(manager.unload("a", timeout_s=0.01))
        await until(lambda: states(manager)["a"] == "draining")
        await manager.reload(deployment(model("b", 4, preload=False)))
        with pytest.raises(ResourceNotAvailableError):
            await unloading
        await asyncio.sleep(0)
    await until(lambda: not manager._table.retired)
    assert handler.unloads["a"] == 1


async def test_changing_the_deployment_under_load_breaks_no_request():
    """Clients go on asking while the model is replaced again and again."""
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    service = LLMInferenceService(manager)
    stop = asyncio.Event()
    answers = 0

    async def client(number):
        nonlocal answers
        while not stop.is_set():
            prompt = f"client {number} says {answers}"
            response = await service.infer(InferenceRequest(model_id="a", prompt=prompt))
            assert response.generated_text == prompt, response.error_message
            answers += 1

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    for version in range(30):
        await manager.reload(deployment(model("a", 4, options={"version": version})))
        seen = answers
        await until(lambda seen=seen: answers > seen + 5 or any(c.done() for c in clients))
    stop.set()
    await asyncio.gather(*clients)
    assert manager.get_loaded_model("a").config.options["version"] == 29
    await service.close()
    assert handler.in_memory["a"] == 0 and cpu(manager).free == 10


# ── the file ─────────────────────────────────────────────────────────────────────────────────

FILE = "memory: {cpu: 10}\nmodels:\n  - {model_id: MODEL, source: 'sized:', options: {size: 4}}\n"


def from_file(path: Path) -> LLMModelManager:
    registry = bare_registry()
    registry.register(FakeSizedHandler())
    return LLMModelManager(path, registry=registry, probe=FakeProbe())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(FILE.replace("MODEL", "first"), encoding="utf-8")
    return path


async def test_the_managers_own_file_is_read_again(file, tmp_path):
    manager = from_file(file)
    file.write_text(FILE.replace("MODEL", "second"), encoding="utf-8")
    assert str(await manager.reload()) == "added: second; removed: first"
    other = tmp_path / "other.yaml"
    other.write_text(FILE.replace("MODEL", "third"), encoding="utf-8")
    assert (await manager.reload(other)).added == ("third",)
    await manager.close()


@pytest.mark.parametrize("text", ["", "models: [", "models:\n  - {model_id: a}\n", "\0"])
async def test_a_file_with_mistakes_changes_nothing(file, text):
    manager = from_file(file)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"deployment\.yaml"):
        await manager.reload()
    assert list(states(manager)) == ["first"]
    file.unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        await manager.reload()


def test_a_file_that_is_being_written_is_read_when_it_is_whole(file, monkeypatch):
    """The writer goes on while it is read; half of a file has fewer models, but is no mistake."""
    whole = FILE.replace("MODEL", "a") + "  - {model_id: b, source: 'sized:'}\n"
    steps = [whole[:40], whole[:90], whole[:120], whole]

    def write_on(_):
        if steps:
            file.write_text(steps.pop(0), encoding="utf-8")

    monkeypatch.setattr("engineroom.config.changes.time.sleep", write_on)
    assert [m.model_id for m in load_settled(file).models] == ["a", "b"]


def test_a_file_that_never_comes_to_rest_is_a_mistake(file, monkeypatch):
    turn = iter(range(10**6))
    monkeypatch.setattr(
        "engineroom.config.changes.time.sleep",
        lambda _: file.write_text(f"# {next(turn)}\n", encoding="utf-8"),
    )
    with pytest.raises(ConfigurationError, match="being written all the time"):
        load_settled(file)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
async def test_sighup_reloads(file, caplog):
    manager = from_file(file)
    async with reloading(manager):
        file.write_text("models: [", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "the old one goes on" in caplog.text)
        assert list(states(manager)) == ["first"]
        file.write_text(FILE.replace("MODEL", "second"), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: list(states(manager)) == ["second"])
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    await manager.close()


async def test_a_change_of_the_file_reloads(file):
    pytest.importorskip("watchfiles", reason="watching needs engineroom[watch]")
    manager = from_file(file)
    async with reloading(manager, on_signal=False, watch=True):
        for name, replaced in (("second", False), ("third", True)):
            text = FILE.replace("MODEL", name)
            deadline = asyncio.get_running_loop().time() + 15
            while list(states(manager)) != [name]:  # written again until the watch has begun
                assert asyncio.get_running_loop().time() < deadline
                if replaced:
                    other = file.with_suffix(".new")
                    other.write_text(text, encoding="utf-8")
                    other.replace(file)
                else:
                    file.write_text(text, encoding="utf-8")
                for _ in range(300):
                    await asyncio.sleep(0.01)
                    if list(states(manager)) == [name]:
                        break
    await manager.close()


@pytest.mark.parametrize("kind", [OSError, PanicException])
async def test_a_watch_that_ends_is_told_and_the_rest_goes_on(kind, file, monkeypatch, caplog):
    watchfiles = pytest.importorskip("watchfiles", reason="watching needs engineroom[watch]")

    async def broken(*_, **__):
        raise kind("OS file watch limit reached")
        yield

    monkeypatch.setattr(watchfiles, "awatch", broken)
    manager = from_file(file)
    async with reloading(manager, on_signal=False, watch=True) as asked:
        await until(lambda: "OS file watch limit reached" in caplog.text)
        file.write_text(FILE.replace("MODEL", "second"), encoding="utf-8")
        asked.set()
        await until(lambda: list(states(manager)) == ["second"])
    await manager.close()


async def test_watching_without_its_library_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(ConfigurationError, match=r"engineroom\[watch\]"):
        async with reloading(from_file(file), watch=True):
            pass


# ── the plan ─────────────────────────────────────────────────────────────────────────────────


async def planned(manager) -> dict[str, tuple[str, tuple[str, ...]]]:
    plan = await manager.plan()
    return {m.model_id: (m.action, m.evicts) for m in plan.models}


async def test_the_plan_is_what_then_happens():
    """Played through and done: the same."""
    manager = manager_of(
        model("a", 4, pinned=True),
        model("b", 5),
        model("c", 3, preload=False),
        model("d", 20),
        model("e", 6),
        memory={"cpu": 10},
    )
    plan = await planned(manager)
    assert plan == {
        "a": ("preload", ()),
        "b": ("preload", ()),
        "c": ("on demand", ("b",)),
        "d": ("impossible", ()),
        "e": ("on demand", ("b",)),
    }
    assert set(states(manager).values()) == {"unloaded"} and manager.memory()[0].held == 0
    with pytest.raises(ResourceNotAvailableError):
        await manager.load_configured_models()
    assert {n for n, s in states(manager).items() if s == "ready"} == {"a", "b"}
    after = await planned(manager)
    assert after["a"] == after["b"] == ("loaded", ()) and after["c"] == plan["c"]
    await manager.load("c")
    assert {n for n, s in states(manager).items() if s == "ready"} == {"a", "c"}


async def test_the_plan_says_why():
    good = FakeSizedHandler("good")
    variants = [
        {"source": "vllm:", "runtime": "vllm"},
        {"source": "good:", "runtime": "good", "options": {"size": 40}},
        {"source": "good:", "options": {"size": 4}},
        {"source": "good:", "options": {}},
    ]
    manager = manager_of(model("m", variants=variants), memory={"cpu": 10}, handlers=[good])
    plan = await manager.plan()
    (m,) = plan.models
    assert (m.action, m.runtime, m.memory) == ("preload", "good", {"cpu": 4})
    assert [v.verdict for v in m.variants] == ["refused", "refused", "chosen", "possible"]
    assert "pip install" in m.variants[0].reason and "needs 40 B" in m.variants[1].reason
    assert [v.memory_from for v in m.variants] == ["unknown", "estimate", "estimate", "unknown"]
    assert "m: preload, good with 4 B on cpu" in str(plan)
    assert "cpu: 4 B of 10 B" in str(plan)


async def test_the_plan_tells_of_waiting():
    manager = manager_of(model("a", 8), model("b", 8, preload=False), memory={"cpu": 10})
    async with manager.lease("a"):
        plan = await manager.plan()
        assert plan.models[1].evicts == ("a",)
        assert "until their requests end" in plan.models[1].reason
        assert states(manager) == {"a": "ready", "b": "unloaded"}


async def test_the_plan_counts_what_is_being_replaced_and_plans_what_replaces_it():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    async with manager.lease("a"):
        handler.failing["a"].append(OSError("asked to fail"))
        await manager.reload(deployment(model("a", 5)))
        await until(lambda: states(manager)["a"] == "failed")
        plan = await manager.plan()
        (planned_model,) = plan.models
        assert (planned_model.action, planned_model.memory) == ("preload", {"cpu": 5})
        assert plan.devices[0].holders == {"a (being replaced)": 4, "a": 5}


async def test_a_plan_of_what_cannot_be_loaded_tells_every_reason():
    manager = manager_of(model("m", source="nowhere:"), model("n", 11), memory={"cpu": 10})
    plan = await manager.plan()
    assert [m.action for m in plan.models] == ["impossible", "impossible"]
    assert "no handler loads 'nowhere:'" in plan.models[0].reason
    assert "there is no room for model 'n'" in plan.models[1].reason
    assert "m: impossible (" in str(plan)
