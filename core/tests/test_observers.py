"""Observers are really called, once each, and can harm nothing."""

from __future__ import annotations

import asyncio
import logging
import types

import pytest
from core_doubles import (
    GateHandler,
    PlainHandler,
    Recorder,
    bare_registry,
    drained,
    echo_bench,
    gate_bench,
    until,
)

from engineroom import (
    ConfigurationError,
    GenerationParams,
    LLMInferenceService,
    LLMModelManager,
    LoggingObserver,
    hookimpl,
    request_logger,
)
from engineroom.handlers.observer_hooks import ObserverSpec
from engineroom.testing import EchoHandler

pytestmark = pytest.mark.usefixtures("both_ways")


def observer(**hooks):
    """An object with these hooks."""
    made = types.SimpleNamespace()
    for name, function in hooks.items():
        setattr(made, name, hookimpl(function))
    return made


# ── called for real ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_every_hook_is_called_with_its_arguments(stream):
    bench = echo_bench()
    request = bench.request("a b", metadata={"tenant": "t"})
    if stream:
        answer = bench.service.stream(request)
        await drained(answer)
        response = answer.response
    else:
        response = await bench.service.infer(request)
    await bench.service.close()
    seen = bench.recorder
    assert seen.order == ["started", "loaded", "finished", "unloaded"]
    assert seen.started[0] is request
    assert seen.finished[0][0] is request and seen.finished[0][1] is response
    assert response.finish_reason == "eos_token" and response.inference_time_ms is not None
    (loaded, load_s), (unloaded, unload_s) = seen.loaded[0], seen.unloaded[0]
    assert loaded is unloaded and loaded.model_id == "echo"
    assert load_s >= 0 and unload_s >= 0


