"""Memory of models: what fits, who waits and who goes."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import asdict

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
    EngineDeadError,
    InferenceError,
    ModelNotFoundError,
    ResourceNotAvailableError,
)

GIB = 1 << 30


# ── what fits ────────────────────────────────────────────────────────────────────────────────


async def test_memory_is_reserved_while_a_model_loads_and_given_back_when_it_goes():
    handler = FakeSizedHandler(gated=("load", "unload"))
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    loading = asyncio.create_task(manager.load("a"))
    await until(lambda: ("load", "a") in handler.gates)
    assert (cpu(manager).reserved, cpu(manager).held, cpu(manager).free) == (4, 0, 6)
    handler.end("load", "a")
    await loading
    assert (cpu(manager).reserved, cpu(manager).held, cpu(manager).free) == (0, 4, 6)
    assert cpu(manager).holders == {"a": 4} and status(manager, "a").memory == {"cpu": 4}
    unloading = asyncio.create_task(manager.unload("a"))
    await until(lambda: ("unload", "a") in handler.gates)
    assert cpu(manager).free == 6, "it is not free before it is free"
    handler.end("unload", "a")
    await unloading
    assert cpu(manager).free == 10 and cpu(manager).holders == {}


@pytest.mark.parametrize("how", ["fails", "is no model", "is stopped"])
async def test_a_load_that_comes_to_nothing_gives_its_reservation_back(how):
    handler = FakeSizedHandler(gated=("load",))
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    if how == "is no model":
        handler.load_model = lambda config: asyncio.sleep(0)
    loading = asyncio.create_task(manager.load("a"))
    if how != "is no model":
        await until(lambda: ("load", "a") in handler.gates)
        assert cpu(manager).free == 6
    if how == "fails":
        handler.end("load", "a", OSError("no"))
    if how == "is stopped":
        await manager.close()
    with pytest.raises((InferenceError, ResourceNotAvailableError)):
        await loading
    assert cpu(manager).free == 10


async def test_what_can_never_fit_is_refused_before_it_starts():
    handler = FakeSizedHandler()
    manager = manager_of(
        model("small", 1 * GIB, pinned=True),
        model("large", 4 * GIB),
        memory={"cpu": "4GiB"},
        handlers=[handler],
    )
    await manager.load("small")
    with pytest.raises(ResourceNotAvailableError) as caught:
        await manager.load("large")
    message = str(caught.value)
    assert "needs 4.0 GiB on cpu" in message and "3.0 GiB of 4.0 GiB is free" in message
    assert "held by small (1.0 GiB, pinned); unload what is pinned, make" in message
    assert handler.loads["large"] == 0 and states(manager)["large"] == "failed"
    await manager.unload("small")
    await manager.load("large")
    await manager.unload("large")
    await manager.reload({"memory": {"cpu": "3GiB"}, "models": manager.config.models})
    with pytest.raises(ResourceNotAvailableError, match="is free; make it smaller, or raise"):
        await manager.load("large")


async def test_a_model_whose_memory_nobody_knows_is_loaded_and_then_counted():
    handler = FakeSizedHandler()
    manager = manager_of(
        model("a", options={"says": 7}), model("b", 4), memory={"cpu": 10}, handlers=[handler]
    )
    await manager.load("a")
    assert cpu(manager).held == 7
    await manager.load("b")
    assert states(manager) == {"a": "unloaded", "b": "ready"}
    await manager.load("a")  # now it is known, so that b goes first
    assert states(manager) == {"a": "ready", "b": "unloaded"}
    assert cpu(manager).free == 3


async def test_the_deployment_knows_better_than_the_runtime():
    manager = manager_of(model("a", 4, memory={"cpu": 8}), model("b", 4), memory={"cpu": 10})
    await manager.load("a")
    assert cpu(manager).held == 8
    await manager.load("b")
    assert states(manager)["a"] == "unloaded"


async def test_a_model_that_is_larger_than_its_estimate_is_told(caplog):
    manager = manager_of(model("a", 4, options={"takes": 12}), memory={"cpu": 10})
    await manager.load("a")
    assert cpu(manager).free == -2 and "more than there is room for" in caplog.text
    await manager.unload("a")
    with pytest.raises(ResourceNotAvailableError):
        await manager.load("a")  # it needs 12 of 10, which is known by now


async def test_a_budget_is_detected_where_the_deployment_names_none():
    manager = manager_of(model("a", 4), model("b", 7), probe=FakeProbe(cpu=10))
    assert manager.memory() == ()
    await manager.load("a")
    assert (cpu(manager).budget, cpu(manager).detected) == (10, True)
    await manager.load("b")
    assert states(manager)["a"] == "unloaded"


async def test_without_any_budget_everything_fits():
    manager = manager_of(model("a", 1 << 59), model("b", 1 << 59))
    await manager.load("a")
    await manager.load("b")
    assert cpu(manager).free is None and set(states(manager).values()) == {"ready"}


async def test_an_estimate_that_makes_no_sense_is_logged_and_counts_for_nothing(caplog):
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), memory={"cpu": 1}, handlers=[handler])
    handler.estimate_memory = lambda config: {"cpu": -1}
    await manager.load("a")
    assert "instead of bytes by device" in caplog.text
    await manager.unload("a")
    manager._table.current["a"].known.clear()

    def broken(config):
        raise KeyError("n_layer")

    handler.estimate_memory = broken
    await manager.load("a")
    assert "estimate_memory failed for model 'a'" in caplog.text and "n_layer" in caplog.text


async def test_a_typed_error_of_an_estimate_is_the_loads():
    handler = FakeSizedHandler()

    def missing(config):
        raise ModelNotFoundError("there is no file 'a.gguf'")

    handler.estimate_memory = missing
    manager = manager_of(model("a"), handlers=[handler])
    with pytest.raises(ModelNotFoundError, match=r"a\.gguf"):
        await manager.load("a")
    assert handler.loads["a"] == 0


async def test_devices_have_accounts_of_their_own():
    manager = manager_of(
        model("a", 8, options={"device": "cuda:0"}),
        model("b", 8, options={"device": "cuda:1"}),
        model("c", 8),
        memory={"cpu": 10, "cuda:0": 10, "cuda:1": 10},
    )
    for name in "abc":
        await manager.load(name)
    assert set(states(manager).values()) == {"ready"}
    assert [d.held for d in manager.memory()] == [8, 8, 8]


# ── who goes ─────────────────────────────────────────────────────────────────────────────────


async def use(manager, *names):
    for name in names:
        async with manager.lease(name):
            await asyncio.sleep(0)


def loaded_at_once(manager):
    """On a busy machine a fake's load may take longer than what lies between two uses."""
    for entry in manager._table.current.values():
        entry.load_duration_s = 0.0


