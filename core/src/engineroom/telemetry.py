"""Names for logs, metrics and spans in one place, and the logging observer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from engineroom.border import get_logger, guarded
from engineroom.config.model import LoadedModel
from engineroom.handlers.markers import hookimpl
from engineroom.schemas import InferenceRequest

__all__ = [
    "LOGGER_NAME",
    "LoggingObserver",
    "RequestLogger",
    "request_logger",
    "work_key",
    "work_logger",
    "work_priority",
    "working_for",
]

LOGGER_NAME: Final = "engineroom"
"""Every logger of the project is this one or below it."""


class RequestLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records carry ``request_id``, ``model_id`` and ``key_name``.

    What an application's log handlers raise does not get to whoever writes to it.
    """

    def __init__(self, logger: logging.Logger, extra: Mapping[str, object] | None = None) -> None:
        super().__init__(guarded(logger), extra)

    @property
    def key_name(self) -> str:
        """Name of the key that the request came with; empty: there is none."""
        name = str((self.extra or {}).get("key_name", ""))
        return "" if name == "-" else name

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the three to what the call itself gave as ``extra``."""
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


def request_logger(logger: logging.Logger, request: InferenceRequest) -> RequestLogger:
    """A logger for what happens to one request; handlers use it too.

    ``key_name`` of a record is ``-`` where the request came without a key.
    """
    return RequestLogger(
        logger,
        {
            "request_id": request.request_id,
            "model_id": request.model_id,
            "key_name": request.key_name or "-",
        },
    )


_WORK: ContextVar[InferenceRequest | None] = ContextVar("engineroom_work", default=None)


@contextmanager
def working_for(request: InferenceRequest) -> Iterator[None]:
    """Inside, calls are made for the request that do not get it, such as a handler's ``embed``."""
    token = _WORK.set(request)
    try:
        yield
    finally:
        _WORK.reset(token)


def work_logger(logger: logging.Logger, model_id: str = "-") -> RequestLogger:
    """As :func:`request_logger`, in a call that the service makes for a request without giving it
    the request: a handler's ``embed``.

    :param model_id: what records name as the model where there is no request.
    """
    request = _WORK.get()
    if request is None:
        extra = {"request_id": "-", "model_id": model_id, "key_name": "-"}
        return RequestLogger(logger, extra)
    return request_logger(logger, request)


def work_priority() -> int:
    """The priority of the request that such a call is made for; 0: there is none."""
    request = _WORK.get()
    return 0 if request is None else request.priority


def work_key() -> str | None:
    """The name of the key of the request that such a call is made for; ``None``: it has none."""
    request = _WORK.get()
    return None if request is None else request.key_name


class LoggingObserver:
    """Writes a line to ``engineroom.requests`` for each model, and says at which level the service
    writes there of requests, which it does without any observer.

    Give it to ``HandlerRegistry.register_plugin``.

    :param level: of what went well; failures are warnings or errors at any.
    """

    def __init__(self, level: int = logging.INFO) -> None:
        self._logger = get_logger(f"{LOGGER_NAME}.requests")
        self._level = self.request_log_level = level

    @hookimpl
    def engineroom_model_loaded(self, loaded_model: LoadedModel, duration_s: float) -> None:
        """Log that a model is ready."""
        self._logger.log(
            self._level,
            "model %s loaded by %s in %.1f s",
            loaded_model.model_id,
            loaded_model.handler_name,
            duration_s,
        )

    @hookimpl
    def engineroom_model_unloaded(self, loaded_model: LoadedModel, duration_s: float) -> None:
        """Log that a model was given back."""
        self._logger.log(
            self._level, "model %s unloaded in %.1f s", loaded_model.model_id, duration_s
        )
