"""What all routes of a server share: the service, the limits, and how the server is."""

from __future__ import annotations

import logging
from typing import Any

from engineroom.config.model import LoadedModel
from engineroom.errors import EngineRoomError, ModelNotFoundError
from engineroom.handlers.base import HandlerHealth, InferenceHandler
from engineroom.models.manager import LLMModelManager, ModelStatus
from engineroom.schemas import InferenceRequest
from engineroom.server.http.errors import Refused, refusal
from engineroom.server.http.limits import Limiter
from engineroom.server.metrics import PrometheusObserver
from engineroom.server.settings import ServerSettings
from engineroom.service import LLMInferenceService
from engineroom.telemetry import request_logger

__all__ = ["Rejections", "ServerContext"]

logger = logging.getLogger("engineroom.server.context")


class Rejections:
    """Tells observers what the server's own limits did to a request."""

    def __init__(self, service: LLMInferenceService) -> None:
        self._registry = service.registry

    def rejected(self, request: InferenceRequest, reason: str) -> None:
        """It was turned away."""
        self._registry.notify("engineroom_request_rejected", request=request, reason=reason)

    def waited(self, request: InferenceRequest, waited_s: float) -> None:
        """It was let in."""
        self._registry.notify("engineroom_request_waited", request=request, waited_s=waited_s)


class ServerContext:
    """The server's one of everything.

    :param service: answers the requests.
    :param settings: what the server was told.
    """

    def __init__(self, service: LLMInferenceService, settings: ServerSettings) -> None:
        self.service = service
        self.settings = settings
        self.limiter = Limiter(settings)
        self.rejections = Rejections(service)
        source = service.model_source
        self.manager = source if isinstance(source, LLMModelManager) else None
        self.metrics = PrometheusObserver(self)
        service.registry.register_plugin(self.metrics, name=f"server-metrics-{id(self):x}")
        self.starting = False
        """A preload runs."""
        self.draining = False
        """The server stops: no request is taken any more."""

    # ── models ───────────────────────────────────────────────────────────────────────────────

    def models(self) -> list[ModelStatus]:
        """Every model; empty where the service's model source cannot tell."""
        return self.manager.list_models() if self.manager is not None else []

    def canonical(self, model_id: str) -> str | None:
        """The id of the model that a name stands for; ``None``: there is none.

        :param model_id: an id or an alias.
        """
        if self.manager is None:
            return model_id
        try:
            return self.manager.get_config(model_id).model_id
        except ModelNotFoundError:
            return None

    def loaded(self) -> list[tuple[LoadedModel, InferenceHandler]]:
        """The models in memory and what runs them."""
        found: list[tuple[LoadedModel, InferenceHandler]] = []
        for status in self.models():
            assert self.manager is not None
            model = self.manager.get_loaded_model(status.model_id)
            if model is not None:
                try:
                    found.append((model, self.service.registry.select(model)))
                except EngineRoomError:
                    continue
        return found

    def health(self) -> list[tuple[LoadedModel, InferenceHandler, HandlerHealth]]:
        """How each loaded model's engine is."""
        found: list[tuple[LoadedModel, InferenceHandler, HandlerHealth]] = []
        for model, handler in self.loaded():
            try:
                health = handler.health(model)
            except Exception as error:
                logger.exception("handler %r: health failed for %r", handler.name, model.model_id)
                health = HandlerHealth(ok=False, detail=f"health raised {type(error).__name__}")
            found.append((model, handler, health))
        return found

    def honours(self, model_id: str) -> frozenset[str] | None:
        """Parameters that the model's runtime honours; ``None``: it cannot be told now."""
        if self.manager is None:
            return None
        try:
            loaded = self.manager.get_loaded_model(model_id)
            registry = self.service.registry
            if loaded is not None:
                handler = registry.select(loaded)
            else:
                choices = self.manager.get_config(model_id).choices()
                handler = registry.select_loader(choices[0])
            return self.service.capabilities_of(handler).params
        except EngineRoomError:
            return None  # the request itself is told why

    def traceparent_of(self, request_id: str) -> str | None:
        """The W3C trace context of a request's span, where an observer traces."""
        for observer in self.service.registry.plugins_with("traceparent_of"):
            found: str | None = observer.traceparent_of(request_id)
            if found is not None:
                return found
        return None

    # ── errors ───────────────────────────────────────────────────────────────────────────────

    def refusal_of(self, error: EngineRoomError) -> Refused:
        """What the client is told of an error; what it is not told goes to the log."""
        load_failed = self._load_failed(error)
        refused = refusal(error, load_failed=load_failed)
        if refused.status >= 500 and not _logged(error):
            logger.error("%s", error.describe())
        return refused

    def _load_failed(self, error: EngineRoomError) -> bool:
        if self.manager is None or error.model_id is None:
            return False
        name = self.canonical(error.model_id)
        return any(s.model_id == name and s.state == "failed" for s in self.models())

    def log_prompt(self, request: InferenceRequest) -> None:
        """Write what was asked to the log, where the deployment says so."""
        if self.settings.log_prompts:
            asked: Any = request.prompt_token_ids or request.prompt
            if request.messages is not None:
                asked = [m.model_dump(exclude_none=True) for m in request.messages]
            request_logger(logger, request).info("prompt of %s: %r", request.request_id, asked)


def _logged(error: BaseException) -> bool:
    """Whether it comes from foreign code, which the service has written to the log."""
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, EngineRoomError):
            return True
        cause = cause.__cause__
    return False