async def test_the_least_recently_used_goes_first():
    manager = manager_of(*(model(name, 4) for name in "abc"), memory={"cpu": 8})
    await use(manager, "a", "b", "a")
    loaded_at_once(manager)
    await use(manager, "c")
    assert states(manager) == {"a": "ready", "b": "unloaded", "c": "ready"}


async def test_lower_priority_goes_before_longer_idleness():
    manager = manager_of(model("a", 4, priority=1), model("b", 4), model("c", 4), memory={"cpu": 8})
    await use(manager, "a", "b", "c")
    assert states(manager) == {"a": "ready", "b": "unloaded", "c": "ready"}


async def test_a_dear_reload_counts_as_use():
    manager = manager_of(*(model(name, 4) for name in "abc"), memory={"cpu": 8})
    await use(manager, "a", "b")
    manager._table.current["a"].load_duration_s = 1000.0
    await use(manager, "c")
    assert states(manager) == {"a": "ready", "b": "unloaded", "c": "ready"}


async def test_pinned_models_stay():
    manager = manager_of(
        model("a", 4, pinned=True), model("b", 4), model("c", 4), memory={"cpu": 8}
    )
    await use(manager, "a", "b", "c")
    assert states(manager) == {"a": "ready", "b": "unloaded", "c": "ready"}


