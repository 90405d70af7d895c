"""Spans and metrics of OpenTelemetry, from the hooks."""

from __future__ import annotations

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra engineroom[otel]")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engineroom import (
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    hookimpl,
)
from engineroom.otel import OpenTelemetryObserver
from engineroom.testing import EchoHandler

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Bench:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.observer = OpenTelemetryObserver(self.tracers, self.meters)
        manager = LLMModelManager(
            config={
                "models": [
                    {"model_id": "m", "source": "echo:"},
                    {"model_id": "bad", "source": "echo:", "options": {"fail": "during"}},
                ]
            }
        )
        self.service = LLMInferenceService(manager, handlers=[EchoHandler()])
        self.service.registry.register_plugin(self.observer, name="otel")

    def spans(self, kind="text_completion"):
        return [s for s in self.exporter.get_finished_spans() if s.name.startswith(kind)]

    def points(self):
        data = self.reader.get_metrics_data()
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def close(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.close()


def ask(model="m", prompt="secret words here", **more):
    params = GenerationParams(max_new_tokens=2, temperature=0.5)
    return InferenceRequest(model_id=model, prompt=prompt, params=params, **more)


async def test_a_request_is_a_span(bench):
    async with bench.service as service:
        await service.infer(ask())
    (span,) = bench.spans()
    assert span.name == "text_completion m"
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "engineroom",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "engineroom.handler": "echo",
    }
    assert {name: span.attributes[name] for name in wanted} == wanted
    assert span.parent is None and span.kind is SpanKind.INTERNAL
    assert "secret" not in span.to_json()


async def test_a_chat_is_called_so(bench):
    async with bench.service as service:
        await service.infer(
            InferenceRequest(model_id="m", messages=[{"role": "user", "content": "a"}])
        )
    assert [span.name for span in bench.spans("chat")] == ["chat m"]


async def test_texts_that_become_vectors_are_a_span(bench):
    async with bench.service as service:
        await service.embed("m", ["secret words", "a"], metadata={"traceparent": PARENT})
    (span,) = bench.spans("embeddings")
    assert span.name == "embeddings m" and span.kind is SpanKind.SERVER
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert span.attributes["gen_ai.operation.name"] == "embeddings"
    assert span.attributes["gen_ai.usage.input_tokens"] == 3
    assert not {"gen_ai.request.max_tokens", "gen_ai.response.finish_reasons"} & {*span.attributes}
    assert "secret" not in span.to_json()
    (usage,) = bench.points()["gen_ai.client.token.usage"]
    assert (usage.sum, usage.attributes["gen_ai.token.type"]) == (3, "input")


async def test_a_failure_is_an_error(bench):
    async with bench.service as service:
        await service.infer(
            ask("bad").model_copy(update={"params": GenerationParams(max_new_tokens=9)})
        )
    (span,) = bench.spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "InferenceError"


async def test_trace_context_comes_in_with_the_request_and_goes_out(bench):
    out = []

    class Peek:
        @hookimpl
        def engineroom_request_started(self, request):
            out.append(bench.observer.traceparent_of(request.request_id))

    bench.service.registry.register_plugin(Peek(), name="peek")  # before it: not there yet
    async with bench.service as service:
        stream = service.stream(ask(metadata={"traceparent": PARENT, "tracestate": "a=1"}))
        await anext(stream)
        inside = bench.observer.traceparent_of(stream.request.request_id)
        await stream.aclose()
    (span,) = bench.spans()
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert span.kind is SpanKind.SERVER
    assert inside == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert bench.observer.traceparent_of(stream.request.request_id) == inside  # for a while
    assert bench.observer.traceparent_of("another") is None


async def test_spans_that_ended_are_remembered_for_a_while_only(bench, monkeypatch):
    monkeypatch.setattr("engineroom.otel._MAX_ENDED", 2)
    asked = [ask() for _ in range(4)]
    async with bench.service as service:
        for request in asked:
            await service.infer(request)
    known = [bench.observer.traceparent_of(request.request_id) is not None for request in asked]
    assert known == [False, False, True, True]


@pytest.mark.parametrize("given", ["nonsense", "", 5, PARENT.replace("0af", "xyz")])
async def test_trace_context_that_is_none_is_left_out(bench, given):
    async with bench.service as service:
        await service.infer(ask(metadata={"traceparent": given}))
    (span,) = bench.spans()
    assert span.parent is None


async def test_in_process_the_current_span_is_the_parent(bench):
    async with bench.service as service:
        with bench.tracers.get_tracer("app").start_as_current_span("mine") as mine:
            await service.infer(ask())
    (span,) = bench.spans()
    assert span.parent.span_id == mine.get_span_context().span_id


async def test_the_metrics(bench):
    async with bench.service as service:
        await service.infer(ask())
        await service.infer(ask("nonsense"))
    points = bench.points()
    assert {p.count for p in points["gen_ai.server.time_to_first_token"]} == {1}
    assert {p.count for p in points["gen_ai.server.time_per_output_token"]} == {1}
    errors = [p.attributes.get("error.type") for p in points["gen_ai.server.request.duration"]]
    assert sorted(map(str, errors)) == ["ModelNotFoundError", "None"]
    usage = {p.attributes["gen_ai.token.type"]: p.sum for p in points["gen_ai.client.token.usage"]}
    assert (usage["input"], usage["output"]) == (3, 2)


async def test_a_load_is_a_span(bench):
    async with bench.service as service:
        await service.infer(ask())
    (span,) = bench.spans("load")
    assert span.end_time >= span.start_time
    assert span.attributes["gen_ai.request.model"] == "m"


def of_server(bench):
    """The bench's service behind HTTP, for as long as the block runs."""
    pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
    pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    from engineroom.server import create_app

    transport = httpx.ASGITransport(create_app(bench.service))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["m", "bad"])
@pytest.mark.parametrize("parent", [None, PARENT])
async def test_a_servers_answer_names_its_span(bench, stream, model, parent):
    body = {"model": model, "messages": [{"role": "user", "content": "one two three"}]}
    headers = {} if parent is None else {"traceparent": parent}
    async with bench.service, of_server(bench) as client:
        answer = await client.post(
            "/v1/chat/completions", json={**body, "stream": stream}, headers=headers
        )
    (span,) = bench.spans("chat")
    version, trace, own, flags = answer.headers["traceresponse"].split("-")
    assert version == "00" and int(flags, 16) & 1  # recorded
    assert int(trace, 16) == span.context.trace_id and int(own, 16) == span.context.span_id
    if parent is not None:
        assert trace == PARENT.split("-")[1] and own != PARENT.split("-")[2]


async def test_an_answer_without_a_span_names_none(bench):
    async with bench.service, of_server(bench) as client:
        assert "traceresponse" not in (await client.get("/healthz")).headers