@pytest.mark.parametrize("words", [1, 2, 4, 257, 600])
async def test_the_gaps_between_a_streams_chunks_are_told(words):
    bench = echo_bench()
    request = bench.request("a " * words, params=GenerationParams(max_new_tokens=None))
    chunks = await drained(bench.service.stream(request))
    told = bench.recorder.gaps
    assert sum(len(gaps) for _, _, gaps in told) == len(chunks) - 1
    assert all(each is request and handler == "echo" for each, handler, _ in told)
    assert all(gap >= 0 for _, _, gaps in told for gap in gaps)
    assert len(told) == -(-(len(chunks) - 1) // 256)
    await bench.service.infer(request)
    assert bench.recorder.gaps == told
    await bench.service.close()


async def test_the_gaps_of_a_stream_that_fails_are_told():
    bench = echo_bench(fail="during")
    await drained(bench.service.stream(bench.request("a b c d")))
    assert [len(gaps) for _, _, gaps in bench.recorder.gaps] == [1]
    await bench.service.close()


async def test_a_request_that_is_refused_at_once_is_told_as_rejected():
    bench = echo_bench()
    await bench.service.infer(bench.request("a"))
    await bench.service.close()
    refused = bench.request("b")
    await bench.service.infer(refused)
    assert bench.recorder.rejected == [(refused, "closed")]
    assert refused not in bench.recorder.started


def test_the_recorder_knows_every_hook():
    hooks = {name for name in vars(ObserverSpec) if name.startswith("engineroom_")}
    assert hooks - {"engineroom_register_handlers"} == {
        name for name in vars(Recorder) if name.startswith("engineroom_")
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail", ["load", "before", "during", "after"])
async def test_each_start_has_one_finish_when_the_handler_fails(stream, fail):
    bench = echo_bench(fail=fail)
    for _ in range(2):
        if stream:
            await drained(bench.service.stream(bench.request()))
        else:
            await bench.service.infer(bench.request())
    assert bench.recorder.reasons == ["error", "error"]
    assert all(response.error_message for _, response in bench.recorder.finished)
    assert bench.at_rest()


@pytest.mark.parametrize("stream", [False, True])
async def test_each_start_has_one_finish_when_there_is_no_such_model(stream):
    bench = echo_bench()
    request = bench.request(model_id="nothing")
    if stream:
        await drained(bench.service.stream(request))
    else:
        await bench.service.infer(request)
    assert bench.recorder.order == ["started", "finished"]


async def test_each_start_has_one_finish_whatever_happens_to_the_request():
    bench = gate_bench()
    ways = ["answered", "cancelled", "expired", "closed", "dropped"]
    requests = {way: bench.request("one", request_id=way, timeout_s=3600) for way in ways}
    tasks = {
        way: asyncio.create_task(bench.service.infer(requests[way]))
        for way in ("answered", "cancelled", "expired")
    }
    closed, dropped = bench.service.stream(requests["closed"]), None
    for stream_way in ("closed", "dropped"):
        bench.handler.permit(stream_way)
    dropped = bench.service.stream(requests["dropped"])
    assert [await anext(closed), await anext(dropped)] == ["one", "one"]
    await until(lambda: len(bench.handler.waiting) == 3)
    bench.handler.permit("answered")
    tasks["cancelled"].cancel()
    bench.expire(requests["expired"])
    await closed.aclose()
    del dropped
    await asyncio.wait(tasks.values())
    await until(bench.at_rest)
    reasons = {request.request_id: r.finish_reason for request, r in bench.recorder.finished}
    assert reasons == {
        "answered": "eos_token",
        "cancelled": "cancelled",
        "expired": "timeout",
        "closed": "cancelled",
        "dropped": "cancelled",
    }
    assert len(bench.recorder.finished) == len(ways)


async def test_an_installed_observer_sees_the_very_first_request(monkeypatch):
    seen = Recorder()

    class Entry:
        name, group, value, dist = "seen", "engineroom.plugins", "seen", None

        def load(self):
            return seen

    def entry_points(group):
        return [Entry()] if group == Entry.group else []

    monkeypatch.setattr("engineroom.handlers.discovery.entry_points", entry_points)
    bench = echo_bench()
    service = LLMInferenceService(LLMModelManager(config=bench.manager.config))
    service.register_handler(EchoHandler())
    await service.infer(bench.request())
    assert seen.order == ["started", "loaded", "finished"]


async def test_a_subset_of_the_arguments_will_do():
    bench = echo_bench()
    calls = []
    bench.service.registry.register_plugin(
        observer(
            engineroom_request_started=lambda: calls.append("started"),
            engineroom_request_finished=lambda response: calls.append(response.generated_text),
            engineroom_model_loaded=lambda duration_s: calls.append(type(duration_s)),
        ),
        name="brief",
    )
    await bench.service.infer(bench.request("a b"))
    assert calls == ["started", float, "a b"]


async def test_a_module_is_an_observer():
    module = types.ModuleType("my_audit")
    module.seen = []

    @hookimpl
    def engineroom_request_started(request):
        module.seen.append(request.request_id)

    module.engineroom_request_started = engineroom_request_started
    bench = echo_bench()
    bench.service.registry.register_plugin(module)
    await bench.service.infer(bench.request(request_id="r"))
    assert module.seen == ["r"]


# ── harming nothing ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [ValueError("boom"), asyncio.CancelledError()], ids=repr)
async def test_an_observer_that_raises_is_logged_and_harms_nothing(stream, error, caplog):
    bench = echo_bench()

    def fail():
        raise error

    unheard = {"engineroom_request_rejected", "engineroom_request_waited"}
    hooks = [n for n in vars(Recorder) if n.startswith("engineroom_") and n not in unheard]
    if not stream:
        hooks.remove("engineroom_request_gaps")
    bench.service.registry.register_plugin(observer(**dict.fromkeys(hooks, fail)), name="bad")
    last = Recorder()
    bench.service.registry.register_plugin(last, name="last")
    request = bench.request("a b")
    if stream:
        assert await drained(bench.service.stream(request)) == ["a", " b"]
    else:
        assert (await bench.service.infer(request)).generated_text == "a b"
    await bench.service.close()
    assert last.order == bench.recorder.order == ["started", "loaded", "finished", "unloaded"]
    records = [r for r in caplog.records if r.name == "engineroom.registry"]
    told = [*last.order, *last.transitions, *last.gaps]
    assert len(records) == len(told) and all(r.exc_info for r in records)
    assert len(last.transitions) == 4  # loading, ready, draining, unloaded
    assert all("'plugin:bad' failed in engineroom_" in r.getMessage() for r in records)


# ── refused ──────────────────────────────────────────────────────────────────────────────────


async def _async_hook(request): ...


def _wrapper(request):
    yield


def refuse(plugin, match, name="mine"):
    found = bare_registry()
    with pytest.raises(ConfigurationError, match=match):
        found.register_plugin(plugin, name=name)
    seen = Recorder()
    found.register_plugin(seen, name=name)  # the name is free: nothing stayed behind
    found.notify("engineroom_request_started", request=None)
    assert seen.order == ["started"]


def test_a_hook_that_does_not_exist_is_refused_with_the_nearest():
    wrong = observer(engineroom_request_finnished=lambda response: None)
    refuse(wrong, r"'mine': there is no hook.*did you mean 'engineroom_request_finished'")


def test_a_marked_function_without_the_prefix_is_refused_in_objects_and_modules():
    module = types.ModuleType("my_audit")
    for plugin in (observer(request_started=lambda request: None), module):
        plugin.request_started = hookimpl(lambda request: None)
        refuse(plugin, "no hook 'request_started'")


def test_an_argument_that_a_hook_does_not_have_is_refused_whole():
    called = []
    wrong = observer(
        engineroom_request_started=lambda request: called.append("started"),
        engineroom_request_finished=lambda request, answer: None,
    )
    refuse(wrong, "answer")
    assert called == []


def test_an_async_hook_is_refused():
    refuse(observer(engineroom_request_started=_async_hook), "is async; write a plain function")


@pytest.mark.parametrize("kind", ["wrapper", "hookwrapper"])
def test_a_wrapper_is_refused(kind):
    plugin = types.SimpleNamespace(engineroom_request_started=hookimpl(**{kind: True})(_wrapper))
    refuse(plugin, "is a wrapper; observers only look on")


def test_a_class_is_refused():
    refuse(Recorder, r"write mine\(\)")


def test_a_name_is_taken_once_and_a_plugin_registered_once():
    found = bare_registry()
    first = observer()
    found.register_plugin(first, name="same")
    with pytest.raises(ConfigurationError, match="'same': the name is taken"):
        found.register_plugin(observer(), name="same")
    with pytest.raises(ConfigurationError, match="registered already"):
        found.register_plugin(first, name="other")
    assert found._manager.get_plugin("plugin:same") is first


def test_what_a_property_does_is_left_to_its_readers():
    class Lazy:
        @property
        def connection(self):
            raise OSError("no network")

        @hookimpl
        def engineroom_request_started(self, request): ...

    bare_registry().register_plugin(Lazy())


# ── publishing handlers ──────────────────────────────────────────────────────────────────────


def test_an_observer_may_register_handlers():
    def hook(register):
        register(GateHandler("b"))
        register(GateHandler("a"))

    found = bare_registry()
    found.register(EchoHandler())
    found.register_plugin(observer(engineroom_register_handlers=hook), name="several")
    assert [h.name for h in found.handlers] == ["echo", "b", "a"]


@pytest.mark.parametrize(
    ("given", "match"),
    [(GateHandler, "write GateHandler"), (PlainHandler(name="echo"), "name is taken")],
)
def test_an_observer_that_registers_a_bad_handler_is_refused(given, match):
    found = bare_registry()
    found.register(EchoHandler())
    plugin = observer(engineroom_register_handlers=lambda register: register(given))
    with pytest.raises(ConfigurationError, match=match):
        found.register_plugin(plugin, name="several")
    assert not found._manager.is_registered(plugin)


# ── the logging observer ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_the_logging_observer_names_request_and_model_and_never_the_prompt(stream, caplog):
    bench = echo_bench()
    bench.service.registry.register_plugin(LoggingObserver())
    request = bench.request("a confidential prompt", request_id="r-1")
    with caplog.at_level(logging.DEBUG, logger="engineroom"):
        if stream:
            await drained(bench.service.stream(request))
        else:
            await bench.service.infer(request)
        await bench.service.close()
    mine = [r for r in caplog.records if r.name == "engineroom.requests"]
    started, loaded, finished, unloaded = mine
    for record in (started, finished):
        assert (record.request_id, record.model_id) == ("r-1", "echo")
    assert (started.levelname, finished.levelname) == ("DEBUG", "INFO")
    assert "eos_token, 3 prompt and 3 generated tokens" in finished.getMessage()
    assert "loaded by echo" in loaded.getMessage() and "unloaded" in unloaded.getMessage()
    assert "confidential" not in caplog.text
    assert not any("confidential" in str(vars(r)) for r in mine)


async def test_the_logging_observer_warns_of_failures_at_any_level(caplog):
    bench = echo_bench(fail="before")
    bench.service.registry.register_plugin(LoggingObserver(level=logging.DEBUG))
    await bench.service.infer(bench.request("a confidential prompt"))
    (record,) = [r for r in caplog.records if r.name == "engineroom.requests"]
    assert record.levelname == "WARNING" and "asked to fail" in record.getMessage()
    assert "confidential" not in caplog.text


def test_a_request_logger_keeps_the_callers_extra(caplog):
    log = request_logger(logging.getLogger("engineroom.mine"), echo_bench().request(request_id="r"))
    log.warning("slow", extra={"slot": 3})
    (record,) = caplog.records
    assert (record.request_id, record.model_id, record.slot) == ("r", "echo", 3)
    assert record.key_name == "-"


@pytest.mark.parametrize(("metadata", "name"), [({"api_key": "ann"}, "ann"), ({"api_key": 3}, "-")])
def test_a_request_logger_names_the_key_that_the_request_came_with(caplog, metadata, name):
    request = echo_bench().request(request_id="r", metadata=metadata)
    request_logger(logging.getLogger("engineroom.mine"), request).warning("slow")
    assert [record.key_name for record in caplog.records] == [name]