async def test_no_more_go_than_must():
    manager = manager_of(
        *(model(name, size) for name, size in {"a": 1, "b": 5, "c": 4, "d": 5}.items()),
        memory={"cpu": 10},
    )
    await use(manager, "a", "b", "c")
    loaded_at_once(manager)
    await use(manager, "d")
    assert states(manager) == {"a": "ready", "b": "unloaded", "c": "ready", "d": "ready"}


async def test_nobody_more_goes_while_what_is_enough_is_going():
    handler = FakeSizedHandler(gated=("unload",))
    manager = manager_of(
        *(model(name, 5) for name in "abc"), memory={"cpu": 10}, handlers=[handler]
    )
    await use(manager, "a", "b")
    waiting = asyncio.create_task(manager.load("c"))
    await until(lambda: ("unload", "a") in handler.gates)
    for _ in range(5):
        manager._lifecycle.queue.wake()
        await asyncio.sleep(0)
    assert states(manager) == {"a": "draining", "b": "ready", "c": "loading"}
    handler.end("unload", "a")
    await waiting
    assert states(manager)["b"] == "ready"


async def test_a_leased_model_is_never_unloaded_and_the_request_waits():
    handler = FakeSizedHandler()
    manager = manager_of(
        model("a", 8 * GIB), model("b", 8 * GIB), memory={"cpu": "10GiB"}, handlers=[handler]
    )
    async with manager.lease("a"):
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
        assert status(manager, "b").waits_for == "6.0 GiB on cpu"
        assert status(manager, "b").waiting == 1 and not waiting.done()
        assert handler.unloads["a"] == 0
    await waiting
    assert states(manager) == {"a": "unloaded", "b": "ready"}
    assert handler.most_bytes == 8 * GIB, "never both"


# ── who waits ────────────────────────────────────────────────────────────────────────────────


async def test_whoever_waits_too_long_is_told_who_holds_the_memory():
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10}, load_timeout_s=0.01)
    async with manager.lease("a"):
        with pytest.raises(ResourceNotAvailableError) as caught:
            await manager.load("b")
        assert "after 0.01 s of waiting (load_timeout_s)" in str(caught.value)
        assert "in use by 1 request); send it again later, unload a model" in str(caught.value)
        # What was asked to go for it goes on serving.
        await until(lambda: states(manager)["a"] == "ready")
        await use(manager, "a")
    manager._table.current["b"].load_timeout_s = 60.0
    await manager.load("b")


async def test_whoever_waits_is_served_in_order():
    handler = FakeSizedHandler()
    manager = manager_of(
        *(model(name, 8) for name in "abcd"), memory={"cpu": 10}, handlers=[handler]
    )
    order = []

    async def request(name):
        async with manager.lease(name):
            order.append(name)
            await asyncio.sleep(0)

    async with manager.lease("a"):
        tasks = []
        for name in "cbdcb":
            tasks.append(asyncio.create_task(request(name)))
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    # Those who wait for a model that was just loaded are served before it goes.
    assert order == ["c", "c", "b", "b", "d"]
    assert handler.loads == {"a": 1, "b": 1, "c": 1, "d": 1}


async def test_a_small_model_does_not_overtake_a_large_one_that_waits():
    manager = manager_of(model("a", 6), model("large", 8), model("small", 3), memory={"cpu": 10})
    async with manager.lease("a"):
        large = asyncio.create_task(manager.load("large"))
        await until(lambda: states(manager)["a"] == "draining")
        small = asyncio.create_task(manager.load("small"))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not small.done()
    await large
    await small


async def test_a_model_on_another_device_does_not_wait():
    manager = manager_of(
        model("a", 8),
        model("b", 8),
        model("gpu", 8, options={"device": "cuda:0"}),
        memory={"cpu": 10, "cuda:0": 10},
    )
    async with manager.lease("a"):
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
        await manager.load("gpu")
        assert not waiting.done()
    await waiting


