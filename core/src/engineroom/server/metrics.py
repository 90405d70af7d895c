"""``GET /metrics``: Prometheus, filled through the observer hooks like anyone's metrics.

Names are those of :mod:`engineroom.telemetry`'s documentation. What can be asked for is asked
for when it is scraped (engines' health, models' states); what happens is counted as it happens.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from engineroom.border import in_thread
from engineroom.config.model import LoadedModel
from engineroom.handlers.markers import hookimpl
from engineroom.inference.request_log import end_of
from engineroom.printable import printable
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.server.directory import ModelDirectory
from engineroom.server.loop_meter import LoopMeter
from engineroom.status import ModelState

__all__ = ["CONTENT_TYPE", "PrometheusObserver"]

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST.encode()

NAMESPACE: Final = "engineroom"
_LABELS: Final = ("model_name", "handler")
KEY_LABEL: Final = "key_name"
MOST_KEYS: Final = 200
"""Keys whose requests are counted by their names; each is thousands of numbers."""
OTHER_KEYS: Final = "(others)"
"""What further ones are counted under; no key has such a name."""
_SECONDS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 200_000)
_LAGS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STATES: Final = get_args(ModelState)


class PrometheusObserver:
    """Counts what the hooks tell.

    :param directory: names of models, and engines' health.
    :param loop_meter: measures the event loop.
    :param queued: how many requests wait for the server's limits.
    :param body_bytes: how many bytes of bodies count against theirs.
    :param by_key: what is counted of requests has the name of their key, too.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        loop_meter: LoopMeter,
        *,
        queued: Callable[[], int],
        body_bytes: Callable[[], int],
        by_key: bool = False,
    ) -> None:
        self._directory = directory
        self._keys: set[str] | None = set() if by_key else None
        key = (KEY_LABEL,) if by_key else ()
        labels = (*_LABELS, *key)
        self._turn = asyncio.Lock()
        self.registry = CollectorRegistry(auto_describe=False)
        counter = partial(Counter, namespace=NAMESPACE, registry=self.registry)
        self._prompt = counter("prompt_tokens", "Tokens read", labels)
        self._generated = counter("generation_tokens", "Tokens written", labels)
        self._success = counter(
            "request_success", "Requests that ended, by why", (*labels, "finished_reason")
        )
        self._ended = counter(
            "requests", "Requests that ended, by their kind and why", (*labels, "kind", "reason")
        )
        self._cancelled = counter(
            "requests_cancelled",
            "Requests whose client went away or that were stopped",
            (*labels, "stage"),
        )
        self._queries = counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache", labels
        )
        self._hits = counter(
            "prefix_cache_hits", "Prompt tokens whose work was not done again", labels
        )
        self._rejections = counter(
            "admission_rejections", "Requests turned away by a limit", (*key, "reason")
        )
        histogram = partial(Histogram, namespace=NAMESPACE, registry=self.registry)
        seconds = partial(histogram, buckets=_SECONDS)
        tokens = partial(histogram, buckets=_TOKENS)
        self._first = seconds(
            "time_to_first_token_seconds", "From acceptance to the first token", labels
        )
        self._gaps = _Gaps(labels)
        self.registry.register(self._gaps)
        self._latency = seconds("e2e_request_latency_seconds", "From acceptance to the end", labels)
        self._waited = seconds(
            "request_queue_time_seconds", "Waited for the server's limits", ("model_name", *key)
        )
        self._prompt_sizes = tokens("request_prompt_tokens", "Tokens read", labels)
        self._sizes = tokens("request_generation_tokens", "Tokens written", labels)
        self._loading = seconds("model_load_duration_seconds", "Loading", _LABELS)
        self.registry.register(_State(directory, queued, body_bytes))
        self._key_failures = counter(
            "api_key_failures", "Requests without a key, or with an unknown one", ["reason"]
        )
        lag = histogram(
            "event_loop_lag_seconds", "How late the event loop came to its beat", buckets=_LAGS
        )
        loop_meter.observers.append(lag.observe)
        Gauge(
            "event_loop_lag_largest_seconds",
            "The largest lag of the last minute or two",
            namespace=NAMESPACE,
            registry=self.registry,
        ).set_function(loop_meter.largest_of_late)

    def _labels(self, request: InferenceRequest, *handler: str) -> tuple[str, ...]:
        """Values of the labels that a request's metrics have."""
        labels = (self._directory.canonical(request.model_id) or "", *handler)
        if (keys := self._keys) is None:
            return labels
        name = request.key_name or "-"
        if name not in keys:
            if len(keys) < MOST_KEYS:
                keys.add(name)
            else:
                name = OTHER_KEYS
        return (*labels, name)

    def count_rejection(self, reason: str) -> None:
        """Count what a limit turned away before it was a request."""
        labels = (reason,) if self._keys is None else ("-", reason)
        self._rejections.labels(*labels).inc()

    def count_key_failure(self, kind: str) -> None:
        """Count a request without a key, or with a wrong one."""
        self._key_failures.labels(kind).inc()

    async def render(self, key_name: str | None = None) -> bytes:
        """The text that Prometheus reads. A crowd that asks at once is answered one by one, and the
        event loop gets to others in between.

        :param key_name: only what is counted of this key's requests.
        """
        async with self._turn:
            families: list[Metric] = []
            for family in self.registry.collect():
                families.append(family)
                await asyncio.sleep(0)
            if key_name is not None:
                families = [f for f in map(partial(_of_key, key_name), families) if f.samples]
            return await in_thread(lambda: generate_latest(_Collected(families)))

    # ── hooks ────────────────────────────────────────────────────────────────────────────────

    @hookimpl
    def engineroom_request_gaps(
        self, request: InferenceRequest, handler: str, gaps_s: Sequence[float]
    ) -> None:
        """Count the gaps between chunks."""
        self._gaps.add(self._labels(request, handler), gaps_s)

    @hookimpl
    def engineroom_request_rejected(self, request: InferenceRequest, reason: str) -> None:
        """Count a request that a limit turned away."""
        self._rejections.labels(*self._labels(request)[1:], reason).inc()

    @hookimpl
    def engineroom_request_waited(self, request: InferenceRequest, waited_s: float) -> None:
        """Observe how long it waited."""
        self._waited.labels(*self._labels(request)).observe(waited_s)

    @hookimpl
    def engineroom_request_finished(
        self, request: InferenceRequest, response: InferenceResponse
    ) -> None:
        """Count a request by how it ended, with its tokens and times."""
        labels = self._labels(request, response.handler or "")
        prompt, generated = response.prompt_tokens, response.generated_tokens
        if prompt is not None:
            self._prompt.labels(*labels).inc(prompt)
            self._prompt_sizes.labels(*labels).observe(prompt)
            if response.cached_prompt_tokens is not None:
                self._queries.labels(*labels).inc(prompt)
                self._hits.labels(*labels).inc(response.cached_prompt_tokens)
        if generated is not None:
            self._generated.labels(*labels).inc(generated)
            self._sizes.labels(*labels).observe(generated)
        if response.time_to_first_token_ms is not None:
            self._first.labels(*labels).observe(response.time_to_first_token_ms / 1000)
        if response.inference_time_ms is not None:
            self._latency.labels(*labels).observe(response.inference_time_ms / 1000)
        reason = response.finish_reason or "error"
        self._success.labels(*labels, reason).inc()
        self._ended.labels(*labels, request.kind, end_of(request, response)).inc()
        if reason == "cancelled":
            stage = "decoding" if generated else "waiting" if prompt is None else "prefill"
            self._cancelled.labels(*labels, stage).inc()
        if response.error_type == "QueueFullError":
            self._rejections.labels(*labels[2:], "engine_queue_full").inc()

    @hookimpl
    def engineroom_model_loaded(self, loaded_model: LoadedModel, duration_s: float) -> None:
        """Observe how long loading took."""
        handler = loaded_model.handler_name or ""
        self._loading.labels(loaded_model.model_id, handler).observe(duration_s)


