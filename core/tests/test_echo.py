"""The fake runtime is as it says: others' tests rest on it."""

from __future__ import annotations

import asyncio

import pytest
from core_doubles import drained, echo_bench, echo_config, until

from engineroom import (
    ConfigurationError,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    QueueFullError,
)
from engineroom.handlers.validation import validate_handler
from engineroom.testing import EchoHandler, EchoModel, EchoOptions


async def loaded(**options):
    handler = EchoHandler()
    return handler, await handler.load_model(echo_config(**options))


def request(prompt="one two", **fields) -> InferenceRequest:
    return InferenceRequest(model_id="echo", prompt=prompt, **fields)


def test_it_keeps_the_contract():
    assert validate_handler(EchoHandler()).name == "echo"


@pytest.mark.parametrize("split_bytes", [False, True])
@pytest.mark.parametrize("prompt", ["", " ", "one", "  a b\n\tc ", "naïve 🦉"])
async def test_it_says_the_prompt_back(prompt, split_bytes):
    handler, model = await loaded(split_bytes=split_bytes)
    response = await handler.infer(model, request(prompt))
    assert response.generated_text == prompt
    assert response.generated_tokens == response.prompt_tokens
    assert response.prompt_tokens == handler.count_tokens(model, prompt)
    assert "".join([c async for c in handler.stream_infer(model, request(prompt))]) == prompt


@pytest.mark.parametrize("split_bytes", [False, True])
async def test_token_ids_are_characters(split_bytes):
    handler, model = await loaded(split_bytes=split_bytes)
    asked = request(None, prompt_token_ids=[ord(c) for c in "a 🦉"])
    response = await handler.infer(model, asked)
    assert (response.generated_text, response.prompt_tokens) == ("a 🦉", 3)
    for token in (0xD800, 0x110000):
        with pytest.raises(ConfigurationError, match=f"{token} is no character"):
            await handler.infer(model, request(None, prompt_token_ids=[65, token]))


async def test_it_repeats_and_honours_the_limit():
    handler, model = await loaded(repeat=2)
    assert (await handler.infer(model, request("a b"))).generated_text == "a ba b"
    short = request("a b", params=GenerationParams(max_new_tokens=3))
    response = await handler.infer(model, short)
    assert (response.generated_text, response.finish_reason) == ("a ba", "length")


def test_it_loads_its_own_sources_only():
    from engineroom import ModelConfig

    assert EchoHandler().can_load(echo_config())
    assert not EchoHandler().can_load(ModelConfig(model_id="m", source="model.gguf"))
    assert not EchoHandler(unloadable=False).can_load(echo_config())


@pytest.mark.parametrize(
    "options", [{"n_parallel": 0}, {"unknown": 1}, {"fail": "sometimes"}, {"token_delay_s": -1}]
)
async def test_its_options_are_checked(options):
    with pytest.raises(ConfigurationError, match="options of model 'echo'") as caught:
        await EchoHandler().load_model(echo_config(**options))
    assert next(iter(options)) in str(caught.value)


async def test_it_counts_loads_unloads_and_what_it_has_seen():
    handler, model = await loaded()
    asked = request()
    await handler.infer(model, asked)
    await handler.unload_model(model)
    assert (handler.loads, handler.unloads) == (1, 1)
    assert model.model_object.seen == [asked] and model.model_object.finished == 1
    assert model.model_object.unloaded and not handler.health(model).ok


async def test_it_runs_as_many_as_it_has_slots_and_the_next_waits():
    bench = echo_bench(n_parallel=2, max_queue=1)
    streams = [bench.service.stream(bench.request("a b")) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    waiting = asyncio.create_task(bench.service.infer(bench.request("c d")))
    loaded_model = bench.manager.get_loaded_model("echo")
    model = loaded_model.model_object
    await until(lambda: model.waiting == 1)
    health = bench.handler.health(loaded_model)
    assert (health.num_requests_running, health.num_requests_waiting) == (2, 1)
    refused = await bench.service.infer(bench.request())
    with pytest.raises(QueueFullError, match="max_queue"):
        refused.raise_for_error()
    await streams[0].aclose()
    assert (await waiting).generated_text == "c d"
    assert await drained(streams[1]) == [" b"]
    assert bench.at_rest()


async def test_a_slot_is_used_again_by_the_first_who_waited():
    bench = echo_bench(n_parallel=1)
    holder = bench.service.stream(bench.request("a b"))
    await anext(holder)
    model = bench.manager.get_loaded_model("echo").model_object
    tasks = []
    for number in range(3):
        tasks.append(asyncio.create_task(bench.service.infer(bench.request(f"{number}"))))
        await until(lambda n=number: model.waiting == n + 1)
    tasks[0].cancel()
    await holder.aclose()
    done = await asyncio.gather(*tasks[1:])
    assert [r.generated_text for r in done] == ["1", "2"]
    assert bench.at_rest()


@pytest.mark.parametrize(
    ("fail", "chunks"),
    [("before", []), ("during", ["one", " two"]), ("after", ["one", " two", " three"])],
)
async def test_it_fails_where_it_is_asked_to_and_gives_the_slot_back(fail, chunks):
    handler, model = await loaded(fail=fail)
    got = []

    async def read():
        async for chunk in handler.stream_infer(model, request("one two three")):
            got.append(chunk)  # noqa: PERF401 - what came before the failure counts

    with pytest.raises(RuntimeError, match="asked to fail"):
        await read()
    assert got == chunks
    assert (model.model_object.running, model.model_object.finished) == (0, 1)


async def test_it_fails_in_loading_and_unloading():
    with pytest.raises(RuntimeError, match="in loading"):
        await loaded(fail="load")
    handler, model = await loaded(fail="unload")
    with pytest.raises(RuntimeError, match="in unloading"):
        await handler.unload_model(model)


async def test_a_model_that_was_unloaded_under_a_request_says_so():
    handler, model = await loaded()
    chunks = handler.stream_infer(model, request())
    await anext(chunks)
    await handler.unload_model(model)
    with pytest.raises(InferenceError, match="unloaded while it was used"):
        await drained(chunks)


async def test_other_runtimes_models_are_not_its_own():
    handler, model = await loaded()
    assert handler.can_handle(model)
    model.model_object = object()
    assert not handler.can_handle(model)
    with pytest.raises(InferenceError, match="no echo model"):
        handler.health(model)


async def test_others_run_between_two_tokens():
    handler, model = await loaded()
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await handler.infer(model, request("a b c d"))
    task.cancel()
    assert turns >= 4


def test_its_defaults_do_nothing():
    options = EchoOptions()
    assert (options.token_delay_s, options.load_delay_s, options.fail) == (0, 0, None)
    assert EchoModel(options, asyncio.Semaphore(1)).running == 0