async def test_requests_that_come_while_a_model_drains_wait_behind_the_others():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10}, handlers=[handler])
    async with manager.lease("a"):
        b = asyncio.create_task(use(manager, "b"))
        await until(lambda: states(manager)["a"] == "draining")
        late = asyncio.create_task(use(manager, "a"))
        await asyncio.sleep(0)
        assert not late.done()
    await asyncio.gather(b, late)
    assert handler.loads == {"a": 2, "b": 1}


async def test_two_models_that_alternate_do_not_thrash():
    """Each load serves all who wait for it, so that loads are far fewer than requests."""
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10}, handlers=[handler])

    async def client(number):
        for turn in range(20):
            async with manager.lease("ab"[(number + turn) % 2]):
                await asyncio.sleep(0)

    await asyncio.gather(*(client(number) for number in range(16)))
    assert sum(handler.loads.values()) <= 60 < 16 * 20


async def test_a_busy_model_that_was_just_loaded_stays_as_long_as_its_load_took():
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10})
    now = 100.0
    manager._lifecycle.queue.evictor.clock = lambda: now
    async with manager.lease("a"):
        entry = manager._table.current["a"]
        entry.ready_at, entry.load_duration_s = 95.0, 10.0
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: status(manager, "b").waits_for)
        assert states(manager)["a"] == "ready"
        await use(manager, "a")  # others are let in, too
        now = 105.0
        manager._lifecycle.queue.wake()
        await until(lambda: states(manager)["a"] == "draining")
    await waiting


async def test_a_long_load_does_not_keep_others_out_beyond_their_patience():
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10}, load_timeout_s=60)
    now = 100.0
    manager._lifecycle.queue.evictor.clock = lambda: now
    async with manager.lease("a"):
        entry = manager._table.current["a"]
        entry.ready_at, entry.load_duration_s = 95.0, 600.0
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: status(manager, "b").waits_for)
        assert states(manager)["a"] == "ready"
        now = 95.0 + 60 / 2 + 1
        manager._lifecycle.queue.wake()
        await until(lambda: states(manager)["a"] == "draining")
    await waiting


async def test_it_is_looked_at_again_when_that_time_is_over():
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10})
    async with manager.lease("a"):
        manager._table.current["a"].load_duration_s = 0.05
        manager._table.current["a"].ready_at += 0.05
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
    await waiting


async def test_a_busy_model_of_higher_priority_is_not_asked_to_go():
    manager = manager_of(model("a", 8, priority=1), model("b", 8), memory={"cpu": 10})
    async with manager.lease("a"):
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: status(manager, "b").waits_for)
        await use(manager, "a")
        assert states(manager)["a"] == "ready"
    await waiting  # idle, it goes
    assert states(manager) == {"a": "unloaded", "b": "ready"}


async def test_a_wait_that_everyone_has_left_ends_and_frees_the_way():
    manager = manager_of(*(model(name, 8) for name in "abc"), memory={"cpu": 10})
    async with manager.lease("a"):
        gone = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
        gone.cancel()
        await until(lambda: states(manager) == {"a": "ready", "b": "unloaded", "c": "unloaded"})
        assert status(manager, "b").error is None
        await use(manager, "a")
    await manager.load("c")


async def test_whoever_comes_as_a_wait_ends_begins_another():
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10})
    async with manager.lease("a"):
        gone = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
        gone.cancel()
        await asyncio.sleep(0)
        stays = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
    await stays


async def test_a_grant_that_nobody_takes_is_given_back():
    """The load is stopped between the grant and its beginning."""
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(manager.lease("a"))
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
        entry = manager._table.current["b"]
        ticket = manager._lifecycle.queue._tickets[0]
        schedule = manager._lifecycle.queue.schedule

        def schedule_and_cancel():
            schedule()
            if ticket.granted:
                entry.task.cancel()  # before it has heard of it
                manager._lifecycle.closed = True

        manager._lifecycle.queue.schedule = schedule_and_cancel
    with pytest.raises(ResourceNotAvailableError, match="closed"):
        await waiting
    assert manager._account.holding(entry) == {}


