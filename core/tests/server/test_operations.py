"""engineroom's own API, the admin routes, health, metrics, and the description of it all."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("schemathesis", reason="needs schemathesis")
pytest.importorskip("prometheus_client", reason="needs the extra engineroom[server]")

import httpx
import jsonschema_rs
from hypothesis import given, strategies as st

from engineroom import InferenceRequest, InferenceResponse, VectorSizes, hookimpl
from engineroom.server.routes import all_routes, document
from engineroom.testing import EchoHandler


def talk(text="one two", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def schema_of(name: str) -> dict:
    whole = document()
    return {"$ref": f"#/components/schemas/{name}", "components": whole["components"]}


# ── /v1/inference ────────────────────────────────────────────────────────────────────────────


def test_an_inference_request_is_answered(shared):
    request = InferenceRequest(
        model_id="m",
        prompt="one two three",
        stop_sequences=["three"],
        params={"max_new_tokens": None, "logit_bias": {7: -1.0}, "logprobs": 1},
        metadata={"who": "ann"},
    )
    answer = httpx.post(
        shared.url + "/v1/inference",
        content=request.model_dump_json(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 200
    response = InferenceResponse.model_validate(answer.json())
    assert response.generated_text == "one two "
    assert response.finish_reason == "stop_sequence"
    assert response.handler == "talk"
    assert response.logprobs[0].token == "one"
    seen = shared.handler.seen[-1]
    assert seen.params.logit_bias == {7: -1.0}
    assert seen.metadata["who"] == "ann"
    assert response.request_id == seen.request_id != request.request_id


def test_a_stream_ends_with_the_response(shared):
    body = {"model_id": "m", "prompt": "one two three", "stream": True}
    text = httpx.post(shared.url + "/v1/inference", json=body).text
    *chunks, final, rest = text.split("\n\n")
    assert rest == ""
    assert [json.loads(c.removeprefix("data: "))["text"] for c in chunks] == [
        "one", " two", " three",
    ]  # fmt: skip
    assert final.startswith("event: response\ndata: ")
    response = InferenceResponse.model_validate_json(final.partition("data: ")[2])
    assert response.generated_text == "one two three"
    assert response.generated_tokens == 3


def test_a_stream_that_fails_ends_with_error_and_response(shared):
    body = {"model_id": "m", "prompt": "a b !leak", "stream": True}
    assert httpx.post(shared.url + "/v1/inference", json=body).status_code == 500
    body["prompt"] = "a b !break c"
    *_, error, final, _rest = httpx.post(shared.url + "/v1/inference", json=body).text.split("\n\n")
    assert error.startswith("event: error\n")
    response = InferenceResponse.model_validate_json(final.partition("data: ")[2])
    assert (response.finish_reason, response.generated_tokens) == ("error", 2)
    assert "RuntimeError" not in final


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model_id": "m"}, None),
        ({"model_id": "m", "prompt": "x", "messages": []}, "messages"),
        ({"model_id": "m", "prompt": "x", "nonsense": 1}, "nonsense"),
        ({"model_id": "m", "prompt": "x", "params": {"temperature": 9}}, "params"),
        ({"model_id": "m", "prompt": "x", "params": {"logit_bias": {"a": 1}}}, "params"),
        ({"model_id": "m", "prompt": "x", "timeout_s": -1}, "timeout_s"),
    ],
)
def test_requests_that_cannot_be_are_refused(shared, body, param):
    answer = httpx.post(shared.url + "/v1/inference", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


# ── /v1/admin ────────────────────────────────────────────────────────────────────────────────

TWO = [
    {"model_id": "a", "source": "talk:", "aliases": ["first"]},
    {"model_id": "org/b", "source": "talk:", "preload": False},
]


def states(run) -> dict[str, str]:
    answer = httpx.get(run.url + "/v1/admin/models").json()
    jsonschema_rs.validate(schema_of("AdminModels"), answer)
    return {model["id"]: model["state"] for model in answer["models"]}


def test_a_model_is_reached_by_the_name_that_the_path_has(start):
    odd = {"model_id": "50%25 off?", "source": "talk:"}
    with start([odd]) as run:
        name = "50%2525%20off%3F"
        assert httpx.get(f"{run.url}/v1/models/{name}").json()["id"] == odd["model_id"]
        answer = httpx.post(f"{run.url}/v1/admin/models/{name}/unload")
        assert answer.json()["state"] == "unloaded"


def test_models_are_loaded_and_unloaded(start):
    with start(TWO) as run:
        assert states(run) == {"a": "ready", "org/b": "unloaded"}
        answer = httpx.post(run.url + "/v1/admin/models/org/b/load")
        assert (answer.status_code, answer.json()["state"]) == (200, "ready")
        answer = httpx.post(run.url + "/v1/admin/models/first/unload")
        assert (answer.status_code, answer.json()["state"]) == (200, "unloaded")
        assert states(run) == {"a": "unloaded", "org/b": "ready"}
        body = {**talk(), "model": "a"}
        assert httpx.post(run.url + "/v1/chat/completions", json=body).status_code == 200
        assert states(run)["a"] == "ready"


def test_a_model_that_is_held_is_not_unloaded(start):
    with start(TWO[:1]) as run:
        with httpx.stream(
            "POST", run.url + "/v1/chat/completions", json=talk("!drip", stream=True, model="a")
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            answer = httpx.post(run.url + "/v1/admin/models/a/unload", json={"timeout_s": 0.05})
            assert answer.status_code == 503
            assert "still held by 1 requests" in answer.json()["error"]["message"]
        run.until(lambda: run.handler.running == 0)
        assert httpx.post(run.url + "/v1/admin/models/a/unload").status_code == 200


def test_a_model_that_does_not_load_is_told_without_its_path(start):
    with start([*TWO, {"model_id": "c", "source": "talk:bad", "preload": False}]) as run:
        answer = httpx.post(run.url + "/v1/admin/models/c/load")
        assert answer.status_code == 503
        assert "/srv" not in answer.text
        listed = httpx.get(run.url + "/v1/admin/models")
        assert listed.json()["models"][2]["failed"] is True
        assert "/srv" not in listed.text


def test_unknown_models_and_bodies(shared):
    assert httpx.post(shared.url + "/v1/admin/models/none/load").status_code == 404
    wrong = {"timeout_s": "soon"}
    answer = httpx.post(shared.url + "/v1/admin/models/m/unload", json=wrong)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout_s")


def test_plan_and_reload_are_as_the_manager_has_them(start, monkeypatch):
    @dataclass
    class Said:
        models: tuple[str, ...]
        reason: str

    with start() as run:
        manager = run.manager

        async def said() -> Said:
            return Said(("m",), "made of /srv/models/m.bin")

        monkeypatch.setattr(manager, "plan", said)
        monkeypatch.setattr(manager, "reload", said)
        wanted = {"models": ["m"], "reason": "made of <path>"}
        assert httpx.get(run.url + "/v1/admin/plan").json() == {"plan": wanted}
        assert httpx.post(run.url + "/v1/admin/reload").json() == {
            "reload": wanted,
            "keys": None,
        }


# ── /v1/embeddings ───────────────────────────────────────────────────────────────────────────


def test_embeddings_where_there_are_none(start):
    with start() as run:
        body = {"model": "m", "input": ["a", "b"]}
        answer = httpx.post(run.url + "/v1/embeddings", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert "makes no embeddings" in answer.json()["error"]["message"]


def test_embeddings_of_a_service_that_has_them(start, monkeypatch):
    import openai

    @dataclass
    class Embeddings:
        vectors: list[list[float]]
        prompt_tokens: int

    async def embed(model_id, texts, *, dimensions, timeout_s, request_id, priority, metadata):
        return Embeddings([[float(len(text)), 0.5] for text in texts], 4)

    with start() as run:
        monkeypatch.setattr(run.service, "embed", embed, raising=False)
        with openai.OpenAI(base_url=f"{run.url}/v1", api_key="x", max_retries=0) as client:
            for encoding in ("float", openai.NOT_GIVEN):  # the client's own choice is base64
                answer = client.embeddings.create(
                    model="m", input=["a", "bcd"], encoding_format=encoding
                )
                assert [each.embedding for each in answer.data] == [[1.0, 0.5], [3.0, 0.5]]
                assert answer.usage.prompt_tokens == 4
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="m", input=["a", ""])


def test_token_ids_and_dimensions_of_embeddings(start):
    import openai

    class Cuttable(EchoHandler):
        async def load_model(self, config):
            loaded = await super().load_model(config)
            loaded.vector_sizes = VectorSizes(26, frozenset({2, 4}))
            return loaded

    models = [{"model_id": "m", "source": "echo:"}]
    with (
        start(models, Cuttable()) as run,
        openai.OpenAI(base_url=f"{run.url}/v1", api_key="x", max_retries=0) as client,
    ):

        def vectors(given, **fields):
            answer = client.embeddings.create(model="m", input=given, **fields)
            return [each.embedding for each in answer.data], answer.usage.prompt_tokens

        whole = vectors(["ab", "ba"])
        for ids in ([[97, 98], [98, 97]], [97, 98]):
            made, tokens = vectors(ids)
            assert made == whole[0][: len(made)]
            assert tokens == 2 * len(made)
        assert vectors(["ab", "ba"], dimensions=26) == whole
        (cut,), _ = vectors(["abcz"], dimensions=2, encoding_format="float")
        assert cut == pytest.approx([0.5**0.5, 0.5**0.5])
        for size in (1, 3, 27):
            with pytest.raises(openai.BadRequestError, match="cut to 2, 4 or 26") as caught:
                vectors("a", dimensions=size)
            assert caught.value.body["param"] == "dimensions"
        for mistake in ([-1], [True], [1.5], [1, "a"], [2**31], [[1], []], [[]], [[1], "a"]):
            with pytest.raises(openai.BadRequestError) as caught:
                vectors(mistake)
            assert caught.value.body["param"] == "input", mistake
        with pytest.raises(openai.BadRequestError, match="1114112 is no character"):
            vectors([0x110000])


def test_embeddings_are_counted_and_named_as_other_requests(start):
    seen = []

    class Observer:
        @hookimpl
        def engineroom_request_waited(self, request):
            seen.append(request)

        @hookimpl
        def engineroom_request_finished(self, request):
            seen.append(request)

    models = [{"model_id": "m", "source": "echo:"}]
    with start(models, EchoHandler()) as run:
        run.service.registry.register_plugin(Observer())
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        answer = httpx.post(
            run.url + "/v1/embeddings",
            json={"model": "m", "input": ["a b", "c"], "user": "ann"},
            headers={"traceparent": trace},
        )
        labels = {"model_name": "m", "handler": "echo"}
        assert answer.json()["usage"]["prompt_tokens"] == 3
        assert value(run, "prompt_tokens_total", **labels) == 3
        assert value(run, "generation_tokens_total", **labels) == 0
        assert value(run, "request_generation_tokens_count", **labels) == 0
        assert value(run, "e2e_request_latency_seconds_count", **labels) == 1
        assert value(run, "request_success_total", **labels, finished_reason="eos_token") == 1
        assert value(run, "requests_total", **labels, kind="embed", reason="done") == 1
        httpx.post(run.url + "/v1/completions", json={"model": "m", "prompt": "a"})
        assert value(run, "requests_total", **labels, kind="generate", reason="eos_token") == 1
        bad = httpx.post(run.url + "/v1/embeddings", json={"model": "no-such", "input": "a"})
        assert bad.status_code == 404
        lost = {"model_name": "", "handler": "", "finished_reason": "error"}
        assert value(run, "request_success_total", **lost) == 1
        lost = {"model_name": "", "handler": "", "kind": "embed", "reason": "error"}
        assert value(run, "requests_total", **lost) == 1
    for request in seen[:2]:
        assert (request.kind, request.request_id) == ("embed", answer.headers["x-request-id"])
        assert (request.metadata["traceparent"], request.metadata["user"]) == (trace, "ann")


# ── /metrics and the hooks ───────────────────────────────────────────────────────────────────


def samples(run) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    text = httpx.get(run.url + "/metrics").text
    return {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(run, name, **labels) -> float:
    return samples(run).get(f"engineroom_{name}" + str(sorted(labels.items())), 0.0)


def test_a_crowd_that_asks_for_metrics_is_answered_one_by_one(shared):
    """Else all of them would be written before the loop gets to anybody else."""

    async def between_them() -> list[int]:
        rounds, ends = 0, []

        async def ask() -> None:
            await shared.server.context.metrics.render()
            ends.append(rounds)

        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(ask()) for _ in range(10)]
            while not all(task.done() for task in asking):
                rounds += 1
                await asyncio.sleep(0)
        return ends

    ends = shared.call(between_them)
    assert len(set(ends)) == len(ends) == 10


def test_what_happens_is_counted(start):
    with start(max_running=1, max_queued=0) as run:
        url = run.url + "/v1/chat/completions"
        httpx.post(url, json=talk("one two three", model="default"))
        httpx.post(url, json=talk("one two three", stream=True, max_tokens=2))
        httpx.post(url, json=talk("!fail"))
        httpx.post(url, json=talk(model="no-such"))
        with httpx.stream("POST", url, json=talk("!drip", stream=True)) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert httpx.post(url, json=talk()).status_code == 429
            assert value(run, "num_requests_running", model_name="m", handler="talk") == 1
        run.until(lambda: run.handler.running == 0)
        run.until(lambda: run.server.context.limiter.running == 0)
        labels = {"model_name": "m", "handler": "talk"}

        def success(reason, **other):
            return value(
                run, "request_success_total", **{**labels, **other}, finished_reason=reason
            )

        assert success("eos_token") == 1
        assert success("length") == 1
        assert success("error") == 1
        assert success("error", model_name="", handler="") == 1
        assert success("cancelled") == 1
        assert value(run, "requests_cancelled_total", **labels, stage="decoding") == 1
        assert value(run, "admission_rejections_total", reason="queue_full") == 1
        assert value(run, "prompt_tokens_total", **labels) == 3 + 3 + 1
        assert value(run, "generation_tokens_total", **labels) >= 3 + 2 + 1
        assert value(run, "prefix_cache_queries_total", **labels) == 7
        assert value(run, "prefix_cache_hits_total", **labels) == 2
        assert value(run, "time_to_first_token_seconds_count", **labels) == 3
        assert value(run, "inter_token_latency_seconds_count", **labels) >= 1
        assert value(run, "e2e_request_latency_seconds_count", **labels) == 4
        assert value(run, "request_queue_time_seconds_count", model_name="m") == 4
        assert value(run, "kv_cache_usage_perc", **labels) == 0.25
        assert value(run, "model_memory_bytes", **labels) == 1000
        held = {"device": "cpu", "what": "held"}
        assert value(run, "device_memory_bytes", **held) == 1000
        held["what"] = "not_returned"
        assert value(run, "device_memory_bytes", **held) == 0
        assert value(run, "model_state", model_name="m", state="ready") == 1
        assert value(run, "model_state", model_name="m", state="failed") == 0
        assert value(run, "model_load_duration_seconds_count", **labels) == 1


def test_strange_names_do_not_become_labels(start):
    with start() as run:
        for i in range(20):
            httpx.post(run.url + "/v1/completions", json={"model": f"x{i}", "prompt": "a"})
        assert "x1" not in httpx.get(run.url + "/metrics").text


@given(st.lists(st.floats(0, 1000), max_size=300))
def test_many_gaps_are_counted_as_one_by_one(gaps):
    from prometheus_client import CollectorRegistry, Histogram
    from prometheus_client.exposition import generate_latest

    from engineroom.server.metrics import _SECONDS, _Gaps

    ours, theirs = CollectorRegistry(), CollectorRegistry()
    many = _Gaps()
    ours.register(many)
    name = "engineroom_inter_token_latency_seconds"
    one = Histogram(
        name, "Between two chunks of a stream", ["model_name", "handler"],
        registry=theirs, buckets=_SECONDS,
    )  # fmt: skip
    for gap in gaps:
        one.labels("m", "h").observe(gap)
    if gaps:
        many.add(("m", "h"), gaps[:7])
        many.add(("m", "h"), gaps[7:])

    def lines(registry):
        text = generate_latest(registry).decode().splitlines()
        return {x for x in text if x.startswith((f"{name}_bucket", f"{name}_count"))}

    assert lines(ours) == lines(theirs)


# ── /openapi.json ────────────────────────────────────────────────────────────────────────────


def test_the_description_names_every_route(shared):
    described = httpx.get(shared.url + "/openapi.json").json()
    assert described == json.loads(json.dumps(document()))
    wanted = {(r.path.replace(":path}", "}"), r.method.lower()) for r in all_routes()}
    found = {(path, method) for path, methods in described["paths"].items() for method in methods}
    assert found == wanted


SCORES = ("EmbeddingList", "Ranking", "ScoreList")
"""Answers that this server's model does not give."""


