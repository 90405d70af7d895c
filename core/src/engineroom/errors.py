"""Every error that engineroom raises, in one tree.

.. code-block:: text

    Exception
    └── EngineRoomError
        ├── ModelNotFoundError          (also LookupError)   no such model id, alias or source
        ├── ResourceNotAvailableError   (also RuntimeError)  closed, full, or no memory for it
        ├── ConfigurationError          (also ValueError)    a request, option or file asks for
        │   │                                                what cannot be done
        │   └── ContextLengthExceededError                   a prompt or text is too long for the
        │                                                    model
        └── InferenceError              (also RuntimeError)  the work itself failed
            ├── NoSuitableHandlerError                       no installed handler takes the model
            ├── EngineDeadError                              the runtime's engine has ended
            ├── RequestTimeoutError                          ``timeout_s`` ran out
            └── QueueFullError                               refused at once instead of queued

A message says what was asked, what was found and what to do next; whatever it quotes, it is safe to
show (:mod:`engineroom.printable`). The service adds the
request and the model to errors that were raised without them, so that
:meth:`EngineRoomError.describe` always names both.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from engineroom.printable import printable_lines

__all__ = [
    "ConfigurationError",
    "ContextLengthExceededError",
    "EngineDeadError",
    "EngineRoomError",
    "InferenceError",
    "ModelNotFoundError",
    "NoSuitableHandlerError",
    "QueueFullError",
    "RequestTimeoutError",
    "ResourceNotAvailableError",
    "error_class",
]

_E = TypeVar("_E", bound="EngineRoomError")


class EngineRoomError(Exception):
    """Base class of every error of this project.

    :param message: what was asked, what was found, what to do next.
    :param request_id: the request it happened to, where there is one.
    :param model_id: the model it happened to, where there is one.
    """

    label: ClassVar[str] = "Error"
    """The words that :meth:`describe` begins with."""

    def __init__(
        self, message: str = "", *, request_id: str | None = None, model_id: str | None = None
    ) -> None:
        message = printable_lines(str(message))  # a plugin may give whatever it caught
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.model_id = model_id

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles. A subclass's own ``__init__``, which may want more than the
        message, is not called; causes are left out, as of every exception.
        """
        return _made_again, (type(self), self.args), self.__dict__

    def with_context(self: _E, *, request_id: str | None = None, model_id: str | None = None) -> _E:
        """Name the request and the model, where the error does not name them already.

        :returns: the error itself, to be raised on.
        """
        if self.request_id is None:
            self.request_id = request_id
        if self.model_id is None:
            self.model_id = model_id
        return self

    def describe(self) -> str:
        """The error on one line: its kind, its message, the model and the request."""
        text = " ".join(self.message.split()) or "no further details were given"
        if not text.startswith(self.label):
            text = f"{self.label}: {text}"
        missing = [
            f"{noun} {value!r}"
            for noun, value in (("model", self.model_id), ("request", self.request_id))
            if value is not None and f"{noun} {value!r}" not in text
        ]
        return f"{text} ({', '.join(missing)})" if missing else text


class ModelNotFoundError(EngineRoomError, LookupError):
    """A model id, an alias or a model file that does not exist."""

    label = "Model not found"


class ResourceNotAvailableError(EngineRoomError, RuntimeError):
    """What is needed is not to be had now: memory, a slot, or a service that was closed."""

    label = "Resource not available"


class ConfigurationError(EngineRoomError, ValueError):
    """A request, an option, a plugin or a file asks for something that cannot be done."""

    label = "Configuration error"

    def __init__(
        self,
        message: str = "",
        *,
        field: str = "",
        request_id: str | None = None,
        model_id: str | None = None,
    ) -> None:
        """:param field: what of a request it is about, with dots; the message begins with it."""
        message = f"{field}: {message}" if field else message
        super().__init__(message, request_id=request_id, model_id=model_id)
        self.field = printable_lines(field)

    def put_within(self, field: str, what: str = "") -> None:
        """It is about a field, or what it is about is in that field.

        :param what: who it is about, to stand before the message.
        """
        message = self.message.removeprefix(f"{self.field}: ") if self.field else self.message
        self.field = printable_lines(f"{field}.{self.field}" if self.field else field)
        self.message = f"{self.field}: {what}: {message}" if what else f"{self.field}: {message}"
        self.args = (self.message,)


class ContextLengthExceededError(ConfigurationError):
    """A prompt, or a text to be embedded, has more tokens than the model reads.

    :param tokens: how many it has, at least; ``None``: not known.
    :param most: how many it may have; ``None``: not known.
    """

    label = "Context length exceeded"

    def __init__(
        self,
        message: str = "",
        *,
        tokens: int | None = None,
        most: int | None = None,
        field: str = "",
        request_id: str | None = None,
        model_id: str | None = None,
    ) -> None:
        super().__init__(message, field=field, request_id=request_id, model_id=model_id)
        self.tokens = tokens
        self.most = most


class InferenceError(EngineRoomError, RuntimeError):
    """The model or its runtime failed while it worked on the request."""

    label = "Inference error"


class NoSuitableHandlerError(InferenceError):
    """No installed handler takes the model."""

    label = "No suitable handler"


class EngineDeadError(InferenceError):
    """The runtime's engine has ended; the model must be loaded anew."""

    label = "Engine dead"


class RequestTimeoutError(InferenceError):
    """The request's ``timeout_s`` ran out before it was done."""

    label = "Request timed out"


class QueueFullError(InferenceError):
    """The queue is at its bound; the request was refused at once and may be sent again."""

    label = "Queue full"


def _made_again(kind: type[_E], args: tuple[Any, ...]) -> _E:
    """An error as it was, but for its state."""
    return kind.__new__(kind, *args)


def error_class(name: str | None) -> type[EngineRoomError]:
    """The class that ``InferenceResponse.error_type`` names; ``InferenceError`` if unknown."""
    known = globals().get(name) if name in __all__ else None
    return known if isinstance(known, type) else InferenceError