async def test_a_grant_that_comes_with_the_deadline_counts(monkeypatch):
    timeouts = []
    timeout_at = asyncio.timeout_at

    def noted(when):
        timeouts.append(timeout_at(when))
        return timeouts[-1]

    monkeypatch.setattr("engineroom.models.memory_queue.asyncio.timeout_at", noted)
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10})
    async with manager.lease("a"):
        waiting = asyncio.create_task(manager.load("b"))
        await until(lambda: states(manager)["a"] == "draining")
        ticket = manager._lifecycle.queue._tickets[0]
        schedule = manager._lifecycle.queue.schedule

        def schedule_at_the_deadline():
            if not ticket.granted and not manager._account.lacking(ticket.need):
                timeouts[-1].reschedule(0)  # it is over before the load has heard of the grant
            schedule()

        manager._lifecycle.queue.schedule = schedule_at_the_deadline
    await waiting
    assert timeouts[-1].expired() and cpu(manager).holders == {"b": 8}


def test_a_manager_outlives_the_loop_that_it_was_used_on():
    """What a loop had left to do when it ended does not keep the next one from going on."""
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10})

    async def first():
        await manager.load("a")
        manager._lifecycle.queue.wake()  # the loop ends before it comes to it

    async def second():
        async with manager.lease("a"):
            waiting = asyncio.create_task(manager.load("b"))
            await until(lambda: states(manager)["a"] == "draining")
        async with asyncio.timeout(10):
            await waiting
        await manager.close()

    asyncio.run(first())
    asyncio.run(second())


async def test_closing_ends_the_waits():
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10})
    lease = manager.lease("a")
    await lease.__aenter__()
    waiting = asyncio.create_task(manager.load("b"))
    await until(lambda: states(manager)["a"] == "draining")
    closing = asyncio.create_task(manager.close())
    with pytest.raises(ResourceNotAvailableError, match="closed"):
        await waiting
    await lease.__aexit__(None, None, None)
    await closing
    assert set(states(manager).values()) <= {"unloaded", "failed"}
    assert cpu(manager).free == 10


# ── keep_alive ───────────────────────────────────────────────────────────────────────────────


async def test_a_model_that_nobody_uses_is_unloaded():
    manager = manager_of(model("a", 4), memory={"cpu": 10}, keep_alive=0.02)
    await use(manager, "a")
    assert states(manager)["a"] == "ready"
    await until(lambda: states(manager)["a"] == "unloaded")


async def test_idle_time_counts_from_the_last_release():
    manager = manager_of(model("a", 4, keep_alive="1h"), memory={"cpu": 10})
    entry = manager._table.current["a"]
    async with manager.lease("a"):
        assert entry.idle_timer is None
        async with manager.lease("a"):
            pass
        assert entry.idle_timer is None, "it is still held"
    first = entry.idle_timer
    assert first is not None
    await use(manager, "a")
    assert first.cancelled() and entry.idle_timer is not first
    await manager.close()
    assert entry.idle_timer is None


async def test_keep_alive_of_zero_lets_it_go_at_once_but_not_before_it_was_used():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4, keep_alive=0), keep_alive="forever", handlers=[handler])
    await manager.load("a")
    for _ in range(5):
        await asyncio.sleep(0)
    assert states(manager)["a"] == "ready"
    async with manager.lease("a"):
        await use(manager, "a")
        assert states(manager)["a"] == "ready"
    await until(lambda: states(manager)["a"] == "unloaded")
    assert handler.loads["a"] == 1


@pytest.mark.parametrize("value", [None, "forever"])
async def test_forever_has_no_timer(value):
    manager = manager_of(model("a", 4, keep_alive=value))
    await use(manager, "a")
    assert manager._table.current["a"].idle_timer is None
    assert status(manager, "a").keep_alive_s is None


# ── variants ─────────────────────────────────────────────────────────────────────────────────


def two_runtimes(*sizes: int, budget: int = 10, **deployment):
    good, other = FakeSizedHandler("good"), FakeSizedHandler("other")
    variants = [
        {"source": f"{name}:", "runtime": name, "options": {"size": size}}
        for name, size in zip(("good", "other", "absent"), sizes, strict=False)
    ]
    manager = manager_of(
        model("m", variants=variants),
        model("x", 6, source="good:"),
        memory={"cpu": budget},
        handlers=[good, other],
        **deployment,
    )
    return good, other, manager


