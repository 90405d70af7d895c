"""What the server knows of its models: their names, their states, and the engines behind them."""

from __future__ import annotations

from engineroom.config.model import LoadedModel
from engineroom.errors import ConfigurationError, EngineRoomError, ModelNotFoundError
from engineroom.handlers.base import HandlerHealth, InferenceHandler
from engineroom.handlers.dispatch import health_of
from engineroom.models.manager import LLMModelManager
from engineroom.service import LLMInferenceService
from engineroom.status import ModelStatus

__all__ = ["ModelDirectory"]


class ModelDirectory:
    """Answers questions about models, whatever the service's model source is.

    :param service: whose models these are.
    """

    def __init__(self, service: LLMInferenceService) -> None:
        self.service = service
        source = service.model_source
        self.manager = source if isinstance(source, LLMModelManager) else None

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

    def load_failed(self, model_id: str | None) -> bool:
        """Whether the model's last load failed.

        :param model_id: an id or an alias.
        """
        if self.manager is None or model_id is None:
            return False
        name = self.canonical(model_id)
        return any(s.model_id == name and s.state == "failed" for s in self.models())

    @property
    def has_file(self) -> bool:
        """Whether the deployment is that of a file, which can be read anew."""
        try:
            return self.manager is not None and bool(self.manager.config_path)
        except ConfigurationError:
            return False

    def health(self) -> list[tuple[LoadedModel, InferenceHandler, HandlerHealth]]:
        """The models in memory, what runs them, and how their engines are.

        One that has ended is unloaded afterwards: else a server that is not ready for its sake is
        sent no request, without which nobody would load it anew.
        """
        engines: list[tuple[LoadedModel, InferenceHandler, HandlerHealth]] = []
        for status in self.models():
            assert self.manager is not None
            if (model := self.manager.get_loaded_model(status.model_id)) is None:
                continue
            try:
                handler = self.service.registry.select(model)
            except EngineRoomError:
                continue
            health = health_of(handler, model)
            if health.dead:
                self.manager.engine_ended(model)
            engines.append((model, handler, health))
        return engines

    def honoured_params(self, model_id: str) -> frozenset[str] | None:
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
