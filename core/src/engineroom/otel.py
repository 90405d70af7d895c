"""OpenTelemetry as an observer: a span for each request, and the GenAI metrics.

Needs the extra ``engineroom[otel]``, and a provider that the application or :func:`configure`
sets up. Names are those of OpenTelemetry's semantic conventions for
generative AI. Prompts and texts are never recorded::

    service.registry.register_plugin(OpenTelemetryObserver())

W3C trace context comes in with ``request.metadata["traceparent"]``, which the server fills from
the header, or from the span that is current where the request is made. It goes out with
:meth:`OpenTelemetryObserver.traceparent_of`.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engineroom.config.model import LoadedModel
from engineroom.errors import ConfigurationError
from engineroom.handlers.markers import hookimpl
from engineroom.schemas import InferenceRequest, InferenceResponse

__all__ = ["OpenTelemetryObserver", "configure"]

_SCOPE: Final = "engineroom"
_MAX_OPEN: Final = 100_000
_MAX_ENDED: Final = 4096
_PARAMS: Final = {
    "max_new_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
}
_FINISH: Final = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
# The conventions' own advice for these two histograms.
_SECONDS: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
_TOKENS: Final = tuple(4.0**power for power in range(14))


class OpenTelemetryObserver:
    """Makes spans and metrics of what the hooks tell.

    :param tracer_provider: where spans go; ``None``: the global one.
    :param meter_provider: where metrics go; ``None``: the global one.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self._propagator = TraceContextTextMapPropagator()
        self._open: dict[str, Span] = {}
        self._ended: OrderedDict[str, Span] = OrderedDict()  # whole answers are sent afterwards

        def seconds(name: str, text: str) -> Any:
            return meter.create_histogram(
                name, unit="s", description=text, explicit_bucket_boundaries_advisory=_SECONDS
            )

        self._duration = seconds("gen_ai.server.request.duration", "A request's time")
        self._first = seconds("gen_ai.server.time_to_first_token", "Time to the first token")
        self._per_token = seconds(
            "gen_ai.server.time_per_output_token", "Time of each token after the first"
        )
        self._usage = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Tokens read and written",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    def traceparent_of(self, request_id: str) -> str | None:
        """The ``traceparent`` of a request's span while it is open, and for a while after."""
        span = self._open.get(request_id) or self._ended.get(request_id)
        if span is None:
            return None
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span, Context()))
        return carrier.get("traceparent")

    @hookimpl
    def engineroom_request_started(self, request: InferenceRequest) -> None:
        """Begin the span, below the caller's."""
        names = ("traceparent", "tracestate")
        carrier = {n: v for n in names if isinstance(v := request.metadata.get(n), str)}
        below = "traceparent" in carrier
        operation = _operation(request)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "engineroom",
            "gen_ai.request.model": request.model_id,
            "engineroom.request.id": request.request_id,
            "engineroom.request.stream": request.stream,
        }
        for field, name in _PARAMS.items() if request.kind == "generate" else ():
            if (value := getattr(request.params, field)) is not None:
                attributes[name] = value
        if request.stop_sequences:
            attributes["gen_ai.request.stop_sequences"] = len(request.stop_sequences)
        span = self._tracer.start_span(
            f"{operation} {request.model_id}",
            context=self._propagator.extract(carrier, Context()) if below else None,
            kind=SpanKind.SERVER if below else SpanKind.INTERNAL,
            attributes=attributes,
        )
        if len(self._open) < _MAX_OPEN:
            self._open[request.request_id] = span

    @hookimpl
    def engineroom_request_finished(
        self, request: InferenceRequest, response: InferenceResponse
    ) -> None:
        """End the span, and measure."""
        span = self._open.pop(request.request_id, None)
        labels: dict[str, Any] = {
            "gen_ai.operation.name": _operation(request),
            "gen_ai.provider.name": "engineroom",
            "gen_ai.request.model": request.model_id,
            "engineroom.handler": response.handler or "",
        }
        if response.error_type is not None:
            labels["error.type"] = response.error_type
        if span is not None:
            _finish(span, request, response)
            self._ended[request.request_id] = span
            if len(self._ended) > _MAX_ENDED:
                self._ended.popitem(last=False)
        total, first = response.inference_time_ms, response.time_to_first_token_ms
        written = response.generated_tokens
        if total is not None:
            self._duration.record(total / 1000, labels)
        if first is not None:
            self._first.record(first / 1000, labels)
            if total is not None and written is not None and written > 1:
                self._per_token.record((total - first) / 1000 / (written - 1), labels)
        for kind, tokens in (("input", response.prompt_tokens), ("output", written)):
            if tokens is not None:
                self._usage.record(tokens, {**labels, "gen_ai.token.type": kind})

    @hookimpl
    def engineroom_model_loaded(self, loaded_model: LoadedModel, duration_s: float) -> None:
        """A span for the load, which is over."""
        now = time.time_ns()
        span = self._tracer.start_span(
            f"load {loaded_model.model_id}",
            context=Context(),
            start_time=now - int(duration_s * 1e9),
            attributes={
                "gen_ai.request.model": loaded_model.model_id,
                "engineroom.handler": loaded_model.handler_name or "",
            },
        )
        span.end(now)


def configure() -> None:
    """Set up export by OTLP, as the ``OTEL_*`` variables say, unless a provider is there.

    :raises ConfigurationError: the exporter is not installed.
    """
    from opentelemetry.sdk.metrics import MeterProvider as SdkMeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if isinstance(trace.get_tracer_provider(), SdkTracerProvider):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigurationError(
            "OpenTelemetry's exporter is not installed; pip install 'engineroom[otel]'"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "engineroom")
    resource = Resource.create({"service.name": name})
    tracers = SdkTracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(tracers)
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    metrics.set_meter_provider(SdkMeterProvider(resource=resource, metric_readers=[reader]))


def _operation(request: InferenceRequest) -> str:
    if request.kind == "embed":
        return "embeddings"
    if request.kind in ("rerank", "tokenize", "detokenize"):
        return request.kind
    return "chat" if request.messages is not None else "text_completion"


def _finish(span: Span, request: InferenceRequest, response: InferenceResponse) -> None:
    span.set_attribute("gen_ai.response.id", response.request_id)
    span.set_attribute("gen_ai.response.model", response.model_id)
    if request.kind == "generate":
        reason = response.finish_reason or "error"
        span.set_attribute("gen_ai.response.finish_reasons", [_FINISH.get(reason, reason)])
    for name, value in (
        ("gen_ai.usage.input_tokens", response.prompt_tokens),
        ("gen_ai.usage.output_tokens", response.generated_tokens),
        ("gen_ai.usage.reasoning.output_tokens", response.reasoning_tokens),
        ("gen_ai.usage.cache_read.input_tokens", response.cached_prompt_tokens),
        ("engineroom.handler", response.handler),
    ):
        if value is not None:
            span.set_attribute(name, value)
    if response.error_type is not None:
        span.set_attribute("error.type", response.error_type)
        span.set_status(Status(StatusCode.ERROR, response.error_type))
    span.end()