@pytest.mark.parametrize(
    "route",
    [
        r for r in all_routes()
        if r.example and r.response.__name__ not in SCORES and "/embed" not in r.path
    ],
    ids=lambda r: r.path,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_the_examples_work_and_answers_are_as_described(shared, route, stream):
    body = {**route.example, "stream": stream}
    schema = document()["paths"][route.path]["post"]["requestBody"]["content"]
    ref = schema["application/json"]["schema"]["$ref"].rpartition("/")[2]
    jsonschema_rs.validate(schema_of(ref), body)
    answer = httpx.post(shared.url + route.path, json=body)
    assert answer.status_code == 200, answer.text
    if stream and route.streams is not None:
        assert answer.headers["content-type"].startswith(route.streams)
    else:
        ref = document()["paths"][route.path]["post"]["responses"]["200"]["content"]
        name = ref["application/json"]["schema"]["$ref"].rpartition("/")[2]
        jsonschema_rs.validate(schema_of(name), answer.json())


def test_log_probabilities_are_as_described(shared):
    for path, body in (
        ("/v1/chat/completions", talk(logprobs=True, top_logprobs=2)),
        ("/v1/completions", {"model": "m", "prompt": "a b", "logprobs": 2}),
    ):
        name = "ChatCompletion" if "chat" in path else "Completion"
        jsonschema_rs.validate(schema_of(name), httpx.post(shared.url + path, json=body).json())


@pytest.fixture(scope="module")
def fuzzed(start):
    with start(request_timeout_s=5) as run:
        yield run


OPERATIONS = sorted((route.method, route.path.replace(":path}", "}")) for route in all_routes())
STREAMED = {route.path for route in all_routes() if route.streams is not None}


@pytest.mark.parametrize("examples", [2, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda each: each)
def test_nothing_that_can_be_asked_breaks_it(fuzzed, method, path, examples):
    """Fuzzed from its own description: no 5xx but where it says so, nothing undescribed."""
    import hypothesis
    import schemathesis
    from schemathesis.checks import CHECKS

    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=fuzzed.url)
    operation = schema[path][method]
    checks = [
        each
        for name, each in ((c.__name__, c) for c in CHECKS.get_all())
        if name
        in {
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
            "response_headers_conformance",
        }
    ]
    assert len(checks) == 4
    described = document()["paths"][path][method.lower()]["responses"]
    allowed = {501} & set(map(int, described))

    modes = [schemathesis.GenerationMode.POSITIVE]
    if "requestBody" in document()["paths"][path][method.lower()]:  # else nothing can be wrong
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:
        strategy = operation.as_strategy(generation_mode=mode)

        @hypothesis.given(case=strategy)
        @hypothesis.settings(
            max_examples=examples,
            phases=[hypothesis.Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def attack(case):
            if path in STREAMED and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "m"  # else there is next to no stream
                case.body["stream"] = True
            response = case.call()
            assert response.status_code < 500 or response.status_code in allowed, response.text
            case.validate_response(response, checks=checks)

        attack()


@pytest.mark.parametrize(
    "path", [route.path for route in all_routes() if route.example and route.streams is not None]
)
def test_streams_are_as_described(fuzzed, path):
    import schemathesis
    from schemathesis.checks import CHECKS

    (route,) = [route for route in all_routes() if route.path == path]
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=fuzzed.url)
    body = {**route.example, "stream": True}
    case = schema[path][route.method].Case(body=body, media_type="application/json")
    response = case.call()
    assert response.headers["content-type"][0].startswith(route.streams)
    names = {"status_code_conformance", "content_type_conformance", "response_schema_conformance"}
    case.validate_response(response, checks=[c for c in CHECKS.get_all() if c.__name__ in names])


SAID = {"role": "user", "content": "a"}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": None}]}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": []}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "tool_calls": [CALLED]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{**SAID, "content": [{"type": "", "text": "a"}]}]}),
        ("/v1/chat/completions",
         {"messages": [SAID], "stream_options": {"include_obfuscation": True}}),
        ("/v1/completions", {}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": {"text": "a"}}),
        ("/v1/completions", {"prompt": "a", "model": "a\n"}),
        ("/v1/embeddings", {"input": ""}),
        ("/v1/embeddings", {"input": ["a", ""]}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{**SAID, "content": [{"type": ""}]}]}),
        ("/v1/messages", {"max_tokens": 1, "messages": [SAID], "thread": {}}),
        ("/v1/responses", {"input": []}),
        ("/v1/inference", {}),
        ("/v1/inference", {"prompt": "a", "messages": [SAID]}),
        ("/v1/inference", {"prompt": "a", "priority": 101}),
        ("/v1/inference", {"prompt": "a", "timeout_s": 0}),
        ("/v1/inference", {"prompt": "a", "params": {"max_new_tokens": -1}}),
    ],
)  # fmt: skip
def test_what_is_refused_is_so_by_the_description_as_well(shared, path, body):
    body = {"model_id" if path == "/v1/inference" else "model": "m", **body}
    ref = document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    valid = jsonschema_rs.is_valid(schema_of(ref["$ref"].rpartition("/")[2]), body)
    answer = httpx.post(shared.url + path, json=body)
    assert (answer.status_code, valid) == (400, False), answer.text


def test_bounds_have_the_names_that_json_schema_gives_them():
    ours = {"ge", "le", "gt", "lt", "min_length", "max_length"}

    def strange(schema, place):
        for key, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
            if key in ours and isinstance(value, int | float):
                yield f"{place}.{key}"
            if isinstance(value, dict | list):
                yield from strange(value, f"{place}.{key}")

    assert list(strange(document()["components"]["schemas"], "")) == []


def test_messages_with_all_that_they_need_are_valid(shared):
    messages = [
        SAID,
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "c", "content": "b"},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}], "tool_calls": []},
        SAID,
    ]
    body = {"model": "m", "messages": messages}
    jsonschema_rs.validate(schema_of("ChatRequest"), body)
    assert httpx.post(shared.url + "/v1/chat/completions", json=body).status_code == 200