async def test_the_next_variant_is_used_where_the_first_fails_to_load():
    good, _, manager = two_runtimes(4, 4)
    good.failing["m"].append(OSError("cannot"))
    loaded = await manager.load("m")
    assert loaded.handler_name == "other" and states(manager)["m"] == "ready"
    first, second = status(manager, "m").variants
    assert (first.outcome, second.outcome) == ("failed", "used") and "cannot" in first.reason
    assert "variant 1, good from good:: failed" in str(manager.explain("m"))
    assert cpu(manager).held == 4


async def test_a_deployment_may_forbid_the_fall_back():
    good, other, manager = two_runtimes(4, 4, fallback=False)
    good.failing["m"].append(OSError("cannot"))
    with pytest.raises(InferenceError, match="cannot"):
        await manager.load("m")
    assert other.loads["m"] == 0 and cpu(manager).free == 10


async def test_a_variant_that_does_not_fit_is_passed_over_and_explained():
    _, _, manager = two_runtimes(20, 4)
    assert (await manager.load("m")).handler_name == "other"
    first, _ = status(manager, "m").variants
    assert first.outcome == "refused" and "needs" in first.reason


async def test_a_variant_that_fits_now_is_used_rather_than_waited_for():
    _, _, manager = two_runtimes(8, 3)
    async with manager.lease("x"):
        assert (await manager.load("m")).handler_name == "other"


async def test_where_none_fits_now_the_first_is_waited_for():
    _, _, manager = two_runtimes(8, 7)
    async with manager.lease("x"):
        waiting = asyncio.create_task(manager.load("m"))
        await until(lambda: states(manager)["x"] == "draining")
    assert (await waiting).handler_name == "good"


async def test_when_every_variant_fails_every_reason_is_told():
    good, _, manager = two_runtimes(4, 40)
    good.failing["m"].append(ConfigurationError("the file is damaged"))
    with pytest.raises(ResourceNotAvailableError, match="none of the 2 variants") as caught:
        await manager.load("m")
    assert "the file is damaged" in str(caught.value) and "no room" in str(caught.value)


# ── engines that die, files that change ──────────────────────────────────────────────────────


async def die(manager):
    async with manager.lease("a"):
        raise EngineDeadError("gone")


async def test_an_engine_that_died_is_loaded_anew_for_the_next_request():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), memory={"cpu": 10}, handlers=[handler])
    await manager.load("a")
    dead = manager.get_loaded_model("a")
    with pytest.raises(EngineDeadError):
        await die(manager)
    async with manager.lease("a") as alive:
        assert alive is not dead
    assert handler.loads["a"] == 2 and handler.unloads["a"] == 1


async def test_a_dead_engine_waits_for_its_other_requests():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 4), handlers=[handler])
    async with manager.lease("a"):
        with pytest.raises(EngineDeadError):
            await die(manager)
        assert states(manager)["a"] == "draining" and handler.unloads["a"] == 0
    await until(lambda: states(manager)["a"] == "unloaded")


async def test_an_engine_that_dies_in_a_load_and_in_an_unload_leaves_nothing_behind():
    handler = FakeSizedHandler()
    manager = manager_of(
        model("a", 4, options={"unload_fails": True}), memory={"cpu": 10}, handlers=[handler]
    )
    handler.failing["a"].append(EngineDeadError("died while it loaded"))
    with pytest.raises(EngineDeadError):
        await manager.load("a")
    assert states(manager)["a"] == "failed" and cpu(manager).free == 10
    await manager.load("a")
    with pytest.raises(InferenceError):
        await manager.unload("a")
    assert states(manager)["a"] == "failed" and cpu(manager).free == 10
    await manager.load("a")
    assert states(manager)["a"] == "ready"