class _Collected(CollectorRegistry):
    """Metrics that have been collected."""

    def __init__(self, families: Sequence[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _of_key(key_name: str, family: Metric) -> Metric:
    """What a family has of one key."""
    part = Metric(family.name, family.documentation, family.type, family.unit)
    part.samples = [s for s in family.samples if s.labels.get(KEY_LABEL) == key_name]
    return part


class _Gaps:
    """A histogram that takes many values at once: a stream has one for each token."""

    def __init__(self, labels: Sequence[str] = _LABELS) -> None:
        self._labels = labels
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, labels: tuple[str, ...], values: Sequence[float]) -> None:
        """Count the values."""
        if not values:
            return
        counts = self._counts.setdefault(labels, [0] * (len(_SECONDS) + 1))
        first, last = (bisect_left(_SECONDS, bound) for bound in (min(values), max(values)))
        below = 0
        # Sorted only where it has to be: an engine's steps take about the same time.
        ordered = sorted(values) if first < last else values
        for place in range(first, last):
            upto = bisect_right(ordered, _SECONDS[place], below)
            counts[place] += upto - below
            below = upto
        counts[last] += len(values) - below
        self._sums[labels] = self._sums.get(labels, 0.0) + sum(values)

    def collect(self) -> Iterator[Metric]:
        """The histogram."""
        family = HistogramMetricFamily(
            f"{NAMESPACE}_inter_token_latency_seconds",
            "Between two chunks of a stream",
            labels=self._labels,
        )
        for labels, counts in self._counts.items():
            bounds = [*map(floatToGoString, _SECONDS), "+Inf"]
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            family.add_metric(labels, buckets, self._sums[labels])
        yield family


class _State:
    """What is asked for when it is scraped."""

    def __init__(
        self,
        directory: ModelDirectory,
        queued: Callable[[], int],
        body_bytes: Callable[[], int],
    ) -> None:
        self._directory = directory
        self._queued = queued
        self._body_bytes = body_bytes

    def collect(self) -> Iterator[Metric]:
        """The gauges."""
        directory = self._directory
        running = _gauge("num_requests_running", "Requests that are worked on", _LABELS)
        waiting = _gauge("num_requests_waiting", "Requests that wait in an engine", _LABELS)
        cache = _gauge("kv_cache_usage_perc", "Used share of the key/value cache", _LABELS)
        memory = _gauge("model_memory_bytes", "Memory that a model takes", _LABELS)
        for model, handler, health in directory.health():
            labels = (model.model_id, handler.name)
            running.add_metric(labels, health.num_requests_running)
            waiting.add_metric(labels, health.num_requests_waiting)
            if health.kv_cache_usage is not None:
                cache.add_metric(labels, health.kv_cache_usage)
            if model.memory_bytes is not None:
                memory.add_metric(labels, model.memory_bytes)
        state = _gauge("model_state", "1 for the state that it is in", ("model_name", "state"))
        for status in directory.models():
            for name in _STATES:
                state.add_metric((status.model_id, name), float(status.state == name))
        queued = _gauge("server_requests_queued", "Requests that wait for the server's limits", ())
        queued.add_metric((), self._queued())
        bodies = _gauge("server_body_bytes", "Bytes of bodies in flight, as they are limited", ())
        bodies.add_metric((), self._body_bytes())
        failures = Metric(f"{NAMESPACE}_plugin_load_failures", "Plugins in quarantine", "counter")
        for record in directory.service.registry.plugins:
            if record.status == "quarantined":
                failures.add_sample(
                    f"{NAMESPACE}_plugin_load_failures_total", {"plugin": printable(record.name)}, 1
                )
        yield from (
            running,
            waiting,
            cache,
            memory,
            self._devices(),
            state,
            queued,
            bodies,
            failures,
        )

    def _devices(self) -> Any:
        """The account of each device."""
        family = _gauge("device_memory_bytes", "The account of a device", ("device", "what"))
        manager = self._directory.manager
        for device in manager.memory() if manager is not None else ():
            for what in ("held", "reserved", "not_returned", "free", "budget"):
                amount = getattr(device, what)
                if amount is not None:  # there is no bound
                    family.add_metric((device.device, what), amount)
        return family


def _gauge(name: str, text: str, labels: Iterable[str]) -> Any:
    return GaugeMetricFamily(f"{NAMESPACE}_{name}", text, labels=list(labels))
