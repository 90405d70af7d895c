"""What all routes of a server share: the service, the limits, and how the server is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engineroom.border import get_logger, log_failure
from engineroom.errors import EngineRoomError
from engineroom.schemas import InferenceRequest
from engineroom.server.directory import ModelDirectory
from engineroom.server.http.bodies import BodyBudget
from engineroom.server.http.callers import Callers
from engineroom.server.http.errors import ApiError, api_error_of
from engineroom.server.http.key_failures import KeyFailures
from engineroom.server.http.limits import Limiter
from engineroom.server.http.rounds import Rounds
from engineroom.server.loop_meter import LoopMeter
from engineroom.server.metrics import PrometheusObserver
from engineroom.server.settings import ServerSettings
from engineroom.service import LLMInferenceService
from engineroom.telemetry import request_logger

__all__ = ["ServerContext"]

logger = get_logger("engineroom.server.context")


class ServerContext:
    """The server's one of everything.

    :param service: answers the requests.
    :param settings: the server's limits, and who may use it.
    """

    def __init__(self, service: LLMInferenceService, settings: ServerSettings) -> None:
        self.service = service
        self.settings = settings
        self.limiter = Limiter(settings)
        self.callers = Callers(settings, lambda: self.metrics.count_rejection("key_connections"))
        self.rounds = Rounds()
        self.directory = ModelDirectory(service)
        self.loop_meter = LoopMeter()
        self.bodies = BodyBudget(
            settings.max_body_total_bytes,
            lambda: self.metrics.count_rejection("body_bytes"),
        )
        self.metrics = PrometheusObserver(
            self.directory,
            self.loop_meter,
            queued=lambda: self.limiter.queued,
            body_bytes=lambda: self.bodies.held,
            by_key=settings.keys.needed,
        )
        self.key_failures = KeyFailures(self.metrics.count_key_failure)
        service.registry.register_plugin(self.metrics, name=f"server-metrics-{id(self):x}")
        self.starting = False
        """A preload runs."""
        self.draining = False
        """The server stops: no request is taken any more."""

    def traceparent_of(self, request_id: str) -> str | None:
        """The W3C trace context of a request's span, where an observer traces."""
        for observer in self.service.registry.plugins_with("traceparent_of"):
            try:
                trace: object = observer.traceparent_of(request_id)
            except BaseException as error:  # noqa: BLE001 - foreign code
                log_failure(logger, error, "an observer failed in traceparent_of")
            else:
                if isinstance(trace, str) and trace.isascii() and trace.isprintable():
                    return trace
        return None

    def api_error_of(
        self, error: EngineRoomError, *, logged: bool = False, places: Mapping[str, str]
    ) -> ApiError:
        """What the client is told of an error; what it is not told goes to the log.

        :param logged: it is there already.
        :param places: fields of the service's request → what the API calls them.
        """
        load_failed = self.directory.load_failed(error.model_id)
        answer = api_error_of(error, load_failed=load_failed, places=places)
        if answer.status >= 500 and not logged and not _logged(error):
            logger.error("%s", error.describe())
        return answer

    def log_prompt(self, request: InferenceRequest) -> None:
        """Write what was asked to the log, where the deployment says so."""
        if self.settings.log_prompts:
            asked: Any = request.prompt_token_ids or request.prompt
            if request.messages is not None:
                asked = [m.model_dump(exclude_none=True) for m in request.messages]
            request_logger(logger, request).info("prompt of %s: %r", request.request_id, asked)


def _logged(error: BaseException) -> bool:
    """Whether it comes from foreign code, which the service has written to the log."""
    while isinstance(error, EngineRoomError) and error.__cause__ is not None:
        error = error.__cause__
    return not isinstance(error, EngineRoomError)