async def test_a_file_that_is_replaced_during_a_load_is_loaded_again(tmp_path, caplog):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"old")
    handler = FakeSizedHandler(gated=("load",))
    handler.can_load = lambda config: True
    manager = manager_of(model("a", 4, source=str(file)), memory={"cpu": 10}, handlers=[handler])
    loading = asyncio.create_task(manager.load("a"))
    await until(lambda: ("load", "a") in handler.gates)
    file.write_bytes(b"newer")
    handler.end("load", "a")
    await until(lambda: handler.loads["a"] == 2 and ("load", "a") in handler.gates)
    assert handler.in_memory["a"] == 0, "what was loaded from half of each is given back"
    handler.end("load", "a")
    await loading
    assert "were written while it was loaded" in caplog.text and cpu(manager).held == 4


async def test_files_that_do_not_come_to_rest_are_a_typed_error(tmp_path):
    (tmp_path / "part-1").write_bytes(b"")
    handler = FakeSizedHandler()
    handler.can_load = lambda config: True
    original = handler.load_model

    async def load_model(config):
        (tmp_path / f"part-{handler.loads['a'] + 2}").write_bytes(b"more")
        return await original(config)

    handler.load_model = load_model
    manager = manager_of(
        model("a", 4, source=str(tmp_path)), memory={"cpu": 10}, handlers=[handler]
    )
    with pytest.raises(ResourceNotAvailableError, match="wait until they are complete"):
        await manager.load("a")
    assert handler.in_memory["a"] == 0 and cpu(manager).free == 10


# ── preloading ───────────────────────────────────────────────────────────────────────────────


async def test_preloading_loads_what_fits_and_says_how_far_it_is():
    manager = manager_of(
        model("a", 4), model("b", 8), model("c", 5), model("d", 1, preload=False),
        memory={"cpu": 10},
    )  # fmt: skip
    steps = []
    await manager.load_configured_models(steps.append)
    assert [(s.model_id, s.step, s.number, s.total) for s in steps] == [
        ("a", "loading", 1, 3),
        ("a", "ready", 1, 3),
        ("b", "skipped", 2, 3),
        ("c", "loading", 3, 3),
        ("c", "ready", 3, 3),
    ]
    assert states(manager) == {"a": "ready", "b": "unloaded", "c": "ready", "d": "unloaded"}


async def test_preloading_what_can_never_fit_is_a_failure():
    manager = manager_of(model("a", 40), model("b", 4), memory={"cpu": 10})
    steps = []
    with pytest.raises(ResourceNotAvailableError, match="no room"):
        await manager.load_configured_models(steps.append)
    assert [(s.model_id, s.step) for s in steps] == [
        ("a", "loading"),
        ("a", "failed"),
        ("b", "loading"),
        ("b", "ready"),
    ]


# ── looking on ───────────────────────────────────────────────────────────────────────────────


async def test_every_transition_is_seen():
    handler = FakeSizedHandler()
    manager = manager_of(model("a", 8), model("b", 8), memory={"cpu": 10}, handlers=[handler])
    observer = FakeTransitions()
    manager.registry.register_plugin(observer, name="observer")
    handler.failing["a"].append(OSError("first"))
    with pytest.raises(InferenceError):
        await manager.load("a")
    await manager.load("a")
    await manager.load("b")
    await manager.close()
    assert observer.seen == [
        ("a", "unloaded", "loading"),
        ("a", "loading", "failed"),
        ("a", "failed", "loading"),
        ("a", "loading", "ready"),
        ("b", "unloaded", "loading"),
        ("a", "ready", "draining"),
        ("a", "draining", "unloaded"),
        ("b", "loading", "ready"),
        ("b", "ready", "draining"),
        ("b", "draining", "unloaded"),
    ]


async def test_what_is_shown_can_be_written_as_json():
    _, _, manager = two_runtimes(20, 4)
    await manager.load("m")
    text = json.dumps([asdict(s) for s in manager.list_models()])
    assert json.loads(text)[0]["memory"] == {"cpu": 4}
    assert json.loads(json.dumps([asdict(d) for d in manager.memory()]))[0]["budget"] == 10
    assert json.loads(json.dumps(asdict(await manager.plan())))["models"][0]["action"] == "loaded"
